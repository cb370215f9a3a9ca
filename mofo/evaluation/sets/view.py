"""MoGe's evaluation view: every image re-projected so that the optical axis meets its centre.

The camera is turned until the middle of the image lies straight ahead; of the views with the target
aspect around that axis the largest is taken that the image covers. The image is brought to about
the target's pixels (Lanczos), then sampled (bilinear). Depth is resized by the nearest measured
pixel, made a distance from the camera, which the turn leaves alone, sampled (nearest), and made
depth again. Intrinsics are in units of width and height, and pixel centres at half-integers. Facts:
moge/test/dataloader.py of microsoft/MoGe; here in float64 throughout.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, UInt8
from PIL import Image

from mofo.alignment import windows

FRACTIONS = 32  # steps of a pixel in which OpenCV's remap takes bilinear weights
ROUNDING = 1e-6  # of a pixel: sizes that are whole but for float arithmetic stay whole

Matrix = Float64[np.ndarray, "3 3"]


class View(NamedTuple):
    """What a camera of normalised `intrinsics`, ahead of the image's middle, sees."""

    image: UInt8[np.ndarray, "h w 3"]
    depth: Float32[np.ndarray, "h w"]
    valid: Bool[np.ndarray, "h w"]
    intrinsics: Matrix


def reproject(
    image: UInt8[np.ndarray, "h2 w2 3"],
    depth: Float32[np.ndarray, "h3 w3"],
    valid: Bool[np.ndarray, "h3 w3"],
    intrinsics: Matrix,
    size: tuple[int, int],
) -> View:
    """The view of `size` (height, width) of an image and its depth."""
    h, w = size
    rotation = turn_ahead(np.linalg.inv(intrinsics) @ (0.5, 0.5, 1.0))
    width = _field_of_view(intrinsics, rotation, w / h)
    height = width * h / w
    target = np.array([[1 / width, 0, 0.5], [0, 1 / height, 0.5], [0, 0, 1]])

    resized_w = int(w / (intrinsics[0, 0] * width) + ROUNDING)
    resized_h = int(h / (intrinsics[1, 1] * height) + ROUNDING)
    resized = Image.fromarray(image).resize((resized_w, resized_h), Image.Resampling.LANCZOS)
    depth, valid = nearest_measured(depth, valid, (resized_h, resized_w))
    distance = depth * np.linalg.norm(
        _rays(np.linalg.inv(intrinsics), (resized_h, resized_w)), axis=0
    )

    seen = _rays(intrinsics @ rotation.T @ np.linalg.inv(target), size)
    x = (seen[0] / seen[2] * resized_w - 0.5).astype(np.float32)
    y = (seen[1] / seen[2] * resized_h - 0.5).astype(np.float32)
    pixels = _bilinear(np.asarray(resized), x, y)
    at, inside = _nearest((resized_h, resized_w), x, y)
    near = distance.ravel()[at] / np.linalg.norm(_rays(np.linalg.inv(target), size), axis=0)
    return View(pixels, near.astype(np.float32), valid.ravel()[at] & inside, target)


def turn_ahead(direction: Float64[np.ndarray, "3"]) -> Matrix:
    """The smallest rotation that brings a direction to (0, 0, 1)."""
    x, y, z = direction / np.linalg.norm(direction)
    # Rodrigues' formula about (y, -x, 0); the denominator is 0 only for what lies behind.
    cross = np.array([[0, 0, -x], [0, 0, -y], [x, y, 0]])
    return np.eye(3) + cross + cross @ cross / (1 + z)


def _field_of_view(intrinsics: Matrix, rotation: Matrix, aspect: float) -> float:
    """Width, at depth 1, of the largest view of an aspect that the turned image covers."""
    corners = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 1], [1, 0, 1]], np.float64)
    corners = corners @ np.linalg.inv(intrinsics).T @ rotation.T
    start = corners[:, :2] / corners[:, 2:]
    edge = np.roll(start, -1, axis=0) - start
    # The view's diagonals t (aspect, 1) and t (aspect, -1) meet an edge's line at these t.
    slope = np.array([1.0, -1.0])
    from_axis = start[:, :1] * edge[:, 1:] - start[:, 1:] * edge[:, :1]
    with np.errstate(divide="ignore"):
        reach = from_axis / (aspect * edge[:, 1:] - slope * edge[:, :1])
    raw = 1 / abs(intrinsics[0, 0]), aspect / abs(intrinsics[1, 1])
    return min(*raw, 2 * aspect * float(np.abs(reach).min()))


