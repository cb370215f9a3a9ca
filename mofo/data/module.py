"""`DataModule`: the training data as Lightning wants it. Its whole state is one integer."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import lightning as L

from mofo.data.caption import read_overlay
from mofo.data.gates import Gates, Rejections, Unusable, naming
from mofo.data.loader import Faults, Source, Steps, TrainingSet
from mofo.data.make import make
from mofo.data.order import bucket_sizes
from mofo.data.shards import Shards

log = logging.getLogger(__name__)


class DataModule(L.LightningDataModule):
    """A weighted mixture of sources, as endless micro-batches of this rank.

    `batch_size` counts the samples of one optimiser step, over all ranks and micro-batches; a step
    takes `accumulate` micro-batches a rank. `size` is (h, w) in pixels; with `buckets` it only says
    how many they are: each step then has the aspect of its samples.
    """

    def __init__(
        self,
        *,
        sources: Mapping[str, Mapping[str, Any]],
        batch_size: int,
        size: Sequence[int],
        patch: int,
        caption_dropout: float,
        seed: int,
        accumulate: int = 1,
        buckets: bool = False,
        num_workers: int = 0,
        max_bad_fraction: float = 0.01,
    ) -> None:
        super().__init__()
        h, w = size
        if h % patch or w % patch or h < patch or w < patch:
            raise Unusable(
                f"image is {h}x{w}, but both sides must be multiples of {patch}; change data.size"
            )
        if not 0 <= max_bad_fraction < 1:
            raise Unusable(
                f"max_bad_fraction is {max_bad_fraction}, but must be in [0, 1): the part of a "
                "source that may be damaged"
            )
        if not sources:
            raise Unusable("there are no sources; give data.sources at least one row")
        self.sources = {name: _source(name, row) for name, row in sources.items()}
        self.batch_size, self.accumulate = batch_size, accumulate
        self.size, self.patch = (h, w), patch
        self.caption_dropout, self.seed = caption_dropout, seed
        self.num_workers, self.max_bad_fraction = num_workers, max_bad_fraction
        self.buckets = buckets
        self.samples_seen = 0
        self.faults: Faults | None = None
        self.rejections: Rejections | None = None

    def prepare_data(self) -> None:
        for name, source in self.sources.items():
            if source.make is not None:
                with naming(f"source {name!r}"):
                    make(source.shards, **source.make)

    def train_dataloader(self) -> Steps:
        world = self.trainer.world_size if self.trainer else 1
        rows = TrainingSet(
            self.sources,
            size=self.size,
            caption_dropout=self.caption_dropout,
            seed=self.seed,
            max_bad_fraction=self.max_bad_fraction,
            bucket_sizes=bucket_sizes(self.size, self.patch) if self.buckets else (),
            batch_size=self.batch_size,
        )
        # The workers count what each of them meets, this process what all of them met.
        self.faults = Faults(rows.sizes, self.max_bad_fraction)
        self.rejections = Rejections(ranks=world)
        return Steps(
            rows=rows,
            start=lambda: self.samples_seen,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            rank=self.trainer.global_rank if self.trainer else 0,
            world=world,
            patch=self.patch,
            num_workers=self.num_workers,
            faults=self.faults,
            rejections=self.rejections,
        )

    def advance(self, samples: int) -> None:
        """Say that `samples` more of the global order were trained on: `batch_size` a step."""
        self.samples_seen += samples

    def fingerprint(self, *, files: bool = False) -> dict[str, str]:
        """For each source what its manifest says of the shards, and its captions, as one hash.

        With `files` also whether those shards are here: Unusable names what is missing.
        """
        sets = {}
        for name, source in self.sources.items():
            with naming(f"source {name!r}"):
                sets[name] = Shards(source.shards)
                if files:
                    _look_for(sets[name])
        return {name: _hash(shards) for name, shards in sets.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"samples_seen": self.samples_seen, "shards": self.fingerprint()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        seen, then, now = state_dict["samples_seen"], state_dict["shards"], self.fingerprint()
        if changed := [name for name in now if now[name] != then.get(name)]:
            raise Unusable(
                f"the shards or captions of {', '.join(changed)} are not those that the run has "
                f"trained on for {seen} samples; bring them back, or start a run of another name"
            )
        if self.buckets and seen % self.batch_size:
            raise Unusable(
                f"the run has seen {seen} samples, no whole number of steps of batch_size="
                f"{self.batch_size}, of which each has a shape; resume with the batch_size it had"
            )
        self.samples_seen = seen

    def teardown(self, stage: str) -> None:
        self._report()

    def on_exception(self, exception: BaseException) -> None:
        self._report()

    def _report(self) -> None:
        if self.faults is not None and self.faults.met:
            log.info("damaged samples that were skipped: %d", len(self.faults.met))
        if self.rejections is not None:
            self.rejections.report()


def _look_for(shards: Shards) -> None:
    """Unusable unless every shard is here, as long as its manifest says; URLs are not asked."""
    if shards.manifest is None or shards.is_remote:
        return
    sizes = [entry["bytes"] for entry in shards.manifest["shards"]]
    wrong = [
        f"{path} ({'missing' if found is None else f'{found} of {size} bytes'})"
        for path, size in zip(shards.paths, sizes, strict=True)
        if (found := _size(path)) != size
    ]
    if wrong:
        raise Unusable(
            f"{len(wrong)} of {len(sizes)} shards are missing or cut short: "
            f"{', '.join(wrong[:5])}; copy or convert them again"
        )


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def _hash(shards: Shards) -> str:
    if shards.manifest is None:
        rows = [[os.path.basename(path), _size(path)] for path in shards.paths]
    else:
        rows = [[row["name"], row["samples"], row["sha256"]] for row in shards.manifest["shards"]]
    captions = sorted(read_overlay(shards.source).items())
    return hashlib.sha256(json.dumps([rows, captions]).encode()).hexdigest()[:16]


def _source(name: str, row: Mapping[str, Any]) -> Source:
    accepted = [field.name for field in fields(Source)]
    if unknown := sorted(set(row) - set(accepted)):
        raise Unusable(f"source {name!r} has the keys {unknown}, but accepted are {accepted}")
    if "shards" not in row:
        raise Unusable(f"source {name!r} has no shards; say in which folder they are")
    patterns, gates, makes = row.get("patterns", Source.patterns), row.get("gates"), row.get("make")
    for key, value, kind in (
        ("patterns", patterns, Sequence),
        ("gates", gates or {}, Mapping),
        ("make", makes or {}, Mapping),
    ):
        if not isinstance(value, kind) or isinstance(value, str):
            like = "key: value" if kind is Mapping else "[one, another]"
            raise Unusable(f"source {name!r}: {key} is {value!r}, but must be like {like}")
    if makes is not None and "converter" not in makes:
        raise Unusable(
            f"source {name!r} with shards {row['shards']} has make={dict(makes)} without a "
            f"converter, perhaps from an experiment; give data.sources.{name}.make.converter=... "
            f"(`mofo convert --help` lists them), or data.sources.{name}.make=null if the shards "
            "are there"
        )
    gates = gates or {}
    accepted = [field.name for field in fields(Gates)]
    if unknown := sorted(set(gates) - set(accepted)):
        raise Unusable(f"source {name!r} has the gates {unknown}, but accepted are {accepted}")
    with naming(f"source {name!r}"):
        return Source(**{**row, "patterns": tuple(patterns), "gates": Gates(**gates)})
