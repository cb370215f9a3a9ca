"""What a user hands in, as arrays: pictures of any mode and depth of any unit, or why not.

Files are read as data only (nothing is unpickled, no program is started), of animations and
multi-page files the first picture. What is refused raises a ValueError that names the file.
"""

import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from PIL import Image

from mofo.data.sample import decode_image

Picture = UInt8[np.ndarray, "h w 3"]
DepthMap = tuple[Float32[np.ndarray, "h w"], Bool[np.ndarray, "h w"]]
PictureSource = str | Path | np.ndarray | Image.Image
DepthSource = str | Path | np.ndarray

# More than nearly all cameras make; a picture this large takes one to three gigabytes to open.
MAX_PIXELS = 100_000_000
# Pillow reads more, EPS among them: by running another program on the file.
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF", "PPM", "JPEG2000")
DEPTH_FILES = ".npy, .npz, .exr, 16-bit PNG, 16-bit or float TIFF"
NUMPY_MAGIC, ZIP_MAGIC = b"\x93NUMPY", b"PK"  # what .npy and .npz begin with
DEPTH_CHANNELS = ("z", "depth")  # in an OpenEXR file with several

# What Pillow, NumPy and OpenEXR raise for files that are broken or not what their name says.
UNREADABLE = (
    OSError, EOFError, SyntaxError, ValueError, RuntimeError, MemoryError, struct.error,
    tokenize.TokenError, zlib.error, zipfile.BadZipFile,
)  # fmt: skip

EIGHT_BITS = "an 8-bit picture shows depth in 256 steps of unknown meaning; give 16 bits or floats"
COLOURS = "colours cannot be turned back into depth; give one number per pixel"


def read_picture(source: PictureSource) -> Picture:
    """RGB pixels, upright, of a file or PIL image of any mode, or of a uint8 array.

    Grey is repeated, 16 bits are scaled to 8, what is transparent becomes white (as on a page),
    EXIF rotation is applied, colour profiles are not.
    """
    if isinstance(source, np.ndarray):
        grey = source.ndim == 2
        if source.dtype != np.uint8 or not (grey or source.shape[2:] == (3,)) or not source.size:
            raise ValueError(
                f"picture is {source.dtype} {source.shape}, but an array must be uint8, (h, w, 3) "
                "or (h, w); scale and convert it, or give a path or a PIL image"
            )
        _check_size(source.shape[:2], "picture")
        return np.repeat(source[..., None], 3, axis=-1) if grey else source
    name = "the PIL image" if isinstance(source, Image.Image) else str(source)
    try:
        with _header(source) as image:
            return decode_image(image)
    except UNREADABLE as error:
        raise ValueError(f"{name} cannot be read as a picture: {error}") from error


def read_depth(source: DepthSource, valid: np.ndarray | None = None) -> DepthMap:
    """Depth in the unit it came in, which may be any, and where it is valid.

    By default that is where it is finite and positive. A path is a .npy of numbers, a .npz with one
    map (or `depth`, and a bool `valid`), an .exr with one channel or one named Z or depth (needs
    OpenEXR), a 16-bit PNG or TIFF (0 = not measured), or a float TIFF.
    """
    name = "depth" if isinstance(source, np.ndarray) else str(source)
    values = source if isinstance(source, np.ndarray) else _depth_file(Path(source))
    if values.ndim != 2 or not values.size:
        flat = values.squeeze().ndim == 2
        why = "take out the axis of length 1" if flat else COLOURS
        raise ValueError(f"{name} has the shape {values.shape}, but must be (h, w): {why}")
    if values.dtype.kind not in "fiu":
        raise ValueError(f"{name} is {values.dtype}, but depth is made of numbers")
    if values.dtype.itemsize == 1:
        raise ValueError(f"{name} is {values.dtype}: {EIGHT_BITS}")
    _check_size(values.shape, name)
    with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite: not valid
        metres = values.astype(np.float32)
    usable = np.isfinite(metres) & (metres > 0)
    if valid is not None:
        if valid.shape != metres.shape or valid.dtype != np.bool_:
            raise ValueError(
                f"valid is {valid.dtype} {valid.shape}, but must be bool {metres.shape} as depth is"
            )
        if bad := int((valid & ~usable).sum()):
            raise ValueError(
                f"{name}: {bad} pixels are marked valid but are NaN, infinite or not positive; "
                "mark them invalid"
            )
        usable = valid
    if not usable.any():
        raise ValueError(f"{name} has no valid pixel: none of {values.size} is finite and positive")
    return np.where(usable, metres, np.float32(0)), usable


