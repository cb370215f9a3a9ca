"""What a user hands in, as arrays: pictures of any mode and depth of any unit, or why not."""

from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from PIL import Image

from mofo.data.sample import decode_image

Picture = UInt8[np.ndarray, "h w 3"]
DepthMap = tuple[Float32[np.ndarray, "h w"], Bool[np.ndarray, "h w"]]
PictureSource = str | Path | np.ndarray | Image.Image
DepthSource = str | Path | np.ndarray


def read_picture(source: PictureSource) -> Picture:
    """RGB pixels, upright, of a file or PIL image of any mode, or of a uint8 array."""
    if isinstance(source, np.ndarray):
        grey = source.ndim == 2
        if source.dtype != np.uint8 or not (grey or source.shape[2:] == (3,)) or not source.size:
            raise ValueError(
                f"picture is {source.dtype} {source.shape}, but an array must be uint8, (h, w, 3) "
                "or (h, w); scale and convert it, or give a path or a PIL image"
            )
        return np.repeat(source[..., None], 3, axis=-1) if grey else source
    name = "the PIL image" if isinstance(source, Image.Image) else str(source)
    try:
        return decode_image(source)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read as a picture: {error}") from error


def read_depth(source: DepthSource, valid: np.ndarray | None = None) -> DepthMap:
    """Depth, in whatever unit, and where it is valid: by default where finite and positive.

    A path is a .npy of numbers, a 16-bit PNG or TIFF (0 = not measured), or a float TIFF.
    """
    name = "depth" if isinstance(source, np.ndarray) else str(source)
    values = source if isinstance(source, np.ndarray) else _depth_file(Path(source))
    if values.ndim != 2 or not values.size:
        raise ValueError(
            f"{name} has the shape {values.shape}, but depth is one number per pixel, (h, w); "
            "colours of a picture cannot be turned back into depth"
        )
    if values.dtype.kind not in "fiu" or values.dtype.itemsize == 1:
        raise ValueError(
            f"{name} is {values.dtype}: an 8-bit picture shows depth in 256 steps of unknown "
            "meaning; give floats (.npy) or 16 bits (PNG, TIFF)"
        )
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
        if path.suffix.lower() == ".npy":
            return np.load(path, allow_pickle=False)
        with Image.open(path) as image:
            return np.array(image)
    except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path} cannot be read as depth ({error}); accepted: .npy, 16-bit PNG or TIFF"
        ) from error
