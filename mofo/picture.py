"""Pictures of depth and grids of pictures: array in, array out, uint8 RGB, no files.

Depth is drawn as disparity (1/depth) between its 5th and 95th percentile: near is bright, far is
dark, and a pixel without depth is grey.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFont

Picture = UInt8[np.ndarray, "h w 3"]

# Nine stops of the magma colour map (van der Walt and Smith, 2015, CC0), interpolated linearly.
MAGMA = np.array([
    (0, 0, 4), (28, 16, 68), (79, 18, 123), (129, 37, 129), (181, 54, 122),
    (229, 80, 100), (251, 135, 97), (254, 194, 135), (252, 253, 191),
], dtype=np.float64)  # fmt: skip
NO_DEPTH = (96, 96, 100)
PERCENTILES = (5, 95)


def magma(values: Float[np.ndarray, "h w"]) -> Picture:
    """Colours of values in [0, 1], dark to bright; what lies outside takes the end's colour."""
    position = np.clip(values, 0, 1) * (len(MAGMA) - 1)
    stops = np.arange(len(MAGMA))
    channels = [np.interp(position, stops, channel) for channel in MAGMA.T]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def disparity_limits(
    depth: Float[np.ndarray, "h w"], valid: Bool[np.ndarray, "h w"] | None = None
) -> tuple[float, float]:
    """The 5th and 95th percentile of 1/depth, for pictures that share one scale."""
    usable = _usable(depth, valid)
    if not usable.any():
        return 0.0, 1.0
    low, high = np.percentile(1.0 / depth[usable], PERCENTILES)
    return float(low), float(high)


def depth_picture(
    depth: Float[np.ndarray, "h w"],
    valid: Bool[np.ndarray, "h w"] | None = None,
    limits: tuple[float, float] | None = None,
) -> Picture:
    """Depth as disparity; `limits` replaces the picture's own percentiles."""
    usable = _usable(depth, valid)
    low, high = disparity_limits(depth, valid) if limits is None else limits
    disparity = 1.0 / np.where(usable, depth, 1.0)
    # A flat depth map has no range: it is drawn in the middle colour.
    position = (disparity - low) / (high - low) if high > low else np.full_like(disparity, 0.5)
    return _masked(magma(position), usable)


def error_picture(
    pred: Float[np.ndarray, "h w"],
    depth: Float[np.ndarray, "h w"],
    valid: Bool[np.ndarray, "h w"],
    worst: float = 0.5,
) -> Picture:
    """Relative error |pred - depth| / depth at measured pixels: dark is 0, bright is `worst`."""
    error = np.abs(pred - depth) / np.where(valid, depth, 1.0)
    return _masked(magma(np.where(valid, error, 0.0) / worst), valid)


def from_unit(image: Float[np.ndarray, "3 h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """A picture of values in [-1, 1], channels first, as the networks have them."""
    return ((image.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8).transpose(1, 2, 0)


def enlarge(image: Picture, factor: int) -> UInt8[np.ndarray, "hf wf 3"]:
    """Each pixel becomes factor x factor pixels: small pictures stay sharp."""
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def grid(
    rows: Sequence[Sequence[UInt8[np.ndarray, "_ _ 3"]]],
    labels: Sequence[str] = (),
    *,
    gap: int = 4,
    background: tuple[int, int, int] = (255, 255, 255),
) -> UInt8[np.ndarray, "hg wg 3"]:
    """Pictures in rows and columns, `labels` above the columns; cells take the largest size."""
    columns = max((len(row) for row in rows), default=0)
    if not columns:
        raise ValueError("a grid needs at least one picture")
    if labels and len(labels) != columns:
        raise ValueError(f"the grid has {columns} columns, but {len(labels)} labels were given")
    h = max(picture.shape[0] for row in rows for picture in row)
    w = max(picture.shape[1] for row in rows for picture in row)
    top = (16 if labels else 0) + gap
    size = (top + len(rows) * (h + gap), gap + columns * (w + gap), 3)
    canvas = np.full(size, background, np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            y, x = top + i * (h + gap), gap + j * (w + gap)
            canvas[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
    return _written(canvas, labels, gap, w + gap, background) if labels else canvas


def _written(
    canvas: Picture, labels: Sequence[str], gap: int, step: int, background: tuple[int, int, int]
) -> Picture:
    image = Image.fromarray(canvas)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=11)
    ink = (0, 0, 0) if sum(background) > 382 else (255, 255, 255)
    for j, label in enumerate(labels):
        draw.text((gap + j * step, 3), label, fill=ink, font=font)
    return np.asarray(image)


def _usable(
    depth: Float[np.ndarray, "h w"], valid: Bool[np.ndarray, "h w"] | None
) -> Bool[np.ndarray, "h w"]:
    positive = np.isfinite(depth) & (depth > 0)
    return positive if valid is None else positive & valid


def _masked(picture: Picture, valid: Bool[np.ndarray, "h w"]) -> Picture:
    picture[~valid] = NO_DEPTH
    return picture
