"""Virtual KITTI 2: five streets of KITTI rendered in ten weathers and views, 42,520 pictures.

    mofo convert vkitti2 --source DIR --out OUT

Layout, as published at europe.naverlabs.com (proxy-virtual-worlds-vkitti-2) in three tars (rgb,
depth, textgt) that unpack into one folder; checked against the loaders of
github.com/facebookresearch/vggt (training/data/datasets/vkitti.py) and github.com/google-research/
google-research (factors_of_influence/fids/vkitti2.py): JPEG; 16-bit PNG of the distance to the
camera plane in centimetres, where the largest code, 655.35 m or more, is the sky; `intrinsic.txt`
with a line "frame cameraID K[0,0] K[1,1] K[0,2] K[1,2]" a picture. Its centre, 620.5 and 187 of
1242x375, is the middle of the picture if pixel centres are counted from 0, so they are.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mofo.data.sample import MAX_CODE, Sample, decode_depth, decode_picture

VERSION = 1
LICENCE = "CC BY-NC-SA 3.0; cite Cabon et al., Virtual KITTI 2, arXiv 2001.10773"
TREE = """
  SOURCE/SceneNN/WEATHER/intrinsic.txt
  SOURCE/SceneNN/WEATHER/frames/rgb/Camera_C/rgb_NNNNN.jpg
  SOURCE/SceneNN/WEATHER/frames/depth/Camera_C/depth_NNNNN.png"""
STEP = 0.01  # metres


class Frame(NamedTuple):
    key: str
    image: Path
    depth: Path
    camera: tuple[float, ...]  # fx, fy, cx, cy


def find(source: Path) -> list[Frame]:
    """Every picture of either camera that has depth."""
    frames = []
    for folder in sorted(source.glob("Scene*/*/frames/rgb/Camera_*")):
        weather = folder.parents[2]
        depths = weather / "frames" / "depth" / folder.name
        known = {path.name for path in depths.glob("depth_*.png")}
        pairs = [
            (image, depths / f"depth_{image.stem[4:]}.png")
            for image in sorted(folder.glob("rgb_*.jpg"))
            if f"depth_{image.stem[4:]}.png" in known
        ]
        cameras = _cameras(weather / "intrinsic.txt") if pairs else {}
        for image, depth in pairs:
            number = int(image.stem[4:]), int(folder.name[7:])
            if number not in cameras:
                raise ValueError(f"{weather / 'intrinsic.txt'} has no frame, camera {number}")
            key = f"{weather.parent.name}_{weather.name}_{folder.name}_{image.stem[4:]}"
            frames.append(Frame(key, image, depth, cameras[number]))
    if not frames:
        raise ValueError(f"{source} holds no pair of picture and depth; expected{TREE}")
    return frames


def read(item: Frame) -> Iterator[Sample]:
    """The picture, with the sky apart."""
    metres, valid = decode_depth(item.depth.read_bytes(), STEP)
    sky = metres >= np.float32(MAX_CODE * STEP)
    valid &= ~sky
    if not valid.any():
        return
    image_bytes = item.image.read_bytes()
    fx, fy, cx, cy = item.camera
    yield Sample(
        key=item.key,
        picture=decode_picture(image_bytes),
        image_bytes=image_bytes,
        metres=np.where(valid, metres, np.float32(0)),
        valid=valid,
        depth_scale=STEP,
        sky=sky,
        intrinsics=np.array([[fx, 0, cx + 0.5], [0, fy, cy + 0.5], [0, 0, 1]]),
        metric=True,
        source="Virtual KITTI 2",
        licence=LICENCE,
    )


def _cameras(path: Path) -> dict[tuple[int, int], tuple[float, ...]]:
    """fx, fy, cx, cy of each (frame, camera)."""
    if not path.is_file():
        raise ValueError(
            f"{path} is missing; unpack vkitti_2.0.3_textgt.tar.gz too. Expected{TREE}"
        )
    rows = np.loadtxt(path, skiprows=1, ndmin=2)
    return {(int(row[0]), int(row[1])): tuple(map(float, row[2:6])) for row in rows}
