"""Killed and resumed equals uninterrupted; the report comes from the lines alone."""

import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mofo.data.sample import Sample
from mofo.data.write import write
from mofo.evaluation.benchmark import Row, read_samples, training_row
from mofo.evaluation.page import curve
from mofo.evaluation.predictors import constant, mean_map, of_model
from mofo.evaluation.report import report
from mofo.evaluation.run import LINES, PICTURES, Origin, origin, read_lines, run
from mofo.metrics import score

ORIGIN = Origin(command="python test", commit="abc", machine="one core", weights={"model": "f00d"})
ROW = Row(name="rooms", about="Made up for a test.", low=0.1, high=50)


def sample(number: int, size: tuple[int, int] = (16, 20), **changes) -> Sample:
    rng = np.random.default_rng(number)
    metres = np.linspace(2, 9, size[0] * size[1], dtype=np.float32).reshape(size)
    metres = metres + rng.uniform(0, 1, size).astype(np.float32)
    valid = rng.random(size) < 0.5
    plain = {
        "key": f"image_{number}",
        "image": rng.integers(0, 256, (*size, 3), dtype=np.uint8),
        "metres": np.where(valid, metres, np.float32(0)),
        "valid": valid,
        "intrinsics": None,
        "captions": ("a room",),
        "metric": True,
        "source": "made for a test",
        "licence": "none",
    }
    return Sample(**(plain | changes))


SAMPLES = [sample(number) for number in range(7)]


def guess(images: list[np.ndarray], keys: list[str]) -> list[np.ndarray]:
    """Some depth that depends on the image alone."""
    return [image.mean(2) / 100 + 1 for image in images]


def go(folder: Path, samples=SAMPLES, **changes) -> list[dict]:
    settings = {"row": ROW, "folder": folder, "batch_size": 3, "origin": ORIGIN}
    predictors = changes.pop("predictors", {"model": guess, "constant": constant})
    run(predictors, samples, **(settings | changes))
    return read_lines(folder)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_one_line_per_image_and_predictor_with_the_scores(tmp_path) -> None:
    lines = go(tmp_path)
    marks = [(line["predictor"], line["key"]) for line in lines]
    assert len(set(marks)) == len(marks) == 14
    one, line = SAMPLES[4], next(x for x in lines if x["key"] == "image_4")
    expected = score(*guess([one.image], [""]), one.metres, one.valid, "affine", 0.1, 50)
    assert line["metrics"] == pytest.approx(expected, rel=1e-12)
    assert (line["weights"], line["failed"], line["num_nonfinite"]) == ("f00d", None, 0)


@pytest.mark.parametrize("cut", [0, 1, 200, 0.4, 0.8, -1])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, cut) -> None:
    go(tmp_path / "whole")
    lines = (tmp_path / "whole" / LINES).read_bytes()

    class Killed(Exception):
        pass

    def stop():
        yield from SAMPLES[:5]
        raise Killed

    with pytest.raises(Killed):
        go(tmp_path / "killed", stop())
    path = tmp_path / "killed" / LINES
    written = path.read_bytes()
    assert lines.startswith(written)
    # The kill may also fall inside a write: any prefix of the bytes must do.
    path.write_bytes(written[: int(cut * len(written)) if isinstance(cut, float) else cut])
    go(tmp_path / "killed")
    assert everything(tmp_path / "killed") == everything(tmp_path / "whole")
    assert report(tmp_path / "killed").count("image") == report(tmp_path / "whole").count("image")


def test_a_finished_run_predicts_nothing_again(tmp_path) -> None:
    go(tmp_path)
    before = everything(tmp_path)

    def refuse(images, keys):
        raise AssertionError("predicted again")

    go(tmp_path, predictors={"model": refuse, "constant": refuse})
    assert everything(tmp_path) == before


def test_lines_of_another_protocol_or_other_weights_are_refused(tmp_path) -> None:
    go(tmp_path)
    with pytest.raises(ValueError, match=r"another alignment, high: \['affine', 50\]"):
        go(tmp_path, row=Row(name="rooms", alignment="scale", low=0.1, high=80))
    other = Origin(command="", commit="", machine="", weights={"model": "beef"})
    with pytest.raises(ValueError, match="with weights f00d, but now they are beef"):
        go(tmp_path, origin=other)
    assert len(go(tmp_path, row=Row(name="streets", alignment="scale"))) == 28


