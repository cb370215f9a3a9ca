"""Damaged shards: a fault that is named, what is not damaged, and never a wrong depth."""

import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from packed import INDEX, SHARD, archive, forty, kinds, row, wide
from pictures import encoded, picture, sparse
from PIL import Image

from mofo.data.sample import Sample, encode_depth
from mofo.data.shards import DamagedSample, Shards
from mofo.data.write import write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return forty(tmp_path / "set")


def spoil(path: Path, name: str) -> None:
    with tarfile.open(path) as tar:
        place = tar.getmember(name).offset_data + 60
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def readable(shards: Shards) -> list[str]:
    """The keys that can be read; all else must be a DamagedSample of a shard of the set."""
    keys, faults = [], []
    for index in range(len(shards)):
        try:
            keys.append(shards.read(index).key)
        except DamagedSample as fault:
            faults.append(fault)
    assert {fault.shard for fault in faults} <= {*map(os.path.basename, shards.paths)}
    return keys


KEYS = [picture(number).key for number in range(40)]


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        (lambda f: os.truncate(f / SHARD, 0), range(12, 18)),
        (lambda f: os.truncate(f / SHARD, 7000), range(13, 18)),
        (lambda f: (f / SHARD).unlink(), range(12, 18)),
        (lambda f: spoil(f / SHARD, "picture-0014.depth.png"), range(14, 15)),
        (lambda f: spoil(f / SHARD, "picture-0014.json"), range(14, 15)),
        # Without its index a shard must be as the manifest says, or nothing of it counts.
        (lambda f: [os.truncate(f / SHARD, 7000), (f / INDEX).unlink()], range(12, 18)),
        (lambda f: [spoil(f / SHARD, "picture-0014.png"), (f / INDEX).unlink()], range(12, 18)),
        (lambda f: (f / INDEX).unlink(), ()),
        (lambda f: (f / INDEX).write_text(""), ()),
        (lambda f: (f / INDEX).write_text("[]"), ()),
        (lambda f: (f / INDEX).write_text('{"samples": 3}'), ()),
        (lambda f: (f / INDEX).write_bytes(b"\xff\xfe"), ()),
        (lambda f: shutil.copy(f / "pictures-000001.idx.json", f / INDEX), ()),
        (lambda f: (f / INDEX).write_text((f / INDEX).read_text().replace("0014", "0019")), ()),
    ],
)
def test_damage_costs_what_is_damaged_and_no_more(folder: Path, damage, lost) -> None:
    damage(folder)
    assert readable(Shards(folder)) == [k for n, k in enumerate(KEYS) if n not in lost]


def test_an_index_older_than_its_shard_is_not_believed(tmp_path: Path) -> None:
    """Also where there is no manifest that could tell."""
    write(map(picture, range(3)), tmp_path / "old", "set")
    write(map(sparse, range(3)), tmp_path / "new", "set")
    shutil.copy(tmp_path / "old/set-000000.idx.json", tmp_path / "new/set-000000.idx.json")
    for source in (tmp_path / "new", f"{tmp_path}/new/*.tar"):
        assert readable(Shards(source)) == [sparse(number).key for number in range(3)]


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "a\\b"])
def test_names_that_leave_the_folder_are_refused_and_nothing_is_extracted(
    tmp_path: Path, name: str
) -> None:
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    image = encoded(Image.fromarray(picture(0).image))
    archive(inside / "set.tar", {f"{name}.png": image, f"{name}.json": row()})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DamagedSample, match="names files"):
        Shards(f"{inside}/*.tar").read(0)
    assert sorted(tmp_path.rglob("*")) == before


POINTS = np.array([[1, 2, 3], [4, 5, 6]], "<f4")
DEPTH = encode_depth(np.ones((24, 32), np.float32), np.ones((24, 32), bool), 1.0)
LINEAR = {"coding": "linear", "step": 1.0}
PACKED = {"coding": "points", "count": 2, "dtype": "<f4"}


