"""How far predicted depth is from measured depth: alignment first, then per-image metrics.

Only measured pixels count. With prediction p, truth d and n measured pixels, an alignment finds

    none        a = 1, b = 0
    median      a = median(d) / median(p), numpy's medians (the mean of the two middles)
    scale       argmin_a     sum (a p - d)^2
    affine      argmin_{a,b} sum (a p + b - d)^2
    disparity   argmin_{a,b} sum (a p + b - 1/d)^2 over p > 0; depth is 1 / max(a p + b, 1e-3)
    scale_l1    argmin_a     sum |a p - d| / d                 on the mask-aware 64x64 sample
    affine_l1   argmin_{a,b} sum |a p + b - d| / d             on the mask-aware 64x64 sample

then the aligned depth is clipped to [low, high]. A best scale that is negative is kept: it is the
optimum, and `scale` shows it. All arithmetic is float64.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int, Num
from torch import Tensor

Array = np.ndarray | Tensor
Pixels = Float64[np.ndarray, " n"]

MIN_DISPARITY = 1e-3  # where Marigold's evaluation clamps an aligned disparity
LOG_FLOOR = 1e-6  # the least depth whose logarithm is taken, as in Marigold's evaluation
L1_GRID = 64  # side of the grid on which MoGe's evaluation fits

METRICS = (
    "absrel", "delta1", "delta2", "delta3", "rmse", "rmse_log", "log10", "sqrel", "silog",
)  # fmt: skip


class Aligned(NamedTuple):
    """Depth of the whole image after alignment and clipping, with the fitted scale and shift."""

    depth: Float64[np.ndarray, "h w"]
    scale: float
    shift: float


def score(
    pred: Num[Array, "hp wp"],
    depth: Num[Array, "h w"],
    valid: Bool[Array, "h w"],
    alignment: str = "affine",
    low: float | int | None = None,
    high: float | int | None = None,
) -> dict[str, float]:
    """Metrics of one image over its measured pixels, with the fitted `scale` and `shift`.

    AbsRel, SqRel and log10 are means, `delta_k` the share with max(p/d, d/p) < 1.25^k and p > 0,
    `silog` 100 times the population standard deviation of ln p - ln d. Logarithms are of at least
    1e-6. The prediction must be finite wherever depth was measured.
    """
    pred, depth, valid = _checked(pred, depth, valid)
    aligned = _align(pred, depth, valid, alignment, low, high)
    metrics = compare(aligned.depth[valid], depth[valid])
    num_valid = float(np.count_nonzero(valid))
    return {**metrics, "num_valid": num_valid, "scale": aligned.scale, "shift": aligned.shift}


def align(
    pred: Num[Array, "hp wp"],
    depth: Num[Array, "h w"],
    valid: Bool[Array, "h w"],
    alignment: str = "affine",
    low: float | int | None = None,
    high: float | int | None = None,
) -> Aligned:
    """Fit on the measured pixels, apply to the whole image; unmeasured pixels may stay NaN."""
    return _align(*_checked(pred, depth, valid), alignment, low, high)


def _align(
    pred: Float64[np.ndarray, "h w"],
    depth: Float64[np.ndarray, "h w"],
    valid: Bool[np.ndarray, "h w"],
    alignment: str,
    low: float | int | None,
    high: float | int | None,
) -> Aligned:
    if alignment not in ALIGNMENTS:
        accepted = ", ".join(ALIGNMENTS)
        raise ValueError(f"alignment is {alignment!r}, but must be one of: {accepted}")
    if alignment.endswith("_l1"):
        index, covered = grid_sample(valid, L1_GRID)
        p, d = pred.ravel()[index[covered]], depth.ravel()[index[covered]]
    else:
        p, d = pred[valid], depth[valid]
    scale, shift = ALIGNMENTS[alignment](p, d)
    aligned = scale * pred + shift
    if alignment == "disparity":
        aligned = 1.0 / np.maximum(aligned, MIN_DISPARITY)
    if low is not None or high is not None:
        aligned = np.clip(aligned, low, high)
    return Aligned(aligned, float(scale), float(shift))


def compare(p: Pixels, d: Pixels) -> dict[str, float]:
    """METRICS of aligned depths p against true depths d > 0, pixel by pixel."""
    error = p - d
    log_error = np.log(np.maximum(p, LOG_FLOOR)) - np.log(d)
    # A negative prediction has two negative ratios, both "below 1.25": it must not pass as correct.
    positive = p > 0
    ratio = np.full_like(p, np.inf)
    ratio[positive] = np.maximum(p[positive] / d[positive], d[positive] / p[positive])
    return {
        "absrel": float(np.mean(np.abs(error) / d)),
        "delta1": float(np.mean(ratio < 1.25)),
        "delta2": float(np.mean(ratio < 1.25**2)),
        "delta3": float(np.mean(ratio < 1.25**3)),
        "rmse": float(np.sqrt(np.mean(error**2))),
        "rmse_log": float(np.sqrt(np.mean(log_error**2))),
        "log10": float(np.mean(np.abs(log_error)) / np.log(10.0)),
        "sqrel": float(np.mean(error**2 / d)),
        "silog": float(100.0 * np.std(log_error)),
    }


def _none(p: Pixels, d: Pixels) -> tuple[float, float]:
    return 1.0, 0.0


def _median(p: Pixels, d: Pixels) -> tuple[float, float]:
    middle = np.median(p)
    if middle == 0:
        raise ValueError("the prediction's median is 0, so no scale fits; use alignment='scale'")
    return np.median(d) / middle, 0.0


def _scale(p: Pixels, d: Pixels) -> tuple[float, float]:
    power = p @ p
    return (float(p @ d / power) if power > 0 else 0.0), 0.0


def _affine(p: Pixels, d: Pixels) -> tuple[float, float]:
    """Least squares; a constant prediction (or a single pixel) gets scale 0 and the mean of d."""
    centred = p - p.mean()
    power = centred @ centred
    # Below this the spread is rounding of the mean, and a slope from it would be noise.
    if power <= len(p) * (1e-12 * np.abs(p).max()) ** 2:
        return 0.0, d.mean()
    scale = centred @ (d - d.mean()) / power
    return scale, d.mean() - scale * p.mean()


def _disparity(p: Pixels, d: Pixels) -> tuple[float, float]:
    positive = p > 0
    if not positive.any():
        raise ValueError("no predicted disparity is positive where depth was measured")
    return _affine(p[positive], 1.0 / d[positive])


def _scale_l1(p: Pixels, d: Pixels) -> tuple[float, float]:
    """The ratios d/p have their weighted median, with weights |p|/d, at the optimum."""
    used = p != 0
    if not used.any():
        return 0.0, 0.0
    return weighted_median(d[used] / p[used], np.abs(p[used]) / d[used]), 0.0


def _affine_l1(p: Pixels, d: Pixels) -> tuple[float, float]:
    """The loss at its best shift is convex in the scale: bisect on the sign of its slope."""
    weight = 1.0 / d
    if np.ptp(p) <= 1e-12 * np.abs(p).max():
        return 0.0, weighted_median(d, weight)

    def slope_and_shift(scale: float) -> tuple[float, float]:
        intercept = d - scale * p
        shift = weighted_median(intercept, weight)
        # Turning the line about the pixel it passes through keeps the shift at its best.
        on_line = p[np.argmin(np.abs(intercept - shift))]
        return weight * (p - on_line) @ np.sign(shift - intercept), shift

    start = _affine(p, d)[0]
    reach = max(abs(start), d.max() / np.ptp(p)) * 1e-3
    low, high = start - reach, start + reach
    while slope_and_shift(low)[0] > 0:
        low -= (reach := 2.0 * reach)
    while slope_and_shift(high)[0] < 0:
        high += (reach := 2.0 * reach)
    while low < (middle := 0.5 * (low + high)) < high:
        if slope_and_shift(middle)[0] > 0:
            high = middle
        else:
            low = middle
    return low, slope_and_shift(low)[1]


def weighted_median(values: Pixels, weight: Pixels) -> float:
    """The value minimising sum weight |value - v|; the lower one where two do."""
    order = np.argsort(values, kind="stable")
    total = np.cumsum(weight[order])
    return float(values[order[np.searchsorted(total, 0.5 * total[-1])]])


def grid_sample(
    valid: Bool[np.ndarray, "h w"], side: int
) -> tuple[Int[np.ndarray, "side side"], Bool[np.ndarray, "side side"]]:
    """Each cell's nearest measured pixel as a flat index, and whether the cell has one.

    A cell looks into a window of ceil(max(1, h / side)) rows (columns: w), which starts at its
    centre less half of max(1, h / side), rounded half to even. Ties go to the first in row-major
    order; a grid finer than the image repeats pixels.
    """
    h, w = valid.shape
    rows, row_distance = _windows(h, side)
    columns, column_distance = _windows(w, side)
    shape = (side, side, rows.shape[1] * columns.shape[1])
    y = np.broadcast_to(rows[:, None, :, None], (side, side, rows.shape[1], columns.shape[1]))
    x = np.broadcast_to(columns[None, :, None, :], y.shape)
    distance = row_distance[:, None, :, None] + column_distance[None, :, None, :]
    measured = (y >= 0) & (y < h) & (x >= 0) & (x < w)
    index = np.where(measured, y * w + x, 0).reshape(shape)
    measured = measured.reshape(shape) & valid.ravel()[index]
    nearest = np.where(measured, distance.reshape(shape), np.inf).argmin(axis=2)
    return np.take_along_axis(index, nearest[..., None], axis=2)[..., 0], measured.any(axis=2)


def _windows(
    length: int, side: int
) -> tuple[Int[np.ndarray, "side k"], Float64[np.ndarray, "side k"]]:
    """Along one axis: the positions each cell looks at, and squared distances to its centre."""
    step = length / side
    centre = (np.arange(side) + 0.5) * step
    first = np.round(centre - max(1.0, step) / 2).astype(np.int64)
    position = first[:, None] + np.arange(int(np.ceil(max(1.0, step))))
    return position, (position + 0.5 - centre[:, None]) ** 2


def _checked(
    pred: Num[Array, "hp wp"], depth: Num[Array, "h w"], valid: Bool[Array, "h w"]
) -> tuple[Float64[np.ndarray, "h w"], Float64[np.ndarray, "h w"], Bool[np.ndarray, "h w"]]:
    valid = valid.cpu().numpy() if isinstance(valid, Tensor) else valid
    pred, depth = _float64(pred), _float64(depth)
    if pred.shape != depth.shape:
        raise ValueError(
            f"the prediction is {pred.shape[0]}x{pred.shape[1]}, but the truth is "
            f"{depth.shape[0]}x{depth.shape[1]}; resize the prediction to the truth's size"
        )
    if not valid.any():
        raise ValueError("no pixel has measured depth, so there is nothing to score; leave it out")
    _refuse(~np.isfinite(pred[valid]), "predicted", "not finite; mask them or write 0")
    measured = depth[valid]
    _refuse(~(np.isfinite(measured) & (measured > 0)), "true", "not finite and > 0; unmark them")
    return pred, depth, valid


def _refuse(bad: Bool[np.ndarray, " n"], whose: str, why: str) -> None:
    if bad.any():
        count = np.count_nonzero(bad)
        raise ValueError(f"{count} of {len(bad)} {whose} depths at measured pixels are {why}")


def _float64(array: Num[Array, "..."]) -> Float64[np.ndarray, "..."]:
    if isinstance(array, Tensor):
        array = array.detach().cpu().double().numpy()
    return np.asarray(array, dtype=np.float64)


ALIGNMENTS: dict[str, Callable[[Pixels, Pixels], tuple[float, float]]] = {
    "none": _none,
    "median": _median,
    "scale": _scale,
    "affine": _affine,
    "disparity": _disparity,
    "scale_l1": _scale_l1,
    "affine_l1": _affine_l1,
}
