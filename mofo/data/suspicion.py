"""What makes a sample or a set suspicious: statistics of what it holds, each with its limit.

Whether depth lies where the image has it is read off the edges: `alignment` is the correlation of
the ranks of the image's differences between neighbours with those of log depth, as it is and under
every placement that a faulty converter produces (mirrored, upside down, shifted). Depth that lies
right fits better as it is. One sample proves little, so a set is judged by the mean over samples.

The limits were set on the 32 real pairs of `data/samples` and on 180 generated scenes, so that none
of them is flagged and the planted faults are. A finding is a reason to look, never a proof.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from mofo.data.sample import Sample

AS_IS = "as it is"
FLIPS = {
    "mirrored": (slice(None), slice(None, None, -1)),
    "upside down": (slice(None, None, -1), slice(None)),
    "turned by 180 degrees": (slice(None, None, -1), slice(None, None, -1)),
}
SHIFTS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
SHIFT_PARTS = (0.03, 0.06)  # of the width
SIDES = (160, 80, 48)  # cells of the longer side; fewer for depth too sparse for neighbours
MIN_PAIRS = 400  # of neighbours with depth, below which edges say nothing
STEP = 0.5  # of log depth; a larger one is no sharper an edge

# A correlation over n pairs is uncertain by about 1 / sqrt(n). Of the real pairs the worst
# placement exceeds the right one by 0.06, and planted flips exceed it by 0.11 in the median.
ADVANTAGE, ADVANTAGE_ERRORS = 0.09, 5.0
CERTAIN = 3.0  # standard errors by which the mean of a set must differ
MIN_SET = 8  # samples, below which the mean of a set says nothing
# The colours of a set prove little: 32 real photographs are warm by 3.1 errors.
MIN_COLOURS, CERTAIN_OF_COLOURS = 16, 2.5
# By which depth as it is fits better than the mean placement: 0.09 on the real pairs, 0.02 on road
# frames that have the depth of one another.
RELATED = 0.06
FLAT_DEPTH = 1.01  # 95th over 5th percentile
FLAT_IMAGE = 2.0  # grey levels of standard deviation
MEDIAN_METRES = (0.1, 150.0)
VIEW_DEGREES = (5.0, 170.0)
COLOURED = 30  # levels by which red and blue must differ to count


class Finding(NamedTuple):
    """Something to look at: `key` of the sample, or None for the set; `what`, and the numbers."""

    key: str | None
    what: str
    why: str

    def __str__(self) -> str:
        return f"{self.key or 'the set'}: {self.what} ({self.why})"


class Measures(NamedTuple):
    """What is kept of a sample for the judgement of its set; None where it says nothing."""

    fits: dict[str, float] | None  # alignment by placement
    num_pairs: int
    tilt: float | None  # correlation of log depth with the row, downwards
    warmth: float


def measure(sample: Sample) -> Measures:
    image, fits, num_pairs, tilt = sample.image, None, 0, None
    if sample.depth is not None:
        metres, valid = sample.depth
        fits, num_pairs = alignment(image, metres, valid)
        tilt = _correlation(np.log(metres[valid]), np.nonzero(valid)[0])
    return Measures(fits, num_pairs, tilt, warmth(image))


def judge(sample: Sample, measures: Measures) -> Iterator[Finding]:
    """What is suspicious about one sample."""
    key, image = sample.key, sample.image
    if (spread := float(image.std(axis=(0, 1)).max())) < FLAT_IMAGE:
        yield Finding(key, "blank image", f"standard deviation {spread:.1f} < {FLAT_IMAGE:g}")
    if sample.intrinsics is not None:
        angle = 2 * np.degrees(np.arctan(image.shape[1] / 2 / sample.intrinsics[0, 0]))
        if not VIEW_DEGREES[0] <= angle <= VIEW_DEGREES[1]:
            why = f"{angle:.1f} degrees wide, not in {_range(VIEW_DEGREES)}"
            yield Finding(key, "implausible intrinsics", why)
    if sample.depth is not None:
        metres, valid = sample.depth
        yield from _judge_depth(key, metres[valid], sample.metric)
    if measures.fits is not None:
        best = max(measures.fits, key=measures.fits.__getitem__)
        gain = measures.fits[best] - measures.fits[AS_IS]
        limit = max(ADVANTAGE, ADVANTAGE_ERRORS / measures.num_pairs**0.5)
        if gain > limit:
            why = f"alignment {gain:+.2f} against as it is > {limit:.2f}"
            yield Finding(key, f"depth fits the image better {best}", why)


def _judge_depth(key: str, depths: Float32[np.ndarray, " n"], metric: bool) -> Iterator[Finding]:
    low, median, high = np.percentile(depths, (5, 50, 95))
    if high < FLAT_DEPTH * low:
        why = f"95th over 5th percentile {high / low:.4f} < {FLAT_DEPTH}"
        yield Finding(key, "constant depth", why)
    if metric and not MEDIAN_METRES[0] <= median <= MEDIAN_METRES[1]:
        why = f"median {median:.6g} m, not in {_range(MEDIAN_METRES)}"
        yield Finding(key, "wrong unit", why)


def judge_set(measures: Sequence[Measures]) -> Iterator[Finding]:
    """What is suspicious about a set, from as many samples of it as were measured."""
    fits = [each.fits for each in measures if each.fits is not None]
    if len(fits) >= MIN_SET:
        yield from _judge_alignment(fits)
    tilts = [each.tilt for each in measures if each.tilt is not None]
    mean, error = _mean(tilts)
    if len(tilts) >= MIN_SET and mean > CERTAIN * error:
        why = f"correlation of depth with the row {_sized(mean, error)} > 0"
        yield Finding(None, "upside down: depth is nearer at the top", why)
    mean, error = _mean([each.warmth for each in measures])
    if len(measures) >= MIN_COLOURS and mean < -CERTAIN_OF_COLOURS * error:
        why = f"warmth of the lower halves {_sized(mean, error)} < 0"
        yield Finding(None, "red and blue may be swapped", why)


def _judge_alignment(fits: Sequence[Mapping[str, float]]) -> Iterator[Finding]:
    placements = [name for name in fits[0] if name != AS_IS]
    gains = {name: _mean([fit[name] - fit[AS_IS] for fit in fits]) for name in placements}
    best = max(gains, key=lambda name: gains[name][0])
    mean, error = gains[best]
    if mean > CERTAIN * error:
        why = f"alignment {_sized(mean, error)} against as it is > 0"
        yield Finding(None, f"depth fits the images better {best}", why)
        return
    mean, error = _mean(
        [fit[AS_IS] - float(np.mean([fit[name] for name in placements])) for fit in fits]
    )
    if mean + 2 * error < RELATED:
        why = f"alignment {_sized(mean, error)} above that of misplaced depth < {RELATED}"
        yield Finding(None, "depth does not follow the edges of the images", why)


def alignment(
    image: UInt8[np.ndarray, "h w 3"],
    metres: Float32[np.ndarray, "h w"],
    valid: Bool[np.ndarray, "h w"],
) -> tuple[dict[str, float] | None, int]:
    """How well the edges of depth lie on those of the image, by placement, and from how many pairs.

    None where depth is too sparse, or has no edge.
    """
    for side in SIDES:
        small, depth, known = _shrink(image, metres, valid, side)
        if (num_pairs := _num_pairs(known)) >= MIN_PAIRS:
            break
    else:
        return None, num_pairs
    fits = {}
    for name, placed, there in _placements(depth, known):
        fit = _fit(small, placed, there)
        if fit is None:
            return None, num_pairs
        fits[name] = fit
    return fits, num_pairs


def warmth(image: UInt8[np.ndarray, "h w 3"]) -> float:
    """The share of warm pixels less that of cool ones, in the lower half, where no sky is.

    Wood, brick, skin and soil are warm, lamps too; little below the horizon is blue. 0.27 in the
    mean of the 32 real photographs, but negative in some: it says something of sets alone.
    """
    lower = image[len(image) // 2 :].astype(np.int16)
    red_over_blue = lower[..., 0] - lower[..., 2]
    warm, cool = (red_over_blue > COLOURED).sum(), (red_over_blue < -COLOURED).sum()
    # Few coloured pixels are noise: they count for less.
    return float((int(warm) - int(cool)) / (warm + cool + 0.01 * red_over_blue.size))


def _shrink(
    image: np.ndarray, metres: np.ndarray, valid: np.ndarray, side: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean colour, log of the nearest depth, and where there is depth, of square cells."""
    k = -(-max(valid.shape) // side)
    h, w = (length // k for length in valid.shape)
    cells = (slice(h * k), slice(w * k))
    small = image[cells].reshape(h, k, w, k, 3).mean((1, 3), dtype=np.float32)
    depth = np.where(valid, metres, np.inf)[cells].reshape(h, k, w, k).min((1, 3))
    known = np.isfinite(depth)
    return small, np.log(np.where(known, depth, 1)), known


def _num_pairs(known: np.ndarray) -> int:
    return int((known[1:] & known[:-1]).sum() + (known[:, 1:] & known[:, :-1]).sum())


def _placements(
    depth: np.ndarray, known: np.ndarray
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """The map as it is, and as it ought to be if a converter had flipped or shifted it."""
    yield AS_IS, depth, known
    for name, order in FLIPS.items():
        yield name, depth[order], known[order]
    for part in SHIFT_PARTS:
        cells = max(1, round(part * depth.shape[1]))
        for name, (down, right) in SHIFTS.items():
            by = (down * cells, right * cells)
            there = np.roll(known, by, (0, 1))
            # What left the image on one side does not enter on the other.
            for axis, steps in enumerate(by):
                edge = slice(steps) if steps > 0 else slice(depth.shape[axis] + steps, None)
                there[(slice(None),) * axis + (edge,)] = False
            yield f"shifted {name} by {part:.0%} of its width", np.roll(depth, by, (0, 1)), there


def _fit(image: np.ndarray, depth: np.ndarray, known: np.ndarray) -> float | None:
    """Rank correlation of the steps of image and depth between neighbours, down and across."""
    values, counts = [], []
    for axis in (0, 1):
        ahead, behind = (np.delete(known, end, axis) for end in (0, -1))
        pairs = ahead & behind
        steps = np.minimum(np.abs(np.diff(depth, axis=axis)[pairs]), STEP)
        edges = np.abs(np.diff(image, axis=axis)).max(-1)[pairs]
        value = _correlation(np.argsort(np.argsort(edges)), steps)
        if value is not None:
            values.append(value)
            counts.append(len(steps))
    return float(np.average(values, weights=counts)) if values else None


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """None where either does not vary."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    if len(values) < 2:
        return 0.0, 0.0
    return float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5)


def _sized(mean: float, error: float) -> str:
    return f"{mean:+.3f} ± {error:.3f}"


def _range(limits: tuple[float, float]) -> str:
    return f"{limits[0]:g}..{limits[1]:g}"
