"""What a source yields (`Sample`), what a training step takes (`Batch`), and files <-> arrays.

Images are uint8 RGB in samples and float in [-1, 1] in batches. Depth is in metres (in the source's
own unit where `metric` is false); `valid` is True exactly where it was measured.
"""

import io
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64, UInt8
from PIL import Image, ImageOps
from torch import Tensor

MAX_CODE = 65535  # of a 16-bit PNG
Metres = Float32[np.ndarray, "h w"]
Valid = Bool[np.ndarray, "h w"]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image with its depth, or without (`metres` and `valid` None).

    `image_bytes` is the file the image was decoded from; a shard stores it as it is. `depth_scale`
    is the step of the integers the depth came from, so that writing it again is exact; None lets
    the writer choose.
    """

    key: str
    image: UInt8[np.ndarray, "h w 3"]
    metres: Float32[np.ndarray, "h w"] | None
    valid: Bool[np.ndarray, "h w"] | None
    intrinsics: Float64[np.ndarray, "3 3"] | None
    caption: str
    metric: bool
    source: str
    licence: str
    image_bytes: bytes | None = None
    depth_scale: float | None = None

    def __post_init__(self) -> None:
        if self.image.dtype != np.uint8 or self.image.ndim != 3 or self.image.shape[2] != 3:
            raise ValueError(
                f"{self.key}: image is {self.image.dtype} {self.image.shape}, but must be "
                "uint8 (h, w, 3); decode_image makes one from any file"
            )
        metres, valid = self.metres, self.valid
        if (metres is None) != (valid is None):
            raise ValueError(f"{self.key}: give both metres and valid, or neither")
        if metres is None or valid is None:
            return
        size = self.image.shape[:2]
        for name, array, dtype in (
            ("metres", metres, np.float32),
            ("valid", valid, np.bool_),
        ):
            if array.shape != size:
                raise ValueError(
                    f"{self.key}: {name} is {array.shape}, but the image is {size}; "
                    "register depth to the image first"
                )
            if array.dtype != dtype:
                raise ValueError(
                    f"{self.key}: {name} is {array.dtype}, but must be {dtype.__name__}"
                )

    @property
    def depth(self) -> tuple[Metres, Valid] | None:
        """Metres and where they were measured, if there is any depth."""
        if self.metres is None or self.valid is None:
            return None
        return self.metres, self.valid

    def check(self) -> None:
        """Raise a ValueError if what is marked as measured cannot be, or if nothing is marked."""
        if not self.key or set(self.key) & set("./\\"):
            raise ValueError(f"key {self.key!r} names files: use no '.', '/' or '\\' in it")
        if self.intrinsics is not None and not np.isfinite(self.intrinsics).all():
            raise ValueError(f"{self.key}: intrinsics are not finite; pass None if unknown")
        if self.depth is None:
            return
        metres, valid = self.depth
        if not valid.any():
            raise ValueError(
                f"{self.key}: depth has no measured pixel; pass metres=None, valid=None instead"
            )
        measured = metres[valid]
        for reason, bad in (
            ("NaN", np.isnan(measured)),
            ("infinite", np.isinf(measured)),
            ("negative or zero", measured <= 0),
        ):
            if bad.any():
                raise ValueError(
                    f"{self.key}: {bad.sum()} of {measured.size} measured depths are {reason}; "
                    "mark such pixels invalid"
                )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch, all samples at the training size.

    `metres` is filled from the nearest measured pixel: finite and positive everywhere (1 everywhere
    where a sample has no depth); only `valid` pixels were measured. `position` is the place in the
    global order, `step_measured` the number of measured pixels of this rank's whole optimiser step,
    all its micro-batches together.
    """

    image: Float[Tensor, "b 3 h w"]
    metres: Float[Tensor, "b h w"]
    valid: Bool[Tensor, "b h w"]
    caption: list[str]
    key: list[str]
    position: Int64[Tensor, " b"]
    grid: tuple[int, int]
    step_measured: int

    def __len__(self) -> int:
        return len(self.key)

    def to(self, device: torch.device | str) -> "Batch":
        """A copy whose tensors are on `device`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: v.to(device) for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def decode_image(source: bytes | str | Path | Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """RGB pixels of an image (a file, its bytes, or a PIL image) of any mode, upright.

    16-bit grey is scaled to 8 bits, transparency is composited on white, EXIF rotation is applied.
    """
    if not isinstance(source, Image.Image):
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            return decode_image(opened)
    image = ImageOps.exif_transpose(source)
    if image.mode.startswith("I"):
        grey = np.clip(np.rint(np.asarray(image) / 257.0), 0, 255)
        image = Image.fromarray(grey.astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("image holds floats of unknown range; save it with 8 or 16 bits")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def decode_depth(source: bytes | str | Path, scale: float) -> tuple[Metres, Valid]:
    """Metres and validity of a 16-bit PNG: code 0 is "not measured", code n is n * scale."""
    if not (np.isfinite(scale) and scale > 0):
        raise ValueError(f"depth_scale is {scale}, but must be positive: metres per step")
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        if not image.mode.startswith("I"):
            raise ValueError(f"depth has mode {image.mode}, but must be a 16-bit greyscale PNG")
        codes = np.array(image)
    return (codes * np.float64(scale)).astype(np.float32), codes > 0


def encode_depth(metres: Metres, valid: Valid, scale: float) -> bytes:
    """The 16-bit PNG that `decode_depth` reads, each depth rounded to a whole number of steps."""
    codes = np.zeros(metres.shape, np.float64)
    codes[valid] = np.rint(metres[valid].astype(np.float64) / scale)
    if valid.any() and not (codes[valid].min() >= 1 and codes[valid].max() <= MAX_CODE):
        raise ValueError(
            f"depth spans {metres[valid].min():g} to {metres[valid].max():g}, but 16 bits in steps "
            f"of {scale:g} hold {scale:g} to {scale * MAX_CODE:g}; change depth_scale, or mark "
            "what is outside invalid"
        )
    buffer = io.BytesIO()
    Image.fromarray(codes.astype(np.uint16)).save(buffer, format="PNG")
    return buffer.getvalue()


def choose_depth_scale(metres: Metres, valid: Valid) -> float:
    """The finest of the steps 1, 2, 5 * 10^n with which 16 bits hold the largest depth."""
    high = float(metres[valid].max())
    power = int(np.floor(np.log10(high / MAX_CODE)))
    steps = (float(f"{step}e{n}") for n in (power, power + 1) for step in (1, 2, 5))
    return next(step for step in steps if high <= step * MAX_CODE)
