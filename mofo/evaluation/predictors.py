"""What is scored: models, and trivial predictors that they must beat (files: `kept`).

A `Predictor` states what its numbers are; nobody guesses it:

    metric      depth in metres
    scale       depth up to a factor; a release of mofo predicts this
    affine      depth up to a factor and a shift
    disparity   inverse depth up to a factor and a shift
"""

import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mofo.data.sample import Sample
from mofo.evaluation.protocol import KINDS
from mofo.model import hub, weights

CONFIG = hub.Wanted(("config.json",), "config.json", "model=")
DEPTH_MODEL = hub.Wanted(
    patterns=("config.json", "preprocessor_config.json", "model*.safetensors"),
    files="config.json, preprocessor_config.json and model.safetensors of a depth model",
    option="model=",
)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Numbers (h, w) of one image at its size, NaN where there are none; relative uncertainty."""

    depth: np.ndarray
    uncertainty: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """Images (h, w, 3) and their keys to predictions, one each.

    `predict` must give the same for a key whenever it is asked. `weights` names what was learned
    (None: nothing was), `settings` whatever else the numbers depend on. `keep` is shown each
    prediction before it is scored, and what it returns is.
    """

    name: str
    kind: str
    predict: Callable[[list[np.ndarray], list[str]], list[Prediction]]
    weights: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    keep: Callable[[str, Prediction], Prediction] | None = None

    def __post_init__(self) -> None:
        check_kind(self.kind, f"the predictions of {self.name}")

    def __call__(self, images: list[np.ndarray], keys: list[str]) -> list[Prediction]:
        made = self.predict(images, keys)
        if len(made) != len(images):
            raise ValueError(f"{self.name} gave {len(made)} depth maps for {len(images)} images")
        return made


def check_kind(kind: str | None, of_what: str) -> str:
    """The kind, if it is one."""
    if kind not in KINDS:
        said = "is not said" if kind is None else f"is {kind!r}"
        raise ValueError(
            f"what {of_what} are {said}; say kind=metric (metres), scale (depth up to a factor), "
            "affine (depth up to factor and shift) or disparity (inverse depth, as MiDaS, DPT and "
            "the relative Depth Anything give)"
        )
    return kind


def _ones(images: list[np.ndarray], keys: list[str]) -> list[Prediction]:
    return [Prediction(depth=np.ones(image.shape[:2])) for image in images]


constant = Predictor(name="constant", kind="scale", predict=_ones)  # the same depth everywhere


def mean_map(
    samples: Iterable[Sample], settings: Mapping[str, Any] | None = None, side: int = 64
) -> Predictor:
    """Each pixel's mean over the training set of unit-mean depth, resized to the image.

    Only measured pixels enter, binned into a side x side grid and averaged per image first, so that
    large or dense images weigh no more. A cell that no image measured predicts the mean, 1.
    `settings` say which training set.
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

    def predict(images: list[np.ndarray], keys: list[str]) -> list[Prediction]:
        sizes = [(image.shape[1], image.shape[0]) for image in images]
        resize = Image.fromarray(mean).resize
        maps = [np.asarray(resize(size, Image.Resampling.BILINEAR)) for size in sizes]
        return [Prediction(depth=one) for one in maps]

    return Predictor(name="mean_map", kind="scale", predict=predict, settings=settings or {})


def of_release(
    mofo: Any,
    *,
    name: str,
    num_steps: int = 1,
    ensemble: int = 1,
    seed: int = 0,
    fit: str = "native",
    size: Sequence[int] | None = None,
) -> Predictor:
    """A pipeline's depth without captions; an image's noise follows from `seed` and key alone.

    `fit` and `size` (height, width; None: as trained) are what the network is shown, see
    `mofo.data.fit`. Pixels that the pipeline does not trust are given no depth.
    """
    settings = {"num_steps": num_steps, "ensemble": ensemble, "fit": fit}
    canvas = None if size is None else (size[0], size[1])

    def predict(images: list[np.ndarray], keys: list[str]) -> list[Prediction]:
        seeds = [zlib.crc32(f"{seed}/{key}".encode()) for key in keys]
        made = mofo.image_to_depth(images, seeds=seeds, size=canvas, **settings)
        return [
            Prediction(depth=np.where(one.valid, one.depth, np.nan), uncertainty=one.uncertainty)
            for one in made
        ]

    said = {**settings, "seed": seed, "size": canvas, "dtype": str(mofo.dtype)}
    return Predictor(
        name=name, kind="scale", predict=predict, weights=mofo.weights_hash, settings=said
    )


