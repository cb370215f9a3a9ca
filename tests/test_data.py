"""Data: transforms invent nothing, order is a function of position, damage is counted."""

import itertools
import logging
import os
import pickle
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import picture, sparse

from mofo.data import transforms
from mofo.data.loader import Steps
from mofo.data.module import DataModule
from mofo.data.order import BLOCK, Mixture, Permutation, share
from mofo.data.sample import Batch
from mofo.data.shards import Shards
from mofo.data.write import write

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 pictures in shards of 6."""
    write(map(picture, range(40)), tmp_path / "set", "pictures", samples_per_shard=6)
    return tmp_path / "set"


def module(folder: Path, **changes) -> DataModule:
    row = {"shards": str(folder), "patterns": ["lidar", "sfm", "rgbd"], "max_kept": 0.3}
    arguments = {
        "sources": {"one": {**row, "weight": 0.75}, "two": {**row, "weight": 0.25}},
        "batch_size": 8,
        "size": (16, 16),
        "patch": 8,
        "caption_dropout": 0.2,
        "seed": 3,
        "max_bad_fraction": 0.0,
    }
    return DataModule(**{**arguments, **changes})


def steps(data: DataModule, *, rank: int = 0, world: int = 1) -> Steps:
    loader = data.train_dataloader()
    return replace(loader, rank=rank, world=world)


def first(loader: Steps, count: int) -> list[Batch]:
    return list(itertools.islice(loader, count))


def fingerprint(batches: list[Batch]) -> list[tuple]:
    """Everything that belongs to each sample, in order."""
    return [
        (b.key[i], b.caption[i], int(b.position[i]))
        + tuple(t[i].numpy().tobytes() for t in (b.image, b.metres, b.valid))
        for b in batches
        for i in range(len(b))
    ]


# Transforms.


@pytest.mark.parametrize("size", [(24, 32), (8, 8), (16, 16), (7, 5), (40, 40)])
@pytest.mark.parametrize("number", range(3))
def test_every_surviving_depth_was_measured_in_its_cell(size: tuple, number: int) -> None:
    sample = picture(number, size=(24, 32))
    rng = np.random.default_rng(number)
    box = transforms.random_box((24, 32), size, rng, min_area=0.3)
    new = transforms.crop_resize(sample, box, size)
    assert new.image.shape == (*size, 3)
    for i, j in itertools.product(*map(range, size)):
        inside = [
            (y, x)
            for y in range(box.height)
            for x in range(box.width)
            if i <= (y + 0.5) * size[0] / box.height < i + 1
            and j <= (x + 0.5) * size[1] / box.width < j + 1
            and sample.valid[box.top + y, box.left + x]
        ]
        assert new.valid[i, j] == bool(inside)
        if not inside:
            assert new.metres[i, j] == 0
            continue

        def away(pixel: tuple[int, int], i: int = i, j: int = j) -> float:
            y, x = pixel
            return (y + 0.5 - (i + 0.5) * box.height / size[0]) ** 2 + (
                x + 0.5 - (j + 0.5) * box.width / size[1]
            ) ** 2

        nearest = min(map(away, inside))
        allowed = [
            sample.metres[box.top + y, box.left + x]
            for y, x in inside
            if away((y, x)) < nearest + 1e-9
        ]
        assert new.metres[i, j] in allowed


def test_flipping_twice_is_the_identity_and_moves_depth_with_the_image() -> None:
    sample = picture(0)
    once, twice = transforms.flip(sample), transforms.flip(transforms.flip(sample))
    np.testing.assert_array_equal(once.image, sample.image[:, ::-1])
    np.testing.assert_array_equal(once.metres, sample.metres[:, ::-1])
    assert once.intrinsics[0, 2] == 32 - 16
    assert once.intrinsics[0, 0] == 30
    for name in ("image", "metres", "valid", "intrinsics"):
        np.testing.assert_array_equal(getattr(twice, name), getattr(sample, name))


def test_points_and_sky_follow_the_image() -> None:
    sample = sparse(3)
    box = transforms.Box(4, 6, 16, 20)
    new = transforms.crop_resize(sample, box, (8, 5))
    expected = [
        ((u - 6) * 5 / 20, (v - 4) * 8 / 16, z)
        for u, v, z in sample.points.astype(np.float64)
        if 6 <= u < 26 and 4 <= v < 20
    ]
    np.testing.assert_allclose(new.points, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(new.points[:, 2], np.float32(expected)[:, 2])
    assert new.sky.shape == (8, 5)
    new.check()
    same = transforms.crop_resize(sample, transforms.Box(0, 0, 24, 32), (24, 32))
    np.testing.assert_array_equal(same.sky, sample.sky)
    np.testing.assert_array_equal(same.points, sample.points)


def test_flipped_points_fall_into_the_flipped_pixels() -> None:
    edges = np.array([[0, 13, 5], [31.999, 14, 6], [8, 15, 7]], np.float32)
    sample = replace(sparse(3), points=np.concatenate([sparse(3).points, edges]), sky=None)
    (metres, valid), (flipped, kept) = sample.depth, transforms.flip(sample).depth
    # On an edge between two pixels a point belongs to the right one, before and after.
    assert (flipped[15, 24], metres[15, 8]) == (7, 7)
    for array in (metres, valid, flipped, kept):
        array[15] = 0
    np.testing.assert_array_equal(flipped[:, ::-1], metres)
    np.testing.assert_array_equal(kept[:, ::-1], valid)
    transforms.flip(sparse(3)).check()


def test_intrinsics_still_project_a_point_to_its_pixel() -> None:
    sample = picture(0)
    box = transforms.Box(4, 6, 16, 20)
    new = transforms.crop_resize(sample, box, (8, 5))
    point = np.array([0.1, -0.2, 2.0])
    u, v, _ = sample.intrinsics @ point / 2
    u2, v2, _ = new.intrinsics @ point / 2
    assert u2 == pytest.approx((u - 6) * 5 / 20)
    assert v2 == pytest.approx((v - 4) * 8 / 16)


@pytest.mark.parametrize("pattern", ["dense", "lidar", "sfm", "rgbd"])
def test_thinning_keeps_depths_and_the_cap(pattern: str) -> None:
    sample = picture(2)
    new = transforms.thin(sample, [pattern], 0.1, np.random.default_rng(0))
    assert 0 < new.valid.sum() <= 0.1 * new.valid.size
    assert (sample.valid | ~new.valid).all()
    np.testing.assert_array_equal(new.metres[new.valid], sample.metres[new.valid])


def test_jitter_changes_colours_and_keeps_a_grey_picture_grey() -> None:
    grey = np.full((4, 4, 3), 100, np.uint8)
    new = transforms.jitter(grey, 0.3, np.random.default_rng(1))
    assert (new == new[0, 0, 0]).all()
    assert new[0, 0, 0] != 100


# Order.


@pytest.mark.parametrize("weights", [[0.75, 0.25], [0.9, 0.099, 0.001], [1.0, 1.0, 1.0], [5.0]])
def test_a_block_holds_every_source_in_exact_proportion(weights: list) -> None:
    mixture = Mixture(weights, seed=0)
    turns = [mixture(position) for position in range(3 * BLOCK)]
    counts = Counter(source for source, _ in turns)
    for source, weight in enumerate(weights):
        assert abs(counts[source] - 3 * BLOCK * weight / sum(weights)) < 3
        # Turns are 0, 1, 2, ... without gap, whatever block they fall in.
        assert sorted(t for s, t in turns if s == source) == list(range(counts[source]))


def test_no_source_starves_however_small_its_weight() -> None:
    assert share([1e-9, 1.0], 1000) == [1, 999]
    assert share([1e-9] * 3 + [1.0], 4) == [1, 1, 1, 1]


def test_an_epoch_holds_each_sample_once_and_epochs_differ() -> None:
    order = Permutation(np.array([0, 5, 5, 11, 20, 24, 30, 37]), seed=0, name="set")
    epochs = [[order(37 * epoch + turn) for turn in range(37)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_far_position_costs_no_more_than_the_first(folder: Path) -> None:
    data = module(folder)
    data.load_state_dict(data.state_dict() | {"samples_seen": 8 * 10**12})
    assert first(steps(data), 1)[0].position[0] == 8 * 10**12


@pytest.mark.parametrize("workers", [0, 2])
def test_any_start_continues_the_uninterrupted_order(folder: Path, workers: int) -> None:
    whole = fingerprint(first(steps(module(folder)), 12))
    data = module(folder, num_workers=workers)
    data.advance(3 * 8)
    resumed = module(folder, num_workers=workers)
    resumed.load_state_dict(data.state_dict())
    assert fingerprint(first(steps(resumed), 9)) == whole[3 * 8 :]


def test_ranks_and_micro_batches_change_nothing(folder: Path) -> None:
    whole = fingerprint(first(steps(module(folder)), 4))
    ranks = [
        fingerprint(first(steps(module(folder, accumulate=2), rank=rank, world=2), 4 * 2))
        for rank in (0, 1)
    ]
    merged = sorted(ranks[0] + ranks[1], key=lambda row: row[2])
    assert merged == whole


def test_another_seed_is_another_order(folder: Path) -> None:
    one, two = (fingerprint(first(steps(module(folder, seed=seed)), 2)) for seed in (1, 2))
    assert [row[0] for row in one] != [row[0] for row in two]


def test_step_measured_counts_all_micro_batches_of_the_step(folder: Path) -> None:
    batches = first(steps(module(folder, accumulate=4)), 8)
    for step in (batches[:4], batches[4:]):
        assert {batch.step_measured for batch in step} == {sum(int(b.valid.sum()) for b in step)}
    assert [len(batch) for batch in batches] == [2] * 8


def test_batches_are_finite_and_in_range(folder: Path) -> None:
    batch = first(steps(module(folder)), 1)[0]
    assert batch.grid == (2, 2)
    assert batch.image.shape == (8, 3, 16, 16)
    assert batch.image.abs().max() <= 1
    assert (batch.metres[batch.valid] > 0).all()
    assert batch.metres.isfinite().all()
    assert batch.to("cpu").key == batch.key


@pytest.mark.parametrize("hidden", [True, False])
def test_a_source_without_depth_has_nothing_measured(tmp_path: Path, hidden: bool) -> None:
    write((picture(i, depth=hidden) for i in range(4)), tmp_path, "set")
    row = {"shards": str(tmp_path), "depth": not hidden}
    batch = first(steps(module(tmp_path, sources={"one": row})), 1)[0]
    assert not batch.valid.any()
    assert batch.step_measured == 0


def test_loading_draws_nothing_from_the_global_generators(folder: Path) -> None:
    before = torch.get_rng_state()
    first(steps(module(folder, num_workers=1)), 1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("ending", ["raise KeyError('x')", "kept.append(batches)"])
def test_no_worker_keeps_a_process_from_ending(folder: Path, ending: str) -> None:
    program = f"""
