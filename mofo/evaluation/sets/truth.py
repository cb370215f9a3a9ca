"""Truth as a row wants it: cut, masked, and never empty."""

import hashlib
import re
from pathlib import PurePosixPath

import numpy as np
from jaxtyping import Bool, Float32, Float64, UInt8
from PIL import Image

from mofo.data.sample import Sample
from mofo.evaluation.benchmark import Row
from mofo.evaluation.sets.regions import REGIONS


def cut_and_mask(
    row: Row,
    key: str,
    image: UInt8[np.ndarray, "h w 3"],
    metres: Float32[np.ndarray, "h2 w2"],
    measured: Bool[np.ndarray, "h3 w3"] | None = None,
    intrinsics: Float64[np.ndarray, "3 3"] | None = None,
) -> Sample:
    """The sample of an image: `measured` says where there is truth, else `low` < depth < `high`.

    What is not finite and positive is no truth whatever a mask says.
    """
    sizes = {array.shape[:2] for array in (image, metres, measured) if array is not None}
    if len(sizes) > 1:
        raise ValueError(f"image, truth and mask have different sizes: {sorted(sizes)}")
    if row.crop is not None:
        pixels = REGIONS[row.crop](*metres.shape).pixels
        image, metres = image[pixels], metres[pixels]
        measured = None if measured is None else measured[pixels]
    # As in the reference, the limits are rounded to the precision of the truth, and strict.
    low, high = np.float32(row.low or 0), np.float32(np.inf if row.high is None else row.high)
    valid = (metres > low) & (metres < high) if measured is None else measured & (metres > 0)
    valid &= np.isfinite(metres)
    if row.region is not None:
        inside = np.zeros_like(valid)
        inside[REGIONS[row.region](*metres.shape).pixels] = True
        valid &= inside
    if not valid.any():
        raise ValueError(f"{key}: no pixel has measured depth, so there is nothing to score")
    return Sample(
        key=key,
        picture=Image.fromarray(np.ascontiguousarray(image)),
        metres=np.where(valid, metres, np.float32(0)),
        valid=valid,
        intrinsics=intrinsics,
        metric=row.metric,
        source=row.name,
        licence=row.licence,
    )


def key_of(path: str) -> str:
    """A file's path as a key: without extension, in one piece."""
    return re.sub(r"[./\\]", "_", str(PurePosixPath(path).with_suffix("")))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
