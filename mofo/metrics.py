"""How far predicted depth is from measured depth: alignment first, then per-image metrics.

Only measured pixels count. `score` aligns one image as `mofo.alignment` has it (`scale_l1` and
`affine_l1` on the mask-aware 64x64 sample; disparity becomes depth as 1 / max(a p + b, 1e-3)), then
clips to [low, high]. Which alignment, clip and floors a published number has is a protocol's
matter: `mofo.evaluation.protocol`. All arithmetic is float64.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64, Int, Int64, Num
from torch import Tensor

from mofo.alignment import L1_GRID, Pixels, check, fit, grid_sample

Array = np.ndarray | Tensor
Counts = Int64[np.ndarray, " k"]

MIN_DISPARITY = 1e-3  # where Marigold's evaluation clamps an aligned disparity
LOG_FLOOR = 1e-6  # the least depth whose logarithm is taken, as in Marigold's evaluation
RADII = (1, 2, 3)  # of the neighbours that MoGe's evaluation looks at for edges
EDGES = 1.0 + np.linspace(0.05, 0.25, 10)  # its thresholds: how much farther the far side is
_BLOCK = 2**14  # pixels looked at together: what a processor's cache holds

METRICS = (
    "absrel", "delta1", "delta2", "delta3", "rmse", "rmse_log", "log10", "sqrel", "silog",
)  # fmt: skip
# What `compare` adds up over the pixels of an image.
_SUMS = (
    "absrel", "delta1", "delta2", "delta3", "squared", "log_squared", "log", "sqrel", "deviation",
    "deviation_squared", "inverse_squared",
)  # fmt: skip


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
    pred, depth, valid = as_arrays(pred, depth, valid)
    p, d = pred[valid].astype(np.float64), depth[valid].astype(np.float64)
    check(p, d)
    if "_l1" in alignment:
        index, covered = grid_sample(valid, L1_GRID)
        sampled = (array.ravel()[index[covered]].astype(np.float64) for array in (pred, depth))
        scale, shift = fit(alignment, *sampled)
    else:
        scale, shift = fit(alignment, p, d)
    aligned = scale * p + shift
    if alignment == "disparity":
        aligned = 1.0 / np.maximum(aligned, MIN_DISPARITY)
    if low is not None or high is not None:
        aligned = np.clip(aligned, low, high)
    compared = compare(aligned, d)
    metrics = {name: compared[name] for name in METRICS}
    return {**metrics, "num_valid": float(len(d)), "scale": scale, "shift": shift}


def compare(
    p: Pixels, d: Pixels, *, eps: float = 0.0, negatives_pass: bool = False
) -> dict[str, float]:
    """METRICS and `i_rmse` of aligned depths p against true depths d > 0, pixel by pixel.

    AbsRel divides by d + `eps`. A negative prediction has two negative ratios, both "below 1.25":
    only with `negatives_pass` does it count as correct, as in some references. `i_rmse` is the
    RMSE of 1/p - 1/d, with p at least 1e-6.
    """
    n = len(d)
    # The deviation of log errors is summed about one of them: exact however far they are from 0.
    about = float(np.log(max(p[0], LOG_FLOOR)) - np.log(d[0]))
    blocks = (slice(first, first + _BLOCK) for first in range(0, n, _BLOCK))
    sums = np.sum([_sums(p[at], d[at], eps, negatives_pass, about) for at in blocks], axis=0) / n
    means = dict(zip(_SUMS, sums.tolist(), strict=True))
    variance = means["deviation_squared"] - means["deviation"] ** 2
    return {
        "absrel": means["absrel"],
        "delta1": means["delta1"],
        "delta2": means["delta2"],
        "delta3": means["delta3"],
        "rmse": means["squared"] ** 0.5,
        "rmse_log": means["log_squared"] ** 0.5,
        "log10": means["log"] / float(np.log(10.0)),
        "sqrel": means["sqrel"],
        "silog": 100.0 * max(variance, 0.0) ** 0.5,
        "i_rmse": means["inverse_squared"] ** 0.5,
    }


def _sums(p: Pixels, d: Pixels, eps: float, negatives_pass: bool, about: float) -> list[float]:
    """_SUMS over a block of pixels that stays in the processor's cache."""
    error = p - d
    squared = error * error
    floored = np.maximum(p, LOG_FLOOR)
    log_error = np.log(floored) - np.log(d)
    deviation = log_error - about
    inverse_error = 1.0 / floored - 1.0 / d
    with np.errstate(divide="ignore"):
        ratio = np.maximum(p / d, d / p)
    if not negatives_pass:
        ratio[p <= 0] = np.inf
    sums = [
        (np.abs(error) / (d + eps if eps else d)).sum(),
        np.count_nonzero(ratio < 1.25),
        np.count_nonzero(ratio < 1.25**2),
        np.count_nonzero(ratio < 1.25**3),
        squared.sum(),
        log_error @ log_error,
        np.abs(log_error).sum(),
        (squared / d).sum(),
        deviation.sum(),
        deviation @ deviation,
        inverse_error @ inverse_error,
    ]
    return [float(total) for total in sums]


