"""Shards: what is written is what is read, or a fault that is named."""

import errno
import io
import json
import os
import shutil
import tarfile
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pictures import encoded, picture, sparse
from PIL import Image

from mofo.data import shards as shards_module
from mofo.data import storage
from mofo.data.sample import Log, Sample, decode_picture, encode_depth
from mofo.data.shards import DamagedSample, Shards
from mofo.data.write import write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 pictures in shards of 6."""
    write(map(picture, range(40)), tmp_path / "set", "pictures", samples_per_shard=6)
    return tmp_path / "set"


def wide(number: int) -> Sample:
    """A picture of which the nearest pixel is at a millimetre, the farthest at 7.68 m."""
    sample = picture(number)
    metres = sample.metres.copy()
    metres[tuple(np.argwhere(sample.valid)[0])] = 0.001
    return replace(sample, key=f"wide-{number}", metres=metres)


def kinds() -> list[Sample]:
    """One sample of each kind that a shard can hold."""
    data = encoded(Image.fromarray(picture(5).image), "JPEG", quality=90)
    masked = picture(4)
    return [
        picture(0),
        sparse(1),
        picture(2, depth=False),
        replace(picture(3), captions=(), intrinsics=None, metric=False),
        replace(masked, sky=~masked.valid),
        replace(picture(5), picture=decode_picture(data), image_bytes=data),
        wide(6),
    ]


def assert_same(new: Sample, old: Sample) -> None:
    """`new` is `old` after one round through the disk."""
    for name in ("key", "captions", "metric", "source", "licence"):
        assert getattr(new, name) == getattr(old, name), name
    for name in ("image", "intrinsics", "valid", "sky", "points"):
        np.testing.assert_array_equal(getattr(new, name), getattr(old, name), name)
    if old.metres is None:
        assert new.metres is None
        return
    measured, depth = new.metres[new.valid], old.metres[old.valid]
    if new.depth_scale is not None:
        np.testing.assert_allclose(measured, depth, rtol=0, atol=0.5001 * new.depth_scale)
    else:
        step = Log(float(depth.min()), float(depth.max())).step
        np.testing.assert_allclose(measured, depth, rtol=0.5001 * step + 1e-7, atol=0)


# Writing and reading.


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    assert write(kinds(), tmp_path, "set", samples_per_shard=3)
    shards = Shards(tmp_path)
    assert len(shards) == len(kinds())
    for index, old in enumerate(kinds()):
        assert_same(shards.read(index), old)


def test_a_second_round_through_the_disk_changes_nothing(tmp_path: Path) -> None:
    write(kinds(), tmp_path / "once", "set", samples_per_shard=3)
    shards = Shards(tmp_path / "once")
    again = (shards.read(index) for index in range(len(shards)))
    write(again, tmp_path / "twice", "set", samples_per_shard=3)
    assert Shards(tmp_path / "twice").manifest["hash"] == shards.manifest["hash"]


def test_encoded_images_are_stored_as_they_are(tmp_path: Path) -> None:
    data = encoded(Image.fromarray(picture(0).image), "JPEG", quality=30)
    sample = replace(picture(0), picture=decode_picture(data), image_bytes=data)
    write([sample], tmp_path, "set")
    with tarfile.open(tmp_path / "set-000000.tar") as tar:
        assert tar.extractfile("picture-0000.jpg").read() == data


def test_an_image_of_another_size_than_its_bytes_is_refused(tmp_path: Path) -> None:
    data = encoded(Image.new("RGB", (5, 4)), "JPEG")
    with pytest.raises(ValueError, match="picture-0000: image_bytes hold 4x5 pixels"):
        write([replace(picture(0), image_bytes=data)], tmp_path, "set")


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


def test_a_sample_that_cannot_be_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="picture-0001.*no measured pixel"):
        write([replace(picture(1), valid=np.zeros((24, 32), bool))], tmp_path, "set")
    with pytest.raises(ValueError, match="picture-0001: depth spans.*change depth_scale"):
        write([replace(picture(1), depth_scale=10.0)], tmp_path, "set")
    assert list(tmp_path.iterdir()) == []


def test_impossible_depth_that_is_marked_invalid_is_dropped(tmp_path: Path) -> None:
    sample = picture(1)
    metres = np.where(sample.valid, sample.metres, np.float32(np.nan))
    write([replace(sample, metres=metres)], tmp_path, "set")
    np.testing.assert_array_equal(Shards(tmp_path).read(0).valid, sample.valid)


def test_a_key_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="picture-0000.*twice"):
        write([picture(0), picture(1), picture(0)], tmp_path, "set", samples_per_shard=2)


def test_the_index_says_where_each_member_is(folder: Path) -> None:
    path = folder / "pictures-000003.tar"
    rows = json.loads(path.with_suffix(".idx.json").read_text())["samples"]
    with tarfile.open(path) as tar:
        found = {m.name: (m.offset_data, m.size) for m in tar}
        for key, spans, size in rows:
            assert size == [24, 32]
            for extension, (offset, size, crc) in spans.items():
                name = f"{key}.{extension}"
                assert found.pop(name) == (offset, size)
                assert zlib.crc32(tar.extractfile(name).read()) == crc
    assert not found


def test_sizes_of_images_are_known_without_reading_them(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    data = encoded(Image.new("RGB", (7, 5)), "JPEG", exif=turned)
    upright = {"picture": decode_picture(data), "image_bytes": data}
    samples = [picture(0), replace(picture(1, depth=False), **upright)]
    write(samples, tmp_path, "set")
    (shards := Shards(tmp_path)).read = None
    assert [shards.shape(index) for index in (0, 1)] == [(24, 32), (7, 5)]
    (tmp_path / "set-000000.idx.json").unlink()
    assert Shards(tmp_path).shape(0) is None


def test_the_manifest_counts_what_was_written(tmp_path: Path) -> None:
    quarter = np.zeros((4, 8), bool)
    quarter[:2, :4] = True
    metres = np.where(quarter, np.float32(2), np.float32(0))
    near = {"picture": Image.new("RGB", (8, 4)), "metres": metres, "valid": quarter}
    samples = [
        *(replace(picture(n), **near, intrinsics=None) for n in range(3)),
        replace(sparse(3, size=(10, 20)), captions=()),
        replace(picture(4, size=(100, 6), depth=False), licence="CC BY 4.0", source="b"),
    ]
    write(samples, tmp_path, "set", samples_per_shard=2, made_from={"converter": "by hand"})
    manifest = Shards(tmp_path).manifest
    counts = {"samples": 5, "with_depth": 4, "with_points": 1, "with_sky": 1, "with_captions": 4}
    counts |= {"with_intrinsics": 1, "metric": 4, "made_from": {"converter": "by hand"}}
    assert {name: manifest[name] for name in counts} == counts
    assert manifest["licences"] == ["CC BY 4.0", "CC0"]
    assert manifest["sources"] == ["b", "test"]
    sizes = {"min": [4, 8], "median": [4, 8], "max": [100, 6]}
    assert manifest["image_sizes"] == sizes
    hit = len({(int(u), int(v)) for u, v, _ in samples[3].points}) / 200
    assert manifest["measured"]["mean"] == pytest.approx((3 * 0.25 + hit) / 4, abs=1e-5)
    assert manifest["measured"]["percentiles"]["50"] == pytest.approx(sorted([0.25] * 3 + [hit])[1])
    histogram = manifest["depth_histogram"]
    # 2 m lies in one bin of an eighth of a decade.
    assert histogram["metric"]["pixels"] == [24]
    assert histogram["metric"]["edges"] == [1.778, 2.371]
    assert sum(histogram["relative"]["pixels"]) == 50
    assert [shard["samples"] for shard in manifest["shards"]] == [2, 2, 1]
    files = [tmp_path / shard["name"] for shard in manifest["shards"]]
    assert manifest["bytes"] == sum(path.stat().st_size for path in files)
    assert [s["sha256"] for s in manifest["shards"]] == [storage.sha256(path) for path in files]


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

    monkeypatch.setattr(storage, "open", full, raising=False)
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


# Other formats.


def archive(path: Path, members: dict[str, bytes]) -> Path:
    """A tar as any program writes it."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def row(**changes) -> bytes:
    plain = {"format": 2, "captions": [], "intrinsics": None, "metric": True, "depth": None}
    return json.dumps({**plain, "source": "test", "licence": "CC0", **changes}).encode()


