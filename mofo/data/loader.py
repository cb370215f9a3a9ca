"""From shards to micro-batches: what a rank reads for each optimiser step, with faults counted.

Global step b trains on positions [b * batch_size, (b + 1) * batch_size) of the global order; rank r
takes its contiguous part of them, in `accumulate` micro-batches. What stands at a position is a
pure function of (seed, position): a sample that is damaged, or fails a gate of its source, is
replaced by the next good one of the same epoch of its source. Damage is counted and ends the run
when there is too much of it; what the gates reject is counted and logged.
"""

import ctypes
import logging
import os
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from multiprocessing import Event
from multiprocessing.synchronize import Event as EventType
from multiprocessing.util import Finalize
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate

from mofo.data import transforms
from mofo.data.caption import read_overlay
from mofo.data.gates import Fault, Faults, Gates, Rejections, Unusable, check
from mofo.data.order import Buckets, Mixture, Permutation, stream
from mofo.data.sample import Batch, Sample
from mofo.data.shards import DamagedSample, Shards
from mofo.data.sparsity import PATTERNS

log = logging.getLogger(__name__)

# Options of mallopt (malloc.h), in bytes: how much freed memory stays with the process, and which
# pieces are too large for that. Larger ones would leave gaps: 1.5 GB of them, measured at 64 MiB.
MALLOC = {-1: 2**28, -3: 2**25}
MAX_REJECTED = 1000  # in a row: then the gates fit almost nothing, and reading on would look stuck


@dataclass(frozen=True, kw_only=True)
class Source:
    """A row of the data config: a set of shards, its share of the batches, and its transforms.

    `patterns` are names in `sparsity.PATTERNS`, of which each sample gets one; at most `max_kept`
    of the pixels stay measured. A crop has at least `min_area` of the largest that fits. `flip`
    mirrors half of the samples; captions that say left or right forbid it. `depth` False hides
    the depth. `gates` says which samples are good enough. `make` has the arguments of `make.make`
    for a set that is made when it is missing.
    """

    shards: str
    weight: float = 1.0
    patterns: tuple[str, ...] = ("dense",)
    max_kept: float = 1.0
    min_area: float = 1.0
    flip: bool = True
    jitter: float = 0.0
    depth: bool = True
    gates: Gates = field(default_factory=Gates)
    make: Mapping | None = None

    def __post_init__(self) -> None:
        for name, accepted, fits in (
            ("weight", "positive and finite", lambda weight: 0 < weight < float("inf")),
            ("max_kept", "in (0, 1]", lambda part: 0 < part <= 1),
            ("min_area", "in (0, 1]", lambda part: 0 < part <= 1),
            ("jitter", "in [0, 0.5]", lambda most: 0 <= most <= 0.5),
            ("patterns", f"some of {sorted(PATTERNS)}", lambda some: set(some) <= set(PATTERNS)),
            ("patterns", "at least [dense], to keep all", lambda some: some or not self.depth),
        ):
            check(name, getattr(self, name), accepted, fits)


class Row(NamedTuple):
    """What a worker makes of one position; `gate` rejected the sample whose turn it was, if any."""

    pixels: torch.Tensor
    metres: torch.Tensor
    valid: torch.Tensor
    caption: str
    key: str
    position: int
    source: str
    gate: str | None
    faults: list[Fault]


class Part(NamedTuple):
    """One micro-batch, whose `step_measured` counts it alone, and what was met on the way."""

    batch: Batch
    faults: list[Fault]
    judged: list[tuple[str, str | None]]


