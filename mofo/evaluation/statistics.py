"""How sure a mean over images is: the bootstrap over images, seeded.

The images of a set are drawn anew, with replacement, as many as there are; the spread of the mean
over many such draws says how far it would move with other images of the same kind. It says nothing
of other seeds or another training, and from a few dozen images it comes out too narrow.

All columns of the same images are taken over the same draws, which follow from the images alone:
whatever else a report compares, a number has the same interval. A difference between two predictors
is a column like any other, of per-image differences: it is paired, which is why it may exclude 0
where the intervals of the two means overlap.
"""

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Float64

NUM_RESAMPLES = 10_000
LEVEL = 0.95
CHUNK = 2**19  # draws that are held at once, so that memory does not grow with resamples x images

Name = TypeVar("Name", bound=Hashable)


def resampled(
    columns: Mapping[Name, Mapping[str, float]], *, of: str
) -> dict[Name, Float64[np.ndarray, " r"]]:
    """Resampled means of columns of numbers by image key; those of fewer than two images have none.

    `of` names the list that the keys are of: other lists, other draws.
    """
    groups: dict[tuple[str, ...], list[Name]] = {}
    for name, column in columns.items():
        if len(column) > 1:
            groups.setdefault(tuple(sorted(column)), []).append(name)
    found = {}
    for keys, names in groups.items():
        values = np.array([[columns[name][key] for name in names] for key in keys], np.float64)
        seed = hashlib.sha256("\n".join((of, *keys)).encode()).digest()
        means = resampled_means(values, seed=int.from_bytes(seed[:8], "big"))
        found |= dict(zip(names, means.T, strict=True))
    return {name: found[name] for name in columns if name in found}


def resampled_means(
    values: Float64[np.ndarray, "n k"], *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Float64[np.ndarray, "r k"]:
    """The k columns' means over each of `num_resamples` draws of the n images.

    NaN marks an image that has no such number: it is left out of its column's means. A draw that
    hits none of a column's numbers has the mean NaN.
    """
    n, k = values.shape
    if not n:
        raise ValueError("there is no image to draw from; leave a set without scored images out")
    rng = np.random.default_rng(seed)
    present = ~np.isnan(values)
    gaps = np.nonzero(~present.all(axis=0))[0]
    filled, counted = np.where(present, values, 0.0), present[:, gaps].astype(np.float64)
    means = np.empty((num_resamples, k))
    rows = max(1, CHUNK // n)
    for first in range(0, num_resamples, rows):
        part = means[first : first + rows]
        drawn = rng.integers(0, n, (len(part), n), dtype=np.int32)
        drawn += np.arange(len(part), dtype=np.int32)[:, None] * n
        # How often each image was drawn makes a sum over draws a product of matrices.
        times = np.bincount(drawn.ravel(), minlength=len(part) * n).reshape(-1, n)
        times = times.astype(np.float64)
        hits = np.full(part.shape, float(n))
        hits[:, gaps] = times @ counted
        np.divide(times @ filled, hits, out=part, where=hits > 0)
        part[hits == 0] = np.nan
    return means


def intervals(
    means: Float64[np.ndarray, "r k"], level: float = LEVEL
) -> list[tuple[float, float] | None]:
    """Of each column of resampled means, where its middle `level` lies; None without numbers."""
    tails = 50 * (1 - level), 50 * (1 + level)
    ends = np.percentile(means, tails, axis=0)
    for column in np.nonzero(np.isnan(ends).any(axis=0))[0]:
        numbers = means[:, column][~np.isnan(means[:, column])]
        ends[:, column] = np.percentile(numbers, tails) if len(numbers) else np.nan
    return [None if np.isnan(low) else (float(low), float(high)) for low, high in ends.T]


def excludes_zero(interval: Sequence[float] | None) -> bool:
    return interval is not None and (interval[0] > 0 or interval[1] < 0)
