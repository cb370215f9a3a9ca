"""How fast training data is read: `python benchmarks/load.py`, 3 minutes.

Samples of 512x512 from JPEG of 1280x960 and points, by the loader and by a bare loop that decodes,
crops, resizes, draws the points and stacks, in as many processes on the same cores, in turn; both
end with images as floats. Also what a worker holds in memory, and how long an epoch over 10,000
shards takes to begin. Appends a table to benchmarks/RESULTS.md.
"""

import argparse
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mofo.data.loader import keep_memory
from mofo.data.module import DataModule
from mofo.data.sample import Sample, decode_picture, rasterise
from mofo.data.shards import FORMAT, MANIFEST
from mofo.data.write import write
from mofo.evaluation.origin import origin

BATCH, SIDE, CROP = 16, 512, 960
NUM_POINTS = 20_000  # of a 64-beam scanner, those that one camera sees
NUM_SHARDS = 10_000


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=256, help="different samples (256)")
    parser.add_argument("--batches", type=int, default=32, help=f"of {BATCH}, a round (32)")
    parser.add_argument("--rounds", type=int, default=5, help="each way, in turn (5)")
    parser.add_argument("--workers", type=int, default=cores, help="processes (all cores)")
    parser.add_argument("--dry", action="store_true", help="append nothing to RESULTS.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        files = make_set(Path(name), args.samples)
        lines = compare(Path(name) / "set", files, args)
        lines += [f"start of an epoch over {NUM_SHARDS} shards: {start_of_epoch(Path(name)):.2f} s"]
    text = "\n".join(lines)
    print(text)
    if not args.dry:
        made_by = origin()
        with Path("benchmarks/RESULTS.md").open("a") as results:
            results.write("\n## Reading training data\n\n")
            results.write(f"`{made_by.command}`, commit {made_by.commit}, {made_by.machine}\n\n")
            results.write(f"{text}\n")


def compare(folder: Path, files: list[Path], args: argparse.Namespace) -> list[str]:
    """Rates of both ways, the median over rounds, and the memory of the workers."""
    ways: dict[str, Callable[[], tuple[float, int]]] = {
        "bare loop": lambda: bare(files, args),
        "loader": lambda: loaded(folder, args),
    }
    rates, memory = {name: [] for name in ways}, 0
    for number in range(args.rounds):
        for name, measure in ways.items():
            rate, held = measure()
            rates[name].append(rate)
            memory = max(memory, held)
            print(f"round {number + 1}: {name}: {rate:.1f} samples/s", flush=True)
    # Of each round its own ratio: what else runs on the machine changes from round to round.
    pairs = zip(rates["loader"], rates["bare loop"], strict=True)
    ratio = float(np.median([mine / ceiling for mine, ceiling in pairs]))
    rows = ["| samples/s | median | all rounds |", "|---|---|---|"]
    for name, values in rates.items():
        listed = ", ".join(f"{value:.1f}" for value in values)
        rows.append(f"| {name} | {np.median(values):.1f} | {listed} |")
    return [
        *rows,
        "",
        f"loader / bare loop: {ratio:.3f}, with {args.workers} processes",
        f"memory of a worker (resident, at most): {memory / 2**20:.0f} MB",
    ]


def loaded(folder: Path, args: argparse.Namespace) -> tuple[float, int]:
    """Samples a second from the loader once it runs, and bytes held by its largest worker."""
    data = DataModule(
        sources={"set": {"shards": str(folder)}},
        batch_size=BATCH,
        size=(SIDE, SIDE),
        patch=16,
        caption_dropout=0.1,
        seed=0,
        num_workers=args.workers,
    )
    batches = iter(data.train_dataloader())
    # What was prepared before the clock starts is as much as is left over at its end.
    list(itertools.islice(batches, 2 * args.workers))
    start = time.monotonic()
    for batch in itertools.islice(batches, args.batches):
        assert batch.image.dtype == torch.float32
    rate = args.batches * BATCH / (time.monotonic() - start)
    held = max((resident(child.pid) for child in multiprocessing.active_children()), default=0)
    batches.close()
    return rate, held


def bare(files: list[Path], args: argparse.Namespace) -> tuple[float, int]:
    """Samples a second of loops that do only what must be done."""
    context = multiprocessing.get_context("fork")
    ready = context.Barrier(args.workers + 1)
    count = args.batches // args.workers
    loops = [
        context.Process(target=loop, args=(files, count, rank, ready))
        for rank in range(args.workers)
    ]
    for process in loops:
        process.start()
    ready.wait()
    start = time.monotonic()
    for process in loops:
        process.join()
    return count * args.workers * BATCH / (time.monotonic() - start), 0


def loop(files: list[Path], count: int, rank: int, ready) -> None:
    rng = np.random.default_rng(rank)
    keep_memory()
    ready.wait()
    for _ in range(count):
        images, maps, masks = [], [], []
        for number in rng.integers(len(files), size=BATCH):
            left = int(rng.integers(1280 - CROP + 1))
            with Image.open(io.BytesIO(files[number].read_bytes())) as opened:
                cut = opened.crop((left, 0, left + CROP, CROP))
            images.append(np.asarray(cut.resize((SIDE, SIDE), Image.Resampling.LANCZOS)))
            points = np.fromfile(files[number].with_suffix(".bin"), "<f4").reshape(-1, 3)
            points = (points - np.float32([left, 0, 0])) * np.float32([SIDE / CROP] * 2 + [1])
            metres, valid = rasterise(points, (SIDE, SIDE))
            maps.append(metres)
            masks.append(valid)
        image = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        image = image.to(torch.float32, memory_format=torch.contiguous_format)
        image.div_(127.5).sub_(1)
        torch.from_numpy(np.stack(maps)), torch.from_numpy(np.stack(masks))


def resident(pid: int | None) -> int:
    """Bytes that a process has in memory, shared ones with them, at most so far."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 2**10
    raise RuntimeError(f"the kernel tells no peak of memory of process {pid}")


def make_set(folder: Path, count: int) -> list[Path]:
    """The set, and beside it the same pictures (.jpg) and points (.bin) as plain files."""
    samples = []
    for number in range(count):
        path = folder / f"{number:04d}.jpg"
        rng = np.random.default_rng(number)
        # Smooth shapes with some grain: about the bytes a pixel of a photograph.
        coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((1280, 960), Image.Resampling.BICUBIC), np.float32)
        grain = rng.normal(0, 6, smooth.shape)
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)
        points = rng.uniform((0, 300, 2), (1280, 960, 80), (NUM_POINTS, 3)).astype("<f4")
        points.tofile(path.with_suffix(".bin"))
        samples.append(path)
    write(map(sample, samples), folder / "set", "set", samples_per_shard=64)
    return samples


def sample(path: Path) -> Sample:
    data = path.read_bytes()
    return Sample(
        key=path.stem,
        picture=decode_picture(data),
        image_bytes=data,
        points=np.fromfile(path.with_suffix(".bin"), "<f4").reshape(-1, 3),
        captions=("noise",),
        metric=True,
        source="noise",
        licence="CC0",
    )


def start_of_epoch(folder: Path) -> float:
    """Seconds until it is known what the first step reads of a set that is only a manifest."""
    many = folder / "many"
    many.mkdir()
    digest = hashlib.sha256(b"").hexdigest()
    shards = [
        {
            "name": f"many-{i:06d}.tar",
            "samples": 1000,
            "bytes": 0,
            "sha256": digest,
            "index": digest,
        }
        for i in range(NUM_SHARDS)
    ]
    (many / MANIFEST).write_text(json.dumps({"format": FORMAT, "shards": shards}))
    start = time.monotonic()
    data = DataModule(
        sources={"many": {"shards": str(many)}},
        batch_size=256,
        size=(SIDE, SIDE),
        patch=16,
        caption_dropout=0.1,
        seed=0,
    )
    rows = data.train_dataloader().rows
    for position in range(256):
        number, turn = rows.mixture(position)
        rows.orders[number](turn)
    return time.monotonic() - start


if __name__ == "__main__":
    main()
