"""Whether killed training continues exactly: `python benchmarks/exact_training.py`, 15 minutes.

Small runs of `train.py` on road frames, one process or several under torchrun (DDP, FSDP2), are
killed (kill -9, all processes) at random moments, and the same command is given again, with the
same or another number of ranks. The steps that were saved must be those of an uninterrupted run of
the first number of ranks, byte by byte, and the others those of one of the second: byte by byte
where both are the same, with equal weights, averages and optimiser in the end; else up to rounding.
Each step takes its own samples, each once. Appends a table to benchmarks/RESULTS.md.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from mofo.data.make import make
from mofo.evaluation.origin import origin
from mofo.training.dcp import Whole
from mofo.training.manifest import Manifest

ROOT = Path(__file__).parents[1]
NUM_STEPS, EVERY, BATCH = 24, 5, 8  # EVERY: steps between checkpoints
AGREED = 1e-5  # relative, of whatever a step logs, between numbers of ranks
START_S, PATIENCE_S = 6.0, 300.0  # before a first step, at least; for a run on a busy machine
SMALL = "model=xs ~data.sources.real data.sources.scenes.make=null optimizer.lr=1e-3 "
SMALL += f"optimizer.warmup_steps=4 callbacks.ema.decay=0.9 data.batch_size={BATCH} "
SMALL += f"callbacks.checkpoint.every_n_steps={EVERY} trainer.max_steps={NUM_STEPS}"
PAIRS = [(before, after) for before in "12" for after in "124"]  # of numbers of ranks
PAIRS += [("2, FSDP2", "2, FSDP2"), ("2, FSDP2", "1")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="in all (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--dry", action="store_true", help="append nothing to RESULTS.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        make_set(Path(name))
        lines = table(Path(name), args.kills, np.random.default_rng(args.seed))
    print(lines)
    if not args.dry:
        made_by = origin()
        with Path("benchmarks/RESULTS.md").open("a") as results:
            results.write("\n## Killed training continues exactly\n\n")
            results.write(f"`{made_by.command}`, commit {made_by.commit}, {made_by.machine}\n\n")
            results.write(f"{lines}\n")


def table(folder: Path, num_kills: int, rng: np.random.Generator) -> str:
    """Kill and resume pair after pair; exits at the first difference."""
    begin, trials = time.monotonic(), dict[tuple[str, str], list[tuple[int, int, float]]]()
    pairs = [PAIRS[kill % len(PAIRS)] for kill in range(num_kills)]
    ways = sorted({way for pair in pairs for way in pair})
    whole = {way: folder / f"whole_{n}" for n, way in enumerate(ways)}
    for way, run in whole.items():
        complete(run, way, "whole")
        check_samples(run, "whole", range(1, NUM_STEPS + 1))
    # One moment in each part of the run, in any order.
    moments = (rng.permutation(num_kills) + rng.random(num_kills)) / num_kills * NUM_STEPS
    for kill, pair in enumerate(pairs):
        done, saved, off = kill_and_resume(folder / f"killed_{kill}", pair, whole, moments[kill])
        trials.setdefault(pair, []).append((done, saved, off))
        said = f"{' -> '.join(pair)} ranks, {done} steps, {saved} saved, off by {off:.1e}"
        print(f"kill {kill + 1}: {said}, {time.monotonic() - begin:.0f} s", flush=True)
    rows = ["| ranks | resumed with | kills | killed after steps | steps lost, mean "]
    rows[0] += "| differing steps | largest relative difference |"
    rows += ["|---|---|---|---|---|---|---|"]
    for (way, other), some in trials.items():
        done, saved, off = np.array(some).T
        spread = f"{done.min():.0f} to {done.max():.0f} of {NUM_STEPS}"
        lost, most = (done - saved).mean(), "0, weights too" if way == other else f"{off.max():.1e}"
        rows.append(f"| {way} | {other} | {len(some)} | {spread} | {lost:.1f} | 0 | {most} |")
    return "\n".join(rows)


def make_set(folder: Path) -> None:
    """Twelve road frames with sparse LiDAR depth, in three shards."""
    keys = (ROOT / "data/splits/real_train.txt").read_text().split()
    (folder / "keys.txt").write_text("\n".join([k for k in keys if k.startswith("zod_")][:12]))
    source: dict[str, Any] = {"converter": "samples", "keys": str(folder / "keys.txt")}
    make(folder / "road", samples_per_shard=4, processes=1, **source)


def complete(run: Path, way: str, part: str) -> None:
    with launched(run, way, part) as process:
        if process.wait(PATIENCE_S):
            fail(run, f"ended with {process.returncode}")


def kill_and_resume(
    run: Path, pair: tuple[str, str], whole: dict[str, Path], moment: float
) -> tuple[int, int, float]:
    """Steps done at `moment`, those of them that were saved, and how far off any row is."""
    step, is_same = int(moment), pair[0] == pair[1]
    with launched(run, pair[0], "before") as process:
        since = reach(process, run, max(step - 1, 1)) if step else time.monotonic() - START_S
        time.sleep((moment - step) * (reach(process, run, step) - since))
        if process.poll() is not None:
            fail(run, "ended before it was killed")
    done = len(rows_of(run))
    complete(run, pair[1], "after")
    starts = map(json.loads, (run / "system.jsonl").read_text().splitlines())
    saved = [row["step"] for row in starts if "started" in row][-1]
    before, after = (whole[way] for way in pair)
    off = compare_rows(run, rows_of(before)[:saved], rows_of(after)[saved:], bits=is_same)
    compare_ends(run, after, bits=is_same)
    check_samples(run, "before", range(1, saved + 1))
    check_samples(run, "after", range(saved + 1, NUM_STEPS + 1))
    return done, saved, off


def compare_rows(run: Path, kept: list[str], later: list[str], *, bits: bool) -> float:
    """The largest relative difference to what the steps should have logged."""
    rows, largest = rows_of(run), 0.0
    if (steps := [json.loads(row)["step"] for row in rows]) != list(range(1, NUM_STEPS + 1)):
        fail(run, f"has other steps than 1 to {NUM_STEPS}: {steps}")
    for row, expected in zip(rows, kept + later, strict=True):
        ours, theirs = (np.array([*json.loads(one).values()], float) for one in (row, expected))
        off = float(np.max(abs(ours - theirs) / np.maximum(abs(theirs), 1e-30)))
        is_exact = bits or ours[0] <= len(kept)
        if (row != expected) if is_exact else not off <= AGREED:  # null, so NaN, agrees with none
            fail(run, f"is off by {off:.1e}, {len(kept)} saved:\n  {row}\n  {expected}\n")
        largest = max(largest, off)
    return largest


def compare_ends(run: Path, whole: Path, *, bits: bool) -> None:
    """The last checkpoints: how far data, schedule and average are; and the `bits` of tensors."""
    paths = [folder / "checkpoints" / f"step_{NUM_STEPS:08d}" for folder in (run, whole)]
    ours, theirs = map(Manifest.read, paths)
    names = ("data", "schedule", "num_updates", "skipped", "config_hash")
    wrong = [name for name in names if ours.facts[name] != theirs.facts[name]]
    wrong += sorted(ours.tensors.keys() ^ theirs.tensors.keys())
    if bits and not wrong:
        tensors, expected = Whole(paths[0], ours.tensors, ""), Whole(paths[1], theirs.tensors, "")
        wrong = [name for name in tensors if not torch.equal(tensors[name], expected[name])]
    if wrong:
        fail(run, f"ends with {len(wrong)} other tensors or facts: {', '.join(wrong[:5])}")


def check_samples(run: Path, part: str, steps: range) -> None:
    """Each step took its samples and no others, over all ranks."""
    took: dict[int, list[int]] = {}
    for path in (run / part).glob("samples_*.jsonl"):
        for row in map(json.loads, path.read_text().split("\n")[:-1]):
            took.setdefault(row["step"], []).extend(row["positions"])
    for step in steps:
        if sorted(took.get(step, [])) != list(range((step - 1) * BATCH, step * BATCH)):
            fail(run, f"took the samples {took.get(step)} in step {step}")


@contextmanager
def launched(run: Path, way: str, part: str) -> Iterator[subprocess.Popen]:
    """`train.py` as a user starts it; all that is left of it after the block is killed."""
    ranks, *sharded = way.split(", ")
    torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={ranks}".split()
    command = [sys.executable, *(torchrun if ranks != "1" else []), "train.py", *SMALL.split()]
    command += ["trainer=fsdp", "trainer.accelerator=cpu"] if sharded else []
    command += [f"paths.runs={run.parent}", f"name={run.name}"]
    command += [f"data.sources.scenes.shards={run.parent}/road"]
    command += [f"+callbacks.taken={{_target_: tests.slurm.faults.Fault, folder: {run}/{part}}}"]
    # A killed torchrun leaves temporary folders behind.
    environ = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(run.parent)}
    environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with run.with_suffix(".log").open("a") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=log, stderr=log)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGSTOP)  # torchrun starts no rank meanwhile
            for pid in [process.pid, *started_by(process.pid)]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def started_by(pid: int) -> Iterator[int]:
    """Children and theirs; torchrun gives each rank a process group of its own."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # a thread that has just ended
            for child in map(int, path.read_text().split()):
                yield from (child, *started_by(child))


def reach(process: subprocess.Popen, run: Path, step: int) -> float:
    """When the row of a step was there."""
    end = time.monotonic() + PATIENCE_S
    while len(rows_of(run)) < step:
        if process.poll() is not None or time.monotonic() > end:
            fail(run, f"does not reach step {step}")
        time.sleep(0.005)
    return time.monotonic()


def rows_of(run: Path) -> list[str]:
    """The whole lines of its metrics."""
    path = run / "metrics.jsonl"
    return path.read_text().split("\n")[:-1] if path.exists() else []


def fail(run: Path, what: str) -> NoReturn:
    log = run.with_suffix(".log").read_text()
    sys.exit(f"{run.name} {what}; its log ends with\n{log[-2000:]}")


if __name__ == "__main__":
    main()
