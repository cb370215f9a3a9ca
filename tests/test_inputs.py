"""Files of pictures and depth, as users have them: an array, or why not."""

import io
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import save_release

from mofo.data import inputs
from mofo.data.fit import FITS
from mofo.data.inputs import MAX_PIXELS, read_depth, read_picture
from mofo.pipeline import Mofo

CODES = np.arange(20 * 30, dtype=np.uint16).reshape(20, 30) * 100


@pytest.fixture(scope="module")
def mofo(tmp_path_factory) -> Mofo:
    return Mofo.load(save_release(tmp_path_factory.mktemp("release")), device="cpu")


def photo(height: int = 20, width: int = 30) -> Image.Image:
    """Red grows downwards, green to the right; blue is constant."""
    red, green = np.meshgrid(np.linspace(0, 250, height), np.linspace(0, 250, width), indexing="ij")
    return Image.fromarray(np.stack([red, green, np.full_like(red, 60)], -1).astype(np.uint8))


def see_through() -> Image.Image:
    image = photo().convert("RGBA")
    left = np.where(np.arange(30) < 15, 0, 255).astype(np.uint8)
    image.putalpha(Image.fromarray(np.tile(left, (20, 1))))
    return image


def rotated(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown after a quarter turn clockwise
    photo().save(path, exif=exif, quality=95)


GREY = np.array(photo().convert("L"))
TRIPLE = GREY[..., None].repeat(3, 2)


PICTURES = [
    ("portrait.png", photo(60, 20), np.array(photo(60, 20))),
    ("panorama.png", photo(20, 160), np.array(photo(20, 160))),
    ("row.png", photo(1, 200), np.array(photo(1, 200))),
    ("column.png", photo(200, 1), np.array(photo(200, 1))),
    ("pixel.png", photo(1, 1), np.array(photo(1, 1))),
    ("grey.png", photo().convert("L"), TRIPLE),
    ("grey.jpg", photo().convert("L"), TRIPLE),
    (
        "sixteen.png",
        Image.fromarray(GREY.astype(np.uint16) * 257),
        TRIPLE,
    ),
    ("bilevel.png", Image.fromarray(GREY > 100), np.where(GREY > 100, 255, 0)[..., None]),
    ("palette.png", photo().quantize(256), np.array(photo())),
    ("palette.gif", photo().quantize(256), np.array(photo())),
    ("cmyk.jpg", photo().convert("CMYK"), np.array(photo())),
    ("cmyk.tif", photo().convert("CMYK"), np.array(photo())),
    ("photo.webp", photo(), np.array(photo())),
    ("photo.bmp", photo(), np.array(photo())),
    (
        "rgba.png",
        see_through(),
        np.where(np.arange(30)[:, None] < 15, 255, np.array(photo())),
    ),
]


@pytest.mark.parametrize(("name", "image", "expected"), PICTURES)
def test_every_kind_of_picture_is_read(
    name: str, image: Image.Image, expected: np.ndarray, tmp_path: Path
) -> None:
    image.save(tmp_path / name)
    pixels = read_picture(tmp_path / name)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (image.height, image.width, 3)
    # Palettes, JPEG and WebP lose a little.
    assert np.abs(pixels.astype(float) - expected).mean() < 8


@pytest.mark.parametrize("fit", FITS)
def test_every_kind_of_picture_is_given_depth_at_its_size(
    mofo: Mofo, fit: str, tmp_path: Path
) -> None:
    rotated(tmp_path / "turned.jpg")
    paths, sizes = [tmp_path / "turned.jpg"], [(30, 20)]
    for name, image, _ in PICTURES:
        image.save(tmp_path / name)
        paths.append(tmp_path / name)
        sizes.append((image.height, image.width))
    made = mofo.image_to_depth(paths, fit=fit, num_steps=1)
    for one, size in zip(made, sizes, strict=True):
        assert one.depth.shape == one.valid.shape == one.image.shape[:2] == size
        assert (one.depth[one.valid] > 0).all()


def test_forty_megapixels_are_given_depth(mofo: Mofo, tmp_path: Path) -> None:
    Image.new("L", (8000, 5000), 7).save(tmp_path / "in.png", compress_level=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        made = mofo.image_to_depth(tmp_path / "in.png", num_steps=1)
    assert made.image.shape == (5000, 8000, 3)
    assert (made.image[::999, ::999] == 7).all()
    assert made.depth.shape == (5000, 8000)


def test_a_rotated_photograph_stands_upright(tmp_path: Path) -> None:
    rotated(tmp_path / "in.jpg")
    pixels = read_picture(tmp_path / "in.jpg").astype(int)
    assert pixels.shape == (30, 20, 3)
    # What was stored as the left column is shown as the top row, what was the top as the right.
    assert pixels[0, :, 1].mean() < 30
    assert pixels[-1, :, 1].mean() > 220
    assert pixels[:, -1, 0].mean() < 30


def test_the_first_picture_of_an_animation_is_read(tmp_path: Path) -> None:
    red, blue = (Image.new("RGB", (4, 3), colour) for colour in ("red", "blue"))
    red.save(tmp_path / "in.gif", save_all=True, append_images=[blue])
    assert (read_picture(tmp_path / "in.gif") == (255, 0, 0)).all()


def test_a_picture_of_the_user_stays_open() -> None:
    image = photo()
    read_picture(image)
    assert image.getpixel((0, 0)) == (0, 0, 60)


def bare_png(path: Path, width: int, height: int) -> Path:
    """A file that only claims its size."""
    small = io.BytesIO()
    Image.new("I;16", (1, 1)).save(small, format="PNG")
    content = bytearray(small.getvalue())
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("read", [read_picture, read_depth])
@pytest.mark.parametrize("width", [10_001, 50_000])
def test_a_picture_over_the_limit_is_refused_by_its_header(read, width: int, tmp_path) -> None:
    path = bare_png(tmp_path / "in.png", width, 10_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"in\.png cannot be read .*at most 100"):
            read(path)


def test_arrays_over_the_limit_are_refused() -> None:
    side = int(MAX_PIXELS**0.5) + 1
    with pytest.raises(ValueError, match=f"picture has {side}x{side} pixels, but at most 100"):
        read_picture(np.broadcast_to(np.uint8(0), (side, side, 3)))
    with pytest.raises(ValueError, match="depth has .* pixels, but at most 100 megapixels"):
        read_depth(np.broadcast_to(np.float32(1), (side, side)))


@pytest.mark.parametrize("suffix", ["eps", "png"])
def test_a_file_that_would_start_a_program_is_not_opened(suffix: str, tmp_path: Path) -> None:
    photo().save(tmp_path / "in.eps")
    path = (tmp_path / "in.eps").rename(tmp_path / f"in.{suffix}")
    with pytest.raises(ValueError, match="cannot identify image file"):
        read_picture(path)


def test_a_float_picture_and_a_cut_file_are_refused_by_name(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match=r"float\.tif cannot be read as a picture: .*floats"):
        read_picture(tmp_path / "float.tif")
    photo(100, 100).save(tmp_path / "cut.jpg")
    content = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cut\.jpg cannot be read as a picture: .*truncated"):
        read_picture(tmp_path / "cut.jpg")


def saved(path: Path, values: np.ndarray) -> Path:
    match path.suffix:
        case ".npy":
            np.save(path, values)
        case ".npz":
            np.savez_compressed(path, values)
        case ".exr":
            exr = pytest.importorskip("OpenEXR")
            exr.File({"type": exr.scanlineimage}, {"Y": values}).write(str(path))
        case _:
            Image.fromarray(values).save(path)
    return path


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("a.npy", np.float64),
        ("a.npy", np.float16),
        ("a.npy", np.int32),
        ("a.NPY", np.float32),
        ("a.npz", np.float32),
        ("a.exr", np.float32),
        ("a.exr", np.float16),
        ("a.exr", np.uint32),
        ("a.png", np.uint16),
        ("a.tif", np.uint16),
        ("a.tiff", np.float32),
        ("a.tif", np.int32),
    ],
)
def test_depth_of_every_format_keeps_its_unit(name: str, dtype: type, tmp_path: Path) -> None:
    path = saved(tmp_path / name.lower(), CODES.astype(dtype)).rename(tmp_path / name)
    metres, valid = read_depth(path)
    assert metres.dtype == np.float32
    assert (metres == CODES.astype(dtype)).all()
    assert (valid == (CODES > 0)).all()


