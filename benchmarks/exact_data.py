"""Whether killed data loading continues exactly: `python benchmarks/exact_data.py`, 10 minutes.

At random moments every rank of a run is killed (kill -9) with its workers; the run is resumed with
another number of workers and of ranks from the last step that all ranks had finished. What was read
before and after must be what an uninterrupted run reads: the same keys in the same order, and the
same bytes. The set has several shapes (so buckets), maps and points, a damaged shard, a gate that
rejects; of the source without these, no sample may be lost or repeated within an epoch. Appends a
table to benchmarks/RESULTS.md.
"""

import argparse
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from mofo.data.module import DataModule
from mofo.data.order import CHUNK
from mofo.data.sample import Sample
from mofo.data.write import write
from mofo.evaluation.origin import origin

WORKERS, WORLDS = (0, 2, 4), (1, 2, 4)
BATCH = 8
STEPS = CHUNK  # one chunk of buckets: what it holds does not depend on how it is sorted
SHAPES = ((24, 48), (32, 32), (48, 32), (24, 32))


class Way(NamedTuple):
    """With how many processes a run reads."""

    workers: int
    world: int


class Row(NamedTuple):
    """A sample as it was read."""

    position: int
    key: str
    digest: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="moments of each kind of run (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--dry", action="store_true", help="append nothing to RESULTS.md")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*worker processes.*")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_sets(folder)
        lines = table(folder, args.kills, np.random.default_rng(args.seed))
    print(lines)
    if not args.dry:
        made_by = origin()
        with Path("benchmarks/RESULTS.md").open("a") as results:
            results.write("\n## Killed loading continues exactly\n\n")
            results.write(f"`{made_by.command}`, commit {made_by.commit}, {made_by.machine}\n\n")
            results.write(f"{lines}\n")


def table(folder: Path, num_kills: int, rng: np.random.Generator) -> str:
    """Kill and resume runs of each kind; exits at the first difference."""
    begin = time.monotonic()
    whole = run(folder, Way(0, 1), 0)
    check_epochs(whole)
    rows = ["| workers | ranks | kills | killed after steps | resumed with others | differences |"]
    rows += ["|---|---|---|---|---|---|"]
    ways = [Way(*way) for way in itertools.product(WORKERS, WORLDS)]
    for way in ways:
        # Other workers and another world, each pair in turn.
        others = [o for o in ways if o.workers != way.workers and o.world != way.world]
        done = []
        for kill in range(num_kills):
            other = others[kill % len(others)]
            steps, read = kill_and_resume(folder, way, other, int(rng.integers(STEPS)))
            if read != whole:
                sys.exit(f"{way} killed after {steps} steps, resumed as {other}: other samples")
            done.append(steps)
            spent = time.monotonic() - begin
            print(f"\r{way}: kill {kill + 1} of {num_kills}, {spent:.0f} s", end="", flush=True)
        print()
        spread = f"{min(done)} to {max(done)} of {STEPS}"
        rows.append(
            f"| {way.workers} | {way.world} | {num_kills} | {spread} | {len(others)} kinds | 0 |"
        )
    return "\n".join(rows)


def kill_and_resume(folder: Path, way: Way, other: Way, step: int) -> tuple[int, list[Row]]:
    """Steps that a run killed at about `step` had finished, and all that was read before and after.

    How far its workers and its other ranks are at that moment is chance.
    """
    before = run(folder, way, 0, kill_at=step)
    return len(before) // BATCH, before + run(folder, other, len(before))


def run(folder: Path, way: Way, start: int, *, kill_at: int | None = None) -> list[Row]:
    """What all ranks read from position `start` on, in the steps that all of them finished."""
    context = multiprocessing.get_context("fork")
    logs = [folder / f"rank_{rank}.jsonl" for rank in range(way.world)]
    ranks = []
    for rank, path in enumerate(logs):
        path.unlink(missing_ok=True)
        ranks.append(context.Process(target=read, args=(folder, way, rank, start, path)))
        ranks[-1].start()
    if kill_at is not None:
        while ranks[0].is_alive() and sum(1 for _ in finished(logs[0])) < kill_at:
            time.sleep(0.001)
        for process in ranks:
            kill(process)
    for process in ranks:
        process.join()
        if kill_at is None and process.exitcode:
            raise RuntimeError(f"a rank of {way} ended with {process.exitcode}")
    steps = zip(*(list(finished(path)) for path in logs), strict=False)
    return [row for step in steps for part in step for row in part]


