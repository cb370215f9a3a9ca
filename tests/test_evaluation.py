"""Runs: killed and resumed equals uninterrupted, processes share, nothing vanishes."""

import json
import multiprocessing
import os
import random
import signal
import time
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
    timeless,
)

from mofo.data.convert.samples import find, read
from mofo.data.write import write
from mofo.evaluation.benchmark import Row, read_samples, training_row
from mofo.evaluation.claims import Claims
from mofo.evaluation.kept import of_files
from mofo.evaluation.lines import LINES, identity, read_lines
from mofo.evaluation.origin import origin
from mofo.evaluation.pictures import PICTURES
from mofo.evaluation.predictors import Prediction, Predictor, constant
from mofo.evaluation.protocol import Protocol, judge
from mofo.evaluation.report import report
from mofo.evaluation.run import Task, run

FORK = multiprocessing.get_context("fork")


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def pictures(folder: Path) -> dict[str, bytes]:
    return everything(folder / PICTURES)


def written(folder: Path) -> list[tuple]:
    """What each whole line in any file is of, doubles and all."""
    files = sorted((folder / LINES).iterdir())
    return [
        identity(json.loads(text)) for file in files for text in file.read_bytes().split(b"\n")[:-1]
    ]


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


SLOW_SAMPLES = [sample(number, size=(8, 9)) for number in range(40)]


def slow(images: list[np.ndarray], keys: list[str]) -> list[Prediction]:
    time.sleep(0.01)
    return guess(images, keys)


SLOW = replace(MODEL, predict=slow)


def work(folder: Path) -> None:
    go(folder, SLOW_SAMPLES, [SLOW, constant])


def start(folder: Path) -> multiprocessing.Process:
    process = FORK.Process(target=work, args=(folder,))
    process.start()
    return process


def test_killed_at_any_moment_and_started_again_equals_uninterrupted(tmp_path) -> None:
    rng = random.Random(0)
    work(tmp_path / "whole")
    killed, found = tmp_path / "killed", [0]
    for _ in range(6):
        process = start(killed)
        while process.is_alive() and len(read_lines(killed)) == found[-1]:
            time.sleep(0.002)
        process.join(rng.uniform(0, 0.06))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found.append(len(read_lines(killed)))
    assert any(0 < count < 80 for count in found)
    work(killed)
    assert timeless(read_lines(killed)) == timeless(read_lines(tmp_path / "whole"))
    assert pictures(killed) == pictures(tmp_path / "whole")
    texts = [report(folder).splitlines()[:-1] for folder in (killed, tmp_path / "whole")]
    assert texts[0] == texts[1]


