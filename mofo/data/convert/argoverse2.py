"""Argoverse 2 Sensor Dataset: seven ring cameras at 20 Hz, two stacked scanners at 10 Hz.

    mofo convert argoverse2 --source DIR/train --out OUT

Published layout, below the source (guide/src/datasets/sensor.md and src/av2/utils/io.py of
github.com/argoverse/av2-api), one folder a log, names are nanoseconds:

    LOG/calibration/egovehicle_SE3_sensor.feather   sensor_name qw qx qy qz tx_m ty_m tz_m
    LOG/calibration/intrinsics.feather              sensor_name fx_px fy_px cx_px cy_px ...
    LOG/city_SE3_egovehicle.feather                 timestamp_ns qw qx qy qz tx_m ty_m tz_m
    LOG/sensors/lidar/315966265259836000.feather    x y z ... offset_ns
    LOG/sensors/cameras/ring_front_center/315966265249927217.jpg

A sweep is in the vehicle's coordinates at the time of its name, its start. The vehicle's poses then
and at the exposure carry it into the camera (project_ego_to_img_motion_compensated in src/av2/
geometry/camera/pinhole_camera.py). What moves by itself is not carried along: each sweep goes with
the image nearest to its middle, without the returns that are too far from the exposure. Images are
undistorted already.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from pyarrow import feather

from mofo.data import lidar
from mofo.data.sample import Sample, decode_picture

VERSION = 1
LICENCE = "CC BY-NC-SA 4.0; cite Wilson et al., Argoverse 2, NeurIPS Datasets and Benchmarks 2021"
SAMPLES_PER_ITEM = 7
HALF_SWEEP = 50_000_000  # ns; also the time between two images
# Between a return and the exposure: the two scanners look the same way half a sweep apart, so that
# each direction keeps a return.
MAX_LAG = 50_000_000  # ns
CALIBRATION = ("calibration/egovehicle_SE3_sensor", "calibration/intrinsics", "city_SE3_egovehicle")


class Item(NamedTuple):
    log: Path
    sweep: int
    images: tuple[tuple[str, int], ...]  # camera, time


def find(source: Path) -> list[Item]:
    """Every sweep with the images taken nearest to its middle."""
    items = []
    for folder in sorted(source.glob("*/sensors/lidar")):
        log = folder.parents[1]
        for name in CALIBRATION:
            if not (log / f"{name}.feather").exists():
                raise ValueError(f"{log} lacks {name}.feather; download the log again")
        cameras = {
            camera.name: np.array(sorted(int(path.stem) for path in camera.glob("*.jpg")))
            for camera in sorted((log / "sensors/cameras").glob("ring_*"))
        }
        for sweep in sorted(int(path.stem) for path in folder.glob("*.feather")):
            images = tuple(_nearest(cameras, sweep + HALF_SWEEP))
            if images:
                items.append(Item(log, sweep, images))
    if not items:
        raise ValueError(
            f"{source} holds no log of the Argoverse 2 Sensor Dataset; expected LOG/sensors/lidar/"
            "TIME.feather, LOG/sensors/cameras/ring_*/TIME.jpg and LOG/calibration/: name the "
            "folder of one split, such as DIR/train"
        )
    return items


def _nearest(cameras: dict[str, np.ndarray], time: int) -> Iterator[tuple[str, int]]:
    """Of each camera the image nearest to a time, unless it is farther than the next could be."""
    for camera, times in cameras.items():
        if len(times):
            image = int(times[np.abs(times - time).argmin()])
            if abs(image - time) <= HALF_SWEEP:
                yield camera, image


def read(item: Item) -> Iterator[Sample]:
    """The images of one sweep with the returns each camera sees."""
    log, sweep, images = item
    mounts = _read(log / "calibration/egovehicle_SE3_sensor.feather")
    lenses = _read(log / "calibration/intrinsics.feather")
    poses = _read(log / "city_SE3_egovehicle.feather")
    scan = _read(log / "sensors/lidar" / f"{sweep}.feather")
    city_from_sweep = _transform(poses, "timestamp_ns", sweep)
    returns = np.stack([scan[axis].astype(np.float64) for axis in "xyz"], axis=1)
    times = sweep + scan["offset_ns"].astype(np.int64)
    for camera, time in images:
        camera_from_city = np.linalg.inv(
            _transform(poses, "timestamp_ns", time) @ _transform(mounts, "sensor_name", camera)
        )
        near = returns[np.abs(times - time) <= MAX_LAG]
        intrinsics = _intrinsics(lenses, camera)
        image_bytes = (log / "sensors/cameras" / camera / f"{time}.jpg").read_bytes()
        picture = decode_picture(image_bytes)
        uvz = lidar.project(lidar.move(near, camera_from_city @ city_from_sweep), intrinsics)
        points = lidar.visible(uvz, intrinsics[0, 0], (picture.height, picture.width))
        if not len(points):
            continue
        yield Sample(
            key=f"{log.name}_{camera}_{time}",
            picture=picture,
            points=points,
            intrinsics=intrinsics,
            metric=True,
            source="argoverse2",
            licence=LICENCE,
            image_bytes=image_bytes,
        )


def _read(path: Path) -> dict[str, np.ndarray]:
    """The columns of a feather file."""
    table = feather.read_table(path)
    return {name: table.column(name).to_numpy() for name in table.column_names}


def _row(table: dict[str, np.ndarray], column: str, value: str | int) -> int:
    rows = np.flatnonzero(table[column] == value)
    if not len(rows):
        raise ValueError(f"{column} has no {value!r}, but {len(table[column])} others")
    return int(rows[0])


def _transform(
    table: dict[str, np.ndarray], column: str, value: str | int
) -> Float64[np.ndarray, "4 4"]:
    row = _row(table, column, value)
    numbers = [table[name][row] for name in ("qw", "qx", "qy", "qz", "tx_m", "ty_m", "tz_m")]
    return lidar.transform(np.array(numbers[:4]), np.array(numbers[4:]))


def _intrinsics(table: dict[str, np.ndarray], camera: str) -> Float64[np.ndarray, "3 3"]:
    row = _row(table, "sensor_name", camera)
    fx, fy, cx, cy = (float(table[f"{name}_px"][row]) for name in ("fx", "fy", "cx", "cy"))
    # Pixel centres count from 0 there (get_depth_map_from_lidar rounds), ours lie at half-integers.
    return np.array([[fx, 0, cx + 0.5], [0, fy, cy + 0.5], [0, 0, 1]])
