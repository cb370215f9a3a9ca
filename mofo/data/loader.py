"""From shards to micro-batches: what a rank reads for each optimiser step, with faults counted.

Global step b trains on positions [b * batch_size, (b + 1) * batch_size) of the global order; rank r
takes its contiguous part of them, in `accumulate` micro-batches. What stands at a position is a
pure function of (seed, position): a damaged sample is replaced by the next readable one of the same
epoch of its source.
"""

import atexit
import logging
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from multiprocessing import Event
from multiprocessing.synchronize import Event as EventType
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mofo.data import transforms
from mofo.data.order import Mixture, Permutation, stream
from mofo.data.sample import Batch, Sample
from mofo.data.shards import DamagedSample, Shards
from mofo.data.sparsity import PATTERNS
from mofo.depth import fill_nearest

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A row of the data config: a set of shards, its share of the batches, and its transforms.

    `patterns` are names in `sparsity.PATTERNS`, of which each sample gets one; at most `max_kept`
    of the pixels stay measured. A crop has at least `min_area` of the largest that fits. `flip`
    mirrors half of the samples; captions that say left or right forbid it. `depth` False hides
    the depth. `make` has the arguments of `make.make` for a set that is made when it is missing.
    """

    shards: str
    weight: float = 1.0
    patterns: tuple[str, ...] = ("dense",)
    max_kept: float = 1.0
    min_area: float = 1.0
    flip: bool = True
    jitter: float = 0.0
    depth: bool = True
    make: Mapping | None = None

    def __post_init__(self) -> None:
        for name, accepted, fits in (
            ("weight", "positive and finite", 0 < self.weight < float("inf")),
            ("max_kept", "in (0, 1]", 0 < self.max_kept <= 1),
            ("min_area", "in (0, 1]", 0 < self.min_area <= 1),
            ("jitter", "in [0, 0.5]", 0 <= self.jitter <= 0.5),
            ("patterns", f"some of {sorted(PATTERNS)}", set(self.patterns) <= set(PATTERNS)),
            ("patterns", "at least [dense], to keep all", self.patterns or not self.depth),
        ):
            if not fits:
                raise ValueError(
                    f"{name} of the source with shards {self.shards} is {getattr(self, name)}, but "
                    f"must be {accepted}"
                )


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
            raise ValueError(
                f"{len(mine)} of the {total} samples of source {fault.source!r} are damaged, more "
                f"than max_bad_fraction={self.max_fraction:g}; convert the set again. The first "
                f"are\n  {names}"
            )
        return True


class Row(NamedTuple):
    """What a worker makes of one position."""

    image: torch.Tensor
    metres: torch.Tensor
    valid: torch.Tensor
    caption: str
    key: str
    position: int
    faults: list[Fault]


Part = tuple[Batch, list[Fault]]


class TrainingSet(Dataset[Row]):
    """Map-style view of the weighted mixture of `sources`, indexed by position in the order."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        *,
        size: tuple[int, int],
        caption_dropout: float,
        seed: int,
        max_bad_fraction: float,
    ) -> None:
        self.sources, self.size, self.seed = dict(sources), size, seed
        self.caption_dropout = caption_dropout
        self.shards = {name: Shards(source.shards) for name, source in sources.items()}
        self.mixture = Mixture([source.weight for source in sources.values()], seed=seed)
        self.orders = [
            Permutation(shards.starts, seed=seed, name=name) for name, shards in self.shards.items()
        ]
        self.sizes = {name: len(shards) for name, shards in self.shards.items()}
        self.faults = Faults(self.sizes, max_bad_fraction)

    def __getitem__(self, position: int) -> Row:
        number, turn = self.mixture(position)
        name = list(self.sources)[number]
        sample, faults = self._read(name, self.orders[number], turn)
        rng = stream(self.seed, "transform", position)
        sample = self._transform(sample, self.sources[name], rng)
        image = torch.from_numpy(sample.image).permute(2, 0, 1).float().div_(127.5).sub_(1)
        metres, valid = sample.depth or (np.ones(self.size, np.float32), np.zeros(self.size, bool))
        return Row(
            image=image,
            metres=torch.from_numpy(fill_nearest(metres, valid)),
            valid=torch.from_numpy(valid),
            caption=sample.caption,
            key=sample.key,
            position=position,
            faults=faults,
        )

    def _read(self, name: str, order: Permutation, turn: int) -> tuple[Sample, list[Fault]]:
        faults = []
        for skip in range(self.sizes[name]):
            try:
                return self.shards[name].read(order(turn, skip)), faults
            except DamagedSample as error:
                faults.append(Fault(name, error.shard, error.key, error.reason))
                self.faults.add(faults[-1])
        raise ValueError(f"no sample of source {name!r} can be read; convert the set again")

    def _transform(self, sample: Sample, source: Source, rng: np.random.Generator) -> Sample:
        shape = sample.image.shape[:2]
        box = transforms.random_box(shape, self.size, rng, min_area=source.min_area)
        sample = transforms.crop_resize(sample, box, self.size)
        if source.flip and rng.random() < 0.5:
            sample = transforms.flip(sample)
        if source.depth:
            sample = transforms.thin(sample, source.patterns, source.max_kept, rng)
        else:
            sample = replace(sample, metres=None, valid=None)
        if source.jitter:
            sample = replace(sample, image=transforms.jitter(sample.image, source.jitter, rng))
        if rng.random() < self.caption_dropout:
            sample = replace(sample, caption="")
        return sample


