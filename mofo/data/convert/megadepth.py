"""MegaDepth v1: Internet photos of landmarks with multi-view stereo depth, scale unknown.

    mofo convert megadepth --source DIR --out OUT

Published layout, below the source (paths: github.com/mihaidusmanu/d2-net, megadepth_utils/
preprocess_scene.py; files: lib/dataset.py there, and github.com/naver/dust3r, datasets_preprocess/
preprocess_megadepth.py):

    phoenix/S6/zl548/MegaDepth_v1/SCENE/denseN/imgs/NAME.jpg
    phoenix/S6/zl548/MegaDepth_v1/SCENE/denseN/depths/NAME.h5      dataset "depth", 0 = none

Some maps hold the order of foreground and background instead of depth: those have negative values
and are left out. The images are undistorted and resized, and no calibration of that comes along.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mofo.data.sample import Sample, decode_picture

VERSION = 1
LICENCE = (
    "MegaDepth: photos under the terms of their authors; cite Li and Snavely, MegaDepth, CVPR 2018"
)


class Item(NamedTuple):
    key: str
    image: Path
    depth: Path


def find(source: Path) -> list[Item]:
    """Every image with a depth map."""
    items = []
    for folder in sorted(source.rglob("dense*/depths")):
        images = {path.stem: path for path in sorted(folder.with_name("imgs").glob("*"))}
        scene = f"{folder.parents[1].name}_{folder.parent.name}"
        items += [
            Item(re.sub(r"[./\\]", "_", f"{scene}_{path.stem}"), images[path.stem], path)
            for path in sorted(folder.glob("*.h5"))
            if path.stem in images
        ]
    if not items:
        raise ValueError(
            f"{source} holds no image of MegaDepth v1; expected SCENE/denseN/imgs/NAME.jpg and "
            "SCENE/denseN/depths/NAME.h5 below it"
        )
    return items


def read(item: Item) -> Iterator[Sample]:
    """The image with its depth; nothing if the map is empty or only an order."""
    import h5py  # a second to import, and only few sets are in HDF5

    key, image_path, depth_path = item
    image_bytes = image_path.read_bytes()
    picture = decode_picture(image_bytes)
    with h5py.File(depth_path, "r") as file:
        stored = file["depth"]
        if not isinstance(stored, h5py.Dataset) or stored.shape != picture.size[::-1]:
            raise ValueError(
                f"{depth_path} holds {stored}, but the image is {picture.size[::-1]}; "
                "extract both again from the archive"
            )
        metres = stored[()].astype(np.float32)
    valid = np.isfinite(metres) & (metres > 0)
    if not valid.any() or (metres < 0).any():
        return
    yield Sample(
        key=key,
        picture=picture,
        metres=np.where(valid, metres, np.float32(0)),
        valid=valid,
        metric=False,
        source="megadepth",
        licence=LICENCE,
        image_bytes=image_bytes,
    )
