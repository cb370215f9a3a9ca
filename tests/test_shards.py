"""Shards: what is written is what is read, older formats too, however many shards there are."""

import json
import tarfile
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from packed import INDEX, archive, forty, full_disk, kinds, row
from pictures import encoded, picture, sparse
from PIL import Image

from mofo.data import shards as shards_module
from mofo.data import storage
from mofo.data.sample import Log, Sample, decode_picture
from mofo.data.shards import DamagedSample, Shards
from mofo.data.write import write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return forty(tmp_path / "set")


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
    monkeypatch.setattr(storage, "open", full_disk(after), raising=False)
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
