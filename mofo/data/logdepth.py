"""Depth maps as MoGe's prepared sets store them: 16-bit PNGs in equal steps of the logarithm.

The text chunks `near` and `far` say what codes 1 and 65534 mean; a code n between them is
near^(1 - u) far^u with u = (n - 1) / 65533. 0 is unknown, 65535 infinitely far: sky. Old files
have a third chunk, `unit`, by which depth is multiplied (moge/utils/io.py of microsoft/MoGe).
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32

from mofo.data.sample import open_image

UNKNOWN, INFINITE = 0, 65535
STEPS = 65533


class LogDepth(NamedTuple):
    """A map in the file's own unit, 0 where it is not `valid`; `sky` is infinitely far."""

    depth: Float32[np.ndarray, "h w"]
    valid: Bool[np.ndarray, "h w"]
    sky: Bool[np.ndarray, "h w"]


def decode_log_depth(source: bytes | str | Path) -> LogDepth:
    """The map of a PNG with `near` and `far`, to one unit in the last place of MoGe's reader.

    That reader's own last place depends on the processor's powf; here it does not.
    """
    name = "the map" if isinstance(source, bytes) else str(source)
    with open_image(source) as image:
        if not image.mode.startswith("I") or not {"near", "far"} <= image.info.keys():
            raise ValueError(
                f"{name} has mode {image.mode} and texts {sorted(image.info)}, but MoGe's depth is "
                "a 16-bit PNG with near and far; write it with MoGe's write_depth"
            )
        near, far = float(image.info["near"]), float(image.info["far"])
        unit = float(image.info.get("unit", 1))
        codes = np.array(image)
    if not (0 < near <= far < np.inf and 0 < unit < np.inf):
        raise ValueError(
            f"{name} spans {near} to {far} in units of {unit}, but must span positive numbers; "
            "write it again"
        )
    valid = (codes != UNKNOWN) & (codes != INFINITE)
    table = _depths(near, far) * np.float32(unit)
    table[[UNKNOWN, INFINITE]] = 0
    return LogDepth(table[codes], valid, codes == INFINITE)


def _depths(near: float, far: float) -> Float32[np.ndarray, " n"]:
    """What each code means: the powers rounded to float32 one by one, as the reference has them."""
    share = (np.arange(INFINITE + 1, dtype=np.float32) - 1) / np.float32(STEPS)
    rest = np.float32(1) - share
    low = np.float64(np.float32(near)) ** rest.astype(np.float64)
    high = np.float64(np.float32(far)) ** share.astype(np.float64)
    return low.astype(np.float32) * high.astype(np.float32)