def test_processes_on_one_folder_share_the_images(tmp_path) -> None:
    processes = [start(tmp_path / "shared") for _ in range(3)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    work(tmp_path / "alone")
    marks = written(tmp_path / "shared")
    assert len(marks) == len(set(marks)) == 80
    assert len(list((tmp_path / "shared" / LINES).iterdir())) > 1
    alone, shared = (timeless(read_lines(tmp_path / name)) for name in ("alone", "shared"))
    assert shared == alone
    assert pictures(tmp_path / "shared") == pictures(tmp_path / "alone")


@pytest.mark.parametrize("cut", [1, 200, 0.4, 0.8, -1])
def test_a_line_that_was_cut_is_written_again(tmp_path, cut) -> None:
    whole = go(tmp_path)
    [path] = (tmp_path / LINES).iterdir()
    data = path.read_bytes()
    path.write_bytes(data[: int(cut * len(data)) if isinstance(cut, float) else cut])
    assert timeless(go(tmp_path)) == timeless(whole)
    assert len(list((tmp_path / LINES).iterdir())) == 2  # nobody writes into another's file


def test_a_finished_run_predicts_nothing_again(tmp_path) -> None:
    go(tmp_path)
    before = everything(tmp_path)

    def refuse(images, keys):
        raise AssertionError("predicted again")

    go(tmp_path, predictors=[replace(one, predict=refuse) for one in (MODEL, constant)])
    assert everything(tmp_path) == before


def test_the_rest_of_a_batch_is_predicted_with_all_of_it(tmp_path) -> None:
    seen = []

    def watch(images, keys):
        seen.append(keys)
        return guess(images, keys)

    go(tmp_path, predictors=[replace(MODEL, predict=watch)])
    [path] = (tmp_path / LINES).iterdir()
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:5]))
    seen.clear()
    go(tmp_path, predictors=[replace(MODEL, predict=watch)])
    assert seen[0] == ["image_3", "image_4", "image_5"]
    assert len(written(tmp_path)) == 7


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"row": replace(ROW, high=80)}, "row.high is 50, but now it is 80"),
        ({"predictors": [replace(MODEL, weights="beef")]}, "weights is f00d, but now it is beef"),
        ({"predictors": [replace(MODEL, settings={"seed": 1})]}, "seed is None, but now it is 1"),
        ({"predictors": [replace(MODEL, kind="metric")]}, "kind is scale, but now it is metric"),
        ({"protocol": replace(PROTOCOL, id="other@1")}, "protocol is test@1, .* other@1"),
        ({"protocol": replace(PROTOCOL, clip=False)}, "settings.clip is True, .* False"),
        ({"images": replace(listed(SAMPLES), list_sha256="cd" * 32)}, "list_sha256 is abab"),
    ],
)
def test_lines_of_another_run_are_refused_and_the_difference_is_named(
    tmp_path, changes, words
) -> None:
    go(tmp_path)
    before = everything(tmp_path)
    with pytest.raises(ValueError, match=words):
        go(tmp_path, **changes)
    assert everything(tmp_path) == before


def test_what_does_not_touch_a_number_may_change(tmp_path) -> None:
    go(tmp_path, SAMPLES[:3])
    row = replace(ROW, about="In other words.", source="/elsewhere", limit=7)
    assert len(go(tmp_path, row=row)) == 14
    assert len(go(tmp_path, row=replace(ROW, name="streets", high=80))) == 28


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


def test_failed_images_are_tried_again_only_when_asked(tmp_path) -> None:
    def breaks(image, key):
        raise RuntimeError("out of memory")

    assert all(line["failed"] for line in go(tmp_path, predictors=[depths(breaks, weights="f00d")]))
    assert all(line["failed"] for line in go(tmp_path, predictors=[MODEL]))
    lines = go(tmp_path, predictors=[MODEL], retry=True)
    assert len(lines) == 7
    assert not any(line["failed"] for line in lines)


def test_predictions_whose_files_changed_are_refused_with_retry_too_and_it_is_said(
    tmp_path,
) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    for one in SAMPLES[:-1]:
        np.save(folder / f"{one.key}.npy", one.metres)
    names = {"set_name": "rooms", "keys": [one.key for one in SAMPLES], "kind": "scale"}
    lines = go(tmp_path / "run", predictors=[of_files(folder, **names)])
    assert [line["failed"] is None for line in lines] == [True] * 6 + [False]
    np.save(folder / f"{SAMPLES[-1].key}.npy", SAMPLES[-1].metres)
    words = "predictions= a file was then added, removed or changed.*retry=true does not.*name="
    with pytest.raises(ValueError, match=words):
        go(tmp_path / "run", predictors=[of_files(folder, **names)], retry=True)
    assert not any(line["failed"] for line in go(tmp_path, predictors=[of_files(folder, **names)]))


def test_whoever_interrupts_stops_the_run_and_leaves_no_claim(tmp_path) -> None:
    def interrupt(images, keys):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, predictors=[replace(MODEL, predict=interrupt)])
    assert len(go(tmp_path)) == 14


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


