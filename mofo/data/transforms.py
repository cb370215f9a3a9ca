"""Paired transforms of a sample: they move and drop depth, and never invent it.

After any of them each measured pixel holds one of the depths measured before, and each point that
is left has its depth and its place in the scene. Pixel centres are at half-integers: pixel (row i,
column j) covers [i, i + 1) x [j, j + 1), so resizing by s multiplies fx, fy, cx and cy by s.
Captions stay as they are, so a source may only be flipped if its captions have no left or right.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64, UInt8
from PIL import Image, ImageOps

from mofo.data.sample import Points, Sample
from mofo.data.sparsity import sparsify

# Weights of red, green and blue in perceived brightness (ITU-R BT.601).
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


class Box(NamedTuple):
    """A rectangle of whole pixels."""

    top: int
    left: int
    height: int
    width: int


def largest_box(shape: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the largest rectangle in `shape` with the aspect of `size`."""
    h, w = shape
    if h * size[1] > w * size[0]:
        return max(1, round(w * size[0] / size[1])), w
    return h, max(1, round(h * size[1] / size[0]))


def centre_box(shape: tuple[int, int], size: tuple[int, int]) -> Box:
    """The largest rectangle in the middle with the aspect of `size`."""
    height, width = largest_box(shape, size)
    return Box((shape[0] - height) // 2, (shape[1] - width) // 2, height, width)


def random_box(
    shape: tuple[int, int], size: tuple[int, int], rng: np.random.Generator, *, min_area: float
) -> Box:
    """A rectangle anywhere with the aspect of `size`, of at least `min_area` of the largest one."""
    side = np.sqrt(rng.uniform(min_area, 1.0))
    height, width = (max(1, round(side * full)) for full in largest_box(shape, size))
    top = rng.integers(shape[0] - height + 1)
    left = rng.integers(shape[1] - width + 1)
    return Box(int(top), int(left), height, width)


def crop_resize(sample: Sample, box: Box, size: tuple[int, int]) -> Sample:
    """Cut out `box` and bring it to `size`: the image filtered, a map by `nearest_measured`.

    Points move exactly; those outside are dropped.
    """
    top, left, height, width = box
    rows, columns = slice(top, top + height), slice(left, left + width)
    picture = sample.picture.crop((left, top, left + width, top + height))
    h, w = size
    if (height, width) != size:
        picture = picture.resize((w, h), Image.Resampling.LANCZOS)
    metres, valid, points, sky, intrinsics = sample.metres, sample.valid, None, None, None
    if metres is not None and valid is not None:
        metres, valid = nearest_measured(metres[rows, columns], valid[rows, columns], size)
    if sample.points is not None:
        points = _move(sample.points, box, size)
    if sample.sky is not None:
        mask = Image.fromarray(sample.sky[rows, columns])
        sky = np.array(mask.resize((w, h), Image.Resampling.NEAREST))
    if sample.intrinsics is not None:
        scale_y, scale_x = h / height, w / width
        shift = np.array([[1, 0, -left], [0, 1, -top], [0, 0, 1]], np.float64)
        intrinsics = np.diag([scale_x, scale_y, 1.0]) @ shift @ sample.intrinsics
    return replace(
        sample,
        picture=picture,
        metres=metres,
        valid=valid,
        points=points,
        sky=sky,
        intrinsics=intrinsics,
        image_bytes=None,
    )


def _move(points: Points, box: Box, size: tuple[int, int]) -> Float32[np.ndarray, "m 3"]:
    """The points inside of `box`, where they lie when it is brought to `size`."""
    (h, w), (u, v, z) = size, points.T
    u = ((u.astype(np.float64) - box.left) * (w / box.width)).astype(np.float32)
    v = ((v.astype(np.float64) - box.top) * (h / box.height)).astype(np.float32)
    inside = (u >= 0) & (u < w) & (v >= 0) & (v < h)
    return np.stack([u[inside], v[inside], z[inside]], 1)


def nearest_measured(
    metres: Float32[np.ndarray, "h w"], valid: Bool[np.ndarray, "h w"], size: tuple[int, int]
) -> tuple[Float32[np.ndarray, "h2 w2"], Bool[np.ndarray, "h2 w2"]]:
    """Depth on a grid of `size`: the measured pixel nearest to the centre of each cell.

    Only pixels whose centre lies in the cell count; a cell without one is not measured.
    """
    if metres.shape == size:
        return np.where(valid, metres, 0), valid
    first_y, count_y, centre_y = _cells(metres.shape[0], size[0])
    first_x, count_x, centre_x = _cells(metres.shape[1], size[1])
    best = np.full(size, np.inf)
    out = np.zeros(size, np.float32)
    for step_y in range(count_y.max()):
        y = np.minimum(first_y + step_y, metres.shape[0] - 1)
        square_y = np.where(step_y < count_y, (y + 0.5 - centre_y) ** 2, np.inf)
        for step_x in range(count_x.max()):
            x = np.minimum(first_x + step_x, metres.shape[1] - 1)
            square_x = np.where(step_x < count_x, (x + 0.5 - centre_x) ** 2, np.inf)
            at = np.ix_(y, x)
            distance = np.where(valid[at], square_y[:, None] + square_x, np.inf)
            nearer = distance < best
            best = np.where(nearer, distance, best)
            out = np.where(nearer, metres[at], out)
    return out, np.isfinite(best)


def _cells(
    pixels: int, cells: int
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"], np.ndarray]:
    """Of each cell along one side: its first pixel, how many pixels, its centre in pixels."""
    edges = np.arange(cells + 1)
    # Pixel y lies in cell c if c / cells <= (y + 1/2) / pixels < (c + 1) / cells, in whole numbers.
    firsts = -((cells - 2 * edges * pixels) // (2 * cells))
    centres = (edges[:-1] + 0.5) * pixels / cells
    return firsts[:-1], np.diff(firsts), centres


def flip(sample: Sample) -> Sample:
    """The mirror image, left and right exchanged."""
    intrinsics = sample.intrinsics
    if intrinsics is not None:
        mirror = np.array([[-1, 0, sample.picture.width], [0, 1, 0], [0, 0, 1]], np.float64)
        # The camera's x axis turns around as well, so that fx stays positive.
        intrinsics = mirror @ intrinsics @ np.diag([-1.0, 1.0, 1.0])
    mirrored = {
        name: torch.from_numpy(array).flip(1).numpy()  # ten times as fast as numpy's copy
        for name in ("metres", "valid", "sky")
        if (array := getattr(sample, name)) is not None
    }
    points = sample.points
    if points is not None:
        width = np.float32(sample.picture.width)
        # A pixel holds its left edge and not its right one, so u = 0 must not become u = width.
        u = np.minimum(width - points[:, 0], np.nextafter(width, np.float32(0)))
        points = np.column_stack([u, points[:, 1:]])
    return replace(
        sample,
        picture=ImageOps.mirror(sample.picture),
        **mirrored,
        points=points,
        intrinsics=intrinsics,
        image_bytes=None,
    )


def thin(
    sample: Sample, patterns: Sequence[str], max_kept: float, rng: np.random.Generator
) -> Sample:
    """Keep only the measurements that a sensor would have made, one of `patterns` at random.

    At most `max_kept` of the image's pixels stay measured.
    """
    depth = sample.depth
    if depth is None:
        return sample
    metres, valid = depth
    pattern = patterns[int(rng.integers(len(patterns)))]
    if pattern == "dense" and max_kept == 1:
        return replace(sample, metres=metres, valid=valid, points=None)
    kept = sparsify(sample.image, metres, valid, pattern=pattern, max_kept=max_kept, rng=rng)
    return replace(sample, metres=np.where(kept, metres, np.float32(0)), valid=kept, points=None)


def jitter(
    image: UInt8[np.ndarray, "h w 3"], strength: float, rng: np.random.Generator
) -> UInt8[np.ndarray, "h w 3"]:
    """Brightness, contrast and saturation each times a factor in 1 +- `strength`."""
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3)
    pixels = image.astype(np.float32) * np.float32(brightness)
    grey = (pixels @ LUMA)[..., None]
    pixels = grey + (pixels - grey) * np.float32(saturation)
    middle = grey.mean()
    pixels = middle + (pixels - middle) * np.float32(contrast)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
