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
from judged import MODEL, PROTOCOL, ROW, SAMPLES, depths, go, guess, listed, sample, timeless

from mofo.evaluation.claims import Claims
from mofo.evaluation.kept import of_files
from mofo.evaluation.lines import LINES, identity, read_lines
from mofo.evaluation.pictures import PICTURES
from mofo.evaluation.predictors import Prediction, constant
from mofo.evaluation.report import report

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