def test_an_image_that_cannot_be_scored_is_listed_and_not_averaged(tmp_path) -> None:
    empty = sample(8, valid=np.zeros((16, 20), bool))
    without = sample(9, metres=None, valid=None)
    large = sample(10)

    def predict(images, keys):
        sizes = [(8, 9) if key == "image_10" else (16, 20) for key in keys]
        return [np.ones(size) for size in sizes]

    go(tmp_path, [*SAMPLES, empty, without, large], predictors={"model": predict})
    failed = {x["key"]: x["failed"] for x in read_lines(tmp_path) if x["failed"]}
    assert failed == {
        "image_8": "no pixel has measured depth",
        "image_9": "no pixel has measured depth",
        "image_10": "prediction is 8 x 9, truth is 16 x 20",
    }
    text = report(tmp_path)
    assert "7/10" in text
    assert all(key in text for key in failed)
    assert all(key in (tmp_path / "report.html").read_text() for key in failed)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_missing_predictions_are_counted_and_cost_what_a_wrong_one_costs(tmp_path, bad) -> None:
    one = SAMPLES[0]

    def predict(images, keys):
        depth = one.metres.astype(np.float64) * 3
        depth[np.nonzero(one.valid)[0][0], np.nonzero(one.valid)[1][0]] = bad
        return [depth]

    [line] = go(tmp_path, [one], predictors={"model": predict}, row=Row(name="rooms"))
    assert line["num_nonfinite"] == 1
    assert line["metrics"]["absrel"] == pytest.approx(1 / one.valid.sum())
    assert line["metrics"]["delta3"] == pytest.approx(1 - 1 / one.valid.sum())
    assert "1 measured pixels had no finite prediction" in report(tmp_path)


def test_non_positive_predictions_are_counted(tmp_path) -> None:
    lines = go(tmp_path, predictors={"model": lambda i, k: [-x for x in guess(i, k)]})
    assert [x["num_nonpositive"] for x in lines] == [int(s.valid.sum()) for s in SAMPLES]


def test_a_prediction_without_any_depth_is_no_score(tmp_path) -> None:
    nothing = {"model": lambda i, k: [np.full(x.shape[:2], np.nan) for x in i]}
    lines = go(tmp_path, predictors=nothing)
    assert all("no pixel" in line["failed"] for line in lines)
    assert "0/7" in report(tmp_path)


def test_a_repeated_key_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="image_2' occurs twice"):
        go(tmp_path, [*SAMPLES, sample(2)])


def test_only_pictures_that_a_report_shows_are_kept(tmp_path) -> None:
    lines = go(tmp_path, [sample(n) for n in range(30)], predictors={"model": guess})
    ranked = sorted(lines, key=lambda line: line["metrics"]["absrel"])
    shown = {lines[0]["key"], *(ranked[at]["key"] for at in (0, 15, 29))}
    assert {p.name for p in (tmp_path / PICTURES / "rooms").iterdir()} == shown
    report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert all(key in page for key in shown)


def test_means_are_over_images_whatever_their_size(tmp_path) -> None:
    lines = go(tmp_path, [sample(0), sample(1, size=(40, 50))], predictors={"model": guess})
    report(tmp_path)
    [table] = json.loads((tmp_path / "report.json").read_text())["tables"]
    [entry] = table["entries"]
    assert entry["means"]["absrel"] == np.mean([x["metrics"]["absrel"] for x in lines])
    assert entry["num_valid"] == sum(x["metrics"]["num_valid"] for x in lines)


def test_the_report_needs_only_the_lines(tmp_path) -> None:
    go(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / LINES).write_bytes((tmp_path / "a" / LINES).read_bytes())
    first, second = report(tmp_path / "a"), report(tmp_path / "b")
    assert first.splitlines()[:-1] == second.splitlines()[:-1]
    documents = [(tmp_path / name / "report.json").read_bytes() for name in "ab"]
    assert documents[0] == documents[1]


def test_the_page_says_what_the_numbers_are_and_stands_alone(tmp_path) -> None:
    go(tmp_path)
    loss = curve({"loss": [(0, 3.0), (100, 1.0)]})
    picture = [(np.zeros((8, 8, 3), np.uint8), "a <joint> sample")]
    report(tmp_path, sections=[("Loss", loss, "falls"), ("Samples", picture, "drawn")])
    page = (tmp_path / "report.html").read_text()
    for words in (
        "least-squares scale and shift", "clipped to 0.1–50", "python test", "abc", "f00d",
        "made for a test, none", "a &lt;joint&gt; sample", "<svg", "Made up for a test.",
    ):  # fmt: skip
        assert words in page
    assert "http" not in page
    assert "src=" in page
    assert page.count("src=") == page.count('src="data:image/png;base64,')


