"""What a checkpoint costs: `python benchmarks/checkpoint.py`, 10 minutes, 26 GB of disk.

A state of random numbers with the names and shapes of a network of 1 B parameters (model=800m),
4 GB in float32, is saved, verified, loaded and exported, each in a process of its own that reports
its peak of resident memory as a multiple of the state. Saving takes turns with saving without
checksums and with a bare write and flush of the same bytes. Appends a table to
benchmarks/RESULTS.md.
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from mofo.evaluation.origin import origin
from mofo.model.dit import ThreeStreamDiT
from mofo.training import dcp, store
from mofo.training.export import export

CONFIGS = Path(__file__).parents[1] / "configs"
STEP = 1
NEEDED = 6.5  # times the state: what stands on the disk at once, and room


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="800m", help="a name in configs/model (800m)")
    parser.add_argument("--rounds", type=int, default=6, help="of each way to save (6)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (the temporary one)")
    parser.add_argument("--dry", action="store_true", help="append nothing to RESULTS.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        run = Path(name)
        size = prepare(run, args.model)
        if (free := shutil.disk_usage(run).free) < NEEDED * size:
            sys.exit(
                f"{run} has {free / 1e9:.1f} GB free, but {NEEDED * size / 1e9:.1f} are needed"
            )
        lines = [f"state: {size / 4e6:.0f} M parameters, {size / 1e9:.2f} GB", ""]
        lines += ["| | seconds | GB/s | peak / state |", "|---|---|---|---|"]
        found = alone(save, run, args.rounds)
        rows = {way: median(taken) for way, taken in found.items()}
        rows |= {"save, asynchronous": alone(save_beside, run)} | alone(verify, run)
        rows |= {"load": alone(load, run)}
        for dtype in ("float32", "bfloat16"):
            rows[f"export to {dtype}"] = alone(export_as, run, dtype)
        for what, (seconds, peak) in rows.items():
            rate = f"{size / seconds / 1e9:.2f}"
            lines.append(f"| {what} | {seconds:.2f} | {rate} | {peak / size:.2f} |")
        lines += ["", *overheads(found)]
    text = "\n".join(lines)
    print(text)
    if not args.dry:
        made_by = origin()
        with Path("benchmarks/RESULTS.md").open("a") as results:
            results.write("\n## Checkpoints\n\n")
            results.write(f"`{made_by.command}`, commit {made_by.commit}, {made_by.machine}\n\n")
            results.write(f"{text}\n")


def prepare(run: Path, model: str) -> int:
    """Freeze a config, as a run does; the bytes of its network."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", [f"model={model}", "name=benchmark"])
    OmegaConf.save(cfg, run / "config.yaml", resolve=True)
    return sum(tensor.nbytes for tensor in outline(run).values())


def outline(run: Path) -> dict[str, Tensor]:
    cfg = OmegaConf.load(run / "config.yaml")
    with torch.device("meta"):
        dit = ThreeStreamDiT(instantiate(cfg.model, _convert_="all"))
    return {f"average/{name}": tensor for name, tensor in dit.state_dict().items()}


def filled(run: Path, value: float | None = None) -> dict[str, Tensor]:
    """A state in memory, all of it touched: one number, or a block of random ones repeated."""
    block = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))
    out = {}
    for name, blank in outline(run).items():
        out[name] = torch.empty(blank.shape)
        for part in out[name].flatten().split(len(block)):
            part.copy_(block[: len(part)]) if value is None else part.fill_(value)
    return out


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


