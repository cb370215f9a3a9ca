"""KITTI: the colour cameras of the raw recordings with the annotated depth of the depth benchmark.

    mofo convert kitti --source DIR --out OUT [--exclude LIST]

Published layout, below the source (readme.txt of the raw data development kit and of the depth
development kit, both of cvlibs.net/datasets/kitti):

    2011_09_26/calib_cam_to_cam.txt, calib_velo_to_cam.txt
    2011_09_26/2011_09_26_drive_0001_sync/image_02/data/0000000005.png              image_03 as well
    2011_09_26/2011_09_26_drive_0001_sync/velodyne_points/data/0000000005.bin       float32 x y z r
    train/2011_09_26_drive_0001_sync/proj_depth/groundtruth/image_02/0000000005.png or below val/

Annotated depth (16 bit, metres * 256, 0 = none) is eleven scans together, checked against stereo.
A frame without it (the first and last five of a drive) gets the scan of its own moment, without
what the camera cannot see. Images are rectified, so P_rect is all of the camera; a scan reaches
camera 0 by R|T of calib_velo_to_cam, then R_rect_00, and P_rect also shifts it to the camera at
hand (run_demoVelodyne.m of the kit). `exclude` is any text, such as the list of a test split: the
drives that are named in it are left out.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from mofo.data import lidar
from mofo.data.sample import Sample, decode_depth, decode_picture

VERSION = 1
LICENCE = "CC BY-NC-SA 3.0; cite Geiger et al., IJRR 2013, and Uhrig et al., 3DV 2017"
STEP = 1 / 256  # metres
DRIVE = re.compile(r"\d{4}_\d\d_\d\d_drive_\d{4}_sync")
CAMERAS = ("image_02", "image_03")
PARTS = ("train", "val")  # of the annotated depth; a drive is in one of them
OPTIONS = {
    "exclude": (
        "a text file, relative to the current directory, such as the list of a test split: "
        "drives named in it are left out"
    ),
}


class Item(NamedTuple):
    image: Path
    depth: Path | None
    scan: Path


def find(source: Path, *, exclude: str | None = None) -> list[Item]:
    """Every image with annotated depth or a scan."""
    left_out = set(DRIVE.findall(Path(exclude).read_text())) if exclude else set()
    items = []
    for drive in sorted(source.glob("????_??_??/*_sync")):
        if drive.name in left_out:
            continue
        for camera in CAMERAS:
            parts = (source / part / drive.name / "proj_depth/groundtruth" for part in PARTS)
            depth = {path.name: path for folder in parts for path in folder.glob(f"{camera}/*.png")}
            for image in sorted((drive / camera / "data").glob("*.png")):
                scan = drive / "velodyne_points/data" / f"{image.stem}.bin"
                if image.name in depth or scan.exists():
                    items.append(Item(image, depth.get(image.name), scan))
    if not items:
        raise ValueError(
            f"{source} holds no image of KITTI with depth (drives left out: {len(left_out)}); "
            "expected DATE/DRIVE_sync/image_02/data/NUMBER.png of the raw recordings, and "
            "train/DRIVE_sync/proj_depth/groundtruth/image_02/NUMBER.png (or val/...) of the "
            "annotated depth or DATE/DRIVE_sync/velodyne_points/data/NUMBER.bin"
        )
    return items


def read(item: Item) -> Iterator[Sample]:
    """The image with its depth; nothing if there is none."""
    image_path, depth_path, scan = item
    camera, drive = image_path.parts[-3], image_path.parents[2]
    matrix, intrinsics = _read_calibration(drive.parent, camera)
    image_bytes = image_path.read_bytes()
    picture = decode_picture(image_bytes)
    metres, valid, points = None, None, None
    if depth_path is not None:
        metres, valid = decode_depth(depth_path, STEP)
        empty = not valid.any()
    else:
        returns = np.fromfile(scan, "<f4").reshape(-1, 4)[:, :3]
        uvz = lidar.project(lidar.move(returns, matrix), intrinsics)
        points = lidar.visible(uvz, intrinsics[0, 0], (picture.height, picture.width))
        empty = not len(points)
    if empty:
        return
    yield Sample(
        key=f"{drive.name}_{camera}_{image_path.stem}",
        picture=picture,
        metres=metres,
        valid=valid,
        points=points,
        intrinsics=intrinsics,
        metric=True,
        source="kitti",
        licence=LICENCE,
        image_bytes=image_bytes,
        depth_scale=None if depth_path is None else STEP,
    )


def _read_calibration(
    folder: Path, camera: str
) -> tuple[Float64[np.ndarray, "4 4"], Float64[np.ndarray, "3 3"]]:
    """From the scanner to the camera, and the camera's intrinsics."""
    cameras = _read_numbers(folder / "calib_cam_to_cam.txt")
    scanner = _read_numbers(folder / "calib_velo_to_cam.txt")
    try:
        projection = cameras[f"P_rect_{camera[-2:]}"].reshape(3, 4)
        rectify, mount = np.eye(4), np.eye(4)
        rectify[:3, :3] = cameras["R_rect_00"].reshape(3, 3)
        mount[:3, :3], mount[:3, 3] = scanner["R"].reshape(3, 3), scanner["T"]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"the calibration in {folder} is incomplete ({error}); extract it again"
        ) from error
    intrinsics = projection[:, :3].copy()
    rectify[:3, 3] = np.linalg.solve(intrinsics, projection[:, 3])
    # Calibrations count pixel centres from 0, ours lie at half-integers.
    intrinsics[:2, 2] += 0.5
    return rectify @ mount, intrinsics


def _read_numbers(path: Path) -> dict[str, Float64[np.ndarray, " n"]]:
    """The rows "NAME: numbers" of a calibration file."""
    rows = (line.partition(":") for line in path.read_text().splitlines())
    # The time of the calibration is no number.
    return {
        name: np.array(numbers.split(), np.float64)
        for name, _, numbers in rows
        if not name.startswith("calib_time")
    }