class TrainingSet(Dataset[Row]):
    """Map-style view of the weighted mixture of `sources`, indexed by position in the order.

    Samples without caption have those of `mofo caption`, if it was there before. With
    `bucket_sizes` the samples of each step of `batch_size` have one of these sizes, else all
    have `size`.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        *,
        size: tuple[int, int],
        caption_dropout: float,
        seed: int,
        max_bad_fraction: float,
        bucket_sizes: Sequence[tuple[int, int]] = (),
        batch_size: int = 1,
    ) -> None:
        self.sources, self.size, self.seed = dict(sources), size, seed
        self.names = list(self.sources)
        self.caption_dropout = caption_dropout
        self.shards = {name: Shards(source.shards) for name, source in sources.items()}
        # Read once: what is written during a run is for the next.
        self.overlays = {name: read_overlay(source.shards) for name, source in sources.items()}
        self.mixture = Mixture([source.weight for source in sources.values()], seed=seed)
        self.orders = [
            Permutation(shards.starts, seed=seed, name=name) for name, shards in self.shards.items()
        ]
        self.sizes = {name: len(shards) for name, shards in self.shards.items()}
        self.faults = Faults(self.sizes, max_bad_fraction)
        self.buckets = None
        if bucket_sizes:
            self.buckets = Buckets(bucket_sizes, self._shape, batch_size=batch_size, seed=seed)

    def __getitem__(self, position: int) -> Row:
        place, size = self.buckets(position) if self.buckets else (position, self.size)
        number, turn = self.mixture(place)
        name = self.names[number]
        sample, gate, faults = self._read(name, self.orders[number], turn)
        rng = stream(self.seed, "transform", position)
        sample = self._transform(sample, self.sources[name], size, rng)
        metres, valid = sample.depth or (np.zeros(size, np.float32), np.zeros(size, bool))
        return Row(
            pixels=torch.from_numpy(sample.image),
            metres=torch.from_numpy(metres),
            valid=torch.from_numpy(valid),
            caption="".join(sample.captions),
            key=sample.key,
            position=position,
            source=name,
            gate=gate,
            faults=faults,
        )

    def _shape(self, place: int) -> tuple[int, int]:
        """Height and width of the image whose turn it is; those of all, if it is damaged."""
        number, turn = self.mixture(place)
        shards, index = self.shards[self.names[number]], self.orders[number](turn)
        if (shape := shards.shape(index)) is not None:
            return shape
        # A set of format 1, or a lost index: slow, and the same shape.
        try:
            return shards.read(index).shape
        except DamagedSample:
            return self.size

    def _read(
        self, name: str, order: Permutation, turn: int
    ) -> tuple[Sample, str | None, list[Fault]]:
        """The first good sample from `turn` on, the gate that rejected the first, all faults."""
        source, gate, rejected, faults = self.sources[name], None, Counter(), []
        for skip in range(self.sizes[name]):
            try:
                sample = self.shards[name].read(order(turn, skip))
            except DamagedSample as error:
                faults.append(Fault(name, error.shard, error.key, error.reason))
                self.faults.add(faults[-1])
                continue
            if not sample.captions and (written := self.overlays[name].get(sample.key)):
                sample = replace(sample, captions=written)
            admitted = source.gates.admit(sample, depth=source.depth)
            if isinstance(admitted, Sample):
                return admitted, gate, faults
            if skip == 0:
                gate = admitted
            rejected[admitted] += 1
            if rejected.total() == MAX_REJECTED:
                break
        if rejected:
            gates = [f"{g}={getattr(source.gates, g)} rejected {n}" for g, n in rejected.items()]
            raise Unusable(
                f"source {name!r}: none of {rejected.total()} samples in a row passes its gates: "
                f"{', '.join(sorted(gates))}; loosen {'them' if gates[1:] else 'it'}, or drop the "
                "source"
            )
        raise Unusable(f"no sample of source {name!r} can be read; convert the set again")

    def _transform(
        self, sample: Sample, source: Source, size: tuple[int, int], rng: np.random.Generator
    ) -> Sample:
        box = transforms.random_box(sample.shape, size, rng, min_area=source.min_area)
        sample = transforms.crop_resize(sample, box, size)
        if source.flip and rng.random() < 0.5:
            sample = transforms.flip(sample)
        if source.depth:
            sample = transforms.thin(sample, source.patterns, source.max_kept, rng)
        else:
            sample = replace(sample, metres=None, valid=None, points=None)
        if source.jitter:
            image = transforms.jitter(sample.image, source.jitter, rng)
            sample = replace(sample, picture=Image.fromarray(image))
        captions = sample.captions
        if rng.random() < self.caption_dropout:
            captions = ()
        if len(captions) > 1:
            captions = (captions[int(rng.integers(len(captions)))],)
        return replace(sample, captions=captions)


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
    rejections: Rejections = field(default_factory=Rejections)

    def __post_init__(self) -> None:
        if self.batch_size % (self.world * self.accumulate):
            raise Unusable(
                f"batch_size is {self.batch_size}, but must be a multiple of ranks x accumulate = "
                f"{self.world} x {self.accumulate}; it counts the samples of a whole step"
            )

    def __iter__(self) -> Iterator[Batch]:
        keep_memory()
        leaving = Event()
        # Before Python ends its children; atexit would not run in a process of multiprocessing.
        leave = Finalize(None, leaving.set, exitpriority=0)
        loader = DataLoader(
            self.rows,
            batch_sampler=self._positions(self.start()),
            num_workers=self.num_workers,
            collate_fn=partial(collate, patch=self.patch),
            worker_init_fn=partial(ignore_job_signals, leaving=leaving),
            # Without a generator the loader would draw from the global one.
            generator=torch.Generator(),
        )
        parts, failure = iter(loader), None
        try:
            while step := list(islice(parts, self.accumulate)):
                self._count(step)
                measured = sum(part.batch.step_measured for part in step)
                for part in step:
                    yield replace(part.batch, step_measured=measured)
        except ValueError as error:
            if not self.num_workers:
                raise
            failure = _of_worker(error)
            traceback.clear_frames(error.__traceback__)
        finally:
            # The last reference to this ends the workers, so no traceback may hold one: the
            # collector of cycles closes their queues first, and they would never be told.
            leave()
            del parts
        if failure is not None:
            raise failure

    def _count(self, step: Iterable[Part]) -> None:
        for part in step:
            for fault in part.faults:
                if self.faults.add(fault):
                    number = len(self.faults.met)
                    log.warning("damaged sample %d skipped: %s", number, ": ".join(fault))
            for source, gate in part.judged:
                self.rejections.add(source, gate)

    def _positions(self, start: int) -> Iterator[list[int]]:
        """Positions of this rank's micro-batches, one after the other."""
        mine = self.batch_size // self.world
        micro = mine // self.accumulate
        while True:
            first = start + self.rank * mine
            for part in range(self.accumulate):
                yield list(range(first + part * micro, first + (part + 1) * micro))
            start += self.batch_size


