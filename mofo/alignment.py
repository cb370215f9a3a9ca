"""The scale and shift that bring a prediction to the truth, each with what it minimises.

Over n measured pixels with prediction p and truth d > 0, `fit` finds a scale a and a shift b:

    none                 a = 1, b = 0
    median               a = median(d) / median(p), numpy's medians (the mean of the two middles)
    median_lower         the same, with the lower of the two middles, as torch has it
    scale                argmin_a     sum (a p - d)^2
    affine               argmin_{a,b} sum (a p + b - d)^2
    disparity            argmin_{a,b} sum (a p + b - 1/d)^2 over p > 0
    scale_l1             argmin_a     sum |a p - d| / d
    affine_l1            argmin_{a,b} sum |a p + b - d| / d
    scale_l1_truncated   argmin_a     sum min(1, |a p - d| / d)
    affine_l1_truncated  argmin_{a,b} sum min(1, |a p + b - d| / d)

All in float64. A best scale that is negative is kept: it is the optimum, both published protocols
keep it, and whoever reads `scale` sees it. A constant prediction, one pixel too, leaves a line
undetermined: it gets scale 0. Two pixels of different prediction are met exactly. Where several
scales are best, `scale_l1` takes the least, and any best line may come from the others. No pixel,
NaN or infinity is refused.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int

Pixels = Float64[np.ndarray, " n"]

L1_GRID = 64  # side of the grid on which MoGe's evaluation fits
TRUNCATION = 1.0  # of the truncated losses, as MoGe's training has it: an error of the whole depth
_FLAT = 1e-12  # a prediction whose spread is this share of its size is constant: rounding made it
_BLOCK = 2**20  # numbers sorted at a time: what a processor's cache holds


class Line(NamedTuple):
    """Aligned is scale * prediction + shift."""

    scale: float
    shift: float


def fit(alignment: str, p: Pixels, d: Pixels) -> Line:
    """The best line of one of ALIGNMENTS; refuses pixels from which none follows."""
    if alignment not in ALIGNMENTS:
        accepted = ", ".join(ALIGNMENTS)
        raise ValueError(f"alignment is {alignment!r}, but must be one of: {accepted}")
    check(p, d)
    return ALIGNMENTS[alignment](p, d)


def check(p: Pixels, d: Pixels) -> None:
    """Refuse pixels that are none, not finite, or whose true depth is not positive."""
    if not len(p):
        raise ValueError("no pixel has measured depth, so there is nothing to score; leave it out")
    _refuse(~np.isfinite(p), "predicted", "not finite; mask them or write 0")
    _refuse(~(np.isfinite(d) & (d > 0)), "true", "not finite and > 0; unmark them")


def none(p: Pixels, d: Pixels) -> Line:
    """Minimises nothing: the prediction as it is."""
    return Line(1.0, 0.0)


def median(p: Pixels, d: Pixels) -> Line:
    """Meets the median; minimises sum |a p - d| only if all p are equal."""
    return _ratio(np.median(d), np.median(p))


def median_lower(p: Pixels, d: Pixels) -> Line:
    """`median` with the lower of two middles."""
    middle = (len(p) - 1) // 2
    return _ratio(np.partition(d, middle)[middle], np.partition(p, middle)[middle])


def scale(p: Pixels, d: Pixels) -> Line:
    """Minimises sum (a p - d)^2; a prediction of all 0 gets scale 0."""
    power = p @ p
    return Line(float(p @ d / power) if power > 0 else 0.0, 0.0)


def affine(p: Pixels, d: Pixels) -> Line:
    """Minimises sum (a p + b - d)^2; a constant prediction gets scale 0 and the mean of d."""
    centred = p - p.mean()
    power = centred @ centred
    # Below this the spread is rounding of the mean, and a slope from it would be noise.
    if power <= len(p) * (_FLAT * np.abs(p).max()) ** 2:
        return Line(0.0, float(d.mean()))
    slope = centred @ (d - d.mean()) / power
    return Line(float(slope), float(d.mean() - slope * p.mean()))


def disparity(p: Pixels, d: Pixels) -> Line:
    """Minimises sum (a p + b - 1/d)^2 over the pixels with p > 0."""
    positive = p > 0
    if not positive.any():
        raise ValueError("no predicted disparity is positive where depth was measured")
    return affine(p[positive], 1.0 / d[positive])


def scale_l1(p: Pixels, d: Pixels) -> Line:
    """Minimises sum |a p - d| / d, so AbsRel: the weighted median of d / p, weights |p| / d."""
    if not p.all():
        used = p != 0
        p, d = p[used], d[used]
    if not len(p):
        return Line(0.0, 0.0)
    return Line(weighted_median(d / p, np.abs(p) / d), 0.0)


def affine_l1(p: Pixels, d: Pixels) -> Line:
    """Minimises sum |a p + b - d| / d, to rounding, in some 20 steps of O(n log n).

    The loss at its best shift, f(a), is convex and made of straight pieces. Two tangents of
    opposite slope meet below its minimum; where f reaches their meeting point, that is it.
    """
    weight = 1.0 / d
    if np.ptp(p) <= _FLAT * np.abs(p).max():
        return Line(0.0, weighted_median(d, weight))
    low, high = _bracket(p, d, weight)
    best = min(low, high, key=lambda tangent: tangent.value)
    while low.slope < 0 < high.slope:
        fall = high.value - low.value - high.slope * (high.at - low.at)
        at = low.at + fall / (low.slope - high.slope)
        bound = low.value + low.slope * (at - low.at)
        # The losses are shares of the truth, so that n is their size.
        if best.value - bound <= 1e-15 * len(p) or not low.at < at < high.at:
            break
        tangent = _tangent(at, p, d, weight)
        best = min(best, tangent, key=lambda tangent: tangent.value)
        low, high = (low, tangent) if tangent.slope > 0 else (tangent, high)
    return Line(best.at, float(d[best.pixel] - best.at * p[best.pixel]))


def scale_l1_truncated(p: Pixels, d: Pixels) -> Line:
    """Minimises sum min(1, |a p - d| / d): a gross outlier costs 1, however gross."""
    return Line(float(_truncated_scales(p[None], d[None], d)[0]), 0.0)


def affine_l1_truncated(p: Pixels, d: Pixels) -> Line:
    """Minimises sum min(1, |a p + b - d| / d), in O(n^2 log n): 0.3 s for 1,000 pixels.

    A best line meets a pixel; so each pixel in turn is held, and the scale about it solved.
    """
    least, best = np.inf, Line(0.0, 0.0)
    step = max(1, _BLOCK // (3 * len(p)))
    for first in range(0, len(p), step):
        held = slice(first, first + step)
        x, y = p - p[held, None], d - d[held, None]
        scales = _truncated_scales(x, y, d)
        losses = _truncated_loss(scales, x, y, d)
        at = int(losses.argmin())
        if losses[at] < least:
            least = losses[at]
            best = Line(float(scales[at]), float(d[held][at] - scales[at] * p[held][at]))
    return best


def weighted_median(values: Pixels, weight: Pixels) -> float:
    """The value v minimising sum weight |value - v|; the lower one where two do."""
    order = np.argsort(values)
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
    rows, row_distance = windows(h, side)
    columns, column_distance = windows(w, side)
    # In each image row, every cell's nearest measured pixel: the first, sorted by distance.
    order = np.argsort(column_distance, axis=1, kind="stable")
    columns = np.take_along_axis(columns, order, axis=1)
    column_distance = np.take_along_axis(column_distance, order, axis=1)
    inside = (columns >= 0) & (columns < w)
    measured = valid[:, np.where(inside, columns, 0)] & inside  # (h, side, k)
    first = measured.argmax(axis=2)
    cell = np.arange(side)
    found = measured[np.arange(h)[:, None], cell, first]
    distance = np.where(found, column_distance[cell, first], np.inf)
    # Then the nearest of these over the cell's rows.
    inside = (rows >= 0) & (rows < h)
    rows = np.where(inside, rows, 0)
    far = np.where(inside, row_distance, np.inf)
    distance = distance[rows] + far[:, :, None]  # (side, k, side)
    nearest = distance.argmin(axis=1)
    covered = np.isfinite(np.take_along_axis(distance, nearest[:, None], axis=1)[:, 0])
    row = rows[cell[:, None], nearest]
    return np.where(covered, row * w + columns[cell, first[row, cell]], 0), covered


def column_sample(shape: tuple[int, int], max_resolution: int) -> Int[np.ndarray, " k"]:
    """The columns that Marigold's evaluation fits on where it limits the resolution.

    The factor is that of the longer side, but only the width shrinks, by nearest neighbours: a
    defect of the reference, which hands an image to a resize of one dimension.
    """
    h, w = shape
    factor = min(max_resolution / h, max_resolution / w)
    if factor >= 1:
        return np.arange(w)
    # The source pixel is found in float32 there.
    position = np.arange(int(w * factor), dtype=np.float32) * np.float32(1 / factor)
    return np.minimum(position.astype(np.int64), w - 1)


class _Tangent(NamedTuple):
    """Of f at scale `at`: its value, a slope, and a pixel that the best line meets there."""

    at: float
    value: float
    slope: float
    pixel: int


def _tangent(at: float, p: Pixels, d: Pixels, weight: Pixels) -> _Tangent:
    intercept = d - at * p
    order = np.argsort(intercept)
    weight, p, intercept = weight[order], p[order], intercept[order]
    total = np.cumsum(weight)
    k = int(np.searchsorted(total, 0.5 * total[-1]))
    value = weight @ np.abs(intercept - intercept[k])
    # The best line passes above the pixels before k, below those after, and turns about k.
    turn = weight * (p - p[k])
    return _Tangent(at, float(value), float(turn[:k].sum() - turn[k:].sum()), int(order[k]))


def _bracket(p: Pixels, d: Pixels, weight: Pixels) -> tuple[_Tangent, _Tangent]:
    """Two scales between which f has its minimum, from the least-squares scale outwards."""
    start = affine(p, d).scale
    reach = max(abs(start), float(d.max() / np.ptp(p))) * 1e-3
    low, high = (_tangent(start + sign * reach, p, d, weight) for sign in (-1.0, 1.0))
    while low.slope > 0:
        reach *= 4.0
        low, high = _tangent(low.at - reach, p, d, weight), low
    while high.slope < 0:
        reach *= 4.0
        low, high = high, _tangent(high.at + reach, p, d, weight)
    return low, high


def _truncated_scales(
    x: Float64[np.ndarray, "k n"], y: Float64[np.ndarray, "k n"], d: Pixels
) -> Float64[np.ndarray, " k"]:
    """Per row the scale a minimising sum min(1, |a x - y| / d).

    A pixel's loss falls from 1 at `ratio - reach` to 0 at `ratio` and is 1 again at
    `ratio + reach`; between such points the sum is straight, so running sums give it at all.
    """
    x, y = np.where(x < 0, -x, x), np.where(x < 0, -y, y)
    used = x > 0
    weight = np.where(used, x / d, 0.0)
    target = np.where(used, y / d, 0.0)
    safe = np.where(used, x, 1.0)
    ratio, reach = np.where(used, y / safe, 0.0), np.where(used, TRUNCATION * d / safe, 0.0)
    kinks = np.concatenate([ratio - reach, ratio, ratio + reach], axis=1)
    order = np.argsort(kinks, axis=1)
    kinks = np.take_along_axis(kinks, order, axis=1)
    zero = np.zeros_like(weight)

    def running(falls: np.ndarray, rests: np.ndarray, ends: np.ndarray) -> np.ndarray:
        steps = np.concatenate([falls, rests, ends], axis=1)
        return np.cumsum(np.take_along_axis(steps, order, axis=1), axis=1)

    slope = running(-weight, 2 * weight, -weight)
    offset = running(-target, 2 * target, -target)
    count = running(-1.0 * used, zero, 1.0 * used)
    loss = TRUNCATION * count + slope * kinks - offset
    # A pixel as good as held gives a kink so far out that its loss is all rounding.
    rounding = 1e-16 * np.abs(kinks) * weight.sum(axis=1, keepdims=True)
    loss = np.where(rounding > 1e-9 * len(d), np.inf, loss)
    return np.take_along_axis(kinks, loss.argmin(axis=1)[:, None], axis=1)[:, 0]


def _truncated_loss(
    scales: Float64[np.ndarray, " k"],
    x: Float64[np.ndarray, "k n"],
    y: Float64[np.ndarray, "k n"],
    d: Pixels,
) -> Float64[np.ndarray, " k"]:
    return np.minimum(TRUNCATION, np.abs(scales[:, None] * x - y) / d).sum(axis=1)


def _ratio(of_truth: np.floating, of_pred: np.floating) -> Line:
    if of_pred == 0:
        raise ValueError("the prediction's median is 0, so no scale fits; use alignment='scale'")
    return Line(float(of_truth / of_pred), 0.0)


def windows(
    length: int, side: int
) -> tuple[Int[np.ndarray, "side k"], Float64[np.ndarray, "side k"]]:
    """Along one axis: the positions each cell looks at, and squared distances to its centre."""
    step = length / side
    centre = (np.arange(side) + 0.5) * step
    first = np.round(centre - max(1.0, step) / 2).astype(np.int64)
    position = first[:, None] + np.arange(int(np.ceil(max(1.0, step))))
    return position, (position + 0.5 - centre[:, None]) ** 2


def _refuse(bad: Bool[np.ndarray, " n"], whose: str, why: str) -> None:
    if bad.any():
        count = np.count_nonzero(bad)
        raise ValueError(f"{count} of {len(bad)} {whose} depths at measured pixels are {why}")


ALIGNMENTS: dict[str, Callable[[Pixels, Pixels], Line]] = {
    "none": none,
    "median": median,
    "scale": scale,
    "affine": affine,
    "disparity": disparity,
    "scale_l1": scale_l1,
    "affine_l1": affine_l1,
    "median_lower": median_lower,
    "scale_l1_truncated": scale_l1_truncated,
    "affine_l1_truncated": affine_l1_truncated,
}
