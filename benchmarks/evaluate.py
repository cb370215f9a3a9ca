"""What running an evaluation costs: `python benchmarks/evaluate.py`, 2 minutes.

A predictor that costs nothing (the truth times a factor), on images of NYUv2's size in a tar as it
is published, by `mofo.evaluation.run` and by a bare loop that reads, decodes, masks and judges in
as many threads, in turn; each in a process of its own. Also what a process holds in memory after
100 and after 1,000 images. Appends a table to benchmarks/RESULTS.md.
"""

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image

from mofo.evaluation.benchmark import Row, open_row
from mofo.evaluation.lines import read_lines
from mofo.evaluation.origin import origin
from mofo.evaluation.predictors import Prediction, Predictor
from mofo.evaluation.protocol import Protocol, judge
from mofo.evaluation.run import Task, run

SIZE = (480, 640)
DIFFERENT = 20  # images; the tar repeats them under names of their own
NAME = "test/room/{}_{:04d}.png"
BOX = (slice(45, 471), slice(41, 601))  # of Eigen et al.


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="each way, in turn (5)")
    parser.add_argument("--images", type=int, default=200, help="a round (200)")
    parser.add_argument("--workers", type=int, default=cores, help="threads (all cores)")
    parser.add_argument("--dry", action="store_true", help="append nothing to RESULTS.md")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_sets(folder, {100, 1000, args.images})
        text = "\n".join(compare(folder, args))
    print(text)
    if not args.dry:
        made_by = origin()
        with Path("benchmarks/RESULTS.md").open("a") as results:
            results.write("\n## Running an evaluation\n\n")
            results.write(f"`{made_by.command}`, commit {made_by.commit}, {made_by.machine}\n\n")
            results.write(f"{text}\n")


def compare(folder: Path, args: argparse.Namespace) -> list[str]:
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(args.rounds):
        for way, own in found.items():
            own.append(alone(way, folder, args.images, args.workers))
            print(f"round {number + 1}: {way}: {own[-1]['rate']:.1f} images/s", flush=True)
    # Of each round its own ratio: what else runs on the machine changes from round to round.
    pairs = zip(found["harness"], found["bare loop"], strict=True)
    ratio = statistics.median(mine["rate"] / ceiling["rate"] for mine, ceiling in pairs)
    rows = ["| | images/s | all rounds | ms of processor an image |", "|---|---|---|---|"]
    for way, own in found.items():
        rates, busy = ([one[name] for one in own] for name in ("rate", "busy"))
        listed = ", ".join(f"{rate:.1f}" for rate in rates)
        middle = statistics.median(rates), statistics.median(busy)
        rows.append(f"| {way} | {middle[0]:.1f} | {listed} | {1000 * middle[1]:.1f} |")
    peaks = {count: alone("harness", folder, count, args.workers)["peak"] for count in (100, 1000)}
    held = ", ".join(f"{peak / 2**20:.0f} MB after {count} images" for count, peak in peaks.items())
    return [
        *rows,
        "",
        f"harness / bare loop: {ratio:.3f}, with {args.workers} threads; marigold@1, "
        f"{SIZE[1]}x{SIZE[0]}",
        f"resident memory, at most: {held}",
    ]


def alone(way: str, folder: Path, count: int, workers: int) -> dict[str, float]:
    """The rate and the memory of one way, in a process of its own."""
    command = [sys.executable, __file__, "--way", way, "--folder", str(folder)]
    command += ["--images", str(count), "--workers", str(workers)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Images a second from opening the archive to the last line and picture, and what it took."""
    row, protocol = rules(args.folder, args.images)
    maps = truths()
    start, before = time.monotonic(), time.process_time()
    WAYS[args.way](row, protocol, maps, args.workers)
    seconds, busy = time.monotonic() - start, time.process_time() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    return {"rate": args.images / seconds, "busy": busy / args.images, "peak": peak}


def harness(row: Row, protocol: Protocol, maps: list[np.ndarray], workers: int) -> None:
    def predict(images: list[np.ndarray], keys: list[str]) -> list[Prediction]:
        return [Prediction(depth=0.3 * maps[int(key[-4:]) % DIFFERENT]) for key in keys]

    free = Predictor(name="free", kind="scale", predict=predict, weights="none")
    task = Task(row=row, images=open_row(row), predictors=[free])
    with tempfile.TemporaryDirectory() as out:
        run([task], protocol=protocol, folder=out, batch_size=16, origin=origin(), workers=workers)
        lines = read_lines(out)
    assert [line["fits"]["affine"]["absrel"] < 1e-3 for line in lines] == [True] * (row.count or 0)


def bare(row: Row, protocol: Protocol, maps: list[np.ndarray], workers: int) -> None:
    """What must be done, and no more."""
    with tarfile.open(row.source) as tar:
        spans = {member.name: (member.offset_data, member.size) for member in tar}
    with open(row.source, "rb") as file, ThreadPoolExecutor(workers) as pool:

        def decode(kind: str, number: int) -> np.ndarray:
            offset, size = spans[NAME.format(kind, number)]
            return np.asarray(Image.open(io.BytesIO(os.pread(file.fileno(), size, offset))))

        def one(number: int) -> float:
            decode("rgb", number)
            truth = decode("depth", number) / np.float32(1000)
            valid = np.zeros(SIZE, bool)
            valid[BOX] = True
            valid &= (truth > 1e-3) & (truth < 10)
            rules = {"kind": "scale", "protocol": protocol, "is_metric": True}
            pred = 0.3 * maps[number % DIFFERENT]
            return judge(pred, truth, valid, **rules, low=1e-3, high=10)["affine"]["absrel"]

        assert max(pool.map(one, range(row.count or 0))) < 1e-3


WAYS = {"bare loop": bare, "harness": harness}


def rules(folder: Path, count: int) -> tuple[Row, Protocol]:
    """NYUv2 of marigold@1 as its YAML has it, on our archive."""
    changes = {"source": str(folder / f"{count}.tar"), "count": count, "list_sha256": None}
    configs = Path(__file__).parents[1] / "configs"
    with initialize_config_dir(str(configs), version_base="1.3"):
        cfg = compose("evaluate", ["eval=marigold"]).eval
    cfg.rows[0].update(changes)
    return instantiate(cfg.rows[0], _convert_="all"), instantiate(cfg.protocol, _convert_="all")


def truths() -> list[np.ndarray]:
    """Depth in metres of each different image: a smooth room."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] / SIZE[1]
    return [
        (2 + np.sin(3 * x + k) + np.cos(4 * y + k) + 3 * y).astype(np.float32) + 0.5
        for k in range(DIFFERENT)
    ]


def make_sets(folder: Path, counts: set[int]) -> None:
    """Tars of the published layout: RGB, raw depth and filled depth."""
    different = []
    for k, metres in enumerate(truths()):
        rng = np.random.default_rng(k)
        # Smooth shapes with some grain: about the bytes a pixel of a photograph.
        coarse = Image.fromarray(rng.integers(0, 256, (15, 20, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(SIZE[::-1], Image.Resampling.BICUBIC), np.float32)
        image = (smooth + rng.normal(0, 3, smooth.shape)).clip(0, 255).astype(np.uint8)
        depth = np.where(rng.random(SIZE) < 0.1, 0, metres * 1000).astype(np.uint16)
        different.append({"rgb": png(image), "depth": png(depth), "filled": png(depth)})
    for count in counts:
        with tarfile.open(folder / f"{count}.tar", "w") as tar:
            for number in range(count):
                for kind, data in different[number % DIFFERENT].items():
                    member = tarfile.TarInfo(NAME.format(kind, number))
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    main()
