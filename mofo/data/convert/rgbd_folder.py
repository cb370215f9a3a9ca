"""Images with depth files, paired by name; the caller states the unit.

    mofo convert rgbd_folder --source DIR --out OUT --unit 0.001 --depth "depth/*_d.png"

`image` and `depth` are patterns relative to DIR, with as many `*` each, such as `*/rgb/*.jpg` and
`*/depth/*.npy`: an image and a depth file belong together if their `*` stand for the same. Depth is
the distance along the optical axis, not along the ray, and as large as its image:

    .png    16-bit grey; `unit` is metres per step
    .npy    numbers, (h, w); `unit` is metres per 1.0, here as in
    .exr    one channel, or one called Z; needs the package OpenEXR

Zero, negative and non-finite values mean "not measured", and so does the value `invalid`.
"""

import logging
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped
from PIL import Image
from PIL.ExifTags import Base as ExifTag

from mofo.data.sample import Sample, decode_picture

VERSION = 1
LICENCE = "unknown"

log = logging.getLogger(__name__)
OPTIONS = {
    "unit": "metres of one step of a PNG, or of 1.0 in .npy and .exr: 0.001 for millimetres",
    "image": "pattern of the images, relative to the source",
    "depth": "pattern of the depth files (.png, .npy, .exr), relative to the source",
    "invalid": "value in the depth files that means not measured, besides 0",
    "metric": "unit is in metres; --no-metric: even its size is unknown",
    "dataset": "name of the data set, the source of each sample",
    "licence": "its terms, kept with each sample",
}


class Item(NamedTuple):
    key: str
    image: Path
    depth: Path
    unit: float
    invalid: float | None
    metric: bool
    dataset: str
    licence: str


def find(
    source: Path,
    *,
    unit: float,
    image: str = "images/*.jpg",
    depth: str = "depth/*.png",
    invalid: float | None = None,
    metric: bool = True,
    dataset: str = "rgbd_folder",
    licence: str = LICENCE,
) -> list[Item]:
    """Every image with a depth file; `metric` is False where even the unit's size is unknown."""
    if not (np.isfinite(unit) and unit > 0):
        raise ValueError(f"unit is {unit}, but must be positive: metres per step of depth")
    images, depths = _matches(source, image), _matches(source, depth)
    if image.count("*") != depth.count("*") or "*" not in image:
        raise ValueError(
            f"image {image!r} and depth {depth!r} cannot be paired; give each the same number of "
            "'*', such as 'images/*.jpg' and 'depth/*.png'"
        )
    pairs = sorted((images[star], depths[star]) for star in images.keys() & depths.keys())
    if not pairs:
        raise ValueError(
            f"{source} holds no pair: {len(images)} files match {image!r} and {len(depths)} "
            f"{depth!r}, but what '*' stands for is never the same; give other patterns"
        )
    if len(pairs) < max(len(images), len(depths)):
        log.warning(
            "%d pairs of %d images and %d depth files", len(pairs), len(images), len(depths)
        )
    settings = (unit, invalid, metric, dataset, licence)
    items = []
    for path, other in pairs:
        name = path.relative_to(source).with_suffix("").as_posix()
        items.append(Item(re.sub(r"[./\\]", "_", name), path, other, *settings))
    return items


def read(item: Item) -> Iterator[Sample]:
    """The pair; nothing if no pixel was measured."""
    image_bytes = item.image.read_bytes()
    with Image.open(BytesIO(image_bytes)) as opened:
        orientation = opened.getexif().get(ExifTag.Orientation, 1)
    if orientation in range(2, 9):
        raise ValueError(
            f"{item.image} has the EXIF orientation {orientation}, which leaves open whether its "
            "depth is turned as well; store both upright, without that tag"
        )
    values = _read_values(item.depth)
    valid = np.isfinite(values) & (values > 0)
    if item.invalid is not None:
        valid &= values != item.invalid
    if not valid.any():
        return
    metres = np.where(valid, values, 0).astype(np.float64) * item.unit
    yield Sample(
        key=item.key,
        picture=decode_picture(image_bytes),
        metres=metres.astype(np.float32),
        valid=valid,
        metric=item.metric,
        source=item.dataset,
        licence=item.licence,
        image_bytes=image_bytes,
        depth_scale=item.unit if item.depth.suffix.lower() == ".png" else None,
    )


def _matches(source: Path, pattern: str) -> dict[tuple[str, ...], Path]:
    """Files that match, by what each '*' stands for."""
    if set("?[]") & set(pattern) or "**" in pattern:
        raise ValueError(f"pattern {pattern!r} may only have '*', each for a part of one name")
    pattern = PurePosixPath(pattern).as_posix()
    stars = re.compile("([^/]*)".join(map(re.escape, pattern.split("*"))))
    found = {}
    for path in source.glob(pattern):
        if match := stars.fullmatch(path.relative_to(source).as_posix()):
            found[match.groups()] = path
    return found


def _read_values(path: Path) -> Shaped[np.ndarray, "h w"]:
    """The numbers of a depth file, in its own unit."""
    match path.suffix.lower():
        case ".npy":
            values = np.load(path, allow_pickle=False)
        case ".png":
            with Image.open(path) as image:
                if not image.mode.startswith("I"):
                    raise ValueError(
                        f"{path} has mode {image.mode}, but depth needs 16 bits; a picture of "
                        "depth in 8 bits or colours cannot be turned back into it"
                    )
                values = np.array(image)
        case ".exr":
            values = _read_exr(path)
        case _:
            raise ValueError(f"{path} is no depth file; accepted: .npy, 16-bit .png, .exr")
    if values.ndim != 2 or values.dtype.kind not in "fiu":
        raise ValueError(
            f"{path} holds {values.dtype} {values.shape}, but depth is one number per pixel, (h, w)"
        )
    return values


def _read_exr(path: Path) -> np.ndarray:
    try:
        import OpenEXR  # not required: only these files need it
    except ImportError as error:
        raise ValueError(
            f"{path} can only be read with the package OpenEXR; `pip install OpenEXR`, or store "
            "depth as .npy"
        ) from error
    with OpenEXR.File(str(path), separate_channels=True) as file:
        channels = file.channels()
        name = "Z" if "Z" in channels else next(iter(channels))
        if name != "Z" and len(channels) > 1:
            raise ValueError(
                f"{path} has the channels {sorted(channels)}, but must have one, or one called Z; "
                "take the others out"
            )
        return np.array(channels[name].pixels)
