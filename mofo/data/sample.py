"""What a source yields (`Sample`), what a training step takes (`Batch`), and files <-> arrays.

Images are 8-bit RGB in samples and float in [-1, 1] in batches. Depth is the distance along the
optical axis, in metres (in the source's own unit where `metric` is false), either as a map or as
points. Pixel centres are at half-integers: pixel (row 0, column 0) covers [0, 1) x [0, 1).
"""

import io
import struct
import zlib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

ORIENTATION = 0x0112  # of EXIF; 1 is upright
MAX_CODE = 65535  # of a 16-bit PNG
# A linear step that is more than this part of the nearest depth would blur what is near: half a
# step, the largest rounding, is then 0.5 % of it. Such depth is coded by its logarithm.
COARSE = 0.01
# What decoders raise when they are given damaged bytes.
DAMAGE = (
    *(OSError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, SyntaxError),
    *(RuntimeError, struct.error, zlib.error, Image.DecompressionBombError),
)
Metres = Float32[np.ndarray, "h w"]
Valid = Bool[np.ndarray, "h w"]
Points = Float32[np.ndarray, "n 3"]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image with its depth, or without.

    `picture` is RGB and upright, and `image` its pixels. Depth is a map (`metres`, and `valid`:
    True exactly where it was measured), or `points`: u, v in pixels and depth, of which several may
    fall into one pixel; never both. `sky` is True where the source says sky, None where it says
    nothing; sky has no depth. `image_bytes` is the file the picture was decoded from; a shard
    stores it as it is. `depth_scale` is the step of the integers the map came from, so that
    writing it again is exact; None lets the writer choose.
    """

    key: str
    picture: Image.Image
    metres: Float32[np.ndarray, "h w"] | None = None
    valid: Bool[np.ndarray, "h w"] | None = None
    points: Float32[np.ndarray, "n 3"] | None = None
    sky: Bool[np.ndarray, "h w"] | None = None
    intrinsics: Float64[np.ndarray, "3 3"] | None = None
    captions: tuple[str, ...] = ()
    metric: bool
    source: str
    licence: str
    image_bytes: bytes | None = None
    depth_scale: float | None = None

    def __post_init__(self) -> None:
        """What can be told at a glance; `check` looks at every depth."""
        if not is_key(self.key):
            raise ValueError(f"key {self.key!r} names files: use no '.', '/' or '\\' in it")
        mode = getattr(self.picture, "mode", f"({type(self.picture).__name__})")
        if mode != "RGB":
            raise ValueError(
                f"{self.key}: picture has mode {mode}, but must be a PIL image of mode RGB; "
                "decode_picture makes one from any file, Image.fromarray from uint8 (h, w, 3)"
            )
        if (self.metres is None) != (self.valid is None):
            raise ValueError(f"{self.key}: give both metres and valid, or neither")
        if self.metres is not None and self.points is not None:
            raise ValueError(f"{self.key}: give depth as a map or as points, not both")
        size = self.shape
        maps = (("metres", np.float32, size), ("valid", np.bool_, size), ("sky", np.bool_, size))
        for name, dtype, shape in (*maps, ("points", np.float32, (-1, 3))):
            array = getattr(self, name)
            if array is not None:
                self._check_array(name, array, dtype, shape)
        self._check_labels()

    def _check_array(self, name: str, array: np.ndarray, dtype: type, shape: tuple) -> None:
        if array.dtype != dtype:
            raise ValueError(f"{self.key}: {name} is {array.dtype}, but must be {dtype.__name__}")
        if name == "points" and (array.ndim != 2 or array.shape[1] != 3):
            raise ValueError(f"{self.key}: points are {array.shape}, but must be (n, 3): u, v, z")
        if name != "points" and array.shape != shape:
            raise ValueError(
                f"{self.key}: {name} is {array.shape}, but the image is {shape}; "
                "register depth to the image first"
            )

    def _check_labels(self) -> None:
        if not all(isinstance(caption, str) and caption for caption in self.captions):
            raise ValueError(
                f"{self.key}: captions are {self.captions!r}, but each must be a text; leave out "
                "what is empty"
            )
        k = self.intrinsics
        if k is None:
            return
        if k.shape != (3, 3) or not np.isfinite(k).all() or (k[2] != (0, 0, 1)).any():
            raise ValueError(
                f"{self.key}: intrinsics are {k.tolist()}, but must be finite, (3, 3), with the "
                "last row 0 0 1; pass None if unknown"
            )
        if not (k[0, 0] > 0 and k[1, 1] > 0):
            raise ValueError(
                f"{self.key}: focal lengths are {k[0, 0]:g} and {k[1, 1]:g} pixels, but must be "
                "positive; mirror the image instead, or pass None if unknown"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return self.picture.height, self.picture.width

    @property
    def image(self) -> UInt8[np.ndarray, "h w 3"]:
        """The pixels, made anew: most pictures are cut and resized before anyone needs them."""
        return np.array(self.picture)

    @property
    def depth(self) -> tuple[Metres, Valid] | None:
        """A map of depth and where it was measured, if there is any; made anew from points."""
        if self.points is not None:
            return rasterise(self.points, self.shape)
        if self.metres is None or self.valid is None:
            return None
        return self.metres, self.valid

    def check(self) -> None:
        """Raise a ValueError if what is marked as measured cannot be, or if nothing is marked."""
        if self.points is not None:
            self._check_places()
            measured = self.points[:, 2]
        elif self.metres is not None and self.valid is not None:
            measured = self.metres[self.valid]
        else:
            return
        if not measured.size:
            raise ValueError(
                f"{self.key}: depth has no measured pixel; leave metres, valid and points out"
            )
        for reason, bad in (
            ("NaN", np.isnan(measured)),
            ("infinite", np.isinf(measured)),
            ("negative or zero", measured <= 0),
        ):
            if bad.any():
                raise ValueError(
                    f"{self.key}: {bad.sum()} of {measured.size} measured depths are {reason}; "
                    "mark such pixels invalid, drop such points"
                )
        self._check_sky()

    def _check_places(self) -> None:
        assert self.points is not None
        h, w = self.shape
        u, v, _ = self.points.T
        # A comparison with NaN is false, so NaN is outside as well.
        outside = np.flatnonzero(~((u >= 0) & (u < w) & (v >= 0) & (v < h)))
        if len(outside):
            raise ValueError(
                f"{self.key}: {len(outside)} of {len(u)} points lie outside the image of {h}x{w}, "
                f"the first at u={u[outside[0]]:g}, v={v[outside[0]]:g}; drop them, after rounding "
                "to float32"
            )

    def _check_sky(self) -> None:
        if self.sky is None or self.depth is None:
            return
        if both := int((self.sky & self.depth[1]).sum()):
            raise ValueError(
                f"{self.key}: {both} pixels are sky and measured; sky has no depth: mark them "
                "invalid, or not sky"
            )


def is_key(key: object) -> bool:
    """Whether `key` can name a sample: a file stem that stays inside its folder."""
    return isinstance(key, str) and bool(key) and not set(key) & set("./\\\0")


def rasterise(
    points: Float32[np.ndarray, "n 3"], size: tuple[int, int]
) -> tuple[Float32[np.ndarray, "h w"], Bool[np.ndarray, "h w"]]:
    """Points as a map of `size`: each pixel holds the nearest of the depths that fall into it.

    Points outside fall nowhere.
    """
    h, w = size
    u, v, z = points.T
    inside = (u >= 0) & (u < w) & (v >= 0) & (v < h)
    pixel = v[inside].astype(np.int64) * w + u[inside].astype(np.int64)
    nearest = np.full(h * w, np.inf, np.float32)
    np.minimum.at(nearest, pixel, z[inside])
    valid = np.zeros(h * w, np.bool_)
    valid[pixel] = True
    return np.where(valid, nearest, np.float32(0)).reshape(size), valid.reshape(size)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch, all samples at the training size.

    `metres` was measured where `valid`, and means nothing elsewhere. `position` is the place in the
    global order, `step_measured` the number of measured pixels of this rank's whole optimiser step,
    all its micro-batches together.
    """

    pixels: UInt8[Tensor, "b h w 3"]
    metres: Float[Tensor, "b h w"]
    valid: Bool[Tensor, "b h w"]
    caption: list[str]
    key: list[str]
    position: Int64[Tensor, " b"]
    grid: tuple[int, int]
    step_measured: int

    def __len__(self) -> int:
        return len(self.key)

    @property
    def image(self) -> Float[Tensor, "b 3 h w"]:
        """In [-1, 1]; made of the bytes where they are: a quarter of it crosses to a GPU."""
        floats = self.pixels.permute(0, 3, 1, 2).to(
            torch.float32, memory_format=torch.contiguous_format
        )
        return floats.div_(127.5).sub_(1)

    def to(self, device: torch.device | str) -> "Batch":
        """A copy whose tensors are on `device`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: v.to(device) for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def open_image(source: bytes | str | Path) -> Image.Image:
    """A file or its bytes; what is no picture is refused in words that are the same each time."""
    try:
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except UnidentifiedImageError as error:
        where = f"{len(source)} bytes are" if isinstance(source, bytes) else f"{source} is"
        raise UnidentifiedImageError(f"{where} no picture of a known format") from error


def decode_image(source: bytes | str | Path | Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels of `decode_picture`."""
    return np.array(decode_picture(source))


