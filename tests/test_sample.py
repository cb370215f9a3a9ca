"""What a sample may hold, and what its files decode to."""

import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pictures import encoded, picture, sparse
from PIL import Image

from mofo.data.sample import (
    MAX_CODE,
    Log,
    Sample,
    choose_coding,
    decode_depth,
    decode_image,
    decode_mask,
    encode_depth,
    encode_mask,
    rasterise,
)


def put(sample: Sample, name: str, array: object) -> Sample:
    """The sample with another array, past the shape types that would object to it in tests only."""
    changed = replace(sample)
    object.__setattr__(changed, name, array)
    return changed


# What samples may hold.


@pytest.mark.parametrize(
    ("depth", "reason"),
    [(np.nan, "NaN"), (np.inf, "infinite"), (-1.0, "negative"), (0.0, "zero")],
)
def test_depth_that_cannot_be_measured_is_refused(depth: float, reason: str) -> None:
    sample = picture(1)
    metres = sample.metres.copy()
    metres[tuple(np.argwhere(sample.valid)[0])] = depth
    with pytest.raises(ValueError, match=f"(?s)picture-0001.*1 of .*{reason}"):
        replace(sample, metres=metres).check()
    points = sparse(1).points.copy()
    points[7, 2] = depth
    with pytest.raises(ValueError, match=f"(?s)sparse-0001: 1 of 50.*{reason}"):
        replace(sparse(1), points=points).check()


@pytest.mark.parametrize("place", [(-0.1, 3), (32, 3), (3, 24), (np.nan, 3), (3, np.inf)])
def test_points_outside_the_image_are_refused(place: tuple) -> None:
    points = sparse(1).points.copy()
    points[7, :2] = place
    with pytest.raises(ValueError, match="1 of 50 points lie outside the image of 24x32"):
        replace(sparse(1), points=points).check()


def test_depth_without_any_measured_pixel_is_refused() -> None:
    with pytest.raises(ValueError, match="picture-0001.*no measured pixel"):
        replace(picture(1), valid=np.zeros((24, 32), bool)).check()
    with pytest.raises(ValueError, match="sparse-0001.*no measured pixel"):
        replace(sparse(1), points=np.zeros((0, 3), np.float32)).check()


def test_sky_with_depth_is_refused() -> None:
    sample = picture(1)
    replace(sample, sky=~sample.valid).check()
    with pytest.raises(ValueError, match="picture-0001: 768 pixels are sky and measured"):
        replace(
            sample,
            valid=np.ones((24, 32), bool),
            metres=sample.metres + 1,
            sky=~np.zeros((24, 32), bool),
        ).check()


