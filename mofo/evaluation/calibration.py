"""Whether a predicted uncertainty tells where the error is: a few numbers of each image."""

import numpy as np
from jaxtyping import Float64

from mofo.alignment import Pixels

BINS = 10  # of equally many pixels, from the most certain to the least


def calibration(uncertainty: Pixels, error: Pixels) -> dict[str, float | list[float]] | None:
    """Of relative uncertainty and relative error, pixel by pixel; None for fewer than BINS pixels.

    `uncertainty` and `error`: means in bins of rising uncertainty. `correlation`: Spearman's, 0 if
    either is constant. `ause`: the mean error of what is left when the least certain pixels are
    taken out, bin by bin, less that when the worst are, both as shares of the mean error, averaged:
    0 is perfect, and what is independent of the error has about 1 less the oracle's mean.
    """
    if len(error) < BINS:
        return None
    by_uncertainty = np.argsort(uncertainty, kind="stable")
    left, best = _left(error[by_uncertainty]), _left(np.sort(error))
    mean = error.mean()
    return {
        "uncertainty": _bins(uncertainty[by_uncertainty]),
        "error": _bins(error[by_uncertainty]),
        "correlation": _spearman(uncertainty, error),
        "ause": float(np.mean(left - best) / mean) if mean > 0 else 0.0,
    }


def _bins(values: Pixels) -> list[float]:
    return [float(part.mean()) for part in np.array_split(values, BINS)]


def _left(error: Pixels) -> Float64[np.ndarray, " bins"]:
    """The mean of the first 10, 9, ..., 1 tenths."""
    ends = np.array([len(error) * k // BINS for k in range(BINS, 0, -1)])
    return np.cumsum(error)[ends - 1] / ends


def _spearman(a: Pixels, b: Pixels) -> float:
    x, y = _ranks(a), _ranks(b)
    power = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / power) if power > 0 else 0.0


def _ranks(values: Pixels) -> Pixels:
    """Ranks less their mean; equal values share the mean of theirs."""
    _, at, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    return ranks[at] - (len(values) + 1) / 2