def nearest_measured(
    depth: Float32[np.ndarray, "h w"], valid: Bool[np.ndarray, "h w"], size: tuple[int, int]
) -> tuple[Float32[np.ndarray, "h2 w2"], Bool[np.ndarray, "h2 w2"]]:
    """Depth on a grid of `size`: of the measured pixels in a cell's window that nearest its centre.

    A window has ceil(max(1, h / rows)) rows and starts max(1, h / rows) / 2 before the centre,
    rounded half to even; columns alike. Ties go to the first in row-major order.
    """
    if depth.shape == size:
        return depth, valid
    rows, far_y = _inside(depth.shape[0], size[0])
    columns, far_x = _inside(depth.shape[1], size[1])
    best = np.full(size, np.inf)
    out = np.zeros(size, np.float32)
    for y, dy in zip(rows.T, far_y.T, strict=True):
        for x, dx in zip(columns.T, far_x.T, strict=True):
            at = np.ix_(y, x)
            distance = np.where(valid[at], dy[:, None] + dx, np.inf)
            nearer = distance < best
            best[nearer], out[nearer] = distance[nearer], depth[at][nearer]
    return out, np.isfinite(best)


def _inside(
    length: int, cells: int
) -> tuple[Int64[np.ndarray, "cells k"], Float64[np.ndarray, "cells k"]]:
    """Along one axis: the pixels a cell looks at, and squared distances; infinite outside."""
    at, far = windows(length, cells)
    far = np.where((at >= 0) & (at < length), far, np.inf)
    return np.clip(at, 0, length - 1), far


def _rays(matrix: Matrix, size: tuple[int, int]) -> Float64[np.ndarray, "3 h w"]:
    """What a matrix makes of the homogeneous, normalised coordinates of pixel centres."""
    h, w = size
    u, v = (np.arange(w) + 0.5) / w, (np.arange(h)[:, None] + 0.5) / h
    return np.stack([across * u + (down * v + ahead) for across, down, ahead in matrix])


def _bilinear(
    image: UInt8[np.ndarray, "h2 w2 3"],
    x: Float32[np.ndarray, "h w"],
    y: Float32[np.ndarray, "h w"],
) -> UInt8[np.ndarray, "h w 3"]:
    """As OpenCV 4's remap has it: weights in steps of 1/32 of a pixel, black outside.

    Sums are exact in float32, so their order does not matter.
    """
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    (left, right_weight), (top, low_weight) = _split(x, image.shape[1]), _split(y, image.shape[0])
    flat, first = padded.reshape(-1, 3), top * padded.shape[1] + left
    total = np.full((*x.shape, 3), np.float32(0.5))  # half a grey value: what is added to round
    for down, wy in ((0, 1 - low_weight), (padded.shape[1], low_weight)):
        for across, wx in ((0, 1 - right_weight), (1, right_weight)):
            total += (wy * wx)[..., None] * np.take(flat, first + (down + across), axis=0)
    return total.astype(np.uint8)


def _split(
    at: Float32[np.ndarray, "h w"], length: int
) -> tuple[Int64[np.ndarray, "h w"], Float32[np.ndarray, "h w"]]:
    """Whole pixels, counted from the padding, and the fraction."""
    steps = np.rint(at * np.float32(FRACTIONS)).astype(np.int64)
    fraction = (steps % FRACTIONS).astype(np.float32) / np.float32(FRACTIONS)
    return np.clip(steps // FRACTIONS + 1, 0, length), fraction


def _nearest(
    size: tuple[int, int], x: Float32[np.ndarray, "h w"], y: Float32[np.ndarray, "h w"]
) -> tuple[Int64[np.ndarray, "h w"], Bool[np.ndarray, "h w"]]:
    """Flat index of the nearest pixel, and whether it lies in the image."""
    row, column = np.rint(y).astype(np.int64), np.rint(x).astype(np.int64)
    inside = (row >= 0) & (row < size[0]) & (column >= 0) & (column < size[1])
    return np.where(inside, row * size[1] + column, 0), inside
