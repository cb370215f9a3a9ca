"""Predict, align, score: one JSON line per (image, predictor), so that a killed run resumes.

The lines hold everything that a report says; beside them
lie small pictures of a few images. An image that cannot be scored gets a line with the reason: it
is listed and never averaged.
"""

import io
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from tqdm import tqdm

from mofo.data.sample import Sample
from mofo.evaluation.benchmark import Row
from mofo.metrics import align, compare
from mofo.model.weights import digest
from mofo.picture import Picture, depth_picture, disparity_limits, error_picture

LINES = "lines.jsonl"
PICTURES = "pictures"
MAX_SIDE = 256  # pixels of a kept picture: a report shows it no larger

# Words of attribution that a licensor asks for, by a mark of the licence text.
ATTRIBUTION = {"Zenseact": "Zenseact Open Dataset, (c) Zenseact AB, CC BY-SA 4.0"}

Line = dict[str, Any]
# Images (h, w, 3) and their keys to depth (h, w), one each; NaN where the model gives none.
Predictor = Callable[[list[np.ndarray], list[str]], list[np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where numbers come from; `weights` is the hash of each predictor that has learned ones."""

    command: str
    commit: str
    machine: str
    weights: Mapping[str, str] = field(default_factory=dict)


def origin(weights: Mapping[str, str | Path]) -> Origin:
    """This process's command, commit and machine, with the hash of each release folder."""
    return Origin(
        command=" ".join(["python", *sys.argv]),
        commit=_commit(),
        machine=torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        weights={name: digest(folder) for name, folder in weights.items()},
    )


def run(
    predictors: Mapping[str, Predictor],
    samples: Iterable[Sample],
    *,
    row: Row,
    folder: str | Path,
    batch_size: int,
    origin: Origin,
) -> None:
    """Score every predictor on every sample; lines that are already in `folder` are kept.

    A predictor must give the same depth for a key whatever batch it is in. Lines made under
    another protocol or by other weights are refused, not mixed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _drop_half_line(folder / LINES)
    lines = [line for line in read_lines(folder) if line["benchmark"] == row.name]
    _refuse_other_origin(lines, row, origin, folder)
    done = {(line["predictor"], line["key"]) for line in lines}
    seen: set[str] = set()
    stream = iter(tqdm(samples, desc=row.name, unit="image", disable=None))
    with open(folder / LINES, "ab") as file:
        while batch := list(islice(stream, batch_size)):
            for sample in batch:
                if sample.key in seen:
                    raise ValueError(f"key {sample.key!r} occurs twice in {row.name}")
                seen.add(sample.key)
            _append(file, _score_batch(predictors, batch, done, row, folder, origin))
    _keep_few_pictures(folder, row.name)


def read_lines(folder: str | Path) -> list[Line]:
    """All whole lines of a run, in the order in which they were written."""
    path = Path(folder) / LINES
    if not path.exists():
        return []
    lines = []
    for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            raise ValueError(f"{path}:{number} is no JSON line ({error}); delete it") from error
    return lines


def chosen_keys(lines: Iterable[Line]) -> dict[str, str]:
    """Of one predictor's lines on one benchmark: the keys of its first, best, median, worst."""
    scored = [line for line in lines if line["failed"] is None]
    if not scored:
        return {}
    ranked = sorted(scored, key=lambda line: line["metrics"]["absrel"])
    picks = {"best": ranked[0], "median": ranked[len(ranked) // 2], "worst": ranked[-1]}
    return {name: line["key"] for name, line in {"first": scored[0], **picks}.items()}


def picture_folder(folder: str | Path, benchmark: str, key: str) -> Path:
    return Path(folder) / PICTURES / quote(benchmark, safe="") / quote(key, safe="")


def _score_batch(
    predictors: Mapping[str, Predictor],
    batch: list[Sample],
    done: set[tuple[str, str]],
    row: Row,
    folder: Path,
    origin: Origin,
) -> Iterator[Line]:
    for name, predict in predictors.items():
        todo = [sample for sample in batch if (name, sample.key) not in done]
        if not todo:
            continue
        depths = predict([sample.image for sample in todo], [sample.key for sample in todo])
        if len(depths) != len(todo):
            raise ValueError(f"{name} gave {len(depths)} depth maps for {len(todo)} images")
        for sample, pred in zip(todo, depths, strict=True):
            yield {
                "benchmark": row.name,
                "predictor": name,
                "key": sample.key,
                **_score_image(name, sample, np.asarray(pred, np.float64), row, folder),
                "credit": _credit(sample),
                "licence": sample.licence,
                "weights": origin.weights.get(name),
                "row": asdict(row),
                "command": origin.command,
                "commit": origin.commit,
                "machine": origin.machine,
            }


def _score_image(
    name: str, sample: Sample, pred: Float[np.ndarray, "..."], row: Row, folder: Path
) -> Line:
    """Metrics, or why there are none; and what was wrong with the prediction where it counts.

    A pixel that the model gives no finite depth is left out of the fit, then scored as depth 0:
    leaving it out of the score would reward a model for predicting only what is easy.
    """
    failed = {"metrics": None, "num_nonfinite": 0, "num_nonpositive": 0}
    truth, valid = sample.depth or (None, None)
    if truth is None or valid is None or not valid.any():
        return {**failed, "failed": "no pixel has measured depth"}
    if pred.shape != truth.shape:
        sizes = (" x ".join(map(str, array.shape)) for array in (pred, truth))
        return {**failed, "failed": "prediction is {}, truth is {}".format(*sizes)}
    finite = np.isfinite(pred)
    counts = {
        "num_nonfinite": int((valid & ~finite).sum()),
        "num_nonpositive": int((valid & finite & (pred <= 0)).sum()),
    }
    try:
        fitted = valid & finite
        aligned = align(pred, truth, fitted, row.alignment, row.low, row.high)
    except ValueError as error:
        return {**failed, **counts, "failed": str(error)}
    depth = np.where(finite, aligned.depth, 0.0)
    metrics = compare(depth[valid], truth[valid].astype(np.float64))
    metrics |= {"num_valid": int(valid.sum())}
    metrics |= {"scale": aligned.scale, "shift": aligned.shift}
    if not np.isfinite(list(metrics.values())).all():
        return {**failed, **counts, "failed": "the prediction is so large that metrics overflow"}
    pictures = picture_folder(folder, row.name, sample.key)
    _save_pictures(pictures, name, sample.image, truth, valid, depth)
    return {"metrics": metrics, **counts, "failed": None}


def _credit(sample: Sample) -> str:
    """What must stand beside the picture."""
    asked = (words for mark, words in ATTRIBUTION.items() if mark in sample.licence)
    return next(asked, ", ".join(filter(None, (sample.source, sample.licence))))


def _save_pictures(
    folder: Path,
    name: str,
    image: Picture,
    truth: Float[np.ndarray, "h w"],
    valid: Bool[np.ndarray, "h w"],
    depth: Float[np.ndarray, "h w"],
) -> None:
    """Image, truth, prediction at the truth's colour scale, relative error."""
    folder.mkdir(parents=True, exist_ok=True)
    limits = disparity_limits(truth, valid)
    # Every n-th pixel: depth may not be averaged over an edge.
    step = -(-max(depth.shape) // MAX_SIDE)
    image, truth, valid, depth = (array[::step, ::step] for array in (image, truth, valid, depth))
    if not (folder / "truth.png").exists():
        _save_png(folder / "image.png", image)
        _save_png(folder / "truth.png", depth_picture(truth, valid, limits))
    stem = quote(name, safe="")
    _save_png(folder / f"{stem}.error.png", error_picture(depth, truth, valid))
    _save_png(folder / f"{stem}.depth.png", depth_picture(depth, limits=limits))


def _save_png(path: Path, picture: Picture) -> None:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", compress_level=1)
    path.write_bytes(buffer.getvalue())


def _keep_few_pictures(folder: Path, benchmark: str) -> None:
    """Delete the pictures that no report shows, now that best, median and worst are known."""
    of_predictor: dict[str, list[Line]] = {}
    for line in read_lines(folder):
        if line["benchmark"] == benchmark:
            of_predictor.setdefault(line["predictor"], []).append(line)
    keys = {key for lines in of_predictor.values() for key in chosen_keys(lines).values()}
    kept = {picture_folder(folder, benchmark, key).name for key in keys}
    above = picture_folder(folder, benchmark, "_").parent
    for pictures in above.iterdir() if above.exists() else ():
        if pictures.name not in kept:
            shutil.rmtree(pictures)


def _append(file: BinaryIO, lines: Iterable[Line]) -> None:
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    file.write(text.encode())
    file.flush()
    os.fsync(file.fileno())


def _drop_half_line(path: Path) -> None:
    """What a kill in the middle of a write leaves; its image is scored again."""
    if path.exists():
        with open(path, "rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def _refuse_other_origin(lines: list[Line], row: Row, origin: Origin, folder: Path) -> None:
    for line in lines:
        old = Row(**line["row"]).protocol()
        differing = [name for name, value in row.protocol().items() if old[name] != value]
        if differing:
            raise ValueError(
                f"{folder} has lines of {row.name} with another {', '.join(differing)}: "
                f"{[old[name] for name in differing]}; choose another folder, or delete it"
            )
        weights = origin.weights.get(line["predictor"])
        if line["weights"] != weights:
            raise ValueError(
                f"{folder} has lines of {line['predictor']} with weights {line['weights']}, but "
                f"now they are {weights}; choose another folder, or delete it"
            )


def _commit() -> str:
    """HEAD of the checkout this package lies in, "+" if it is modified; "" outside of one."""
    here = Path(__file__).parent
    ask = [
        "git",
        "-C",
        str(here),
        "describe",
        "--always",
        "--dirty=+",
        "--exclude=*",
        "--abbrev=12",
    ]
    try:
        return subprocess.run(
            ask, cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _processor() -> str:
    return f"{platform.machine()} CPU, {len(os.sched_getaffinity(0))} cores"