def points(**changes) -> bytes:
    return np.where(POINTS == 3, changes["z"], POINTS).astype("<f4").tobytes()


@pytest.mark.parametrize(
    ("changed", "fields", "reason"),
    [
        ({"png": encoded(Image.fromarray(picture(0).image))[:900]}, {}, "runcated|broken|IDAT"),
        (
            {"jpg": b"\xff\xd8\xff\xe0 no picture", "png": None},
            {},
            "no picture|OSError|SyntaxError",
        ),
        ({"png": b""}, {}, "no picture|OSError|SyntaxError"),
        ({"png": None}, {}, "there is no image among"),
        ({"json": None}, {}, "json"),
        ({"json": b"{"}, {}, "JSONDecodeError"),
        ({"json": b"[" * 100_000}, {}, "Recursion"),
        ({"json": b"{}"}, {}, "format"),
        ({}, {"captions": "one text"}, "captions must be a list"),
        ({}, {"captions": [""]}, "captions"),
        ({}, {"metric": "false"}, "true or false"),
        ({}, {"intrinsics": [[float("inf"), 0, 0], [0, 1, 0], [0, 0, 1]]}, "must be finite"),
        ({}, {"intrinsics": [[-5, 0, 0], [0, 1, 0], [0, 0, 1]]}, "focal lengths"),
        ({}, {"intrinsics": [[1, 0], [0, 1]]}, "intrinsics"),
        ({}, {"depth": LINEAR}, "depth.png"),
        ({"depth.png": DEPTH}, {"depth": {"coding": "cubic"}}, "reads linear, log and points"),
        ({"depth.png": DEPTH}, {"depth": LINEAR | {"step": 0}}, "depth_scale is 0"),
        ({"depth.png": DEPTH}, {"depth": LINEAR | {"step": "1"}}, "reads linear, log"),
        ({"depth.png": DEPTH}, {"depth": {"coding": "log", "near": 2, "far": 1}}, "depth_scale"),
        ({"depth.png": DEPTH[:60]}, {"depth": LINEAR}, "runcated|broken|IDAT"),
        ({"depth.png": encoded(Image.new("L", (32, 24)))}, {"depth": LINEAR}, "16-bit"),
        ({"depth.png": encoded(Image.new("I;16", (31, 24)))}, {"depth": LINEAR}, "24, ?31"),
        ({"points.bin": points(z=3)[:20]}, {"depth": PACKED}, "points of 3|multiple"),
        ({"points.bin": points(z=3)}, {"depth": PACKED | {"count": 3}}, "not 3 points of 3"),
        ({"points.bin": points(z=3)}, {"depth": PACKED | {"dtype": "<f8"}}, "reads linear"),
        ({"points.bin": points(z=np.nan)}, {"depth": PACKED}, "NaN"),
        ({"points.bin": points(z=np.inf)}, {"depth": PACKED}, "infinite"),
        ({"points.bin": points(z=-3)}, {"depth": PACKED}, "negative"),
        ({"points.bin": b""}, {"depth": PACKED | {"count": 0}}, "no measured pixel"),
        ({"sky.png": encoded(Image.new("1", (5, 4)))}, {}, "sky"),
    ],
)
def test_what_cannot_be_a_sample_is_a_named_fault(
    tmp_path: Path, changed: dict, fields: dict, reason: str
) -> None:
    """As another program might write it, so that no checksum speaks against it."""
    members = {"png": encoded(Image.fromarray(picture(0).image)), "json": row(**fields)} | changed
    files = {f"a.{ext}": data for ext, data in members.items() if data is not None}
    good = {"b.png": encoded(Image.fromarray(picture(1).image)), "b.json": row()}
    archive(tmp_path / "set.tar", files | good)
    shards = Shards(f"{tmp_path}/*.tar")
    with pytest.raises(DamagedSample, match=f"(?s)^set.tar: a: .*({reason})"):
        shards.read(0)
    assert shards.read(1).key == "b"