def collate(rows: Sequence[Row], *, patch: int) -> Part:
    """Rows of one micro-batch."""
    # In a worker this stacks right into the memory that it shares with the training process.
    pixels, metres, valid = (
        default_collate([getattr(row, name) for row in rows])
        for name in ("pixels", "metres", "valid")
    )
    batch = Batch(
        pixels=pixels,
        metres=metres,
        valid=valid,
        caption=[row.caption for row in rows],
        key=[row.key for row in rows],
        position=torch.tensor([row.position for row in rows], dtype=torch.int64),
        grid=(valid.shape[1] // patch, valid.shape[2] // patch),
        step_measured=int(torch.count_nonzero(valid)),  # sum() of booleans takes 20 times as long
    )
    faults = [fault for row in rows for fault in row.faults]
    return Part(batch, faults, [(row.source, row.gate) for row in rows])


def _of_worker(error: ValueError) -> ValueError:
    """`error` without its traceback. That in the worker is in its text: Unusable needs none."""
    if not isinstance(error, Unusable):
        return ValueError(str(error))
    return Unusable(
        str(error).rpartition(f"{Unusable.__module__}.{Unusable.__name__}: ")[2].strip()
    )


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


def keep_memory() -> None:
    """Let this process, and those it forks, use freed memory again where the C library is glibc.

    By itself that gives what is large back to the system, which clears it for the next sample:
    measured, a ninth of a worker's time.
    """
    with suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        for option, value in MALLOC.items():
            library.mallopt(option, value)