def test_large_pictures_are_shown_to_the_model_few_at_a_time(tmp_path, monkeypatch) -> None:
    counts = []

    def watch(images, keys):
        counts.append(len(images))
        return guess(images, keys)

    monkeypatch.setattr("mofo.evaluation.run.MAX_PIXELS", 2 * 16 * 20 + 1)
    go(tmp_path, predictors=[replace(MODEL, predict=watch)], batch_size=5)
    assert counts[:4] == [2, 2, 2, 1]


def test_a_full_disk_stops_the_run(tmp_path, monkeypatch) -> None:
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        go(tmp_path)


def test_lines_say_where_each_set_and_predictor_stands(tmp_path) -> None:
    tasks = [
        Task(row=replace(ROW, name=name), images=listed(SAMPLES), predictors=[b, a], order=order)
        for name, order, a, b in (("z", 1, MODEL, constant), ("a", 2, constant, MODEL))
    ]
    run(tasks[::-1], protocol=PROTOCOL, folder=tmp_path, batch_size=3, origin=ORIGIN)
    seen = dict.fromkeys((line["set"], line["predictor"]) for line in read_lines(tmp_path))
    assert list(seen) == [("z", "constant"), ("z", "model"), ("a", "model"), ("a", "constant")]


def test_a_claim_is_one_processs_until_it_ends_or_dies(tmp_path) -> None:
    ours, theirs = Claims(tmp_path), Claims(tmp_path, patience=0.05)
    with ours.claim("rooms/0") as first, theirs.claim("rooms/0") as second:
        assert (first, second) == (True, False)
    with theirs.claim("rooms/0") as after:
        assert after
    with pytest.raises(RuntimeError), ours.claim("rooms/0"):
        raise RuntimeError
    with theirs.claim("rooms/0") as after_error:
        assert after_error


def owner(claim: Path) -> dict:
    return json.loads(claim.read_text())


def test_a_claim_of_a_dead_process_is_taken_over_at_once(tmp_path) -> None:
    with Claims(tmp_path).claim("rooms/0"):
        living = owner(tmp_path / "rooms" / "0.0")
    (tmp_path / "rooms" / "0.1").write_text(json.dumps({**living, "started": "1"}))
    with Claims(tmp_path).claim("rooms/0") as ours:
        assert ours
    (tmp_path / "rooms" / "0.3").write_text(json.dumps(living))
    with Claims(tmp_path).claim("rooms/0") as ours:
        assert not ours


@pytest.mark.parametrize("text", ["", '{"host": "another", "pid": 1, "started": "1"}'])
def test_a_claim_of_another_host_is_taken_over_when_nobody_touches_it(tmp_path, text) -> None:
    path = tmp_path / "rooms" / "0.0"
    path.parent.mkdir()
    path.write_text(text)
    claims = Claims(tmp_path, patience=0.05)
    for _ in range(3):  # its owner lives
        with claims.claim("rooms/0") as ours:
            assert not ours
        time.sleep(0.06)
        os.utime(path)
    with claims.claim("rooms/0") as ours:
        assert not ours
    time.sleep(0.06)
    with claims.claim("rooms/0") as ours:
        assert ours


def test_only_one_of_many_takes_over(tmp_path) -> None:
    (tmp_path / "rooms").mkdir()
    (tmp_path / "rooms" / "0.0").write_text("released")
    every = [Claims(tmp_path).claim("rooms/0") for _ in range(5)]
    assert [claim.__enter__() for claim in every] == [True, False, False, False, False]
    for claim in every:
        claim.__exit__(None, None, None)


def test_lines_in_memory_share_what_they_have_in_common(tmp_path) -> None:
    lines = go(tmp_path)
    for name in ("row", "settings", "command", "list_sha256"):
        assert len({id(line[name]) for line in lines}) == 1


def test_a_broken_line_is_named(tmp_path) -> None:
    (tmp_path / LINES).mkdir()
    (tmp_path / LINES / "one.jsonl").write_text('{"a": 1}\n{"a"\n')
    with pytest.raises(ValueError, match="one.jsonl:2 is no JSON"):
        read_lines(tmp_path)


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