import sys
from mofo.data.loader import Faults, Source, Steps, TrainingSet
rows = TrainingSet({{"one": Source(shards={str(folder)!r})}}, size=(16, 16), caption_dropout=0.1,
                   seed=0, max_bad_fraction=0.0)
batches = iter(Steps(rows=rows, start=lambda: 0, batch_size=4, accumulate=1, rank=0, world=1,
                     patch=8, num_workers=2, faults=Faults(rows.sizes, 0.0)))
next(batches)
kept = sys.modules.setdefault("kept", [])
{ending}
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == int("raise" in ending), done.stderr
    assert "worker" not in done.stderr


def test_a_training_set_can_be_sent_to_a_spawned_worker(folder: Path) -> None:
    rows = steps(module(folder)).rows
    rows[5]
    again = pickle.loads(pickle.dumps(rows))
    assert torch.equal(again[7].pixels, rows[7].pixels)
    assert again[7].key == rows[7].key


def test_a_rank_that_multiprocessing_started_ends_with_its_workers(folder: Path) -> None:
    # Nothing closes what it reads from: at its end its workers must obey, though they ignore jobs.
    def read() -> None:
        kept["batches"] = iter(steps(module(folder, num_workers=1)))
        next(kept["batches"])

    kept: dict[str, Iterator[Batch]] = {}
    rank = get_context("fork").Process(target=read)
    rank.start()
    rank.join(60)
    ended = rank.exitcode
    if ended is None:
        os.kill(rank.pid, signal.SIGKILL)
    assert ended == 0


