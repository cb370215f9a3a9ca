"""Waymo Open Dataset, perception, version 2 (Parquet): five cameras and the scanner on the roof.

    mofo convert waymo --source DIR/training --out OUT

Published layout, below the source: COMPONENT/SEGMENT.parquet, for each component a table with the
columns that v2/perception/{base,camera_image,context,lidar}.py below src/waymo_open_dataset of
github.com/waymo-research/waymo-open-dataset declare and tutorial/tutorial_v2.ipynb lists:

    camera_image, camera_calibration, lidar, lidar_calibration, lidar_pose, lidar_camera_projection

Rows are found by their keys, their order differs between components (issue 691 there). A cell of
the range image is a range along an inclination and an azimuth (utils/range_image_utils.py), with
the vehicle's pose in the world at its own time; `lidar_camera_projection` says into which pixel of
which camera it falls, lens and rolling shutter included. Depth is along the optical axis at the
time that pixel's row or column was read (wdl_limited/camera/camera_model.cc). Used are the first
returns of the scanner on the roof: the others stand metres away from the cameras, and have no poses
of their own. Images keep the distortion of the lens, which `intrinsics` leave out (pinhole part).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64
from pyarrow import parquet

from mofo.data import lidar
from mofo.data.sample import Sample, decode_picture

VERSION = 1
LICENCE = (
    "Waymo Dataset License Agreement for Non-Commercial Use (waymo.com/open); made using the Waymo "
    "Open Dataset, provided by Waymo LLC; cite Sun et al., CVPR 2020"
)
CAMERAS = {1: "FRONT", 2: "FRONT_LEFT", 3: "FRONT_RIGHT", 4: "SIDE_LEFT", 5: "SIDE_RIGHT"}
TOP = 1  # the scanner on the roof
COMPONENTS = {
    "camera_image": "CameraImageComponent",
    "camera_calibration": "CameraCalibrationComponent",
    "lidar": "LiDARComponent",
    "lidar_calibration": "LiDARCalibrationComponent",
    "lidar_pose": "LiDARPoseComponent",
    "lidar_camera_projection": "LiDARCameraProjectionComponent",
}
TIME, CAMERA, LASER = "key.frame_timestamp_micros", "key.camera_name", "key.laser_name"
# Frames read together: about 10 MB each. Nothing says that rows are in order, so that every reading
# may go through a whole file, which takes seconds.
FRAMES = 25
SAMPLES_PER_ITEM = FRAMES * len(CAMERAS)
ROWS = 8  # decoded together; a row of `lidar` is up to 3 MB
BUFFER = 1 << 20  # bytes of a file; else a row group is read whole, and a file may be one group
# Of each direction of readout the axis of the image, and whether it runs against it.
READOUT = {1: (1, False), 2: (0, False), 3: (1, True), 4: (0, True)}
GLOBAL_SHUTTER = 5

GRID = ("range_image_return1.values", "range_image_return1.shape")
IMAGE = (
    "image",
    "pose.transform",
    "pose_timestamp",
    *(f"velocity.{kind}_velocity.{axis}" for kind in ("linear", "angular") for axis in "xyz"),
    "rolling_shutter_params.shutter",
    "rolling_shutter_params.camera_trigger_time",
    "rolling_shutter_params.camera_readout_done_time",
)

Row = dict[str, Any]


class Item(NamedTuple):
    source: Path
    segment: str
    times: tuple[int, ...]


def find(source: Path) -> list[Item]:
    """Runs of consecutive frames of every segment."""
    items = []
    for path in sorted((source / "camera_image").glob("*.parquet")):
        for component in COMPONENTS:
            if not (source / component / path.name).exists():
                raise ValueError(f"{source} lacks {component}/{path.name}; download it as well")
        times = sorted(set(parquet.read_table(path, columns=[TIME]).column(TIME).to_pylist()))
        items += [
            Item(source, path.stem, tuple(times[start : start + FRAMES]))
            for start in range(0, len(times), FRAMES)
        ]
    if not items:
        raise ValueError(
            f"{source} holds no segment of the Waymo Open Dataset v2; expected SEGMENT.parquet in "
            f"each of {', '.join(COMPONENTS)}: name the folder of one split, such as DIR/training"
        )
    return items


def read(item: Item) -> Iterator[Sample]:
    """The images of some frames with the returns each camera sees."""
    lenses = _read_calibration(item, "camera_calibration", CAMERA)
    scanner = _read_calibration(item, "lidar_calibration", LASER)[TOP]
    scans = {row[TIME]: _grid(row)[..., 0].copy() for row in _read_rows(item, "lidar", GRID)}
    poses = {row[TIME]: _grid(row) for row in _read_rows(item, "lidar_pose", GRID)}
    cells = {row[TIME]: _grid(row) for row in _read_rows(item, "lidar_camera_projection", GRID)}
    images = {(row[TIME], row[CAMERA]): row for row in _read_rows(item, "camera_image", IMAGE)}
    for time in item.times:
        if not (time in scans and time in poses and time in cells):
            raise ValueError(
                f"{item.segment} at {time} lacks a row of lidar, lidar_pose or "
                "lidar_camera_projection; download these components again"
            )
        # Cells without a return have range 0 or less, and some no pose.
        measured = (scans[time] > 0) & poses[time].any(-1)
        world = _to_world(scans[time], poses[time], measured, scanner)
        for camera, name in CAMERAS.items():
            if (time, camera) in images:
                row = images[time, camera]
                yield from _sample(item, name, row, lenses[camera], world, cells[time][measured])


def _sample(
    item: Item,
    name: str,
    row: Row,
    lens: Row,
    world: Float64[np.ndarray, "n 3"],
    cells: Float32[np.ndarray, "n 6"],
) -> Iterator[Sample]:
    """One image with the returns that fall into it; nothing if none does."""
    camera = row[CAMERA]
    first, second = cells[:, 0] == camera, cells[:, 3] == camera
    # The index of a pixel, whose centre is half a pixel farther.
    places = np.concatenate([cells[first, 1:3], cells[second, 4:6]], dtype=np.float64) + 0.5
    depth = _depth(np.concatenate([world[first], world[second]]), places, row, lens)
    picture = decode_picture(row["image"])
    fu, fv, cu, cv = (lens[f"intrinsic.{key}"] for key in ("f_u", "f_v", "c_u", "c_v"))
    points = lidar.visible(np.column_stack([places, depth]), fu, (picture.height, picture.width))
    if len(points):
        yield Sample(
            key=f"{item.segment}_{row[TIME]}_{name}",
            picture=picture,
            points=points,
            # Pixel 0 begins at the left edge of the image: half-integer centres, as ours.
            intrinsics=np.array([[fu, 0, cu], [0, fv, cv], [0, 0, 1]], np.float64),
            metric=True,
            source="waymo",
            licence=LICENCE,
            image_bytes=row["image"],
        )


def _to_world(
    scan: Float32[np.ndarray, "h w"],
    poses: Float32[np.ndarray, "h w 6"],
    measured: Bool[np.ndarray, "h w"],
    scanner: Row,
) -> Float64[np.ndarray, "n 3"]:
    """World coordinates of the measured cells of a range image, in rows."""
    h, w = scan.shape
    mount = np.reshape(scanner["extrinsic.transform"], (4, 4))
    inclinations = scanner["beam_inclination.values"]
    if inclinations is None or len(inclinations) == 0:
        low, high = scanner["beam_inclination.min"], scanner["beam_inclination.max"]
        inclinations = low + (np.arange(h) + 0.5) / h * (high - low)
    row, column = np.nonzero(measured)
    # Beams are listed from the lowest, rows of the image from the highest; columns go clockwise
    # from behind the vehicle, whatever the yaw of the scanner.
    inclination = np.asarray(inclinations)[::-1][row]
    azimuth = np.pi * (1 - (2 * column + 1) / w) - np.arctan2(mount[1, 0], mount[0, 0])
    flat = np.cos(inclination)
    beams = np.column_stack([np.cos(azimuth) * flat, np.sin(azimuth) * flat, np.sin(inclination)])
    x, y, z = lidar.move(beams * scan[measured, None].astype(np.float64), mount).T
    roll, pitch, yaw, *place = poses[measured].astype(np.float64).T
    y, z = _turn(y, z, roll)
    z, x = _turn(z, x, pitch)
    x, y = _turn(x, y, yaw)
    return np.column_stack([x, y, z]) + np.column_stack(place)


def _turn(a: np.ndarray, b: np.ndarray, angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates after a rotation from the axis of `a` towards that of `b`."""
    return a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)