def kill(process: multiprocessing.process.BaseProcess) -> None:
    """kill -9 of a rank and its workers, as when a machine is lost."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # before it had a group of its own, or after its end
        process.kill()


def read(folder: Path, way: Way, rank: int, start: int, path: Path) -> None:
    """One rank: a line for each step, as soon as it is read."""
    os.setpgid(0, 0)
    data = module(folder, workers=way.workers)
    data.advance(start)
    batches = iter(replace(data.train_dataloader(), rank=rank, world=way.world))
    with open(path, "ab", buffering=0) as file:
        for _ in range(start // BATCH, STEPS):
            file.write(json.dumps(rows_of(next(batches))).encode() + b"\n")


def finished(path: Path) -> Iterator[list[Row]]:
    """The steps in a rank's log; a line that a kill cut short is none."""
    text = path.read_text() if path.exists() else ""
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):
            yield [Row(*row) for row in json.loads(line)]


def rows_of(batch) -> list[Row]:
    """Each sample of a batch with a digest of all that belongs to it."""
    rows = []
    for i, key in enumerate(batch.key):
        digest = hashlib.sha256(repr((batch.caption[i], batch.grid)).encode())
        for tensor in (batch.image[i], batch.metres[i], batch.valid[i]):
            digest.update(tensor.numpy().tobytes())
        rows.append(Row(int(batch.position[i]), key, digest.hexdigest()))
    return rows


def module(folder: Path, *, workers: int) -> DataModule:
    row = {"patterns": ["lidar", "sfm", "rgbd"], "min_area": 0.5, "jitter": 0.2}
    return DataModule(
        sources={
            "good": {**row, "shards": str(folder / "good"), "weight": 0.5},
            "damaged": {**row, "shards": str(folder / "damaged"), "weight": 0.3},
            "gated": {
                **row,
                "shards": str(folder / "gated"),
                "weight": 0.2,
                "gates": {"min_image_size": 25},
            },
        },
        batch_size=BATCH,
        size=(32, 32),
        patch=8,
        caption_dropout=0.2,
        seed=5,
        buckets=True,
        num_workers=workers,
        max_bad_fraction=0.5,
    )


def make_sets(folder: Path) -> None:
    """Three sets of 60 samples in shards of 7; the second shard of one is cut off."""
    for name in ("good", "damaged", "gated"):
        samples = (sample(number, name) for number in range(60))
        write(samples, folder / name, name, samples_per_shard=7)
    os.truncate(folder / "damaged/damaged-000001.tar", 5000)


def sample(number: int, name: str) -> Sample:
    """Noise of one of the shapes, with a map or with points."""
    rng = np.random.default_rng(number)
    h, w = SHAPES[number % len(SHAPES)]
    points = rng.uniform((0, 0, 1), (w, h, 50), (80, 3)).astype(np.float32)
    metres = rng.uniform(1, 50, (h, w)).astype(np.float32)
    depth = {"metres": metres, "valid": rng.random((h, w)) < 0.5}
    return Sample(
        key=f"{name}-{number:03d}",
        picture=Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)),
        **(depth if number % 3 else {"points": points}),
        captions=(f"number {number}", "noise")[: 1 + number % 2],
        metric=True,
        source=name,
        licence="CC0",
    )


def check_epochs(rows: list[Row]) -> None:
    """Of the source without faults each sample comes once before any comes again."""
    counts = Counter(row.key for row in rows if row.key.startswith("good"))
    if not (len(counts) == 60 and max(counts.values()) - min(counts.values()) <= 1):
        raise RuntimeError(f"samples were lost or repeated within an epoch: {counts}")


if __name__ == "__main__":
    main()
