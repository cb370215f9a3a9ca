"""ScanNet: over 1500 scans of rooms with a structured-light sensor on a tablet, 2.5 million frames.

    mofo convert scannet --source DIR --out OUT

Layout, from README.md and SensReader/ of github.com/ScanNet/ScanNet: one folder a scan with its
stream of frames (`mofo.data.sens`), JPEG of 1296x968 and depth of 640x480 in millimetres,
0 = none. The rule that registers them is that of `SensorData::saveToPointCloud` there, in the
matrices of the stream itself: a depth pixel is unprojected, moved into the colour camera (in the
release by the identity: both "are already aligned", issue 92), and gives its depth to the one
colour pixel it falls into, where the nearest wins. So every depth is one that was measured, and
three colour pixels of four have none. Pixel centres are counted from 0 there.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, UInt16

from mofo.data.sample import Sample, decode_picture
from mofo.data.sens import Header, read_frame, read_header

VERSION = 1
LICENCE = "ScanNet Terms of Use (non-commercial); cite Dai et al., ScanNet, CVPR 2017"
TREE = """
  SOURCE/.../scene0000_00/scene0000_00.sens"""
OPTIONS = {
    "every": "take every N-th frame; they come at 30 Hz, neighbours are near-copies",
}


class Frame(NamedTuple):
    sens: Path
    index: int


def find(source: Path, *, every: int = 1) -> list[Frame]:
    """Every `every`-th frame of every scan; they come at 30 Hz, neighbours are near-copies."""
    if every < 1:
        raise ValueError(f"every is {every}, but must be at least 1: 10 takes each tenth frame")
    scans = sorted(source.rglob("*.sens"))
    if not scans:
        raise ValueError(f"{source} holds no .sens file; expected{TREE}")
    return [
        Frame(sens, index)
        for sens in scans
        for index in range(0, read_header(sens).num_frames, every)
    ]


def read(item: Frame) -> Iterator[Sample]:
    """The frame, unless its depth is empty or misses the picture."""
    header, image_bytes, codes = read_frame(item.sens, item.index)
    metres, valid = register(codes, header)
    if not valid.any():
        return
    same_camera = np.array_equal(header.depth_to_colour, np.eye(4))
    intrinsics = header.colour_intrinsics.copy()
    intrinsics[:2, 2] += 0.5
    yield Sample(
        key=f"{item.sens.stem}_{item.index:06d}",
        picture=decode_picture(image_bytes),
        image_bytes=image_bytes,
        metres=metres,
        valid=valid,
        depth_scale=1 / header.units if same_camera else None,
        intrinsics=intrinsics,
        metric=True,
        source="ScanNet",
        licence=LICENCE,
    )


def register(
    codes: UInt16[np.ndarray, "hd wd"], header: Header
) -> tuple[Float32[np.ndarray, "h w"], Bool[np.ndarray, "h w"]]:
    """Depth in the colour camera, and where the colour picture has any."""
    v, u = np.nonzero(codes)
    z = codes[v, u] / header.units
    points = np.linalg.inv(header.depth_intrinsics) @ (np.stack([u, v, np.ones_like(u)]) * z)
    points = header.depth_to_colour[:3, :3] @ points + header.depth_to_colour[:3, 3:]
    points = points[:, points[2] > 0]
    at = header.colour_intrinsics @ points
    column, row = np.floor(at[:2] / at[2] + 0.5)
    h, w = header.colour_size
    inside = (column >= 0) & (column < w) & (row >= 0) & (row < h)
    nearest = np.full((h, w), np.inf)
    pixels = row[inside].astype(int), column[inside].astype(int)
    np.minimum.at(nearest, pixels, points[2, inside])
    valid = nearest < np.inf
    return np.where(valid, nearest, 0).astype(np.float32), valid