def test_a_pattern_of_nothing_but_damage_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="no samples"):
        Shards(f"{tmp_path}/*.tar")


def test_a_manifest_that_is_damaged_or_points_elsewhere_is_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    text = path.read_text()
    for wrong in ("", "{", "[]", "{}", "[" * 10**5, text.replace('"samples": 6', '"samples": "6"')):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=r"manifest.json is damaged .*convert the set again"):
            Shards(folder)
    for wrong in ("../pictures-000001.tar", "/etc/passwd"):
        path.write_text(text.replace("pictures-000001.tar", wrong))
        with pytest.raises(ValueError, match="names the shard"):
            Shards(folder)


# Fuzz.


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Some bytes changed, cut off, taken out, put in, set to zero or copied over others."""
    if not data:
        return rng.bytes(5)
    start, length = int(rng.integers(len(data))), int(rng.integers(1, 200))
    match rng.integers(6):
        case 0:
            flipped = bytes([data[start] ^ (1 << int(rng.integers(8)))])
            return data[:start] + flipped + data[start + 1 :]
        case 1:
            return data[:start]
        case 2:
            return data[:start] + data[start + length :]
        case 3:
            return data[:start] + rng.bytes(length) + data[start:]
        case 4:
            return (data[:start] + bytes(length) + data[start + length :])[: len(data)]
        case _:
            other = int(rng.integers(len(data)))
            return data[:start] + data[other : other + length] + data[start + length :]


def assert_intact(sample: Sample, original: Sample) -> None:
    for name in ("captions", "metric", "source", "licence", "image_bytes", "depth_scale"):
        assert getattr(sample, name) == getattr(original, name)
    for name in ("image", "metres", "valid", "points", "sky", "intrinsics"):
        np.testing.assert_array_equal(getattr(sample, name), getattr(original, name))


def test_a_thousand_mutations_give_what_was_written_or_a_fault(tmp_path: Path) -> None:
    """In any file of a set, up to three at once: no crash, and no wrong depth."""
    write([picture(0), sparse(1), wide(2), picture(3)], tmp_path, "set", samples_per_shard=2)
    whole = Shards(tmp_path)
    original = {sample.key: sample for sample in map(whole.read, range(len(whole)))}
    files = {path: path.read_bytes() for path in sorted(tmp_path.iterdir())}
    rng = np.random.default_rng(0)
    outcomes, mutations = {"same": 0, "fault": 0, "refused": 0}, 0
    while mutations < 1000:
        hit = rng.choice(sorted(files), size=rng.integers(1, 4), replace=False)
        mutations += len(hit)
        for path in hit:
            path.write_bytes(mutate(files[path], rng))
        try:
            shards = Shards(tmp_path)
        except ValueError:
            outcomes["refused"] += 1
        else:
            for index in range(min(len(shards), 8)):
                try:
                    sample = shards.read(index)
                except DamagedSample:
                    outcomes["fault"] += 1
                else:
                    assert_intact(sample, original[sample.key])
                    outcomes["same"] += 1
        for path in hit:
            path.write_bytes(files[path])
    assert min(outcomes.values()) > 100, outcomes


def test_mutated_tars_without_anything_that_vouches_for_them_crash_nothing(tmp_path: Path) -> None:
    write(kinds(), tmp_path, "set")
    tar, sidecar = tmp_path / "set-000000.tar", tmp_path / "set-000000.idx.json"
    data, index = tar.read_bytes(), sidecar.read_bytes()
    rng = np.random.default_rng(1)
    faults = 0
    for turn in range(200):
        tar.write_bytes(mutate(data, rng))
        sidecar.write_bytes(mutate(index, rng) if turn % 2 else b"")
        try:
            shards = Shards(f"{tmp_path}/*.tar")
        except ValueError:  # no samples at all
            continue
        for number in range(len(shards)):
            try:
                shards.read(number)
            except DamagedSample:
                faults += 1
    assert faults > 100
