"""Small sets and predictors, for tests of what runs them."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mofo.data.sample import Sample
from mofo.evaluation.benchmark import Listed, Row
from mofo.evaluation.lines import Line, read_lines
from mofo.evaluation.origin import Origin
from mofo.evaluation.predictors import Prediction, Predictor, constant
from mofo.evaluation.protocol import Fit, Protocol
from mofo.evaluation.run import Task, run

ORIGIN = Origin(command="python test", commit="abc", machine="one core")
ROW = Row(name="rooms", about="Made up for a test.", low=0.1, high=50)
AFFINE = Fit(alignment="affine", predicts=["metric", "scale", "affine"])
SCALE = Fit(alignment="scale", predicts=["metric", "scale"])
PROTOCOL = Protocol(id="test@1", about="Least squares.", fits={"affine": AFFINE}, clip=True)


def sample(number: int, size: tuple[int, int] = (16, 20), **changes: Any) -> Sample:
    rng = np.random.default_rng(number)
    metres = np.linspace(2, 9, size[0] * size[1], dtype=np.float32).reshape(size)
    metres = metres + rng.uniform(0, 1, size).astype(np.float32)
    valid = rng.random(size) < 0.5
    plain = {
        "key": f"image_{number}",
        "picture": Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)),
        "metres": np.where(valid, metres, np.float32(0)),
        "valid": valid,
        "captions": ("a room",),
        "metric": True,
        "source": "made for a test",
        "licence": "none",
    }
    return Sample(**(plain | changes))


SAMPLES = [sample(number) for number in range(7)]
PICTURES = [np.random.default_rng(k).integers(0, 256, (30, 40 + k, 3), np.uint8) for k in (0, 0, 5)]


def listed(samples: list[Sample]) -> Listed:
    return Listed(
        keys=[one.key for one in samples],
        parts=[None] * len(samples),
        list_sha256="ab" * 32,
        read=samples.__getitem__,
    )


def guess(images: list[np.ndarray], keys: list[str]) -> list[Prediction]:
    """Some depth that depends on the image alone."""
    return [Prediction(depth=image.mean(2) / 100 + 1) for image in images]


MODEL = Predictor(name="model", kind="scale", predict=guess, weights="f00d")


def depths(make: Any, **changes: Any) -> Predictor:
    """A predictor from a function of an image and its key to an array."""

    def predict(images: list[np.ndarray], keys: list[str]) -> list[Prediction]:
        return [Prediction(depth=make(*pair)) for pair in zip(images, keys, strict=True)]

    return Predictor(**{"name": "model", "kind": "scale", "predict": predict} | changes)


def go(
    folder: Path,
    images: Any = None,
    predictors: Any = (MODEL, constant),
    row: Row = ROW,
    **changes: Any,
) -> list[Line]:
    """Run on one set, and read the lines."""
    images = listed(SAMPLES) if images is None else images
    images = listed(images) if isinstance(images, list) else images
    settings = {"protocol": PROTOCOL, "folder": folder, "batch_size": 3, "origin": ORIGIN}
    run([Task(row=row, images=images, predictors=list(predictors))], **(settings | changes))
    return read_lines(folder)


def timeless(lines: list[Line]) -> list[Line]:
    """What must be the same of the same images, whoever wrote it."""
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]