def boundary_f1(
    pred: Float64[np.ndarray, "h w"],
    depth: Float64[np.ndarray, "h w"],
    valid: Bool[np.ndarray, "h w"],
    radii: Sequence[int] = RADII,
) -> dict[int, float]:
    """How well edges of depth are met: F1 of pairs of pixels for each radius, as MoGe defines it.

    A pair is a pixel, at least the radius away from the image's border, and a neighbour in the disc
    of that radius, both measured. It is an edge at a threshold if the neighbour is that many times
    as far. F1 compares predicted with true edges, and is averaged over EDGES with weight
    threshold - 1. Without an edge in either map it is 0.
    """
    h, w = valid.shape
    # Unmeasured pixels make NaN, which exceeds nothing.
    maps = [np.where(valid, array, np.nan).ravel() for array in (pred, depth)]
    y, x = (np.minimum(np.arange(side), np.arange(side)[::-1]) for side in (h, w))
    border = np.minimum(y[:, None], x).ravel()
    counts = {radius: np.zeros((len(EDGES) + 1) ** 2, np.int64) for radius in radii}
    reach = max(radii)
    with np.errstate(divide="ignore", invalid="ignore"):
        for dy in range(reach + 1):
            for dx in range(-reach if dy else 1, reach + 1):
                around = {r: count for r, count in counts.items() if dy**2 + dx**2 <= r**2}
                if around and dy * w + dx > 0:
                    _count_edges(maps, border, dy * w + dx, around)
    return {radius: _weighted_f1(count) for radius, count in counts.items()}


def _count_edges(
    maps: list[Pixels], border: Int[np.ndarray, " n"], offset: int, counts: dict[int, Counts]
) -> None:
    """Add to `counts` of each radius the pairs of pixels `offset` apart, seen from either end.

    An entry counts pairs by how many of EDGES they exceed, in the prediction and in the truth.
    Pairs that wrap round the image's side have both ends nearer to the border than the radius.
    """
    for start in range(0, len(border) - offset, _BLOCK):
        stop = min(start + _BLOCK, len(border) - offset)
        ratios = [array[start + offset : stop + offset] / array[start:stop] for array in maps]
        # Few pairs are edges; these are all of them and, to be safe from rounding, some more.
        onward = np.flatnonzero((ratios[0] > EDGES[0]) | (ratios[1] > EDGES[0])) + start
        least = (1.0 + 1e-9) / EDGES[0]
        back = np.flatnonzero((ratios[0] < least) | (ratios[1] < least)) + start
        for centre, other in ((onward, onward + offset), (back + offset, back)):
            # fmax: 0 / 0 is no edge.
            pred, true = (np.fmax(array[other] / array[centre], 0.0) for array in maps)
            cell = np.searchsorted(EDGES, pred) * (len(EDGES) + 1) + np.searchsorted(EDGES, true)
            for radius, count in counts.items():
                count += np.bincount(cell[border[centre] >= radius], minlength=len(count))


def _weighted_f1(counts: Counts) -> float:
    table = counts.reshape(len(EDGES) + 1, -1)
    above = range(1, len(EDGES) + 1)
    both = np.array([table[k:, k:].sum() for k in above])
    either = np.array([table[k:].sum() + table[:, k:].sum() for k in above])
    return float(np.average(2.0 * both / np.maximum(either, 1), weights=EDGES - 1.0))


def as_arrays(
    pred: Num[Array, "hp wp"], depth: Num[Array, "h w"], valid: Bool[Array, "h w"]
) -> tuple[Num[np.ndarray, "h w"], Num[np.ndarray, "h w"], Bool[np.ndarray, "h w"]]:
    """Prediction, truth and mask as numpy arrays; refuses a prediction of another size."""
    valid = valid.cpu().numpy() if isinstance(valid, Tensor) else valid
    pred, depth = _numpy(pred), _numpy(depth)
    if pred.shape != depth.shape:
        raise ValueError(
            f"the prediction is {pred.shape[0]}x{pred.shape[1]}, but the truth is "
            f"{depth.shape[0]}x{depth.shape[1]}; resize the prediction to the truth's size"
        )
    return pred, depth, valid


def _numpy(array: Num[Array, "..."]) -> Num[np.ndarray, "..."]:
    # By way of double: numpy has no bfloat16.
    return array.detach().cpu().double().numpy() if isinstance(array, Tensor) else array
