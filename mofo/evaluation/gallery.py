"""What numbers do not show: sections of a report with samples, a point cloud and loss curves."""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from mofo.data.sample import Sample
from mofo.evaluation.page import Section
from mofo.evaluation.plots import curve
from mofo.geometry import intrinsics_from_fov, point_cloud, render
from mofo.picture import Picture, depth_picture, enlarge, grid
from mofo.pipeline import Mofo

SIDE = 256  # pixels of a picture with a point cloud
SMOOTHING = 20  # steps that a point of a loss curve averages


def from_text(mofo: Mofo, captions: Sequence[str], *, num_steps: int) -> Section:
    """Joint samples: the picture and its depth, of each caption."""
    made = mofo.joint(list(captions), num_steps=num_steps)
    pictures = []
    for result, caption in zip(made, captions, strict=True):
        about = f"seed {result.metadata['seed']}: {caption}"
        depth = depth_picture(result.depth, result.valid)
        pictures += [(result.image, about), (depth, "its depth")]
    return ("Picture and depth from text", pictures, "Joint: only text is given.")


def from_depth(mofo: Mofo, samples: Sequence[Sample], *, num_steps: int) -> Section:
    """Depth-to-image samples: depth and text of held-out images, and a picture made for them."""
    captions = ["".join(sample.captions[:1]) for sample in samples]
    made = mofo.depth_to_image(
        [sample.metres for sample in samples],
        captions,
        valid=[sample.valid for sample in samples],
        num_steps=num_steps,
    )
    pictures = []
    for result, sample, caption in zip(made, samples, captions, strict=True):
        assert sample.metres is not None  # held_out takes no other
        given = depth_picture(sample.metres, sample.valid)
        pictures += [(given, "given depth"), (result.image, f"made for it: {caption}")]
    return ("Picture from depth", pictures, "Held-out depth and its caption are given.")


def clouds(
    mofo: Mofo, samples: Sequence[Sample], *, num_steps: int
) -> list[tuple[Picture, Picture, Picture]]:
    """Of each sample: the picture, its predicted depth, and the point cloud of both from aside."""
    made = mofo.image_to_depth([sample.image for sample in samples], num_steps=num_steps)
    shown = []
    for result, sample in zip(made, samples, strict=True):
        factor = max(1, SIDE // sample.picture.height)
        intrinsics = sample.intrinsics
        if intrinsics is None:
            intrinsics = intrinsics_from_fov(*sample.shape)
        # enlarged, so that the few points of a small picture close into a surface
        image = enlarge(sample.image, factor)
        points = point_cloud(
            _enlarge_map(result.depth, factor),
            image,
            intrinsics * np.array([[factor], [factor], [1]]),
            _enlarge_map(result.valid, factor),
        )
        depth = enlarge(depth_picture(result.depth, result.valid), factor)
        shown.append((image, depth, render(points, image.shape[:2])))
    return shown


def cloud_section(shown: Sequence[tuple[Picture, Picture, Picture]]) -> Section:
    pictures = []
    for image, _, points in shown:
        pictures += [(image, "image"), (points, "its point cloud")]
    return ("Point clouds", pictures, "Depth predicted from the image alone, seen from aside.")


def poster(shown: Sequence[tuple[Picture, Picture, Picture]]) -> Picture:
    """One picture for the top of a README: image, depth and point cloud, a row per sample."""
    return grid(shown, ["image", "depth, predicted from it", "point cloud of both"])


def losses(runs: Mapping[str, str | Path]) -> Section:
    """Loss against step of training runs, each the folder that holds a metrics.jsonl."""
    series = {}
    for label, folder in runs.items():
        rows = (Path(folder) / "metrics.jsonl").read_text().splitlines()
        points = [(row["step"], row["train/loss"]) for row in map(json.loads, rows)]
        series[label] = _smooth(points)
    return ("Training", curve(series), f"Loss, each point the mean of {SMOOTHING} steps.")


def held_out(samples: Iterable[Sample], count: int) -> list[Sample]:
    """The first samples that have a wide field of depth measured, for the sections above."""
    return list(islice((s for s in samples if s.valid is not None and s.valid.mean() > 0.5), count))


def _enlarge_map(values: np.ndarray, factor: int) -> np.ndarray:
    return values.repeat(factor, axis=0).repeat(factor, axis=1)


def _smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    # the first steps of a fresh depth head are so much worse that they would flatten the rest
    first = SMOOTHING if len(points) > SMOOTHING else 0
    chunks = [points[i : i + SMOOTHING] for i in range(first, len(points), SMOOTHING)]
    return [(chunk[-1][0], float(np.mean([loss for _, loss in chunk]))) for chunk in chunks]
