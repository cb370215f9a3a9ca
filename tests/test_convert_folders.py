"""Folders of images, with and without depth, and MoGe's layout: depth where it was put."""

import csv
import json
import pickle
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import OpenEXR
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin

from mofo.data.convert import images, moge, rgbd_folder
from mofo.data.sample import Sample

GOLDEN = Path(__file__).parent / "golden"


def picture(path: Path, size: tuple[int, int] = (8, 6), **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    w, h = size
    pixels = np.random.default_rng(0).integers(0, 255, (h, w, 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def samples_of(items: list, read: object) -> list[Sample]:
    """Checked samples of items that went to another process and came back."""
    assert callable(read)
    samples = [sample for item in pickle.loads(pickle.dumps(items)) for sample in read(item)]
    for sample in samples:
        sample.check()
    return samples


def captions_of(source: Path, **options: object) -> dict[str, tuple[str, ...]]:
    found = samples_of(images.find(source, **options), images.read)
    return {sample.key: sample.captions for sample in found}


def test_images_are_kept_as_they_are_or_decoded_if_shards_do_not_hold_them(tmp_path: Path) -> None:
    for name in ("a.JPG", "a.png", "sub/b.webp", "sub/c.bmp", "sub/d.tif"):
        picture(tmp_path / name)
    (tmp_path / "notes.md").write_text("no image")
    found = samples_of(images.find(tmp_path, dataset="mine", licence="CC0"), images.read)
    assert [sample.key for sample in found] == ["a_JPG", "a_png", "sub_b_webp", "sub_c_bmp",
                                                "sub_d_tif"]  # fmt: skip
    published = [None if s.image_bytes is None else len(s.image_bytes) for s in found]
    sizes = [(tmp_path / name).stat().st_size for name in ("a.JPG", "a.png", "sub/b.webp")]
    assert published == [*sizes, None, None]
    for sample in found:
        assert sample.image.shape == (6, 8, 3)
        assert sample.depth is None
        assert (sample.captions, sample.source, sample.licence) == ((), "mine", "CC0")
    np.testing.assert_array_equal(found[1].image, found[3].image)


def test_each_line_of_a_text_file_beside_an_image_is_a_caption(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    picture(tmp_path / "b.jpg")
    (tmp_path / "a.txt").write_text("a grey cat\n\n  Käse \n", "utf-8")
    assert captions_of(tmp_path) == {"a_jpg": ("a grey cat", "Käse"), "b_jpg": ()}


ROWS = [("sub/a.jpg", "one"), ("sub/a.jpg", "two, with a comma"), ("b.jpg", "")]
WANTED = {"b_jpg": (), "sub_a_jpg": ("one", "two, with a comma")}


@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
def test_a_table_gives_one_or_several_captions(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "pictures"
    picture(source / "sub/a.jpg")
    picture(source / "b.jpg")
    # With a table, text files count for nothing.
    (source / "b.txt").write_text("not this")
    table = tmp_path / f"table.{kind}"
    if kind == "json":
        table.write_text(json.dumps({"sub/a.jpg": ["one", "two, with a comma"], "b.jpg": ""}))
        options = {}
    elif kind == "csv":
        with open(table, "w", newline="") as file:
            csv.writer(file).writerows([("file_name", "other", "caption")])
            csv.writer(file).writerows([(name, "x", text) for name, text in ROWS])
        options = {}
    else:
        names, texts = zip(*ROWS, strict=True)
        pq.write_table(pa.table({"path": names, "text": [*texts[:2], None], "n": [1, 2, 3]}), table)
        options = {"image_column": "path", "caption_column": "text"}
    assert captions_of(source, captions=str(table), **options) == WANTED


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "file,caption\na.jpg,x\n", r"not \['file_name'\]; name those .* image_column"),
        ("t.csv", "", "has the columns"),
        ("t.csv", "file_name,caption\nelsewhere/a.jpg,x\n", "none of the 1 images, which are"),
        ("t.json", '["a"]', "must be an object of file name: caption"),
        ("t.json", '{"a.jpg": 3}', "has 3 for 'a.jpg'"),
        ("t.xml", "", "accepted: .json, .csv, .parquet"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    picture(tmp_path / "a.jpg")
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        images.find(tmp_path, captions=str(tmp_path / name))


def test_an_empty_folder_of_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no image; expected .bmp, .jpeg"):
        images.find(tmp_path)


def write_png16(path: Path, codes: np.ndarray, texts: dict[str, str] | None = None) -> None:
    """A 16-bit grey PNG, chunk by chunk, as the PNG specification has it."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    h, w = codes.shape
    rows = b"".join(b"\0" + struct.pack(f">{w}H", *row) for row in codes.tolist())
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 16, 0, 0, 0, 0))
    for key, text in (texts or {}).items():
        data += chunk(b"tEXt", key.encode() + b"\0" + text.encode())
    path.write_bytes(data + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def test_16_bit_depth_is_read_in_the_stated_unit(tmp_path: Path) -> None:
    codes = np.zeros((6, 8), np.uint16)
    codes[0, 1], codes[5, 7], codes[2, 2] = 1234, 65535, 1
    write_png16(tmp_path / "depth/0.x.png", codes)
    path = picture(tmp_path / "images/0.x.jpg")
    picture(tmp_path / "images/unpaired.jpg")
    (sample,) = samples_of(rgbd_folder.find(tmp_path, unit=0.001), rgbd_folder.read)
    assert sample.metres is not None
    assert sample.valid is not None
    assert sample.key == "images_0_x"
    assert sample.metres[0, 1] == np.float32(1.234)
    assert sample.metres[5, 7] == np.float32(65.535)
    np.testing.assert_array_equal(sample.valid, codes > 0)
    assert (sample.metric, sample.depth_scale) == (True, 0.001)
    assert sample.image_bytes == path.read_bytes()
    options = {"unit": 0.001, "invalid": 65535.0, "metric": False}
    (sample,) = samples_of(rgbd_folder.find(tmp_path, **options), rgbd_folder.read)
    assert sample.valid is not None
    assert (sample.valid.sum(), sample.metric) == (2, False)


@pytest.mark.parametrize("kind", ["npy", "exr"])
def test_depth_of_floats_is_read_and_what_was_not_measured_is_invalid(
    tmp_path: Path, kind: str
) -> None:
    values = np.full((6, 8), -1, np.float32)
    values[1, 2], values[3, 4] = 0.7071068, 200.5
    values[0, :3] = np.nan, np.inf, 0
    values[5, 5] = 10000
    for scene in ("a", "b"):
        picture(tmp_path / scene / "rgb/left_0.png")
        path = tmp_path / scene / f"depth/z-0.{kind}"
        path.parent.mkdir()
        if kind == "npy":
            np.save(path, values)
        else:
            header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
            with OpenEXR.File(header, {"Z": values}) as file:
                file.write(str(path))
    items = rgbd_folder.find(
        tmp_path, unit=0.5, image="*/rgb/left_*.png", depth=f"*/depth/z-*.{kind}", invalid=10000.0
    )
    found = samples_of(items, rgbd_folder.read)
    assert [sample.key for sample in found] == ["a_rgb_left_0", "b_rgb_left_0"]
    for sample in found:
        assert sample.metres is not None
        assert sample.valid is not None
        assert sample.valid.sum() == 2
        assert sample.metres[1, 2] == np.float32(values[1, 2]) / 2
        assert sample.metres[3, 4] == 100.25
        assert sample.depth_scale is None


def test_depth_beside_its_image_is_paired_and_is_no_image_itself(tmp_path: Path) -> None:
    for name in ("a", "b"):
        picture(tmp_path / f"{name}.png")
        write_png16(tmp_path / f"{name}_depth.png", np.ones((6, 8), np.uint16))
    items = rgbd_folder.find(tmp_path, unit=1.0, image="*.png", depth="*_depth.png")
    assert [(item.key, item.depth.name) for item in items] == [
        ("a", "a_depth.png"), ("b", "b_depth.png")
    ]  # fmt: skip


def test_a_map_without_a_measured_pixel_gives_nothing(tmp_path: Path) -> None:
    picture(tmp_path / "images/0.jpg")
    write_png16(tmp_path / "depth/0.png", np.zeros((6, 8), np.uint16))
    assert not samples_of(rgbd_folder.find(tmp_path, unit=1.0), rgbd_folder.read)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": 0.0}, "unit is 0.0, but must be positive"),
        ({"unit": 1.0, "image": "images/*_*.jpg"}, "same number of '[*]'"),
        ({"unit": 1.0, "depth": "images/?*.jpg"}, "may only have '[*]'"),
        ({"unit": 1.0, "depth": "d/*.png"}, "no pair: 1 files match 'images/[*].jpg' and 0 'd/"),
    ],
)
def test_what_cannot_be_paired_is_refused(tmp_path: Path, options: dict, message: str) -> None:
    picture(tmp_path / "images/0.jpg")
    with pytest.raises(ValueError, match=message):
        rgbd_folder.find(tmp_path, **options)


def test_depth_that_cannot_be_read_or_belongs_elsewhere_is_refused(tmp_path: Path) -> None:
    def refused(image: Path, depth: Path, message: str) -> None:
        item = rgbd_folder.Item("k", image, depth, 1.0, None, True, "d", "l")
        with pytest.raises(ValueError, match=message):
            samples_of([item], rgbd_folder.read)

    image = picture(tmp_path / "0.jpg")
    refused(image, picture(tmp_path / "8bit.png"), "has mode RGB, but depth needs 16 bits")
    np.save(tmp_path / "stack.npy", np.ones((2, 6, 8)))
    refused(image, tmp_path / "stack.npy", r"float64 \(2, 6, 8\), but depth is one number")
    np.save(tmp_path / "objects.npy", np.array([[{}]]), allow_pickle=True)
    refused(image, tmp_path / "objects.npy", "allow_pickle=False")
    refused(image, image, "accepted: .npy, 16-bit .png, .exr")
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    channels = {name: np.ones((6, 8), np.float32) for name in "RG"}
    with OpenEXR.File(header, channels) as file:
        file.write(str(tmp_path / "colours.exr"))
    refused(image, tmp_path / "colours.exr", r"channels \['G', 'R'\], but must have one")
    exif = Image.Exif()
    exif[0x0112] = 3
    np.save(tmp_path / "good.npy", np.ones((6, 8)))
    refused(picture(tmp_path / "1.jpg", exif=exif), tmp_path / "good.npy", "EXIF orientation 3")


def write_instance(
    folder: Path, codes: np.ndarray, near: str, far: str, **texts: str
) -> dict[str, list]:
    picture(folder / "image.jpg", codes.shape[::-1])
    write_png16(folder / "depth.png", codes, {"near": near, "far": far, **texts})
    meta = {"intrinsics": [[0.875, 0, 0.5], [0, 1.25, 0.5625], [0, 0, 1]]}
    (folder / "meta.json").write_text(json.dumps(meta))
    return meta


def test_moge_depth_is_logarithmic_and_sky_is_no_depth(tmp_path: Path) -> None:
    codes = np.zeros((6, 8), np.uint16)
    codes[0, 0], codes[1, 1], codes[2, 2], codes[5, 7] = 1, 65534, 20001, 65535
    write_instance(tmp_path / "s/0.a", codes, "0.25", "80.0")
    (tmp_path / ".index.txt").write_text("s/0.a\n\n")
    (sample,) = samples_of(moge.find(tmp_path), moge.read)
    assert sample.metres is not None
    assert sample.valid is not None
    assert sample.sky is not None
    assert sample.key == "s_0_a"
    assert sample.metres[0, 0] == np.float32(0.25)
    assert sample.metres[1, 1] == np.float32(80)
    middle = np.exp(np.log(0.25) + 20000 / 65533 * np.log(80 / 0.25))
    np.testing.assert_allclose(sample.metres[2, 2], middle, rtol=1e-6)
    assert sample.valid.sum() == 3
    np.testing.assert_array_equal(np.argwhere(sample.sky), [(5, 7)])
    k = np.array([[7.0, 0, 4.0], [0, 7.5, 3.375], [0, 0, 1]])
    np.testing.assert_array_equal(sample.intrinsics, k)
    assert not sample.metric


def test_moge_depth_is_metric_once_its_unit_is_stated(tmp_path: Path) -> None:
    write_instance(tmp_path / "0", np.full((6, 8), 65534, np.uint16), "1", "500", unit="2.0")
    (tmp_path / ".val.txt").write_text("0\n")
    items = moge.find(tmp_path, unit=0.001, index=".val.txt", dataset="x", licence="y")
    (sample,) = samples_of(items, moge.read)
    assert sample.metres is not None
    np.testing.assert_allclose(sample.metres, 1.0, rtol=1e-6)
    assert sample.sky is None
    assert (sample.metric, sample.source, sample.licence) == (True, "x", "y")


def test_moge_maps_of_its_own_writer_are_read_as_its_own_reader_does(tmp_path: Path) -> None:
    golden = np.load(GOLDEN / "eval_golden_public.npz")
    decoded = golden["moge_depth_png/decoded"]
    (tmp_path / "0").mkdir()
    (tmp_path / "0/depth.png").write_bytes(golden["moge_depth_png/png_bytes"].tobytes())
    picture(tmp_path / "0/image.jpg", decoded.shape[::-1])
    (tmp_path / "0/meta.json").write_text('{"intrinsics": [[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]]}')
    (tmp_path / ".index.txt").write_text("0")
    (sample,) = samples_of(moge.find(tmp_path), moge.read)
    assert sample.metres is not None
    assert sample.valid is not None
    np.testing.assert_array_equal(sample.valid, np.isfinite(decoded))
    np.testing.assert_allclose(sample.metres[sample.valid], decoded[sample.valid], rtol=2e-6)
    sky = np.zeros(decoded.shape, bool) if sample.sky is None else sample.sky
    np.testing.assert_array_equal(sky, np.isposinf(decoded))


@pytest.mark.parametrize("name", ["../outside", "/etc", "a/../../b", "a\\b"])
def test_a_moge_index_never_leaves_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / ".index.txt").write_text(f"a\n{name}\n")
    with pytest.raises(ValueError, match=f"lists {re.escape(repr(name))}, which is not a folder"):
        moge.find(tmp_path)


def test_moge_folders_that_are_not_as_described_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no .index.txt; expected it to list folders"):
        moge.find(tmp_path)
    (tmp_path / ".index.txt").write_text("0")
    with pytest.raises(ValueError, match="unit is -1.0"):
        moge.find(tmp_path, unit=-1.0)
    write_instance(tmp_path / "0", np.ones((6, 8), np.uint16), "nan", "2")
    with pytest.raises(ValueError, match="spans nan to 2.0"):
        samples_of(moge.find(tmp_path), moge.read)
    write_png16(tmp_path / "0/depth.png", np.ones((6, 8), np.uint16))
    with pytest.raises(ValueError, match="16-bit PNG with near and far"):
        samples_of(moge.find(tmp_path), moge.read)
    texts = PngImagePlugin.PngInfo()
    texts.add_text("near", "1")
    texts.add_text("far", "2")
    picture(tmp_path / "0/depth.png", pnginfo=texts)
    with pytest.raises(ValueError, match="has mode RGB"):
        samples_of(moge.find(tmp_path), moge.read)
