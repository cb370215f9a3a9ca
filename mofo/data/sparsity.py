"""Which pixels of a dense depth map a sensor would have measured.

A pattern is a pure function of (image, metres, valid, rng) and returns a mask of kept pixels, a
subset of `valid`. None needs intrinsics, so they suit any image size, and real depth as well.
`sparsify` also bounds how many pixels stay.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float32, UInt8

Image = UInt8[np.ndarray, "h w 3"]
Metres = Float32[np.ndarray, "h w"]
Mask = Bool[np.ndarray, "h w"]

# A jump of inverse depth between neighbours, as a share of it, where a depth camera fails.
EDGE = 0.05


def sparsify(
    image: Image,
    metres: Metres,
    valid: Mask,
    *,
    pattern: str,
    max_kept: float,
    rng: np.random.Generator,
) -> Mask:
    """Pixels that `pattern` keeps, thinned at random to at most `max_kept` of all pixels.

    At least one pixel is kept where any is valid.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"pattern is {pattern!r}, but must be one of {', '.join(PATTERNS)}")
    if not 0 < max_kept <= 1:
        raise ValueError(f"max_kept is {max_kept}, but must be in (0, 1]: a share of all pixels")
    if not valid.any():
        return np.zeros_like(valid)
    mask = PATTERNS[pattern](image, metres, valid, rng)
    most, kept = max(int(max_kept * valid.size), 1), np.count_nonzero(mask)
    if 0 < kept <= most:
        return mask
    measured = np.flatnonzero(mask if kept else valid)
    chosen = np.zeros(valid.shape, bool)
    chosen.flat[rng.choice(measured, most if kept else 1, replace=False)] = True
    return chosen


def dense(image: Image, metres: Metres, valid: Mask, rng: np.random.Generator) -> Mask:
    """Every measured pixel."""
    return valid.copy()


def lidar(image: Image, metres: Metres, valid: Mask, rng: np.random.Generator) -> Mask:
    """Scan lines: equal steps of elevation and azimuth, with jitter, drop-outs, a longest range.

    What is high up in the picture lies above the scanner's field of view.
    """
    h, w = valid.shape
    lines = max(int(h * rng.uniform(0.15, 0.4)), 2)
    # Equal steps of an angle: the rows lie further apart away from the middle of the picture.
    half_view = np.radians(rng.uniform(15, 35))
    elevation = np.linspace(-rng.uniform(0.3, 1) * half_view, half_view, lines)
    elevation += rng.uniform(-0.5, 0.5) * half_view / lines
    rows = h / 2 * (1 + np.tan(elevation) / np.tan(half_view))
    step = rng.uniform(1, 3)
    columns = np.arange(rng.uniform(0, step), w, step)
    grid = (lines, len(columns))
    row = np.floor(rows[:, None] + rng.normal(0, 0.15, grid)).astype(int)
    column = np.floor(columns + rng.uniform(-0.3, 0.3, grid)).astype(int)
    returned = (row >= 0) & (row < h) & (column >= 0) & (column < w)
    returned &= rng.random(grid) > rng.uniform(0.02, 0.2)
    hit = np.zeros(valid.shape, bool)
    hit[row[returned], column[returned]] = True
    return hit & valid & _within_range(metres, valid, rng.uniform(0.85, 1))


def sfm(image: Image, metres: Metres, valid: Mask, rng: np.random.Generator) -> Mask:
    """Points at texture: the stronger the image's gradient, the likelier; 1-8 % of all pixels."""
    grey = image.astype(np.float64).mean(-1)
    gradient = _highest(grey) - _lowest(grey)
    # Corners and lines, not their surroundings; a flat picture keeps an order by chance.
    peak = np.where(gradient >= _highest(gradient), 4, 1)
    likely = (peak * (gradient / max(gradient.max(), 1) + 1e-4))[valid]
    count = max(int(rng.uniform(0.01, 0.08) * valid.size), 1)
    # The largest of log(u) / weight are a weighted choice without replacement.
    order = np.argsort(np.log(rng.uniform(1e-12, 1, likely.shape)) / likely)
    kept = np.zeros(valid.shape, bool)
    kept.flat[np.flatnonzero(valid)[order[-count:]]] = True
    return kept


def rgbd(image: Image, metres: Metres, valid: Mask, rng: np.random.Generator) -> Mask:
    """A depth camera's holes: depth edges, far range, dark and shiny pixels, random blobs."""
    # Inverse depth is affine over a plane, however slanted: what bends it is an edge.
    inverse = 1 / np.where(valid, metres, np.inf)
    bend = np.zeros_like(inverse)
    bend[1:-1] = np.abs(np.diff(inverse, 2, axis=0))
    bend[:, 1:-1] = np.maximum(bend[:, 1:-1], np.abs(np.diff(inverse, 2, axis=1)))
    edge = bend > EDGE * inverse
    beside_unknown = _highest(~valid)
    dark = image.mean(-1) < rng.uniform(15, 45)
    shiny = image.min(-1) > rng.uniform(235, 255)
    lost = (dark | shiny) & (rng.random(valid.shape) < 0.8)
    hole = edge | beside_unknown | lost | _blobs(valid.shape, rng)
    return valid & ~hole & _within_range(metres, valid, rng.uniform(0.8, 1))


PATTERNS = {"dense": dense, "lidar": lidar, "sfm": sfm, "rgbd": rgbd}


def _within_range(metres: Metres, valid: Mask, share: float) -> Mask:
    """The nearest `share` of the measured pixels."""
    return metres <= np.quantile(metres[valid], share) if valid.any() else valid


def _blobs(shape: tuple[int, int], rng: np.random.Generator) -> Mask:
    """A few discs, each up to a tenth of the picture's longer side in radius."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    found = np.zeros(shape, bool)
    for _ in range(rng.integers(2, 9)):
        row, column = rng.uniform(0, shape[0]), rng.uniform(0, shape[1])
        radius = rng.uniform(0.02, 0.1) * max(shape)
        found |= (y - row) ** 2 + (x - column) ** 2 < radius**2
    return found


def _highest(values: np.ndarray) -> np.ndarray:
    """The maximum over each pixel's 3x3 neighbourhood."""
    padded = np.pad(values, 1, mode="edge")
    rows = np.maximum(np.maximum(padded[:-2], padded[1:-1]), padded[2:])
    return np.maximum(np.maximum(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])


def _lowest(values: np.ndarray) -> np.ndarray:
    return -_highest(-values)
