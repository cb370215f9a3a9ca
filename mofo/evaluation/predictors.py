"""What is scored: a model, and the trivial predictors, blind to the image, that it must beat."""

import zlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from PIL import Image

from mofo.data.sample import Sample
from mofo.evaluation.run import Predictor


def constant(images: list[np.ndarray], keys: list[str]) -> list[np.ndarray]:
    """The same depth everywhere."""
    return [np.ones(image.shape[:2]) for image in images]


def mean_map(samples: Iterable[Sample], side: int = 64) -> Predictor:
    """Each pixel's mean over the training set of unit-mean depth, resized to the image.

    Only measured pixels enter, binned into a side x side grid and averaged per image first, so that
    large or dense images weigh no more. A cell that no image measured predicts the mean, 1.
    """
    total, count = np.zeros((side, side)), np.zeros((side, side))
    for sample in samples:
        metres, valid = sample.depth or (None, None)
        if metres is None or valid is None or not valid.any():
            continue
        h, w = valid.shape
        row, column = np.nonzero(valid)
        depth = metres[row, column].astype(np.float64)
        cell = (row * side // h) * side + column * side // w
        hits = np.bincount(cell, minlength=side * side).reshape(side, side)
        sums = np.bincount(cell, depth / depth.mean(), side * side).reshape(side, side)
        total += sums / np.maximum(hits, 1)
        count += hits > 0
    if not count.any():
        raise ValueError("the training set has no measured depth, so there is no mean map")
    mean = np.where(count > 0, total / np.maximum(count, 1), 1.0).astype(np.float32)

    def predict(images: list[np.ndarray], keys: list[str]) -> list[np.ndarray]:
        sizes = [(image.shape[1], image.shape[0]) for image in images]
        resize = Image.fromarray(mean).resize
        return [np.asarray(resize(size, Image.Resampling.BILINEAR)) for size in sizes]

    return predict


def of_model(image_to_depth: Callable[..., list[Any]], *, num_steps: int, seed: int) -> Predictor:
    """A pipeline's `image_to_depth` without captions; noise follows from `seed` and the key alone.

    Pixels that the pipeline does not trust are given no depth.
    """

    def predict(images: list[np.ndarray], keys: list[str]) -> list[np.ndarray]:
        seeds = [zlib.crc32(f"{seed}/{key}".encode()) for key in keys]
        made = image_to_depth(images, seeds=seeds, num_steps=num_steps)
        return [np.where(one.valid, one.depth, np.nan) for one in made]

    return predict
