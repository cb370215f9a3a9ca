"""Statistics of a set, from counts of its samples alone.

A tally counts values by name: {"size": {"480x640": 12}, ...}. Tallies of shards add up to that of
the set, in any order; `describe` turns it into the rows of a manifest.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32

from mofo.data.sample import Sample

Tally = dict[str, dict[str, int]]

BINS_PER_DECADE = 8  # of the histogram of depth
PARTS = 100_000  # to which the measured share of an image is rounded
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


def tally(sample: Sample) -> Tally:
    """What one sample counts for."""
    h, w = sample.shape
    has = {
        "metric": sample.metric,
        "points": sample.points is not None,
        "sky": sample.sky is not None,
        "intrinsics": sample.intrinsics is not None,
        "captions": bool(sample.captions),
    }
    counts: Tally = {
        "size": {f"{h}x{w}": 1},
        "source": {sample.source: 1},
        "licence": {sample.licence: 1},
        "with": {name: 1 for name, it_has in has.items() if it_has},
    }
    kind = "metric depth" if sample.metric else "relative depth"
    if sample.points is not None:
        u, v, z = sample.points.T
        valid = np.zeros((h, w), np.bool_)
        valid[v.astype(np.int64), u.astype(np.int64)] = True
        counts |= {"measured": _share(valid), kind: _histogram(z)}
    elif sample.metres is not None and sample.valid is not None:
        counts |= {"measured": _share(sample.valid)}
        counts |= {kind: _histogram(sample.metres[sample.valid])}
    return counts


def add(total: Tally, more: Mapping[str, Mapping[str, int]]) -> None:
    """Add `more` to `total`, in place."""
    for name, counts in more.items():
        mine = total.setdefault(name, {})
        for value, count in counts.items():
            mine[value] = mine.get(value, 0) + count


def describe(total: Tally) -> dict[str, Any]:
    """The statistics of a manifest."""
    present = total.get("with", {})
    return {
        "samples": sum(total["size"].values()),
        "with_depth": sum(total.get("measured", {}).values()),
        **{f"with_{name}": present.get(name, 0) for name in ("points", "sky", "intrinsics")},
        "with_captions": present.get("captions", 0),
        "metric": present.get("metric", 0),
        "sources": sorted(total["source"]),
        "licences": sorted(total["licence"]),
        "image_sizes": _sizes(total["size"]),
        "measured": _shares(total.get("measured", {})),
        "depth_histogram": {
            kind: _bins(total[f"{kind} depth"])
            for kind in ("metric", "relative")
            if f"{kind} depth" in total
        },
    }


def _share(valid: Bool[np.ndarray, "h w"]) -> dict[str, int]:
    return {str(round(np.count_nonzero(valid) / valid.size * PARTS)): 1}


def _histogram(depths: Float32[np.ndarray, " n"]) -> dict[str, int]:
    """Counts by bin: bin k begins at 10^(k / BINS_PER_DECADE)."""
    bins = np.floor(np.log10(depths) * BINS_PER_DECADE).astype(np.int64)
    values, counts = np.unique(bins, return_counts=True)
    return dict(zip(map(str, values.tolist()), counts.tolist(), strict=True))


def _bins(counts: Mapping[str, int]) -> dict[str, list]:
    """Bins from the first that holds a depth to the last: edges, and measured pixels or points."""
    numbers = [int(number) for number in counts]
    bins = range(min(numbers), max(numbers) + 1)
    edges = [float(f"{10 ** (k / BINS_PER_DECADE):.4g}") for k in (*bins, bins[-1] + 1)]
    return {"edges": edges, "pixels": [counts.get(str(k), 0) for k in bins]}


def _sizes(counts: Mapping[str, int]) -> dict[str, list[int]]:
    """The smallest, the median and the largest image, by area."""
    sizes = [(tuple(map(int, name.split("x"))), count) for name, count in counts.items()]
    sizes.sort(key=lambda row: (row[0][0] * row[0][1], row[0]))
    below = np.cumsum([count for _, count in sizes])
    median = int(np.searchsorted(below, (below[-1] + 1) // 2))
    return {
        name: list(sizes[place][0])
        for name, place in (("min", 0), ("median", median), ("max", len(sizes) - 1))
    }


def _shares(counts: Mapping[str, int]) -> dict[str, Any] | None:
    """Mean and percentiles, over the images with depth, of the measured part of all pixels."""
    if not counts:
        return None
    values = sorted((int(value), count) for value, count in counts.items())
    parts = np.array([value for value, _ in values]) / PARTS
    below = np.cumsum([count for _, count in values])
    ranks = [int(np.searchsorted(below, max(p / 100 * below[-1], 1))) for p in PERCENTILES]
    mean = float(np.average(parts, weights=np.diff(below, prepend=0)))
    return {
        "mean": round(mean, 5),
        "percentiles": {
            str(p): float(parts[rank]) for p, rank in zip(PERCENTILES, ranks, strict=True)
        },
    }
