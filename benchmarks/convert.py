"""How fast data sets are converted: `python benchmarks/convert.py`, 8 minutes.

Two sets of 1280x960 JPEG, with depth as 16-bit PNG (`mofo convert rgbd_folder`) and without (`mofo
convert images`), and beside them a bare loop in as many processes on the same cores that only reads
the files, decodes them, encodes depth again as PNG and writes the bytes: what no converter can do
without. Both end with all bytes on the disk. Appends a table to benchmarks/RESULTS.md.
"""

import argparse
import io
import multiprocessing
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mofo.data.make import make
from mofo.data.sample import decode_picture, encode_depth
from mofo.evaluation.origin import origin

UNIT = 0.001
SETS: dict[str, dict[str, Any]] = {
    "rgbd_folder": {"unit": UNIT},
    "images": {},
}
LINKS = 32  # of each photograph in the set without depth: or starting the processes would be most


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--samples", type=int, default=128, help="with depth; without, 32 times as many (128)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="each way, in turn (3)")
    parser.add_argument("--processes", type=int, default=cores, help="(all cores)")
    parser.add_argument("--dry", action="store_true", help="append nothing to RESULTS.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "source"
        make_source(source, args.samples)
        lines = ["| samples/s | converter | bare loop | ratio |", "|---|---|---|---|"]
        for converter in SETS:
            folder = source if converter == "rgbd_folder" else source / "linked"
            rounds = [
                (converted(converter, folder, args), bare(converter, folder, args))
                for _ in range(args.rounds)
            ]
            mine, ceiling = np.median(rounds, axis=0)
            ratio = np.median([one / other for one, other in rounds])
            lines.append(f"| {converter} | {mine:.1f} | {ceiling:.1f} | {ratio:.2f} |")
            print(lines[-1], flush=True)
    text = "\n".join(
        [
            *lines,
            "",
            f"{args.processes} processes; {args.samples} samples, {LINKS * args.samples} images",
        ]
    )
    print(text)
    if not args.dry:
        made_by = origin()
        with Path("benchmarks/RESULTS.md").open("a") as results:
            results.write("\n## Converting data sets\n\n")
            results.write(f"`{made_by.command}`, commit {made_by.commit}, {made_by.machine}\n\n")
            results.write(f"{text}\n")


def converted(converter: str, source: Path, args: argparse.Namespace) -> float:
    """Samples a second of the converter."""
    out, count = source.parent / "out", len(list((source / "images").iterdir()))
    start = time.monotonic()
    make(
        out,
        converter=converter,
        source=source,
        samples_per_shard=-(-count // (4 * args.processes)),
        processes=args.processes,
        **SETS[converter],
    )
    rate = count / (time.monotonic() - start)
    shutil.rmtree(out)
    return rate


def bare(converter: str, source: Path, args: argparse.Namespace) -> float:
    """Samples a second of loops that do only what must be done."""
    context = multiprocessing.get_context("fork")
    files = sorted((source / "images").iterdir())
    loops = [
        context.Process(target=loop, args=(files[rank :: args.processes], converter, rank))
        for rank in range(args.processes)
    ]
    start = time.monotonic()
    for process in loops:
        process.start()
    for process in loops:
        process.join()
    return len(files) / (time.monotonic() - start)


def loop(files: list[Path], converter: str, rank: int) -> None:
    with (files[0].parent.parent / f"bare_{rank}").open("wb") as out:
        for path in files:
            data = path.read_bytes()
            decode_picture(data)
            out.write(data)
            if converter == "rgbd_folder":
                depth = (path.parent.parent / "depth" / path.name).with_suffix(".png").read_bytes()
                with Image.open(io.BytesIO(depth)) as opened:
                    metres = np.asarray(opened).astype(np.float32) * np.float32(UNIT)
                out.write(encode_depth(metres, metres > 0, UNIT))
        out.flush()
        os.fsync(out.fileno())
    Path(out.name).unlink()


def make_source(folder: Path, count: int) -> None:
    """Smooth shapes with some grain: about the bytes a pixel of a photograph, and of its depth."""
    for name in ("images", "depth", "linked/images"):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        rng = np.random.default_rng(number)
        coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((1280, 960), Image.Resampling.BICUBIC), np.float32)
        image = (smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(image).save(folder / "images" / f"{number:04d}.jpg", quality=90)
        for link in range(LINKS):
            os.link(
                folder / "images" / f"{number:04d}.jpg",
                folder / "linked" / "images" / f"{number:04d}_{link}.jpg",
            )
        depth = (1000 + 20 * smooth[..., 0] + rng.normal(0, 3, smooth.shape[:2])).astype(np.uint16)
        Image.fromarray(depth).save(folder / "depth" / f"{number:04d}.png")


if __name__ == "__main__":
    main()
