"""Data: what is written is what is read, order is a function of position, damage is counted."""

import errno
import io
import itertools
import json
import logging
import os
import pickle
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mofo.data import shards as shards_module
from mofo.data import transforms
from mofo.data.convert import samples as real
from mofo.data.loader import Steps
from mofo.data.make import make
from mofo.data.module import DataModule
from mofo.data.order import BLOCK, Mixture, Permutation, share
from mofo.data.sample import Batch, Sample, decode_depth, decode_image, encode_depth
from mofo.data.shards import DamagedSample, Shards, write

ROOT = Path(__file__).parents[1]


def picture(number: int, *, size: tuple[int, int] = (24, 32), depth: bool = True) -> Sample:
    """A sample whose measured depths are all different, with a third of the pixels unmeasured."""
    rng = np.random.default_rng(number)
    metres = (rng.permutation(size[0] * size[1]).reshape(size) + 1).astype(np.float32) / 100
    valid = rng.random(size) > 1 / 3
    return Sample(
        key=f"picture-{number:04d}",
        image=rng.integers(0, 256, (*size, 3), dtype=np.uint8),
        metres=np.where(valid, metres, np.float32(0)) if depth else None,
        valid=valid if depth else None,
        intrinsics=np.array([[30.0, 0, 16], [0, 30.0, 12], [0, 0, 1]]),
        caption=f"picture number {number}, naïve",
        metric=True,
        source="test",
        licence="CC0",
    )


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


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


# The disk.


@pytest.mark.parametrize("depth", [True, False])
def test_what_is_written_is_what_is_read(tmp_path: Path, depth: bool) -> None:
    wrote = [picture(number, depth=depth) for number in range(7)]
    assert write(wrote, tmp_path, "set", samples_per_shard=3)
    shards = Shards(tmp_path)
    assert len(shards) == 7
    for index, old in enumerate(wrote):
        new = shards.read(index)
        assert (new.key, new.caption, new.source, new.licence) == (
            old.key,
            old.caption,
            old.source,
            old.licence,
        )
        np.testing.assert_array_equal(new.image, old.image)
        np.testing.assert_array_equal(new.intrinsics, old.intrinsics)
        if depth:
            np.testing.assert_array_equal(new.valid, old.valid)
            step = new.depth_scale
            np.testing.assert_allclose(new.metres, old.metres, rtol=0, atol=0.5001 * step)
        else:
            assert new.metres is None
            assert new.valid is None


def test_a_second_round_through_the_disk_changes_nothing(tmp_path: Path, folder: Path) -> None:
    shards = Shards(folder)
    again = (shards.read(index) for index in range(len(shards)))
    write(again, tmp_path / "again", "pictures", samples_per_shard=6)
    assert Shards(tmp_path / "again").manifest["hash"] == shards.manifest["hash"]


def test_encoded_images_are_stored_as_they_are(tmp_path: Path) -> None:
    data = encoded(Image.fromarray(picture(0).image), "JPEG", quality=30)
    sample = replace(picture(0), image=decode_image(data), image_bytes=data)
    write([sample], tmp_path, "set")
    with tarfile.open(tmp_path / "set-000000.tar") as tar:
        assert tar.extractfile("picture-0000.jpg").read() == data


def test_shards_are_ordinary_webdataset_tars(folder: Path) -> None:
    import webdataset

    url = str(folder / "pictures-{000000..000006}.tar")
    rows = list(webdataset.WebDataset(url, shardshuffle=False))
    assert len(rows) == 40
    assert {name for name in rows[0] if not name.startswith("__")} == {"png", "depth.png", "json"}


