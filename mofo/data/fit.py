"""How a picture of any size meets a network that was trained at one size, and comes back.

    fit = choose("native", source=(480, 640), trained=(512, 512), stride=16)    # 448 x 592
    pixels = picture_in(picture, fit)       # or depth_in(metres, valid, fit), at fit.size
    depth_out(depth, valid, fit)            # or picture_out(pixels, fit), at fit.source

native      keeps the aspect and about the trained area: the picture fills its own canvas
letterbox   keeps the aspect on the trained canvas: centred, its edge repeated into the borders
stretch     fills the trained canvas, distorted: what the method's script does
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from PIL import Image

from mofo.data.transforms import Box, centre_box, nearest_measured
from mofo.depth import fill_nearest, resample

FITS = ("native", "letterbox", "stretch")
# No side of a native canvas is longer than this many times the trained canvas's longer one: the
# network has never seen positions far outside it. Measured on strips of 6:1 of data/samples (the
# shipped model, AbsRel after scaling): 1, 1.5, 2, 2.5 times give 0.58, 0.55, 0.54, 0.55.
LONGEST = 2


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Heights and widths of the source and of the network's canvas; `box`, the source in it."""

    source: tuple[int, int]
    size: tuple[int, int]
    box: Box


def choose(fit: str, source: tuple[int, int], trained: tuple[int, int], stride: int) -> Fit:
    """The canvas for a source of this size; its sides are multiples of `stride`.

    "native" rounds each side to the nearest multiple, at least one. On a square trained canvas an
    aspect beyond 4:1 is clamped to 4:1 (in general: to where a side is LONGEST times the longer
    trained one), so that a panorama of 8:1 and a picture one pixel high are squeezed into that.
    """
    if fit not in FITS:
        raise ValueError(f"fit is {fit!r}, but must be one of {', '.join(FITS)}")
    size = _native_size(source, trained, stride) if fit == "native" else trained
    box = centre_box(size, source) if fit == "letterbox" else Box(0, 0, *size)
    return Fit(source=source, size=size, box=box)


def picture_in(picture: UInt8[np.ndarray, "h w 3"], fit: Fit) -> UInt8[np.ndarray, "h2 w2 3"]:
    """The network's canvas: the picture filtered to its box, its edge repeated around it.

    A border of one colour is a surface of its own: on data/samples the shipped model's AbsRel
    (after scaling) is 0.58 with the edge repeated, 0.61 with black, 0.62 with grey borders.
    """
    inside = _resize(picture, (fit.box.height, fit.box.width))
    return np.pad(inside, (*_borders(fit), (0, 0)), mode="edge")


def picture_out(pixels: UInt8[np.ndarray, "h2 w2 3"], fit: Fit) -> UInt8[np.ndarray, "h w 3"]:
    """What the network drew, without borders and filtered to the source's size."""
    return _resize(_inside(pixels, fit.box), fit.source)


def depth_in(
    metres: Float32[np.ndarray, "h w"], valid: Bool[np.ndarray, "h w"], fit: Fit
) -> tuple[Float32[np.ndarray, "h2 w2"], Bool[np.ndarray, "h2 w2"]]:
    """Depth on the network's canvas, filled from the nearest, and which cells were measured.

    A cell takes the measured pixel nearest to its centre; where the canvas is finer than the
    source, depth is resampled. Borders are filled and not measured.
    """
    inside = fit.box.height, fit.box.width
    fewer = min(metres.shape[0], inside[0]), min(metres.shape[1], inside[1])
    metres, valid = resample(*nearest_measured(metres, valid, fewer), inside)
    metres, valid = np.pad(metres, _borders(fit)), np.pad(valid, _borders(fit))
    return fill_nearest(metres, valid), valid


def depth_out(
    depth: Float32[np.ndarray, "h2 w2"], valid: Bool[np.ndarray, "h2 w2"], fit: Fit
) -> tuple[Float32[np.ndarray, "h w"], Bool[np.ndarray, "h w"]]:
    """Generated depth, without borders and resampled to the source's size."""
    return resample(_inside(depth, fit.box), _inside(valid, fit.box), fit.source)


def _native_size(source: tuple[int, int], trained: tuple[int, int], stride: int) -> tuple[int, int]:
    area, longest = trained[0] * trained[1], LONGEST * max(trained)
    height = np.clip(np.sqrt(area * source[0] / source[1]), area / longest, longest)
    rows, columns = (max(1, round(side / stride)) for side in (height, area / height))
    return rows * stride, columns * stride


def _resize(
    picture: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]
) -> UInt8[np.ndarray, "h2 w2 3"]:
    if picture.shape[:2] == size:
        return picture
    resized = Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return np.array(resized)


def _inside(canvas: np.ndarray, box: Box) -> np.ndarray:
    return canvas[box.top : box.top + box.height, box.left : box.left + box.width]


def _borders(fit: Fit) -> tuple[tuple[int, int], tuple[int, int]]:
    """Pixels before and after the box, along each side."""
    (height, width), box = fit.size, fit.box
    return (box.top, height - box.top - box.height), (box.left, width - box.left - box.width)