@contextmanager
def measured(before: int) -> Iterator[list[float]]:
    """Seconds, and the peak of resident memory beyond `before` bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    taken: list[float] = []
    start = time.perf_counter()
    yield taken
    taken += [time.perf_counter() - start, resident("VmHWM") - before]


def resident(what: str = "VmRSS") -> int:
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith(f"{what}:")) * 1024


def saved(run: Path, step: int, tensors: dict[str, Tensor], **options: Any) -> store.Saving:
    facts = {"data": {"samples_seen": 0}}
    return store.save(run / "checkpoints", step, tensors, facts, **options)


def save(run: Path, rounds: int) -> dict[str, list[list[float]]]:
    """Three ways in turn, each as often first as last; a checkpoint stays."""
    before = resident()
    tensors, summed = filled(run), dcp.xxh3_64
    found: dict[str, list[list[float]]]
    found = {"bare write": [], "save, no checksums": [], "save": []}
    for number in range(rounds):
        ways = deque(found)
        ways.rotate(number)
        for what in ways:
            shutil.rmtree(run / "checkpoints", ignore_errors=True)
            os.sync()
            with measured(before) as taken:
                if what == "bare write":
                    write_bare(run / "bare", tensors)
                else:
                    dcp.xxh3_64 = summed if what == "save" else Unsummed
                    saved(run, STEP, tensors).wait()
            dcp.xxh3_64 = summed
            (run / "bare").unlink(missing_ok=True)
            found[what].append(taken)
            print(f"{what}: {taken[0]:.2f} s", file=sys.stderr)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    saved(run, STEP, tensors).wait()
    return found


def median(rows: list[list[float]]) -> tuple[float, float]:
    """Seconds, and the highest of the peaks."""
    return statistics.median(row[0] for row in rows), max(row[1] for row in rows)


def overheads(found: dict[str, list[list[float]]]) -> Iterator[str]:
    """On a shared machine the quickest of each way was disturbed least."""
    times = {way: [row[0] for row in rows] for way, rows in found.items()}
    for way, what in (("save, no checksums", "checksums add"), ("bare write", "all adds")):
        pairs = zip(times["save"], times[way], strict=True)
        typical = statistics.median(ours / theirs - 1 for ours, theirs in pairs)
        best = min(times["save"]) / min(times[way]) - 1
        yield f"{what} {best:+.1%} (quickest), {typical:+.1%} (median of rounds) to: {way}"


class Unsummed:
    """A checksum that costs nothing."""

    def update(self, block: memoryview) -> None:
        pass

    def hexdigest(self) -> str:
        return ""


def write_bare(path: Path, tensors: dict[str, Tensor]) -> None:
    with path.open("wb", buffering=0) as file:
        for tensor in tensors.values():
            data = tensor.flatten().view(torch.uint8).numpy().data
            while len(data):
                data = data[file.write(data[: dcp.BLOCK]) :]
        os.fsync(file.fileno())


def save_beside(run: Path) -> tuple[float, float]:
    """Until training may go on; the peak is that of the whole save."""
    before = resident()
    tensors = filled(run)
    with measured(before) as taken:
        start = time.perf_counter()
        saving = saved(run, STEP + 1, tensors, asynchronous=True)
        waited = time.perf_counter() - start
        saving.wait()
    shutil.rmtree(run / "checkpoints" / f"step_{STEP + 1:08d}")
    return waited, taken[1]


def verify(run: Path) -> dict[str, tuple[float, float]]:
    path, before, out = run / "checkpoints" / f"step_{STEP:08d}", resident(), {}
    for what in ("verify", "verify, from the page cache"):
        if what == "verify":
            for file in path.iterdir():
                with file.open("rb") as opened:
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with measured(before) as taken:
            assert store.verify(path) == []
        out[what] = tuple(taken)
    return out


def load(run: Path) -> tuple[float, ...]:
    before = resident()
    tensors = filled(run, 9.0)
    with measured(before) as taken:
        store.load(run / "checkpoints" / f"step_{STEP:08d}", tensors)
    expected = filled(run)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    return tuple(taken)


def export_as(run: Path, dtype: str) -> tuple[float, ...]:
    before = resident()
    with measured(before) as taken:
        export(run, run / dtype, dtype=getattr(torch, dtype), num_samples=0)
    shutil.rmtree(run / dtype)
    return tuple(taken)


if __name__ == "__main__":
    main()
