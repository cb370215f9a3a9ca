"""Rectangles of an image that a protocol looks at, in whole pixels.

`REGIONS` maps a name to a function of height and width; the integers are those that the reference
implementations come to.
"""

from collections.abc import Callable
from typing import NamedTuple

KITTI_HEIGHT, KITTI_WIDTH = 352, 1216
NYU_SIZE = (480, 640)


class Region(NamedTuple):
    """Rows top to bottom and columns left to right, the last ones not included."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def pixels(self) -> tuple[slice, slice]:
        return slice(self.top, self.bottom), slice(self.left, self.right)


def kitti(height: int, width: int) -> Region:
    """The 352x1216 of KITTI's depth benchmark: at the bottom, in the middle."""
    if height < KITTI_HEIGHT or width < KITTI_WIDTH:
        raise ValueError(
            f"the image is {height}x{width}, but KITTI's crop needs {KITTI_HEIGHT}x{KITTI_WIDTH}; "
            "choose another crop"
        )
    left = int((width - KITTI_WIDTH) / 2)
    return Region(height - KITTI_HEIGHT, height, left, left + KITTI_WIDTH)


def garg(height: int, width: int) -> Region:
    """Garg et al., ECCV 2016."""
    return _shares(height, width, 0.40810811, 0.99189189, 0.03594771, 0.96405229)


def eigen(height: int, width: int) -> Region:
    """Eigen et al., NeurIPS 2014, for KITTI."""
    return _shares(height, width, 0.3324324, 0.91351351, 0.0359477, 0.96405229)


def nyu_eigen(height: int, width: int) -> Region:
    """Eigen et al., NeurIPS 2014, for NYUv2."""
    if (height, width) != NYU_SIZE:
        raise ValueError(f"the image is {height}x{width}, but NYUv2's region is that of 480x640")
    return Region(45, 471, 41, 601)


REGIONS: dict[str, Callable[[int, int], Region]] = {
    "kitti": kitti,
    "garg": garg,
    "eigen": eigen,
    "nyu_eigen": nyu_eigen,
}


def _shares(
    height: int, width: int, top: float, bottom: float, left: float, right: float
) -> Region:
    rows = int(top * height), int(bottom * height)
    return Region(*rows, int(left * width), int(right * width))
