"""Sets in the layout that MoGe trains and evaluates on.

    mofo convert moge --source DIR --out OUT

Published layout (docs/train.md and moge/utils/io.py of github.com/microsoft/MoGe):

    .index.txt                  one instance folder per line
    INSTANCE/image.jpg
    INSTANCE/depth.png          16 bit, logarithmic, text chunks near, far and, in old files, unit
    INSTANCE/meta.json          "intrinsics": 3x3, in units of image width and height

`mofo.data.logdepth` says what a code means. The layout does not say its unit: `unit`, metres per
unit of depth, does (1 for Hypersim, 0.001 for ARKitScenes: depth_unit in configs/train/v2.json
there); without it the set is not metric.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from mofo.data.logdepth import decode_log_depth
from mofo.data.sample import Sample, decode_picture

VERSION = 2
LICENCE = "unknown"
OPTIONS = {
    "index": "list of the instances, relative to the source",
    "depth": "name of the depth map in each instance's folder",
    "unit": "metres of one unit of depth; without it the depth is not metric",
    "dataset": "name of the data set, the source of each sample",
    "licence": "its terms, kept with each sample",
}


class Item(NamedTuple):
    key: str
    folder: Path
    depth: str
    unit: float | None
    dataset: str
    licence: str


def find(
    source: Path,
    *,
    index: str = ".index.txt",
    depth: str = "depth.png",
    unit: float | None = None,
    dataset: str = "moge",
    licence: str = LICENCE,
) -> list[Item]:
    """Every instance that the file `index` lists, with the depth map called `depth`."""
    if not (source / index).is_file():
        raise ValueError(
            f"{source} has no {index}; expected it to list folders with image.jpg, {depth}, "
            "meta.json; name another list with index"
        )
    if unit is not None and not (np.isfinite(unit) and unit > 0):
        raise ValueError(f"unit is {unit}, but must be positive: metres per unit of depth")
    names = [line.strip() for line in (source / index).read_text().splitlines() if line.strip()]
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name:
            raise ValueError(
                f"{source / index} lists {name!r}, which is not a folder inside {source}; "
                "take that line out"
            )
    return [
        Item(re.sub(r"[./\\]", "_", name), source / name, depth, unit, dataset, licence)
        for name in names
    ]


def read(item: Item) -> Iterator[Sample]:
    """The instance; nothing if no depth in it is known."""
    depth, valid, sky = decode_log_depth(item.folder / item.depth)
    if not valid.any():
        return
    image_bytes = (item.folder / "image.jpg").read_bytes()
    picture = decode_picture(image_bytes)
    yield Sample(
        key=item.key,
        picture=picture,
        metres=depth * np.float32(item.unit or 1.0),
        valid=valid,
        # A map without a single infinite pixel may come from a set that labels none.
        sky=sky if sky.any() else None,
        intrinsics=_read_intrinsics(item.folder / "meta.json", *picture.size[::-1]),
        metric=item.unit is not None,
        source=item.dataset,
        licence=item.licence,
        image_bytes=image_bytes,
    )


def _read_intrinsics(path: Path, height: int, width: int) -> Float64[np.ndarray, "3 3"]:
    rows = np.array(json.loads(path.read_text())["intrinsics"], np.float64)
    return np.diag([width, height, 1.0]) @ rows