# Damage.


def truncate(folder: Path) -> str:
    path = folder / "pictures-000002.tar"
    with tarfile.open(path) as tar:
        second = tar.getmember("picture-0014.json").offset_data
    os.truncate(path, second)
    return "truncated"


def empty(folder: Path) -> str:
    os.truncate(folder / "pictures-000002.tar", 0)
    return "truncated"


def flip_a_bit(folder: Path) -> str:
    path = folder / "pictures-000002.tar"
    with tarfile.open(path) as tar:
        place = tar.getmember("picture-0014.depth.png").offset_data + 60
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    return "checksum"


def remove(folder: Path) -> str:
    (folder / "pictures-000002.tar").unlink()
    return "No such file"


DAMAGES = [(truncate, 4), (empty, 6), (flip_a_bit, 1), (remove, 6)]


@pytest.mark.parametrize(("damage", "lost"), DAMAGES, ids=[d.__name__ for d, _ in DAMAGES])
def test_damage_is_named_counted_and_replaced(
    folder: Path, damage, lost: int, caplog: pytest.LogCaptureFixture
) -> None:
    intact = fingerprint(first(steps(module(folder)), 12))
    reason = damage(folder)
    data = module(folder, max_bad_fraction=0.3)
    with caplog.at_level(logging.WARNING):
        rows = fingerprint(first(steps(data), 12))
    bad = {(fault.source, fault.key) for fault in data.faults.met}
    assert len({key for _, key in bad}) == lost
    assert all(reason in fault.reason for fault in data.faults.met)
    assert len(caplog.records) == len(bad)
    # Only the damaged positions changed, and they hold something readable.
    changed = [old[0] for old, new in zip(intact, rows, strict=True) if old[0] != new[0]]
    assert set(changed) == {key for _, key in bad}
    assert all(new == old for old, new in zip(intact, rows, strict=True) if old[0] == new[0])
    # The replacement is a function of position as well.
    again = module(folder, max_bad_fraction=0.3, num_workers=2)
    again.advance(8 * 5)
    assert fingerprint(first(steps(again), 7)) == rows[8 * 5 :]