def model_type(name: str | Path) -> str | None:
    """What transformers calls the architecture of a folder or hub id; None for a release of mofo.

    Refuses a name that is neither here nor on the hub.
    """
    if str(name) in weights.SHIPPED:
        return None
    path = hub.fetch(name, CONFIG) / "config.json"
    return json.loads(path.read_text()).get("model_type") if path.exists() else None


def of_transformers(
    model: str | Path, *, name: str, kind: str | None, device: str | None = None
) -> Predictor:
    """Any depth model of transformers, with its own preparation and resizing of the pictures.

    Safetensors only, and no code of a repository is run. Pillow prepares the pictures even where
    torchvision is installed, so that numbers are the same with and without.
    """
    kind = check_kind(kind, f"the predictions of {model}")
    folder = hub.fetch(model, DEPTH_MODEL)
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    prepare, network = _loaded(folder)
    network = network.to(chosen).eval()
    restore = getattr(prepare, "post_process_depth_estimation", None)
    pads = restore is not None and "source_sizes" in signature(restore).parameters

    def predict_alike(images: list[np.ndarray]) -> list[Prediction]:
        pictures = [Image.fromarray(image) for image in images]
        pixels = prepare(images=pictures, return_tensors="pt")["pixel_values"].to(chosen)
        sizes = [image.shape[:2] for image in images]
        # ZoeDepth pads the picture, and must be told how large it was.
        own = {"source_sizes": sizes} if pads else {}
        with torch.inference_mode():
            made = network(pixel_values=pixels)
            if restore is None:
                depth = made.predicted_depth[:, None].float()
                full = torch.nn.functional.interpolate(depth, sizes[0], mode="bilinear")[:, 0]
            else:
                full = [x["predicted_depth"] for x in restore(made, target_sizes=sizes, **own)]
        return [Prediction(depth=one.float().cpu().numpy()) for one in full]

    def predict(images: list[np.ndarray], keys: list[str]) -> list[Prediction]:
        made: dict[int, Prediction] = {}
        for shape in dict.fromkeys(image.shape for image in images):
            alike = [k for k, image in enumerate(images) if image.shape == shape]
            made |= zip(alike, predict_alike([images[k] for k in alike]), strict=True)
        return [made[k] for k in range(len(images))]

    settings = {"model_type": network.config.model_type, "dtype": str(network.dtype)}
    hashed = weights.digest(folder)
    return Predictor(name=name, kind=kind, predict=predict, weights=hashed, settings=settings)


def _loaded(folder: Path) -> tuple[Any, Any]:
    """Picture prepare and network; refuses a network that would be random in part."""
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation  # slow to import

    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        prepare = AutoImageProcessor.from_pretrained(folder, backend="pil", **local)
        network, loading = AutoModelForDepthEstimation.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **local
        )
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{folder} cannot be loaded as a depth model of transformers: {reason}"
        ) from error
    if lost := sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]])):
        raise ValueError(
            f"{folder} lacks {len(lost)} of the tensors of its own architecture, as "
            f"{', '.join(lost[:5])}; it is no complete depth model"
        )
    return prepare, network


def shown_at(predictor: Predictor, side: int | None) -> Predictor:
    """The same, shown pictures whose longer side is `side`; what it gives is brought back."""
    if side is None:
        return predictor

    def predict(images: list[np.ndarray], keys: list[str]) -> list[Prediction]:
        shown = []
        for image in images:
            factor = side / max(image.shape[:2])
            size = int(image.shape[1] * factor), int(image.shape[0] * factor)
            shown.append(np.array(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)))
        made = predictor(shown, keys)
        return [_restored(*pair) for pair in zip(made, images, strict=True)]

    return replace(predictor, predict=predict)


def _restored(made: Prediction, image: np.ndarray) -> Prediction:
    arrays = {"depth": made.depth, "uncertainty": made.uncertainty}
    size = image.shape[1], image.shape[0]
    return Prediction(
        **{name: _resized(array, size) for name, array in arrays.items() if array is not None}
    )


def _resized(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinearly; a pixel has a number where most of what it would be mixed of has one."""
    finite = np.isfinite(values)
    parts = [np.where(finite, values, 0), finite]
    mixed, share = (
        np.asarray(
            Image.fromarray(part.astype(np.float32)).resize(size, Image.Resampling.BILINEAR),
            np.float64,
        )
        for part in parts
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(share > 0.5, mixed / share, np.nan)