def test_a_big_endian_and_a_compressed_tiff_are_read(tmp_path: Path) -> None:
    Image.fromarray(CODES).save(tmp_path / "a.tif", compression="tiff_lzw")
    Image.frombytes("I;16B", (30, 20), CODES.byteswap().tobytes()).save(tmp_path / "b.tif")
    for name in ("a.tif", "b.tif"):
        assert (read_depth(tmp_path / name)[0] == CODES).all()


def test_an_archive_may_hold_other_arrays_beside_one_map(tmp_path: Path) -> None:
    intrinsics, mask = np.eye(3), np.ones((20, 30), bool)
    np.savez(tmp_path / "named.npz", depth=CODES, intrinsics=intrinsics, mask=mask)
    np.savez(tmp_path / "only.npz", z=CODES, focal=np.float64(3), image=np.zeros((20, 30, 3)))
    for name in ("named.npz", "only.npz"):
        assert (read_depth(tmp_path / name)[0] == CODES).all()


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (
            {"z": CODES, "mask": CODES > 0},
            r"holds z \(20, 30\), mask \(20, 30\), but must hold one",
        ),
        ({"image": np.zeros((4, 4, 3))}, r"holds image \(4, 4, 3\), but must"),
        ({"depth": np.zeros((2, 4, 4))}, r"holds depth \(2, 4, 4\), but must"),
        ({"depth": CODES, "valid": np.ones(3, bool)}, "its depth and its valid have different"),
        ({}, "holds nothing"),
    ],
)
def test_an_archive_without_a_clear_map_says_what_it_holds(
    arrays: dict, words: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=rf"a\.npz cannot be read as depth \((it )?{words}"):
        read_depth(tmp_path / "a.npz")


