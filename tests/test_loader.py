"""The loader: kills lose nothing, shapes are not stretched, gates and faults are counted."""

import itertools
import json
import logging
import os
import pickle
import shutil
import tarfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import picture, sparse
from PIL import Image

from benchmarks import exact_data
from benchmarks.exact_data import BATCH, STEPS, Way
from mofo.data import shards as shards_module
from mofo.data import storage
from mofo.data.loader import MAX_REJECTED
from mofo.data.module import DataModule
from mofo.data.sample import Batch, Sample, rasterise
from mofo.data.shards import Shards
from mofo.data.write import write


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sets of several shapes, one with a damaged shard; see `exact_data`."""
    folder = tmp_path_factory.mktemp("sets")
    exact_data.make_sets(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 pictures in shards of 6, every fourth with points."""
    samples = (picture(i) if i % 4 else sparse(i) for i in range(40))
    write(samples, tmp_path / "set", "set", samples_per_shard=6)
    return tmp_path / "set"


def module(folder: Path, row: dict | None = None, **changes) -> DataModule:
    arguments = {
        "sources": {"one": {"shards": str(folder), **(row or {})}},
        "batch_size": 8,
        "size": (16, 16),
        "patch": 8,
        "caption_dropout": 0.0,
        "seed": 3,
        "max_bad_fraction": 0.0,
    }
    return DataModule(**{**arguments, **changes})


def first(data: DataModule, count: int) -> list[Batch]:
    return list(itertools.islice(data.train_dataloader(), count))


