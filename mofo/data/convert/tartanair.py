"""TartanAir (the first version): a drone's flights through 18 rendered worlds.

    mofo convert tartanair --source DIR --out OUT

Layout, from README.md and data_type.md of github.com/castacks/tartanair_tools: PNG of 640x480 and
depth as float32 in metres along the optical axis (disparity = 80 / depth for a base line of
0.25 m). The field of view is 90 degrees, so the focal length is 320, and the axis meets the picture
in its middle: (320, 240) from its outer edge. The sky is a sphere "at a large distance (e.g.
10000)", whose size differs from world to world; depth from 1000 m on is taken as sky, as the
loaders of the set that are public do.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mofo.data.sample import Sample, decode_picture

VERSION = 1
LICENCE = "CC BY 4.0; cite Wang et al., TartanAir, IROS 2020"
TREE = """
  SOURCE/WORLD/{Easy,Hard}/PNNN/image_left/NNNNNN_left.png          and _right
  SOURCE/WORLD/{Easy,Hard}/PNNN/depth_left/NNNNNN_left_depth.npy"""
SIZE = (480, 640)
INTRINSICS = ((320.0, 0.0, 320.0), (0.0, 320.0, 240.0), (0.0, 0.0, 1.0))
SKY = 1000.0  # metres


class Frame(NamedTuple):
    key: str
    image: Path
    depth: Path


def find(source: Path) -> list[Frame]:
    """Every picture of either eye that has depth."""
    frames = []
    for folder in sorted(source.glob("*/*/P*/image_*")):
        world, level, flight, _ = folder.parts[-4:]
        depths = folder.with_name(folder.name.replace("image", "depth"))
        known = {path.name for path in depths.glob("*_depth.npy")}
        frames += [
            Frame(
                f"{world}_{level}_{flight}_{image.stem}", image, depths / f"{image.stem}_depth.npy"
            )
            for image in sorted(folder.glob("*.png"))
            if f"{image.stem}_depth.npy" in known
        ]
    if not frames:
        raise ValueError(f"{source} holds no pair of picture and depth; expected{TREE}")
    return frames


def read(item: Frame) -> Iterator[Sample]:
    """The picture, with the sky apart."""
    metres = np.load(item.depth, allow_pickle=False).astype(np.float32)
    sky = metres >= SKY
    valid = np.isfinite(metres) & (metres > 0) & ~sky
    if not valid.any():
        return
    image_bytes = item.image.read_bytes()
    picture = decode_picture(image_bytes)
    if picture.size[::-1] != SIZE:
        raise ValueError(
            f"{item.image} is {picture.size[::-1]}, but the published intrinsics are those of "
            f"{SIZE}; take the files of the first version of TartanAir, as they are"
        )
    yield Sample(
        key=item.key,
        picture=picture,
        image_bytes=image_bytes,
        metres=np.where(valid, metres, np.float32(0)),
        valid=valid,
        sky=sky,
        intrinsics=np.array(INTRINSICS),
        metric=True,
        source="TartanAir",
        licence=LICENCE,
    )