def test_a_full_disk_leaves_the_old_report(tmp_path, monkeypatch) -> None:
    go(tmp_path)
    report(tmp_path)
    before = everything(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        report(tmp_path, title="newer")
    assert everything(tmp_path) == before


def test_an_empty_folder_has_no_report(tmp_path) -> None:
    with pytest.raises(ValueError, match="no lines to report on"):
        report(tmp_path)
    assert not os.listdir(tmp_path)


def test_a_broken_line_is_named(tmp_path) -> None:
    (tmp_path / LINES).write_text('{"a": 1}\n{"a"\n')
    with pytest.raises(ValueError, match="lines.jsonl:2 is no JSON"):
        read_lines(tmp_path)


def test_an_unknown_alignment_is_refused_before_anything_runs() -> None:
    with pytest.raises(ValueError, match="rooms: alignment is 'best'"):
        Row(name="rooms", alignment="best")


def test_mean_map_is_the_mean_of_unit_mean_depth_at_measured_pixels() -> None:
    depth = np.array([[1, 3], [2, 2]], np.float32)
    image = np.zeros((2, 2, 3), np.uint8)
    valid = np.array([[True, True], [True, False]])
    first = sample(0, image=image, metres=depth, valid=np.ones((2, 2), bool))
    second = sample(1, image=image, metres=10 * depth, valid=valid)
    [got] = mean_map([first, second, sample(2, metres=None, valid=None)], side=2)([image], ["x"])
    assert np.allclose(got, [[0.5, 1.5], [1.0, 1.0]])
    large = np.zeros((4, 6, 3), np.uint8)
    assert mean_map([first], side=2)([large], ["x"])[0].shape == (4, 6)


def test_mean_map_weighs_images_equally_and_predicts_one_where_nothing_was_measured() -> None:
    low = np.zeros((8, 8), bool)
    low[4:] = True
    metres = np.tile(np.array([1.0, 3.0], np.float32).repeat(4), (8, 1))
    image = np.zeros((8, 8, 3), np.uint8)
    one = sample(0, image=image, metres=metres, valid=low)
    [got] = mean_map([one], side=2)([np.zeros((2, 2, 3), np.uint8)], ["x"])
    assert np.allclose(got, [[1, 1], [0.5, 1.5]])


def test_a_training_set_without_depth_has_no_mean_map() -> None:
    with pytest.raises(ValueError, match="no measured depth"):
        mean_map([sample(0, metres=None, valid=None)])


def test_a_models_noise_follows_the_key_and_untrusted_pixels_have_no_depth() -> None:
    asked = {}

    def image_to_depth(images, *, seeds, num_steps):
        asked.update(zip("ab"[: len(images)], seeds, strict=True), num_steps=num_steps)
        depth = np.ones((2, 2), np.float32)
        return [SimpleNamespace(depth=depth, valid=depth > image[0, 0, 0]) for image in images]

    predict = of_model(image_to_depth, num_steps=4, seed=0)
    images = [np.full((2, 2, 3), grey, np.uint8) for grey in (0, 9)]
    first, second = predict(images, ["one", "two"])
    assert (first == 1).all()
    assert np.isnan(second).all()
    together = dict(asked)
    predict(images[1:], ["two"])
    assert asked["a"] == together["b"] != together["a"]
    assert asked["num_steps"] == 4


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


def test_origin_hashes_the_weights(tmp_path) -> None:
    with pytest.raises(ValueError, match="has no model"):
        origin({"model": tmp_path})
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    made = origin({"model": tmp_path})
    assert made.weights == {"model": hashlib.sha256(b"weights").hexdigest()[:16]}
    assert made.command.startswith("python ")


def test_a_training_set_is_read_whole_at_the_size_of_its_benchmark() -> None:
    row = Row(name="rooms", shards="test", keys="k", limit=3, size=[8, 8], training={"shards": "t"})
    assert training_row(row) == Row(name="rooms", shards="t", size=[8, 8])
    assert training_row(ROW) is None


def test_a_picture_has_the_attribution_its_licensor_asks_for(tmp_path) -> None:
    licence = "CC BY-SA 4.0, (c) Zenseact AB. A notice that travels with every copy."
    go(tmp_path, [sample(3, licence=licence)])
    report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Zenseact Open Dataset, (c) Zenseact AB, CC BY-SA 4.0" in page
    assert "A notice that travels with every copy." in page