@dataclass(kw_only=True)
class Steps:
    """The endless micro-batches of one rank, from the position that `start` gives when asked."""

    rows: TrainingSet
    start: Callable[[], int]
    batch_size: int
    accumulate: int
    rank: int
    world: int
    patch: int
    num_workers: int
    faults: Faults

    def __post_init__(self) -> None:
        if self.batch_size % (self.world * self.accumulate):
            raise ValueError(
                f"batch_size is {self.batch_size}, but must be a multiple of ranks x accumulate = "
                f"{self.world} x {self.accumulate}; it counts the samples of a whole step"
            )

    def __iter__(self) -> Iterator[Batch]:
        leaving = Event()
        atexit.register(leaving.set)
        loader = DataLoader(
            self.rows,
            batch_sampler=self._positions(self.start()),
            num_workers=self.num_workers,
            collate_fn=partial(collate, patch=self.patch),
            worker_init_fn=partial(ignore_job_signals, leaving=leaving),
            # Without a generator the loader would draw from the global one.
            generator=torch.Generator(),
        )
        parts = iter(loader)
        try:
            while step := list(islice(parts, self.accumulate)):
                for fault in (fault for _, faults in step for fault in faults):
                    if self.faults.add(fault):
                        number = len(self.faults.met)
                        log.warning("damaged sample %d skipped: %s", number, ": ".join(fault))
                measured = sum(int(batch.valid.sum()) for batch, _ in step)
                for batch, _ in step:
                    yield replace(batch, step_measured=measured)
        except ValueError as error:
            failure = str(error)
            traceback.clear_frames(error.__traceback__)
        finally:
            # The last reference to this ends the workers, so no traceback may hold one: the
            # collector of cycles closes their queues first, and they would never be told.
            del parts
        raise ValueError(failure)

    def _positions(self, start: int) -> Iterator[list[int]]:
        """Positions of this rank's micro-batches, one after the other."""
        mine = self.batch_size // self.world
        micro = mine // self.accumulate
        while True:
            first = start + self.rank * mine
            for part in range(self.accumulate):
                yield list(range(first + part * micro, first + (part + 1) * micro))
            start += self.batch_size


def collate(rows: Iterable[Row], *, patch: int) -> Part:
    """One micro-batch, whose `step_measured` counts it alone, and the faults met on the way."""
    image, metres, valid, caption, key, position, faults = map(list, zip(*rows, strict=True))
    valid = torch.stack(valid)
    batch = Batch(
        image=torch.stack(image),
        metres=torch.stack(metres),
        valid=valid,
        caption=caption,
        key=key,
        position=torch.tensor(position, dtype=torch.int64),
        grid=(valid.shape[1] // patch, valid.shape[2] // patch),
        step_measured=int(valid.sum()),
    )
    return batch, sum(faults, [])


def ignore_job_signals(worker: int, *, leaving: EventType) -> None:
    """SLURM signals every process of a job: workers must neither die of it nor act on it.

    Python ends its children with SIGTERM as well, when it exits, and then waits for them; so once
    `leaving` is set they do as they are told.
    """

    def leave(*_: object) -> None:
        if leaving.is_set():
            os._exit(0)

    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, leave)