@pytest.mark.parametrize(
    ("name", "array", "reason"),
    [
        ("metres", np.ones((24, 31), np.float32), r"metres is \(24, 31\).*\(24, 32\)"),
        ("valid", np.ones((24, 32), np.uint8), "valid is uint8, but must be bool"),
        ("sky", np.ones((2, 2), bool), r"sky is \(2, 2\)"),
        ("points", np.ones((5, 3), np.float32), "a map or as points, not both"),
        ("picture", np.ones((24, 32, 3), np.uint8), r"mode \(ndarray\).*Image.fromarray"),
        ("picture", Image.new("RGBA", (32, 24)), "picture has mode RGBA"),
        ("metres", None, "both metres and valid"),
        ("captions", ("a text", ""), "captions"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(name: str, array: object, reason: str) -> None:
    with pytest.raises(ValueError, match=f"picture-0001: .*{reason}"):
        put(picture(1), name, array).__post_init__()


def test_points_of_another_shape_are_refused() -> None:
    for points in (np.ones((5, 2), np.float32), np.ones(3, np.float32)):
        with pytest.raises(ValueError, match="points are .* must be"):
            put(sparse(1), "points", points).__post_init__()


@pytest.mark.parametrize(
    ("row", "column", "value", "reason"),
    [
        (0, 0, np.nan, "finite"),
        (1, 2, np.inf, "finite"),
        (0, 0, 0.0, "focal lengths are 0"),
        (1, 1, -30.0, "focal lengths are 30 and -30"),
        (2, 2, 0.0, "last row"),
        (2, 0, 1.0, "last row"),
    ],
)
def test_absurd_intrinsics_are_refused(row: int, column: int, value: float, reason: str) -> None:
    intrinsics = picture(1).intrinsics.copy()
    intrinsics[row, column] = value
    with pytest.raises(ValueError, match=f"picture-0001: .*{reason}"):
        replace(picture(1), intrinsics=intrinsics)


@pytest.mark.parametrize("key", ["", "../up", "a.b", "a/b", "/etc/passwd", "a\\b", "a\0b"])
def test_keys_that_are_no_file_stems_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match="key"):
        replace(picture(0), key=key)


def test_a_sample_needs_neither_depth_nor_caption_nor_intrinsics() -> None:
    black = Image.new("RGB", (6, 4))
    sample = Sample(key="bare", picture=black, metric=True, source="test", licence="CC0")
    sample.check()
    assert sample.depth is None
    assert sample.captions == ()


# Points.


def test_a_pixel_of_points_holds_the_nearest_return_that_falls_into_it() -> None:
    points = [(0, 0, 9), (0.99, 0.99, 5), (0.5, 0.5, 7), (1, 0, 4), (5.999, 3.999, 3), (2.5, 1, 8)]
    metres, valid = rasterise(np.array(points, np.float32), (4, 6))
    expected = np.zeros((4, 6), np.float32)
    expected[0, 0], expected[0, 1], expected[3, 5], expected[1, 2] = 5, 4, 3, 8
    np.testing.assert_array_equal(metres, expected)
    np.testing.assert_array_equal(valid, expected > 0)


def test_points_outside_fall_nowhere() -> None:
    points = np.array([(-0.01, 1, 2), (6, 1, 2), (1, 4, 2), (np.nan, 1, 2)], np.float32)
    metres, valid = rasterise(points, (4, 6))
    assert not valid.any()
    assert not metres.any()


# Files.


def half(left: int | tuple, right: int | tuple, mode: str) -> Image.Image:
    image = Image.new(mode, (6, 4), left)
    image.paste(right, (3, 0, 6, 4))
    return image


def sixteen_bit_rgb() -> bytes:
    """A PNG that Pillow cannot write: 16 bits for each of red, green and blue."""

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


@pytest.mark.parametrize("step", [0.0, -1.0, np.nan, np.inf, 1e38, 1e-60])
def test_a_step_that_makes_no_depth_is_refused(step: float) -> None:
    data = encode_depth(np.ones((2, 2), np.float32), np.ones((2, 2), bool), 1.0)
    with pytest.raises(ValueError, match="depth_scale is"):
        decode_depth(data, step)


def test_depth_that_does_not_fit_its_step_is_refused() -> None:
    for metres in (0.1, 70000.0):
        with pytest.raises(ValueError, match="spans.*change depth_scale"):
            encode_depth(np.full((2, 2), metres, np.float32), np.ones((2, 2), bool), 1.0)


@pytest.mark.parametrize(
    ("low", "high", "coding"),
    [(0.5, 10, 0.0002), (2, 80, 0.002), (0.5, 80, 0.002), (1, 1000, Log(1, 1000))],
)
def test_a_wide_range_is_coded_by_its_logarithm(low: float, high: float, coding: object) -> None:
    metres = np.array([[low, high]], np.float32)
    assert choose_coding(metres, np.ones((1, 2), bool)) == coding


@pytest.mark.parametrize("high", [1e2, 1e4, 1e8])
def test_depth_in_the_log_coding_is_right_to_half_a_step_and_stays_so(high: float) -> None:
    rng = np.random.default_rng(0)
    metres = np.exp(rng.uniform(np.log(0.01), np.log(high), (40, 50))).astype(np.float32)
    valid = rng.random(metres.shape) < 0.9
    coding = choose_coding(metres, valid)
    assert isinstance(coding, Log)
    again, measured = decode_depth(encode_depth(metres, valid, coding), coding)
    np.testing.assert_array_equal(measured, valid)
    error = np.abs(np.log(again[valid].astype(np.float64) / metres[valid]))
    assert error.max() <= coding.step / 2 + 2**-24  # of float32
    assert coding.step == pytest.approx(np.log(coding.far / coding.near) / (MAX_CODE - 1))
    # Nearest and farthest are exact, so a second time the coding is the same.
    assert choose_coding(again, valid) == coding
    twice, _ = decode_depth(encode_depth(again, valid, coding), coding)
    np.testing.assert_array_equal(twice, again)


def test_a_mask_has_one_bit_a_pixel_and_survives() -> None:
    mask = np.random.default_rng(0).random((24, 33)) < 0.5
    np.testing.assert_array_equal(decode_mask(encode_mask(mask)), mask)
    with pytest.raises(ValueError, match="1 bit"):
        decode_mask(encoded(half(1, 2, "L")))