def _depth(
    world: Float64[np.ndarray, "n 3"], places: Float64[np.ndarray, "n 2"], row: Row, lens: Row
) -> Float64[np.ndarray, " n"]:
    """Depth of points along the optical axis (x of the camera) when their pixels were read."""
    vehicle = np.reshape(row["pose.transform"], (4, 4))
    camera = vehicle @ np.reshape(lens["extrinsic.transform"], (4, 4))
    axis, position = camera[:3, 0], camera[:3, 3]
    # Turning is given in the vehicle's coordinates, speed in the world's.
    turning = vehicle[:3, :3] @ [row[f"velocity.angular_velocity.{k}"] for k in "xyz"]
    speed = np.array([row[f"velocity.linear_velocity.{k}"] for k in "xyz"])
    speed = speed + np.cross(turning, position - vehicle[:3, 3])
    late = _time_of_readout(places, row, lens)[:, None] - row["pose_timestamp"]
    return ((world - position - late * speed) * (axis + late * np.cross(turning, axis))).sum(1)


def _time_of_readout(
    places: Float64[np.ndarray, "n 2"], row: Row, lens: Row
) -> Float64[np.ndarray, " n"]:
    """Seconds at the middle of the exposure of each pixel; the pose's if all are read at once."""
    direction = lens["rolling_shutter_direction"]
    if direction == GLOBAL_SHUTTER:
        return np.full(len(places), row["pose_timestamp"])
    if direction not in READOUT:
        raise ValueError(
            f"rolling_shutter_direction is {direction}, but must be one of "
            f"{sorted(READOUT)} or {GLOBAL_SHUTTER}; download camera_calibration again"
        )
    axis, backwards = READOUT[direction]
    part = places[:, axis] / (lens["width"], lens["height"])[axis]
    shutter, trigger, done = (
        row[f"rolling_shutter_params.{key}"]
        for key in ("shutter", "camera_trigger_time", "camera_readout_done_time")
    )
    return trigger + shutter / 2 + (done - trigger - shutter) * (1 - part if backwards else part)


