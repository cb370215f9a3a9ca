"""How long scoring an image takes: `OMP_NUM_THREADS=1 python benchmarks/score.py`.

Each protocol judges one 640x480 image with holes, of a prediction in metres, so that every fit
applies; beside it the same numbers by the code that one would write first (numpy's lstsq, formulas
over whole arrays, a linear programme), which must agree, and the bare memory traffic: the bytes of
prediction, truth and mask at the measured speed of a copy. Also edges at 1920x1080. Times are
medians of this process's own processor time, which other processes on the machine do not count in.
Appends a table to benchmarks/RESULTS.md.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from scipy.ndimage import gaussian_filter
from scipy.optimize import linprog
from scipy.sparse import block_array, coo_array, eye_array

from mofo.alignment import grid_sample
from mofo.evaluation.origin import origin
from mofo.evaluation.protocol import Protocol, judge
from mofo.metrics import boundary_f1

REPEATS = 15
LIMITS = {"marigold@1": 25.0, "moge@1": 400.0}  # milliseconds for a 640x480 image on one core


class Image(NamedTuple):
    pred: np.ndarray
    truth: np.ndarray
    valid: np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="append nothing to RESULTS.md")
    args = parser.parse_args()
    lines, slow = table()
    print(lines)
    if not args.dry:
        made_by = origin()
        with Path("benchmarks/RESULTS.md").open("a") as results:
            results.write("\n## Scoring an image\n\n")
            results.write(f"`{made_by.command}`, commit {made_by.commit}, {made_by.machine}\n\n")
            results.write(f"{lines}\n")
    if slow:
        sys.exit(f"over the limit: {', '.join(slow)}")


def table() -> tuple[str, list[str]]:
    """The rows, and what was slower than its limit."""
    image, large = scene(480, 640), scene(1080, 1920)
    floor = milliseconds_of_traffic(image)
    rows = ["| what | ms | plain / this | ms of bare traffic | limit |", "|---|---|---|---|---|"]
    slow = []
    for name, plain in {"marigold": by_lstsq, "moge": by_linprog, "scale": by_sorting}.items():
        protocol = load(name)

        def ours(protocol: Protocol = protocol) -> dict[str, dict[str, float]]:
            rules = {"kind": "metric", "protocol": protocol, "is_metric": True}
            return judge(*image, **rules, low=1e-3, high=10.0)

        for fit, absrel in plain(image).items():
            got = ours()[fit]["absrel"]
            if abs(got - absrel) > 1e-8:
                sys.exit(f"{protocol.id}, {fit}: AbsRel {got}, by the plain code {absrel}")
        taken, theirs = milliseconds(ours), milliseconds(lambda plain=plain: plain(image), 3)
        limit = LIMITS.get(protocol.id)
        slow += [protocol.id] if limit and taken > limit else []
        rows.append(
            f"| {protocol.id}, 640x480, {len(ours())} fits | {taken:.1f} | {theirs / taken:.1f} "
            f"| {floor:.2f} | {limit or ''} |"
        )
    maps = (large.pred.astype(float), large.truth.astype(float), large.valid)
    taken, floor = milliseconds(lambda: boundary_f1(*maps), 3), milliseconds_of_traffic(large)
    rows.append(f"| boundary F1, 1920x1080, 3 radii | {taken:.0f} | | {floor:.2f} | |")
    return "\n".join(rows), slow


def load(name: str) -> Protocol:
    configs = Path(__file__).resolve().parents[1] / "configs"
    with initialize_config_dir(str(configs), version_base="1.3"):
        composed = compose(f"eval/protocol/{name}")
    return instantiate(composed.eval.protocol, _convert_="all")


def scene(h: int, w: int) -> Image:
    """Smooth depth with some edges, a tenth not measured; the prediction is a little off."""
    rng = np.random.default_rng(0)
    truth = 3 + 2 * gaussian_filter(rng.normal(size=(h, w)), h / 10) * h / 10
    truth = (truth + (gaussian_filter(rng.normal(size=(h, w)), h / 20) > 0)).clip(1, 9)
    pred = truth * rng.lognormal(0.1, 0.03, (h, w)) - 0.1
    return Image(pred.astype(np.float32), truth.astype(np.float32), rng.random((h, w)) < 0.9)


def by_lstsq(image: Image) -> dict[str, float]:
    p, d = measured(image)
    (a, b), *_ = np.linalg.lstsq(np.stack([p, np.ones_like(p)], axis=1), d)
    return {"affine": formulas((a * p + b).clip(1e-3, 10.0), d)}


def by_linprog(image: Image) -> dict[str, float]:
    p, d = measured(image)
    index, covered = grid_sample(image.valid, 64)
    x, y = (array.ravel()[index[covered]].astype(float) for array in image[:2])
    n, line = len(x), coo_array(np.stack([x, np.ones_like(x)], axis=1))
    sides = block_array([[line, -eye_array(n)], [-line, -eye_array(n)]])
    bounds = [(None, None)] * 2 + [(0, None)] * n
    a, b = linprog(np.r_[0, 0, 1 / y], sides, np.r_[y, -y], bounds=bounds).x[:2]
    (q, r), *_ = np.linalg.lstsq(np.stack([1 / p, np.ones_like(p)], axis=1), 1 / d)
    return {
        "metric": formulas(p, d),
        "scale": formulas(middle_ratio(x, y) * p, d),
        "affine": formulas(a * p + b, d),
        "disparity": formulas(1 / np.maximum(q / p + r, 1 / d.max()), d),
    }


def by_sorting(image: Image) -> dict[str, float]:
    p, d = measured(image)
    return {"scale": formulas(middle_ratio(p, d) * p, d)}


def middle_ratio(p: np.ndarray, d: np.ndarray) -> float:
    """The weighted median."""
    order = np.argsort(d / p)
    total = np.cumsum((p / d)[order])
    return (d / p)[order][np.searchsorted(total, total[-1] / 2)]


def measured(image: Image) -> tuple[np.ndarray, np.ndarray]:
    return image.pred[image.valid].astype(float), image.truth[image.valid].astype(float)


def formulas(p: np.ndarray, d: np.ndarray) -> float:
    """All metrics as the papers write them; the AbsRel is compared."""
    e = np.log(p.clip(1e-6)) - np.log(d)
    ratio = np.maximum(p / d, d / p)
    numbers = [np.mean(ratio < 1.25**k) for k in (1, 2, 3)]
    numbers += [np.sqrt(np.mean((p - d) ** 2)), np.sqrt(np.mean(e**2)), np.mean((p - d) ** 2 / d)]
    numbers += [
        np.abs(e).mean() / np.log(10),
        100 * e.std(),
        np.sqrt(np.mean((1 / p - 1 / d) ** 2)),
    ]
    assert np.isfinite(numbers).all()
    return float(np.mean(np.abs(p - d) / d))


def milliseconds_of_traffic(image: Image) -> float:
    """To read the image's bytes once, at the speed at which this machine reads and writes."""
    source = np.ones(2**25)
    target = np.ones_like(source)
    copied = milliseconds(lambda: np.copyto(target, source), 5)
    return copied * sum(array.nbytes for array in image) / (2 * source.nbytes)


def milliseconds(run: Callable[[], object], repeats: int = REPEATS) -> float:
    run()
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        taken.append(time.process_time() - start)
    return 1e3 * statistics.median(taken)


if __name__ == "__main__":
    main()