@pytest.mark.parametrize("damage", [damage for damage, _ in DAMAGES])
@pytest.mark.parametrize("workers", [0, 2])
def test_too_much_damage_stops_the_run_and_names_it(folder: Path, damage, workers: int) -> None:
    damage(folder)
    loader = steps(module(folder, max_bad_fraction=0.02, num_workers=workers))
    with pytest.raises(ValueError, match="(?s)damaged.*max_bad_fraction.*pictures-000002.tar"):
        first(loader, 100)


# The module.


def test_a_size_that_is_no_multiple_of_the_patch_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="image is 20x16.*multiples of 8"):
        module(folder, size=(20, 16))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"shardz": "x"}, "shardz.*accepted are"),
        ({"shards": "x", "max_kept": 0.0}, "max_kept"),
        ({"shards": "x", "min_area": 2.0}, "min_area"),
        ({"shards": "x", "weight": -1.0}, "weight"),
        ({"shards": "x", "patterns": ["lidr"]}, "lidr"),
    ],
)
def test_a_wrong_row_is_refused(folder: Path, row: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(folder, sources={"one": row})


def test_a_batch_that_ranks_cannot_share_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="batch_size is 8.*3 x 1"):
        steps(module(folder), world=3)


def test_missing_sets_are_made_once(tmp_path: Path) -> None:
    made = {"converter": "generated", "split": "test", "count": 3, "seed": 1, "size": [16, 16]}
    row = {"shards": str(tmp_path / "scenes"), "make": made}
    data = module(tmp_path, sources={"scenes": row})
    data.prepare_data()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "scenes").iterdir()}
    data.prepare_data()
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "scenes").iterdir()} == written
    assert Shards(tmp_path / "scenes").manifest["samples"] == 3
    assert len(first(steps(data), 1)[0]) == 8