def test_tars_without_manifest_and_index_are_read_by_pattern(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    for index in folder.glob("*.idx.json"):
        index.unlink()
    shards = Shards(f"{folder}/*.tar")
    assert [shards.read(i).key for i in range(40)] == [picture(i).key for i in range(40)]


def test_a_finished_set_is_never_replaced(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert not write(map(picture, range(40)), folder, "pictures", samples_per_shard=6)
    with pytest.raises(ValueError, match="delete that folder"):
        write(map(picture, range(3)), folder, "pictures", made_from={"count": 3})
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_an_unfinished_set_is_refused_with_the_command_that_makes_it(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="mofo convert"):
        Shards(folder)


@pytest.mark.parametrize("after", [0, 20_000, 45_000])
def test_a_full_disk_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    class FullDisk(io.FileIO):
        def write(self, data) -> int:
            nonlocal after
            after -= len(data)
            if after < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    def full(path, mode):
        return FullDisk(path, mode) if "w" in mode else open(path, mode)

    monkeypatch.setattr(shards_module, "open", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        write(map(picture, range(40)), tmp_path, "set", samples_per_shard=6)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert not [name for name in left if "partial" in name or name == "manifest.json"]
    for name in left:
        if name.endswith(".tar"):
            with tarfile.open(tmp_path / name) as tar:
                assert len(tar.getnames()) == 18
    monkeypatch.undo()
    assert write(map(picture, range(40)), tmp_path, "set", samples_per_shard=6)
    assert len(Shards(tmp_path)) == 40


# What samples may hold.


@pytest.mark.parametrize(
    ("depth", "reason"),
    [(np.nan, "NaN"), (np.inf, "infinite"), (-1.0, "negative"), (0.0, "zero"), (1e-9, "spans")],
)
def test_impossible_depth_is_not_written(tmp_path: Path, depth: float, reason: str) -> None:
    sample = picture(1)
    metres = sample.metres.copy()
    metres[np.argwhere(sample.valid)[0][0], np.argwhere(sample.valid)[0][1]] = depth
    with pytest.raises(ValueError, match=f"(?s)picture-0001.*{reason}"):
        write([replace(sample, metres=metres)], tmp_path, "set")
    assert list(tmp_path.iterdir()) == []


def test_impossible_depth_that_is_marked_invalid_is_dropped(tmp_path: Path) -> None:
    sample = picture(1)
    metres = np.where(sample.valid, sample.metres, np.float32(np.nan))
    write([replace(sample, metres=metres)], tmp_path, "set")
    np.testing.assert_array_equal(Shards(tmp_path).read(0).valid, sample.valid)


def test_depth_without_any_measured_pixel_is_refused(tmp_path: Path) -> None:
    sample = replace(picture(1), valid=np.zeros((24, 32), bool))
    with pytest.raises(ValueError, match="picture-0001.*no measured pixel"):
        write([sample], tmp_path, "set")


def test_depth_of_another_size_than_the_image_is_refused() -> None:
    # Called by hand, because in tests the shape types of the constructor would object before it.
    sample = picture(1)
    object.__setattr__(sample, "metres", sample.metres[:, :-1])
    with pytest.raises(ValueError, match=r"picture-0001: metres is \(24, 31\).*\(24, 32\)"):
        sample.__post_init__()


@pytest.mark.parametrize("key", ["", "../up", "a.b", "a/b"])
def test_keys_that_are_no_file_stems_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="key"):
        write([replace(picture(0), key=key)], tmp_path, "set")


def test_a_key_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="picture-0000.*twice"):
        write([picture(0), picture(1), picture(0)], tmp_path, "set", samples_per_shard=2)


def half(left: int | tuple, right: int | tuple, mode: str) -> Image.Image:
    image = Image.new(mode, (6, 4), left)
    image.paste(right, (3, 0, 6, 4))
    return image


def sixteen_bit_rgb() -> bytes:
    """A PNG that Pillow cannot write: 16 bits for each of red, green and blue."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    row = b"\0" + struct.pack(">3H", 200 * 257, 100 * 257, 0) * 3
    row += struct.pack(">3H", 0, 0, 65535) * 3
    header = struct.pack(">IIBBBBB", 6, 4, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(row * 4))
        + chunk(b"IEND", b"")
    )


def palette_with_hole() -> bytes:
    image = half(1, 0, "P")
    image.putpalette([0, 0, 255, 200, 100, 0])
    return encoded(image, transparency=0)


def sixteen_bit_grey() -> bytes:
    return encoded(Image.fromarray(np.repeat([[51400] * 3 + [65535] * 3], 4, 0).astype(np.uint16)))


@pytest.mark.parametrize(
    ("data", "left", "right"),
    [
        (encoded(half(200, 0, "L")), (200, 200, 200), (0, 0, 0)),
        (encoded(half(1, 0, "1")), (255, 255, 255), (0, 0, 0)),
        (sixteen_bit_grey(), (200, 200, 200), (255, 255, 255)),
        (sixteen_bit_rgb(), (200, 100, 0), (0, 0, 255)),
        (encoded(half((200, 100, 0, 255), (0, 0, 0, 0), "RGBA")), (200, 100, 0), (255,) * 3),
        (encoded(half((200, 100, 0, 255), (0, 0, 0, 51), "RGBA")), (200, 100, 0), (204,) * 3),
        (encoded(half((200, 255), (9, 0), "LA")), (200,) * 3, (255,) * 3),
        (palette_with_hole(), (200, 100, 0), (255, 255, 255)),
        (encoded(half((0, 128, 255, 0), (0, 0, 0, 255), "CMYK"), "TIFF"), (255, 127, 0), (0,) * 3),
    ],
    ids=["grey", "1 bit", "grey 16", "RGB 16", "RGBA", "shade", "LA", "palette", "CMYK"],
)
def test_every_mode_becomes_rgb(data: bytes, left: tuple, right: tuple, tmp_path: Path) -> None:
    image = decode_image(data)
    assert image.dtype == np.uint8
    assert image.shape == (4, 6, 3)
    assert tuple(image[0, 0]) == left
    assert tuple(image[3, 5]) == right
    (tmp_path / "file").write_bytes(data)
    np.testing.assert_array_equal(decode_image(tmp_path / "file"), image)


def test_cmyk_jpeg_has_the_colours_it_was_saved_with() -> None:
    image = decode_image(encoded(half((0, 128, 255, 0), (0, 0, 0, 255), "CMYK"), "JPEG"))
    np.testing.assert_allclose(image[0, 0], (255, 127, 0), atol=6)
    np.testing.assert_allclose(image[3, 5], 0, atol=6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int) -> None:
    upright = np.zeros((4, 6, 3), np.uint8)
    upright[0, 0], upright[0, 5], upright[3, 0] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    # What a camera held that way would have stored.
    turn = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(turn(upright)))
    np.testing.assert_array_equal(decode_image(encoded(stored, exif=exif)), upright)


def test_depth_survives_the_png_exactly_and_zero_is_not_measured() -> None:
    codes = np.array([[0, 1, 2], [1000, 65534, 65535]])
    metres, valid = (codes * 0.001).astype(np.float32), codes > 0
    again, measured = decode_depth(encode_depth(metres, valid, 0.001), 0.001)
    np.testing.assert_array_equal(again, metres)
    np.testing.assert_array_equal(measured, valid)


def test_depth_of_eight_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="16-bit"):
        decode_depth(encoded(half(1, 2, "L")), 0.001)


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
    data.load_state_dict({"samples_seen": 8 * 10**12})
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


def test_batches_are_filled_finite_and_in_range(folder: Path) -> None:
    batch = first(steps(module(folder)), 1)[0]
    assert batch.grid == (2, 2)
    assert batch.image.shape == (8, 3, 16, 16)
    assert batch.image.abs().max() <= 1
    assert (batch.metres > 0).all()
    assert batch.metres.isfinite().all()
    assert batch.to("cpu").key == batch.key


@pytest.mark.parametrize("hidden", [True, False])
def test_a_source_without_depth_has_nothing_measured(tmp_path: Path, hidden: bool) -> None:
    write((picture(i, depth=hidden) for i in range(4)), tmp_path, "set")
    row = {"shards": str(tmp_path), "depth": not hidden}
    batch = first(steps(module(tmp_path, sources={"one": row})), 1)[0]
    assert not batch.valid.any()
    assert (batch.metres == 1).all()
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
    assert torch.equal(again[7].image, rows[7].image)
    assert again[7].key == rows[7].key


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


def test_without_index_what_a_truncated_shard_lost_still_counts(folder: Path) -> None:
    truncate(folder)
    (folder / "pictures-000002.idx.json").unlink()
    shards = Shards(folder)
    assert len(shards) == 40
    assert shards.read(13).key == "picture-0013"
    with pytest.raises(DamagedSample, match=r"pictures-000002.tar"):
        shards.read(17)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"samples": 3}'])
def test_a_damaged_index_is_replaced_by_the_tars_own_headers(folder: Path, text: str) -> None:
    (folder / "pictures-000002.idx.json").write_text(text)
    assert Shards(folder).read(13).key == "picture-0013"


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


def test_an_unknown_converter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kitty.*generated"):
        make(tmp_path, converter="kitty")


# The real photographs.


def test_the_real_photographs_are_all_there_with_their_terms() -> None:
    convert = partial(real.convert, folder=str(ROOT / "data/samples"))
    train = {s.key: s for s in convert(keys=str(ROOT / "data/splits/real_train.txt"))}
    test = {s.key: s for s in convert(keys=str(ROOT / "data/splits/real_test.txt"))}
    assert (len(train), len(test)) == (26, 6)
    assert not set(train) & set(test)
    for key, sample in {**train, **test}.items():
        sample.check()
        row = json.loads((ROOT / f"data/samples/{key}.json").read_text())
        assert sample.valid.mean() == pytest.approx(row["valid_fraction"], abs=2e-4)
        assert sample.metres[sample.valid].max() == pytest.approx(row["depth_max"], rel=1e-3)
        assert sample.caption.startswith("a photo of ")
        assert row["licence"] in sample.licence
    road = [sample for key, sample in train.items() if key.startswith("zod")]
    assert all(sample.intrinsics is None for sample in road)
    assert all("Zenseact" in sample.licence and "intention" in sample.licence for sample in road)