def test_an_archive_is_never_unpickled_and_not_inflated_without_limit(
    tmp_path: Path, monkeypatch
) -> None:
    objects = np.array([[{"a": 1}]], dtype=object)
    np.savez(tmp_path / "objects.npz", depth=objects, allow_pickle=True)
    with pytest.raises(ValueError, match="Object arrays cannot be loaded"):
        read_depth(tmp_path / "objects.npz")
    np.savez_compressed(tmp_path / "large.npz", depth=np.ones((100, 100)))
    monkeypatch.setattr(inputs, "MAX_PIXELS", 99 * 99)
    with pytest.raises(ValueError, match="at most 0 megapixels"):
        read_depth(tmp_path / "large.npz")


def test_an_array_file_that_claims_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    header = io.BytesIO()
    shape = {"descr": "<f4", "fortran_order": False, "shape": (9_000, 9_000)}
    np.lib.format.write_array_header_1_0(header, shape)
    (tmp_path / "a.npy").write_bytes(header.getvalue() + b"1234")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("depth.npy", header.getvalue() + b"1234")
    for name in ("a.npy", "a.npz"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as depth"):
            read_depth(tmp_path / name)


def test_an_archive_says_where_its_depth_is_valid(tmp_path: Path) -> None:
    valid = np.zeros((20, 30), bool)
    np.savez(tmp_path / "none.npz", depth=CODES, valid=valid)
    valid[3:5] = True
    np.savez(tmp_path / "some.npz", depth=CODES, valid=valid)
    assert (read_depth(tmp_path / "some.npz")[1] == valid).all()
    with pytest.raises(ValueError, match="has no valid pixel"):
        read_depth(tmp_path / "none.npz")


@pytest.mark.parametrize("shape", [(1, 20, 30), (20, 30, 1)])
def test_an_axis_of_length_1_is_no_colour(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be .h, w.: take out the axis of length 1"):
        read_depth(np.ones(shape))


def test_text_is_no_array_file_and_nobody_is_told_to_unpickle_it(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_text("1.0 2.0 3.0")
    with pytest.raises(ValueError, match="it is no file of np.save or np.savez"):
        read_depth(tmp_path / "a.npy")


def test_a_file_of_another_kind_than_its_name_is_refused(tmp_path: Path) -> None:
    for name in ("a.npz", "a.npy", "a.exr"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 and nothing more")
        with pytest.raises(ValueError, match=f"{name} cannot be read as depth"):
            read_depth(tmp_path / name)


def test_exr_channels_are_chosen_by_name_or_refused_by_name(tmp_path: Path) -> None:
    exr = pytest.importorskip("OpenEXR")
    values = CODES.astype(np.float32)

    def write(*names: str) -> Path:
        path = tmp_path / "a.exr"
        exr.File({"type": exr.scanlineimage}, dict.fromkeys(names, values)).write(str(path))
        return path

    for names in (("R",), ("Z", "R"), ("View.Combined.R", "View.Depth.Z"), ("A", "depth")):
        assert (read_depth(write(*names))[0] == CODES).all()
    with pytest.raises(ValueError, match="has the channels B, G, R, but must have one"):
        read_depth(write("R", "G", "B"))


def test_exr_without_its_library_says_what_to_install(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "OpenEXR", None)
    with pytest.raises(ValueError, match=r"a\.exr .*pip install OpenEXR"):
        read_depth(tmp_path / "a.exr")


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("L", "8-bit"),
        ("1", "8-bit"),
        ("P", "a palette: colours cannot be turned back into depth"),
        ("RGB", "the mode RGB: colours"),
        ("RGBA", "the mode RGBA: colours"),
        ("LA", "the mode LA: colours"),
    ],
)
def test_a_picture_of_depth_is_refused_with_the_reason(
    mode: str, words: str, tmp_path: Path
) -> None:
    photo().convert(mode).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=rf"a\.png cannot be read as depth .*{words}"):
        read_depth(tmp_path / "a.png")


@pytest.mark.parametrize("dtype", ["complex64", "U3", "O", "M8[s]", "bool"])
def test_what_is_no_number_is_no_depth(dtype: str) -> None:
    with pytest.raises(ValueError, match="depth is made of numbers"):
        read_depth(np.ones((3, 3)).astype("i8").astype(dtype))


def test_numbers_beyond_float32_are_not_valid() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metres, valid = read_depth(np.array([[1e300, 2.0, np.nan, -np.inf, -1.0]]))
    assert metres.tolist() == [[0, 2, 0, 0, 0]]
    assert valid.tolist() == [[False, True, False, False, False]]