def decode_picture(source: bytes | str | Path | Image.Image) -> Image.Image:
    """An image (a file, its bytes, or a PIL image) of any mode as RGB, upright, decoded whole.

    16-bit grey is scaled to 8 bits, transparency is composited on white, EXIF rotation is applied.
    """
    if not isinstance(source, Image.Image):
        with open_image(source) as opened:
            return decode_picture(opened)
    # It copies even an upright picture.
    turned = source.getexif().get(ORIENTATION, 1) != 1
    image = ImageOps.exif_transpose(source) if turned else source
    if image.mode.startswith("I"):
        grey = np.clip(np.rint(np.asarray(image) / 257.0), 0, 255)
        image = Image.fromarray(grey.astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("image holds floats of unknown range; save it with 8 or 16 bits")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    # Files are decoded when first looked at; what is damaged must be known here.
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def decode_mask(source: bytes | str | Path) -> Bool[np.ndarray, "h w"]:
    """The 1-bit PNG that `encode_mask` writes."""
    with open_image(source) as image:
        if image.mode != "1":
            raise ValueError(f"a mask has mode {image.mode}, but must have 1 bit a pixel")
        return np.array(image)


def encode_mask(mask: Bool[np.ndarray, "h w"]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, format="PNG")
    return buffer.getvalue()


class Log(NamedTuple):
    """Depth in equal steps of its logarithm: code 1 is `near`, code 65535 is `far`."""

    near: float
    far: float

    @property
    def step(self) -> float:
        return float(np.log(self.far / self.near)) / (MAX_CODE - 1)


def decode_depth(source: bytes | str | Path, coding: float | Log) -> tuple[Metres, Valid]:
    """Metres and validity of a 16-bit PNG: code 0 is "not measured".

    Code n is n * `coding`, or n - 1 steps of a `Log`.
    """
    _check_coding(coding)
    with open_image(source) as image:
        if not image.mode.startswith("I"):
            raise ValueError(f"depth has mode {image.mode}, but must be a 16-bit greyscale PNG")
        codes = np.array(image)
    if isinstance(coding, Log):
        table = coding.near * np.exp((np.arange(MAX_CODE + 1) - 1) * coding.step)
        table[0] = 0
        return table.astype(np.float32)[codes], codes > 0
    return (codes * np.float64(coding)).astype(np.float32), codes > 0


def encode_depth(metres: Metres, valid: Valid, coding: float | Log) -> bytes:
    """The 16-bit PNG that `decode_depth` reads, each depth rounded to a whole number of steps."""
    _check_coding(coding)
    measured = metres[valid].astype(np.float64)
    if isinstance(coding, Log):
        low, high = coding
        steps = 1 + np.log(measured / coding.near) / coding.step
    else:
        low, high = coding, coding * MAX_CODE
        steps = measured / coding
    steps = np.rint(steps)
    if len(steps) and not (steps.min() >= 1 and steps.max() <= MAX_CODE):
        raise ValueError(
            f"depth spans {measured.min():g} to {measured.max():g}, but 16 bits hold {low:g} to "
            f"{high:g} in the coding {coding}; change depth_scale, or mark what is outside invalid"
        )
    codes = np.zeros(metres.shape, np.uint16)
    codes[valid] = steps.astype(np.uint16)
    buffer = io.BytesIO()
    # Measured: a third of the time of the default level, 4 % larger, as fast to read.
    Image.fromarray(codes).save(buffer, format="PNG", compress_level=3)
    return buffer.getvalue()


def choose_coding(metres: Metres, valid: Valid) -> float | Log:
    """The finest of the steps 1, 2, 5 * 10^n with which 16 bits hold the largest depth.

    Where that step is coarse beside the smallest depth, equal steps of the logarithm instead.
    """
    low, high = float(metres[valid].min()), float(metres[valid].max())
    power = int(np.floor(np.log10(high / MAX_CODE)))
    steps = (float(f"{step}e{n}") for n in (power, power + 1) for step in (1, 2, 5))
    step = next(step for step in steps if high <= step * MAX_CODE)
    return Log(low, high) if step > COARSE * low else step


def _check_coding(coding: float | Log) -> None:
    low, high = coding if isinstance(coding, Log) else (coding, coding * MAX_CODE)
    with np.errstate(over="ignore"):
        fits = np.float32(low) > 0 and np.isfinite(np.float32(high))
    if not (low < high and fits):
        raise ValueError(
            f"depth_scale is {coding}, but must be positive: metres per step, or a nearest and a "
            "farther depth"
        )