def keys(batches: list[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.key]


# Kills.


@pytest.mark.parametrize(
    ("way", "other", "step"),
    [(Way(2, 2), Way(0, 1), 5), (Way(0, 1), Way(2, 4), 40)],
    ids=["two_ranks_with_workers_then_one_without", "one_rank_then_four_with_workers"],
)
def test_a_killed_run_reads_on_as_if_nothing_had_happened(
    sets: Path, way: Way, other: Way, step: int
) -> None:
    data = exact_data.module(sets, workers=0)
    whole = [row for batch in first(data, STEPS) for row in exact_data.rows_of(batch)]
    steps, read = exact_data.kill_and_resume(sets, way, other, step)
    assert steps < STEPS
    assert [row.position for row in read] == list(range(STEPS * BATCH))
    assert read == whole
    # A whole chunk of buckets holds whole epochs, and a part of the next.
    counts = Counter(row.key for row in whole if row.key.startswith("good"))
    assert len(counts) == 60
    assert max(counts.values()) - min(counts.values()) <= 1
    assert data.faults.met
    assert data.rejections.rejected["gated", "min_image_size"]


# Buckets.


def ramp(number: int, h: int, w: int) -> Sample:
    """Red rises by 2 a column and green by 2 a row."""
    image = np.zeros((h, w, 3), np.uint8)
    image[..., 0] = 2 * np.arange(w)
    image[..., 1] = 2 * np.arange(h)[:, None]
    metres = np.full((h, w), 1 + number, np.float32)
    return Sample(
        key=f"ramp-{number:03d}",
        picture=Image.fromarray(image),
        metres=metres,
        valid=np.ones((h, w), bool),
        metric=True,
        source="test",
        licence="CC0",
    )


def test_each_step_has_the_aspect_of_its_samples_and_nothing_is_stretched(tmp_path: Path) -> None:
    shapes = [(48, 48), (48, 96), (96, 48)]
    write((ramp(i, *shapes[i % 3]) for i in range(60)), tmp_path, "ramps")
    data = module(tmp_path, {"flip": False}, buckets=True, size=(32, 32))
    batches = first(data, 64)
    sizes = Counter(tuple(batch.image.shape[2:]) for batch in batches)
    assert len(sizes) == 3
    assert all(count > 15 for count in sizes.values())
    pure = 0
    for batch in batches:
        h, w = batch.valid.shape[1:]
        assert batch.grid == (h // 8, w // 8)
        middle = batch.image[:, :, h // 4 : -h // 4, w // 4 : -w // 4]
        across = middle[:, 0].diff(dim=2).mean((1, 2))
        down = middle[:, 1].diff(dim=1).mean((1, 2))
        torch.testing.assert_close(across, down, rtol=0.06, atol=0)
        natural = [shapes[int(key[-3:]) % 3] for key in batch.key]
        pure += len(set(natural)) == 1
    assert pure >= 62


def test_without_its_index_a_shard_gives_the_same_steps(sets: Path, tmp_path: Path) -> None:
    whole = [exact_data.rows_of(batch) for batch in first(exact_data.module(sets, workers=0), 10)]
    copy = shutil.copytree(sets, tmp_path / "copy")
    for path in itertools.chain(copy.glob("good/*.idx.json"), copy.glob("gated/*.idx.json")):
        path.unlink()
    again = first(exact_data.module(copy, workers=0), 10)
    assert [exact_data.rows_of(batch) for batch in again] == whole


def test_an_image_whose_shard_is_gone_has_no_shape_and_is_still_a_fault(folder: Path) -> None:
    (folder / "set-000002.tar").unlink()
    (folder / "set-000002.idx.json").unlink()
    data = module(folder, buckets=True, max_bad_fraction=0.2)
    assert len(keys(first(data, 20))) == 160
    assert {fault.shard for fault in data.faults.met} == {"set-000002.tar"}


def test_a_start_within_a_step_is_refused_where_steps_have_shapes(folder: Path) -> None:
    data = module(folder, buckets=True)
    with pytest.raises(ValueError, match="12 samples.*batch_size=8"):
        data.load_state_dict(data.state_dict() | {"samples_seen": 12})
    module(folder).load_state_dict(data.state_dict() | {"samples_seen": 12})


def test_bucketed_rows_can_be_sent_to_a_spawned_worker(sets: Path) -> None:
    rows = exact_data.module(sets, workers=0).train_dataloader().rows
    again = pickle.loads(pickle.dumps(rows))
    assert rows[5].key == again[5].key
    assert torch.equal(rows[5].pixels, again[5].pixels)


# What a sample becomes.


def test_points_are_drawn_at_the_size_of_training_the_nearest_first(tmp_path: Path) -> None:
    # The first two fall into one pixel of the halved image, not of the image.
    points = np.array([[4.2, 6.1, 9], [5.9, 7.9, 3], [20, 20, 5]], np.float32)
    sample = replace(sparse(0, size=(32, 32)), points=points, sky=None)
    write([sample], tmp_path, "set")
    batch = first(module(tmp_path, {"flip": False}), 1)[0]
    assert batch.valid.sum((1, 2)).tolist() == [2] * 8
    assert (batch.metres[:, 3, 2] == 3).all()
    assert (batch.metres[:, 10, 10] == 5).all()
    expected, _ = rasterise(points * np.float32([0.5, 0.5, 1]), (16, 16))
    assert torch.equal(batch.metres[0][batch.valid[0]], torch.from_numpy(expected[expected > 0]))


def test_one_of_several_captions_is_taken_by_position(tmp_path: Path) -> None:
    write([sparse(0)], tmp_path, "set")
    captions = [text for batch in first(module(tmp_path), 10) for text in batch.caption]
    counts = Counter(captions)
    assert set(counts) == {"sparse number 0", "a road"}
    assert min(counts.values()) > 20
    data = module(tmp_path)
    data.advance(40)
    assert [text for batch in first(data, 5) for text in batch.caption] == captions[40:]


def test_missing_captions_come_from_the_overlay_and_no_other(tmp_path: Path) -> None:
    bare = [replace(picture(number), captions=()) for number in (0, 2)]
    write([*bare, picture(1)], tmp_path, "set")
    lines: list[dict] = [{"format": 1, "model": "by hand"}]
    for index in (0, 1):
        text = [f"written {index}"]
        lines.append({"index": index, "key": f"picture-{index:04d}", "captions": text})
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    gated = {"gates": {"caption_length": [1, 100]}}
    batches = first(module(tmp_path, gated), 3)
    found = {k: c for batch in batches for k, c in zip(batch.key, batch.caption, strict=True)}
    assert found == {
        "picture-0000": "written 0",
        "picture-0001": "picture number 1, naïve",
    }


# Gates.


def test_what_a_gate_rejects_is_replaced_counted_and_no_damage(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain, data = module(folder), module(folder, {"gates": {"min_measured_count": 60}})
    before, after = keys(first(plain, 10)), keys(first(data, 10))
    for old, new in zip(before, after, strict=True):
        assert new == old or old.startswith("sparse")
        assert not new.startswith("sparse")
    # 80 positions are two epochs of 40 samples, of which 10 have 50 points.
    assert data.rejections.read == {"one": 80}
    assert data.rejections.rejected == {("one", "min_measured_count"): 20}
    assert not data.faults.met
    again = module(folder, {"gates": {"min_measured_count": 60}}, num_workers=2)
    again.advance(40)
    assert keys(first(again, 5)) == after[40:]
    with caplog.at_level(logging.INFO):
        data.teardown("fit")
    assert "source 'one': 25.0 % of 80 samples rejected: min_measured_count 20" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_gates_that_reject_everything_are_named(folder: Path, workers: int) -> None:
    gates = {"min_image_size": 1000, "max_relative_depth": 50.0}
    data = module(folder, {"gates": gates}, num_workers=workers)
    with pytest.raises(
        ValueError, match=r"^source 'one': none of 40 .* min_image_size=1000 rejected 40; loosen it"
    ):
        first(data, 1)
    assert len(Shards(folder)) < MAX_REJECTED


def test_a_gate_that_is_unknown_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"'one' has the gates \['min_size'\].*min_image_size"):
        module(folder, {"gates": {"min_size": 3}})


# Storage that fails while a run goes on.


def test_a_shard_that_disappears_during_a_run_is_named_and_too_many_stop_it(folder: Path) -> None:
    data = module(folder, max_bad_fraction=0.2)
    batches = iter(data.train_dataloader())
    next(batches)
    (folder / "set-000003.tar").unlink()
    rows = data.train_dataloader()
    data.advance(40)
    list(itertools.islice(rows, 5))
    assert {fault.shard for fault in data.faults.met} == {"set-000003.tar"}
    assert len(data.faults.met) == 6
    (folder / "set-000004.tar").unlink()
    with pytest.raises(ValueError, match="(?s)max_bad_fraction=0.2.*set-00000[34].tar"):
        first(data, 10)


def test_points_that_became_nan_are_a_fault_and_a_damaged_index_costs_nothing(
    folder: Path,
) -> None:
    whole = keys(first(module(folder), 5))
    (folder / "set-000001.idx.json").write_text("{")
    assert keys(first(module(folder), 5)) == whole
    with tarfile.open(folder / "set-000002.tar") as tar:
        place = tar.getmember("sparse-0012.points.bin").offset_data
    with open(folder / "set-000002.tar", "r+b") as file:
        file.seek(place + 8)
        file.write(b"\xff\xff\xff\x7f")  # NaN
    data = module(folder, max_bad_fraction=0.1)
    first(data, 5)
    assert {(fault.key, "checksum" in fault.reason) for fault in data.faults.met} == {
        ("sparse-0012", True)
    }


def test_a_file_system_that_hangs_for_a_while_only_costs_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = keys(first(module(folder), 5))
    monkeypatch.setattr(storage, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(storage, "PAUSES_S", (0.05, 0.1))
    honest, calls = shards_module._pread, itertools.count()

    def hang(*arguments) -> bytes:
        if next(calls) == 20:
            time.sleep(0.6)
        return honest(*arguments)

    monkeypatch.setattr(shards_module, "_pread", hang)
    data = module(folder)
    assert keys(first(data, 5)) == whole
    assert not data.faults.met


def test_a_file_that_never_answers_is_a_fault_with_a_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "TIMEOUT_S", 0.1)
    monkeypatch.setattr(storage, "PAUSES_S", (0.01,))
    path = folder / "set-000002.tar"
    path.unlink()
    os.mkfifo(path)  # whoever opens it waits for a writer
    data = module(folder, max_bad_fraction=0.2)
    first(data, 5)
    assert len(data.faults.met) == 6
    assert all("no answer within 0.1 s" in fault.reason for fault in data.faults.met)