def _depth_file(path: Path) -> np.ndarray:
    try:
        match path.suffix.lower():
            case ".npy" | ".npz":
                return _numpy_depth(path)
            case ".exr":
                return _exr_depth(path)
            case _:
                return _picture_depth(path)
    except UNREADABLE as error:
        raise ValueError(
            f"{path} cannot be read as depth ({error}); accepted: {DEPTH_FILES}"
        ) from error


def _numpy_depth(path: Path) -> np.ndarray:
    with path.open("rb") as file:  # of anything else NumPy would say to unpickle it
        if not file.read(6).startswith((NUMPY_MAGIC, ZIP_MAGIC)):
            raise ValueError("it is no file of np.save or np.savez")
    # Mapped, not read: the file must be as large as its header claims before memory is taken.
    loaded = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(loaded, np.lib.npyio.NpzFile):
        _check_size(loaded.shape[:2])
        return np.array(loaded)
    with loaded as archive:
        assert archive.zip is not None
        for entry in archive.zip.infolist():
            _check_size((entry.file_size // np.dtype(np.float64).itemsize,))
        names = ["depth"] if "depth" in archive else archive.files
        arrays = {name: archive[name] for name in names}
        if "depth" in archive and "valid" in archive and archive["valid"].dtype == np.bool_:
            if archive["valid"].shape != arrays["depth"].shape:
                raise ValueError("its depth and its valid have different shapes")
            arrays["depth"] = np.where(archive["valid"], arrays["depth"], 0)
    maps = {name: array for name, array in arrays.items() if array.ndim == 2}
    if len(maps) != 1:
        inside = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ValueError(
            f"it holds {inside or 'nothing'}, but must hold one array of (h, w), or one named depth"
        )
    return maps.popitem()[1]


def _exr_depth(path: Path) -> np.ndarray:
    try:
        import OpenEXR  # an extra of this one format
    except ImportError as error:
        raise ValueError("this format needs a library: pip install OpenEXR") from error
    with OpenEXR.File(str(path), separate_channels=True, header_only=True) as file:
        first, last = file.header()["dataWindow"]
        _check_size(tuple(int(side) for side in last - first + 1))
    with OpenEXR.File(str(path), separate_channels=True) as file:
        channels = {name: channel.pixels for name, channel in file.channels().items()}
    named = [name for name in channels if name.split(".")[-1].lower() in DEPTH_CHANNELS]
    chosen = list(channels) if len(channels) == 1 else named
    if len(chosen) != 1:
        raise ValueError(
            f"it has the channels {', '.join(channels)}, but must have one, or one named Z or depth"
        )
    return channels[chosen[0]]


def _picture_depth(path: Path) -> np.ndarray:
    with _header(path) as image:
        if image.mode in ("L", "1"):
            raise ValueError(EIGHT_BITS)
        if image.mode[0] not in "IF":  # I is integers, F floats, with the bits after a semicolon
            kind = "a palette" if image.mode == "P" else f"the mode {image.mode}"
            raise ValueError(f"it has {kind}: {COLOURS}")
        return np.array(image)


@contextmanager
def _header(source: str | Path | Image.Image) -> Iterator[Image.Image]:
    """An image of acceptable size whose pixels are not read yet; a file is closed at the end."""
    if isinstance(source, Image.Image):
        _check_size((source.height, source.width))
        yield source
        return
    with warnings.catch_warnings():
        # Pillow warns at 89 megapixels, before the limit here speaks.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            opened = Image.open(source, formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise ValueError(f"{error}; at most {MAX_PIXELS} are accepted") from error
    with opened as image:
        _check_size((image.height, image.width))
        yield image


def _check_size(shape: tuple[int, ...], name: str = "it") -> None:
    if np.prod(shape, dtype=np.float64) > MAX_PIXELS:
        raise ValueError(
            f"{name} has {'x'.join(map(str, shape))} pixels, but at most {MAX_PIXELS // 10**6} "
            "megapixels are accepted; make it smaller"
        )