def _read_calibration(item: Item, component: str, key: str) -> dict[int, Row]:
    """The rows of a small table by one of their keys."""
    path = item.source / component / f"{item.segment}.parquet"
    prefix = f"[{COMPONENTS[component]}]."
    rows = parquet.read_table(path).to_pylist()
    return {
        row[key]: {name.removeprefix(prefix): value for name, value in row.items()} for row in rows
    }


def _read_rows(item: Item, component: str, names: tuple[str, ...]) -> Iterator[Row]:
    """The rows of the item's frames, of scanners only that on the roof; lists become arrays."""
    path = item.source / component / f"{item.segment}.parquet"
    prefix = f"[{COMPONENTS[component]}]."
    sensor = CAMERA if component == "camera_image" else LASER
    columns = [TIME, sensor, *(prefix + name for name in names)]
    missing = set(item.times)
    with parquet.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False) as file:
        groups = [
            group
            for group in range(file.num_row_groups)
            if set(file.read_row_group(group, [TIME]).column(TIME).to_pylist()) & missing
        ]
        for batch in file.iter_batches(ROWS, groups, columns, use_threads=False):
            keys = zip(*(batch.column(name).to_pylist() for name in (TIME, sensor)), strict=True)
            for index, (time, number) in enumerate(keys):
                if time in item.times and (sensor == CAMERA or number == TOP):
                    yield {
                        name.removeprefix(prefix): _value(batch.column(name)[index])
                        for name in columns
                    }
                    # Of a camera there may be no image: those are read to the end.
                    missing -= {time} if sensor == LASER else set()
                    if not missing:
                        return


def _value(scalar: Any) -> Any:
    """A plain value, or a copy of a list as an array: a view would keep the whole batch."""
    values = getattr(scalar, "values", None)
    return scalar.as_py() if values is None else np.array(values)


def _grid(row: Row) -> Float32[np.ndarray, "h w c"]:
    """The first return of a range image, in the shape it says."""
    return row[GRID[0]].reshape(row[GRID[1]])
