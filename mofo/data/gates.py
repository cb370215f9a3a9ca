"""Which samples of a source are not trained on, counted: gates reject some, others are damaged.

A gate looks at a sample as it was published, before any transform. Without settings all pass.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from mofo.data.sample import Sample

log = logging.getLogger(__name__)

LOG_EVERY = 10_000  # samples read between two summaries in the log
NUM_DEPTHS = 50_000  # of which the percentiles are taken: 0.1 points of rank off, at most


class Unusable(ValueError):
    """Data that cannot be trained on as they are; its message is for whoever chose them."""


@contextmanager
def naming(what: str) -> Iterator[None]:
    """What is wrong within is Unusable, and says with what."""
    try:
        yield
    except ValueError as error:
        raise Unusable(f"{what}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Gates:
    """What a sample of a source must be.

    `depth_range`: depth outside [low, high] becomes unmeasured; `min_measured_count` and
    `min_measured_fraction` (of the image's pixels; each point counts as one) look at what is left,
    and an image without depth has none. `max_relative_depth`: the 99th percentile of depth over the
    1st. `min_image_size`: pixels of the shorter side. `caption_length`: captions with fewer or more
    characters are dropped; a sample that is left with none fails if the least length is not 0.
    """

    depth_range: Sequence[float | int] = (0, float("inf"))
    min_measured_fraction: float | int = 0
    min_measured_count: int = 0
    max_relative_depth: float | int = float("inf")
    min_image_size: int = 1
    caption_length: Sequence[float | int] = (0, float("inf"))

    def __post_init__(self) -> None:
        for name, accepted, fits in (
            ("depth_range", "two depths [low, high], low < high", _is_range),
            ("caption_length", "two lengths [least, most], least < most", _is_range),
            ("min_measured_fraction", "in [0, 1]", lambda part: 0 <= part <= 1),
            ("min_measured_count", "0 or more", lambda count: count >= 0),
            ("max_relative_depth", "more than 1", lambda ratio: ratio > 1),
            ("min_image_size", "1 or more", lambda side: side >= 1),
        ):
            check(f"gate {name}", getattr(self, name), accepted, fits)

    def admit(self, sample: Sample, *, depth: bool = True) -> Sample | str:
        """The sample as it may be trained on, or the name of the gate that it fails.

        `depth` False: its depth is not used, so no gate looks at it.
        """
        if min(sample.shape) < self.min_image_size:
            return "min_image_size"
        least, most = self.caption_length
        captions = tuple(text for text in sample.captions if least <= len(text) <= most)
        if least > 0 and not captions:
            return "caption_length"
        if captions != sample.captions:
            sample = replace(sample, captions=captions)
        return self._admit_depth(sample) if depth else sample

    def _admit_depth(self, sample: Sample) -> Sample | str:
        sample = self._cut(sample)
        h, w = sample.shape
        count = 0 if (depths := _depths(sample)) is None else len(depths)
        if count < self.min_measured_count:
            return "min_measured_count"
        if count < self.min_measured_fraction * h * w:
            return "min_measured_fraction"
        if depths is not None and count and np.isfinite(self.max_relative_depth):
            near, far = np.percentile(depths[:: -(-count // NUM_DEPTHS)], (1, 99))
            if far > self.max_relative_depth * near:
                return "max_relative_depth"
        return sample

    def _cut(self, sample: Sample) -> Sample:
        """The sample without depth outside of `depth_range`."""
        low, high = self.depth_range
        if (low, high) == (0, float("inf")):
            return sample
        if sample.points is not None:
            z = sample.points[:, 2]
            return replace(sample, points=sample.points[(z >= low) & (z <= high)])
        if sample.metres is None or sample.valid is None:
            return sample
        valid = sample.valid & (sample.metres >= low) & (sample.metres <= high)
        # A map holds zeros where nothing was measured.
        metres = np.where(valid, sample.metres, np.float32(0))
        return replace(sample, metres=metres, valid=valid)


def _depths(sample: Sample) -> Float32[np.ndarray, " n"] | None:
    """All that was measured."""
    if sample.points is not None:
        return sample.points[:, 2]
    return None if sample.metres is None else sample.metres[sample.valid]


def check(name: str, value: Any, accepted: str, fits: Callable[[Any], bool]) -> None:
    """Unusable unless `value` fits; one of another type, which cannot be compared, does not."""
    try:
        good = fits(value)
    except TypeError:
        good = False
    if not good:
        raise Unusable(f"{name} is {value!r}, but must be {accepted}")


def _is_range(pair: Sequence[float | int]) -> bool:
    return len(pair) == 2 and 0 <= pair[0] < pair[1]


@dataclass
class Rejections:
    """How many samples of each source were read, and how many failed at which gate.

    A sample counts when its own turn comes, once an epoch; what stands in for it does not count.
    Each of `ranks` counts what it read itself.
    """

    ranks: int = 1

    read: Counter[str] = field(default_factory=Counter)
    rejected: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, source: str, gate: str | None) -> None:
        """Count one sample, and the gate that it failed, if any."""
        self.read[source] += 1
        if gate is not None:
            self.rejected[source, gate] += 1
        if self.read.total() % LOG_EVERY == 0:
            self.report()

    def report(self) -> None:
        """Log what was rejected so far, one line a source."""
        where = f" (read by one of {self.ranks} ranks)" if self.ranks > 1 else ""
        for source, total in sorted(self.read.items()):
            gates = {gate: n for (name, gate), n in self.rejected.items() if name == source}
            if gates:
                named = ", ".join(f"{gate} {n}" for gate, n in sorted(gates.items()))
                part = sum(gates.values()) / total
                text = f"{100 * part:.1f} % of {total} samples rejected: {named}{where}"
                log.info("source %r: %s", source, text)


class Fault(NamedTuple):
    """A sample that could not be read."""

    source: str
    shard: str
    key: str
    reason: str


@dataclass
class Faults:
    """Damaged samples met so far, each counted once; too many of a source end the run."""

    sizes: Mapping[str, int]
    max_fraction: float
    met: dict[Fault, None] = field(default_factory=dict)

    def add(self, fault: Fault) -> bool:
        """Count `fault`; False if it was known."""
        if fault in self.met:
            return False
        self.met[fault] = None
        mine = [other for other in self.met if other.source == fault.source]
        total = self.sizes[fault.source]
        if len(mine) > self.max_fraction * total:
            names = "\n  ".join(f"{f.shard}: {f.key}: {f.reason}" for f in mine[:10])
            raise Unusable(
                f"{len(mine)} of the {total} samples of source {fault.source!r} are damaged, more "
                f"than max_bad_fraction={self.max_fraction:g}; convert the set again. The first "
                f"are\n  {names}"
            )
        return True
