"""What a run says: a score or a reason for every image, in lines, pictures and the report."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from judged import (
    AFFINE,
    MODEL,
    ORIGIN,
    PROTOCOL,
    ROW,
    SAMPLES,
    SCALE,
    depths,
    go,
    guess,
    listed,
    sample,
)

from mofo.data.convert.samples import find, read
from mofo.data.write import write
from mofo.evaluation.benchmark import Row, read_samples, training_row
from mofo.evaluation.lines import read_lines
from mofo.evaluation.origin import origin
from mofo.evaluation.pictures import PICTURES
from mofo.evaluation.predictors import Predictor, constant
from mofo.evaluation.protocol import Protocol, judge
from mofo.evaluation.report import report
from mofo.evaluation.run import Task, run


def test_one_line_per_image_and_predictor_with_the_scores(tmp_path) -> None:
    lines = go(tmp_path)
    marks = [(line["predictor"], line["key"]) for line in lines]
    names = ("model", "constant")
    assert marks == [(name, one.key) for name in names for one in SAMPLES]
    one, line = SAMPLES[4], lines[4]
    rules = {"kind": "scale", "protocol": PROTOCOL, "is_metric": True, "low": 0.1, "high": 50}
    assert line["fits"] == judge(guess([one.image], [""])[0].depth, one.metres, one.valid, **rules)
    assert (line["weights"], line["failed"], line["num_nonfinite"]) == ("f00d", None, 0)
    assert (line["protocol"], line["set"], line["index"], line["part"]) == (
        "test@1",
        "rooms",
        4,
        None,
    )
    assert line["num_valid"] == one.valid.sum()
    assert line["settings"] == PROTOCOL.settings()
    assert (line["list_count"], line["list_sha256"]) == (7, "ab" * 32)


def test_a_predictor_that_the_protocol_cannot_score_is_refused_at_once(tmp_path) -> None:
    disparity = replace(MODEL, kind="disparity")
    with pytest.raises(ValueError, match="test@1 scores .* metric, scale, affine, not disparity"):
        go(tmp_path, predictors=[disparity])
    with pytest.raises(ValueError, match="two predictors are called 'model'"):
        go(tmp_path, predictors=[MODEL, MODEL])
    assert not list(tmp_path.iterdir())


def test_an_image_that_cannot_be_scored_is_listed_and_not_averaged(tmp_path) -> None:
    empty = sample(8, valid=np.zeros((16, 20), bool))
    without = sample(9, metres=None, valid=None)
    every = [*SAMPLES, empty, without, sample(10), sample(11), sample(12)]

    def damaged(index: int):
        if index == 11:
            raise OSError("image_12.png is truncated")
        return every[index]

    def make(image, key):
        if key == "image_11":
            raise RuntimeError("out of\nmemory")
        return np.ones((8, 9) if key == "image_10" else (16, 20))

    lines = go(tmp_path, replace(listed(every), read=damaged), [depths(make)])
    assert len(lines) == 12
    assert {line["key"]: line["failed"] for line in lines if line["failed"]} == {
        "image_8": "no pixel has measured depth",
        "image_9": "no pixel has measured depth",
        "image_10": "prediction is 8 x 9, truth is 16 x 20",
        "image_11": "no prediction: RuntimeError: out of memory",
        "image_12": "the image cannot be read: OSError: image_12.png is truncated",
    }
    text = report(tmp_path)
    assert "7/12" in text
    page = (tmp_path / "report.html").read_text()
    for line in lines:
        assert line["failed"] is None or line["key"] in text and line["key"] in page


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_missing_predictions_are_counted_and_cost_what_a_wrong_one_costs(tmp_path, bad) -> None:
    one = SAMPLES[0]

    def make(image, key):
        depth = one.metres.astype(np.float64) * 3
        depth[np.nonzero(one.valid)[0][0], np.nonzero(one.valid)[1][0]] = bad
        return depth

    [line] = go(tmp_path, [one], [depths(make)], row=Row(name="rooms"))
    assert line["num_nonfinite"] == 1
    metrics = line["fits"]["affine"]
    assert metrics["absrel"] == pytest.approx(1 / one.valid.sum())
    assert metrics["delta3"] == pytest.approx(1 - 1 / one.valid.sum())


def test_non_positive_predictions_are_counted(tmp_path) -> None:
    negative = depths(lambda image, key: -image.mean(2) - 1)
    lines = go(tmp_path, predictors=[negative])
    assert [x["num_nonpositive"] for x in lines] == [int(s.valid.sum()) for s in SAMPLES]


def test_a_prediction_without_any_depth_is_no_score(tmp_path) -> None:
    nothing = depths(lambda image, key: np.full(image.shape[:2], np.nan))
    lines = go(tmp_path, predictors=[nothing])
    assert all("finite" in line["failed"] for line in lines)
    assert not any(line["fits"] for line in lines)
    assert "0/7" in report(tmp_path)


def test_means_so_far_are_shown_while_it_runs(tmp_path, capsys) -> None:
    lines = go(tmp_path, predictors=[MODEL])
    said = capsys.readouterr().err
    assert "rooms: 100%" in said
    mean = np.mean([line["fits"]["affine"]["absrel"] for line in lines])
    assert f"model: AbsRel {mean:.4f}" in said
    go(tmp_path, predictors=[MODEL])
    assert f"model: AbsRel {mean:.4f}" in capsys.readouterr().err


def test_all_fits_that_suit_are_scored_the_main_one_first(tmp_path) -> None:
    both = Protocol(id="both@1", about="", fits={"scale": SCALE, "affine": AFFINE})
    [first, *_] = go(tmp_path / "a", protocol=both)
    assert list(first["fits"]) == ["scale", "affine"]
    [first, *_] = go(tmp_path / "b", predictors=[replace(MODEL, kind="affine")], protocol=both)
    assert list(first["fits"]) == ["affine"]


def test_only_pictures_that_a_report_shows_are_drawn(tmp_path) -> None:
    go(tmp_path, [sample(n) for n in range(5)], [MODEL])
    lines = go(tmp_path, [sample(n) for n in range(30)], [MODEL])
    ranked = sorted(lines, key=lambda line: line["fits"]["affine"]["absrel"])
    shown = {lines[0]["key"], *(ranked[at]["key"] for at in (0, 15, 29))}
    assert {p.name for p in (tmp_path / PICTURES / "rooms").iterdir()} == shown
    names = {"image.png", "truth.png", "model.depth.png", "model.error.png"}
    for key in shown:
        assert {p.name for p in (tmp_path / PICTURES / "rooms" / key).iterdir()} == names
    report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert all(key in page for key in shown)


def test_lines_say_where_each_set_and_predictor_stands(tmp_path) -> None:
    tasks = [
        Task(row=replace(ROW, name=name), images=listed(SAMPLES), predictors=[b, a], order=order)
        for name, order, a, b in (("z", 1, MODEL, constant), ("a", 2, constant, MODEL))
    ]
    run(tasks[::-1], protocol=PROTOCOL, folder=tmp_path, batch_size=3, origin=ORIGIN)
    seen = dict.fromkeys((line["set"], line["predictor"]) for line in read_lines(tmp_path))
    assert list(seen) == [("z", "constant"), ("z", "model"), ("a", "model"), ("a", "constant")]


# A prediction that is wrong in a known way on real photographs, against arithmetic written anew.


def flawed(samples: list) -> Predictor:
    """Truth times a smooth field and noise, in another unit and moved."""
    truths = {one.key: one for one in samples}

    def make(image, key):
        h, w = image.shape[:2]
        y, x = np.mgrid[:h, :w] / max(h, w)
        noise = np.random.default_rng(len(key)).normal(0, 0.05, (h, w))
        truth = np.where(truths[key].valid, truths[key].metres, 1.0)
        return 0.2 * truth * (1 + 0.2 * np.sin(5 * x + 3 * y) + noise) + 0.4

    return depths(make, weights="f00d")


def by_hand(depth: np.ndarray, one) -> dict[str, float]:
    d, p = one.metres[one.valid].astype(np.float64), depth[one.valid]
    columns = np.stack([p, np.ones_like(p)], axis=1)
    p = np.clip(columns @ np.linalg.lstsq(columns, d)[0], 0.1, 50)
    ratio, logs = np.maximum(p / d, d / p), np.log(p) - np.log(d)
    return {
        "absrel": np.mean(np.abs(p - d) / d),
        "delta1": np.mean(ratio < 1.25),
        "rmse": np.sqrt(np.mean((p - d) ** 2)),
        "log10": np.mean(np.abs(np.log10(p) - np.log10(d))),
        "silog": 100 * np.sqrt(np.mean(logs**2) - np.mean(logs) ** 2),
    }


def test_the_reports_numbers_on_real_photographs_are_those_of_independent_arithmetic(
    tmp_path,
) -> None:
    source = Path(__file__).parents[1] / "data"
    found = find(source / "samples", keys=str(source / "splits" / "real_test.txt"))
    # all in metres, as only one unit has a mean RMSE
    samples = [replace(one, metric=True) for item in found for one in read(item)]
    predictor = flawed(samples)
    go(tmp_path, samples, [predictor])
    report(tmp_path)
    [table] = json.loads((tmp_path / "report.json").read_text())["tables"]
    [entry] = table["entries"]
    rows = [by_hand(predictor([x.image], [x.key])[0].depth, x) for x in samples]
    for metric in rows[0]:
        expected = np.mean([row[metric] for row in rows])
        assert entry["means"][metric] == pytest.approx(expected, rel=1e-9), metric
    assert entry["num_images"] == len(samples)
    assert entry["num_valid"] == sum(int(one.valid.sum()) for one in samples)
    assert entry["means"]["absrel"] > 0.02


def test_a_row_reads_its_keys_cropped_to_its_size(tmp_path) -> None:
    write(SAMPLES, tmp_path / "set", "set")
    (tmp_path / "keys.txt").write_text("image_5\nimage_1\n")
    source = {"name": "rooms", "shards": str(tmp_path / "set"), "keys": str(tmp_path / "keys.txt")}
    got = list(read_samples(Row(**source, size=[8, 8])))
    assert [one.key for one in got] == ["image_1", "image_5"]
    assert all(one.image.shape == (8, 8, 3) for one in got)
    for one, number in zip(got, (1, 5), strict=True):
        whole = SAMPLES[number]
        written = whole.metres[whole.valid][:, None]
        assert np.abs(one.metres[one.valid] - written).min(axis=0).max() < 1e-3
    assert [one.key for one in read_samples(Row(**source, limit=1))] == ["image_1"]
    (tmp_path / "keys.txt").write_text("image_5\nimage_77\n")
    with pytest.raises(ValueError, match="lacks 1 images .*image_77"):
        list(read_samples(Row(**source)))


def test_a_training_set_is_read_whole_at_the_size_of_its_benchmark() -> None:
    row = Row(name="rooms", shards="test", keys="k", limit=3, size=[8, 8], training={"shards": "t"})
    assert training_row(row) == Row(name="rooms", shards="t", size=[8, 8])
    assert training_row(ROW) is None


def test_the_origin_is_this_command_on_this_machine() -> None:
    made = origin()
    assert made.command.startswith("python ")
    assert "CPU" in made.machine or made.machine


def test_a_picture_has_the_attribution_its_licensor_asks_for(tmp_path) -> None:
    licence = "CC BY-SA 4.0, (c) Zenseact AB. A notice that travels with every copy."
    go(tmp_path, [sample(3, licence=licence)])
    report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Zenseact Open Dataset, (c) Zenseact AB, CC BY-SA 4.0" in page
    assert "A notice that travels with every copy." in page
