"""The pictures a report shows: of each set and predictor the first, best, median, worst image.

They are drawn when the lines of a set are complete, from the images themselves and one prediction
more: so nothing is drawn that no report shows, and it matters not which process wrote which line.
"""

import io
import shutil
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mofo.evaluation.lines import Line
from mofo.picture import Picture, depth_picture, disparity_limits, error_picture

PICTURES = "pictures"
MAX_SIDE = 256  # pixels of a kept picture: a report shows it no larger


def main_metric(line: Line, metric: str) -> float:
    """Of the first fit, which is the protocol's main one."""
    return next(iter(line["fits"].values()))[metric]


def chosen_keys(lines: Iterable[Line]) -> dict[str, str]:
    """Of one predictor's lines on one set: the keys of its first, best, median, worst."""
    scored = [line for line in lines if line["failed"] is None]
    if not scored:
        return {}
    ranked = sorted(scored, key=lambda line: main_metric(line, "absrel"))
    picks = {"best": ranked[0], "median": ranked[len(ranked) // 2], "worst": ranked[-1]}
    return {name: line["key"] for name, line in {"first": scored[0], **picks}.items()}


def picture_folder(folder: str | Path, set_name: str, key: str) -> Path:
    return Path(folder) / PICTURES / quote(set_name, safe="") / quote(key, safe="")


def picture_paths(folder: Path, predictor: str) -> tuple[Path, Path, Path, Path]:
    """Image, truth, prediction and error in a `picture_folder`."""
    stem = quote(predictor, safe="")
    names = ("image.png", "truth.png", f"{stem}.depth.png", f"{stem}.error.png")
    image, truth, depth, error = (folder / name for name in names)
    return image, truth, depth, error


def draw(
    paths: tuple[Path, Path, Path, Path],
    image: Picture,
    truth: Float[np.ndarray, "h w"],
    valid: Bool[np.ndarray, "h w"],
    depth: Float[np.ndarray, "h w"],
) -> None:
    """Image, truth, prediction at the truth's colour scale, relative error.

    The files say in `near` and `far` which depths the ends of that scale are.
    """
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    limits = disparity_limits(truth, valid)
    # Every n-th pixel: depth may not be averaged over an edge.
    step = -(-max(depth.shape) // MAX_SIDE)
    image, truth, valid, depth = (array[::step, ::step] for array in (image, truth, valid, depth))
    drawn = (
        image,
        depth_picture(truth, valid, limits),
        depth_picture(depth, limits=limits),
        error_picture(depth, truth, valid),
    )
    ends = PngInfo()
    for name, disparity in zip(("far", "near"), limits, strict=True):
        ends.add_text(name, repr(1 / disparity))
    for path, picture in zip(paths, drawn, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="PNG", compress_level=1, pnginfo=ends)
        path.write_bytes(buffer.getvalue())


def drop_others(folder: str | Path, set_name: str, keys: Iterable[str]) -> None:
    """Delete the pictures of a set that no report shows any more."""
    kept = {picture_folder(folder, set_name, key) for key in keys}
    above = picture_folder(folder, set_name, "_").parent
    for pictures in above.iterdir() if above.exists() else ():
        if pictures not in kept:
            shutil.rmtree(pictures)