def test_sets_of_format_1_are_read(tmp_path: Path) -> None:
    plain = {"format": 1, "intrinsics": None, "metric": True, "source": "s", "licence": "l"}
    with_depth, without = plain | {"depth_scale": 0.5, "caption": "old"}, plain | {"caption": ""}
    sample = picture(0)
    image, codes = encoded(Image.fromarray(sample.image)), np.arange(768).reshape(24, 32)
    members = {
        "a.png": image,
        "a.depth.png": encoded(Image.fromarray(codes.astype(np.uint16))),
        "a.json": json.dumps(with_depth).encode(),
        "b.png": image,
        "b.json": json.dumps(without | {"depth_scale": None}).encode(),
    }
    path = archive(tmp_path / "old-000000.tar", members)
    with tarfile.open(path) as tar:
        spans = {
            m.name: [m.offset_data, m.size, zlib.crc32(members[m.name])] for m in tar.getmembers()
        }
    samples = [
        ["a", {e: spans[f"a.{e}"] for e in ("png", "depth.png", "json")}],
        ["b", {e: spans[f"b.{e}"] for e in ("png", "json")}],
    ]
    size = path.stat().st_size
    sidecar = tmp_path / "old-000000.idx.json"
    sidecar.write_text(json.dumps({"bytes": size, "samples": samples}))
    shard = {"name": path.name, "samples": 2, "bytes": size, "sha256": storage.sha256(path)}
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "shards": [shard]}))
    for _ in range(2):
        shards = Shards(tmp_path)
        first, second = shards.read(0), shards.read(1)
        np.testing.assert_array_equal(first.metres, codes * np.float32(0.5))
        np.testing.assert_array_equal(first.valid, codes > 0)
        assert (first.captions, second.captions) == (("old",), ())
        assert second.depth is None
        # A second time without what format 1 could not anchor.
        sidecar.write_text(json.dumps({"bytes": size + 1, "samples": samples[::-1]}))


def test_a_newer_format_is_refused(folder: Path, tmp_path: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(ValueError, match="format 3, but this version reads up to 2"):
        Shards(folder)
    archive(tmp_path / "new.tar", {"a.png": b"", "a.json": row(format=3)})
    with pytest.raises(DamagedSample, match="format 3 is newer"):
        Shards(f"{tmp_path}/*.tar").read(0)


# Damage.


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
SHARD, INDEX = "pictures-000002.tar", "pictures-000002.idx.json"


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


# Size.


def test_ten_thousand_shards_open_in_two_seconds_and_no_sidecar_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    one = manifest["shards"][2]
    manifest["shards"] = [one | {"name": f"pictures-{n:06d}.tar"} for n in range(10_000)]
    path.write_text(json.dumps(manifest, indent=1))
    asked = []
    read = shards_module.read_bytes
    monkeypatch.setattr(shards_module, "read_bytes", lambda path: asked.append(path) or read(path))
    started = time.perf_counter()
    shards = Shards(folder)
    assert len(shards) == 60_000
    assert time.perf_counter() - started < 2
    assert asked == [str(path)]
    assert shards.read(2 * 6 + 1).key == "picture-0013"
    assert asked == [str(path), str(folder / INDEX)]


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
