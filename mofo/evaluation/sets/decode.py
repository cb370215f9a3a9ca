"""Files of published sets as arrays.

`DEPTH` maps the name of a format to its decoder: bytes to float32 depth, whatever the file holds
where nothing was measured (0, NaN, infinity).
"""

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from mofo.data.inputs import NUMPY_MAGIC, ZIP_MAGIC
from mofo.data.sample import open_image

SINTEL_TAG = 202021.25  # the first number of every .dpt, which shows that the bytes stand right

Depth = Float32[np.ndarray, "h w"]


def image(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """RGB pixels as they are stored: truth belongs to that grid, so no EXIF rotation is applied."""
    with open_image(data) as opened:
        return np.array(opened if opened.mode == "RGB" else opened.convert("RGB"))


def png(data: bytes, *, divisor: float | int) -> Depth:
    """A 16-bit PNG: a code divided by `divisor` (1000 for millimetres)."""
    with open_image(data) as opened:
        if not opened.mode.startswith("I"):
            raise ValueError(f"depth has mode {opened.mode}, but must be a 16-bit grey PNG")
        return (np.asarray(opened) / np.float64(divisor)).astype(np.float32)


def floats(data: bytes, *, shape: Sequence[int]) -> Depth:
    """Headerless little-endian float32, row by row."""
    values = np.frombuffer(data, "<f4")
    h, w = shape
    if values.size != h * w:
        raise ValueError(f"{values.size} numbers are not {h}x{w}")
    return values.reshape(h, w).astype(np.float32)


def npy(data: bytes) -> Depth:
    """A NumPy file of height x width, or with a last axis of 1."""
    return _array(data).astype(np.float32)


def dpt(data: bytes) -> Depth:
    """Sintel's .dpt: a tag, width and height, then float32 row by row, all little-endian."""
    tag, size = np.frombuffer(data, "<f4", 1), np.frombuffer(data, "<i4", 2, offset=4)
    if tag[0] != np.float32(SINTEL_TAG):
        raise ValueError(f"it begins with {tag[0]}, but a .dpt with {SINTEL_TAG}")
    return floats(data[12:], shape=(int(size[1]), int(size[0])))


DEPTH: dict[str, Callable[..., Depth]] = {"png": png, "floats": floats, "npy": npy, "dpt": dpt}


def mask(data: bytes) -> Bool[np.ndarray, "h w"]:
    """A NumPy file or a PNG: True where it is not 0."""
    if data.startswith(NUMPY_MAGIC):
        return _array(data) != 0
    with open_image(data) as opened:
        values = np.array(opened)
    if values.ndim != 2:
        raise ValueError(f"a mask has mode {opened.mode}, but must be grey")
    return values != 0


def load_numpy(data: bytes) -> Any:
    """What np.save or np.savez wrote; for other bytes NumPy itself would suggest to unpickle."""
    if not data.startswith((NUMPY_MAGIC, ZIP_MAGIC)):
        raise ValueError("it is no file of np.save or np.savez")
    return np.load(io.BytesIO(data), allow_pickle=False)


def _array(data: bytes) -> np.ndarray:
    values = np.asarray(load_numpy(data))
    values = values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values
    if values.ndim != 2:
        raise ValueError(f"it holds an array of {values.shape}, but must be height x width")
    return values
