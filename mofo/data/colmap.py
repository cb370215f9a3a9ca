"""COLMAP's sparse models, binary or text: views, points, and the depth that each view observes.

Layout: doc/format.rst of github.com/colmap/colmap, camera parameters in src/colmap/sensor/models.h.
A world point X stands at R X + t in the camera (x right, y down, z forward), R from a Hamilton
quaternion w x y z. Pixel centres lie at half-integers, as ours do. Rigs and frames repeat what the
images file says of each image, so they are not read. Models that COLMAP itself wrote (pycolmap
4.2.1, synthetic, all accepted lenses) are read to 1e-12 pixels of its own projection.

Nothing is allocated because a header says so: every count is read up to the end of its file.
"""

import math
import mmap
import os
import struct
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

# In the order of their numbers in a binary model.
MODELS = (
    "SIMPLE_PINHOLE",
    "PINHOLE",
    "SIMPLE_RADIAL",
    "RADIAL",
    "OPENCV",
    "OPENCV_FISHEYE",
    "FULL_OPENCV",
    "FOV",
    "SIMPLE_RADIAL_FISHEYE",
    "RADIAL_FISHEYE",
    "THIN_PRISM_FISHEYE",
    "RAD_TAN_THIN_PRISM_FISHEYE",
    "SIMPLE_DIVISION",
    "DIVISION",
    "SIMPLE_FISHEYE",
    "FISHEYE",
    "EUCM",
    "EQUIRECTANGULAR",
)
# Where the parameters of a model hold fx, fy, cx, cy, k1, k2, p1, p2; those it lacks are 0.
ACCEPTED = {
    "SIMPLE_PINHOLE": (0, 0, 1, 2),
    "PINHOLE": (0, 1, 2, 3),
    "SIMPLE_RADIAL": (0, 0, 1, 2, 3),
    "RADIAL": (0, 0, 1, 2, 3, 4),
    "OPENCV": (0, 1, 2, 3, 4, 5, 6, 7),
}

# The records of the binary files.
COUNT = struct.Struct("<Q")
CAMERA = struct.Struct("<iiQQ")  # id, model, width, height
VIEW = struct.Struct("<i7di")  # id, quaternion, translation, camera
POINT = struct.Struct("<q3d3xdQ")  # id, place, error, length of its track; not the colour
TRACK = struct.Struct("<ii")
OBSERVATION = np.dtype([("place", "<f8", 2), ("point", "<i8")])


class Camera(NamedTuple):
    width: int
    height: int
    focal: tuple[float, float]
    centre: tuple[float, float]
    distortion: tuple[float, float, float, float]  # k1, k2, p1, p2


class View(NamedTuple):
    """A registered image; its observations are bytes of the images file."""

    name: str
    camera: Camera
    rotation: tuple[float, ...]
    translation: tuple[float, ...]
    start: int
    size: int


class Points(NamedTuple):
    """The 3-D points that passed a filter, in the order of their numbers."""

    number: Int64[np.ndarray, " n"]
    place: Float64[np.ndarray, "n 3"]


def is_model(folder: Path) -> bool:
    """Whether `folder` holds the three files of a model."""
    return all(_file(folder, part).is_file() for part in ("cameras", "images", "points3D"))


def read_views(folder: Path) -> list[View]:
    """Every registered image of a model, in the order of the file."""
    cameras = _read_cameras(_file(folder, "cameras"))
    path = _file(folder, "images")
    with _explained(path):
        rows = list(_views_binary(path) if path.suffix == ".bin" else _views_text(path))
    views = []
    for name, pose, camera, start, size in rows:
        if camera not in cameras:
            raise ValueError(
                f"{path}: image {name!r} has camera {camera}, but there are {sorted(cameras)}; "
                "take all files of a model from the same export"
            )
        if not (all(map(math.isfinite, pose)) and any(pose[:4])):
            raise ValueError(
                f"{path}: image {name!r} has the pose {pose}, but it must be a quaternion and a "
                "translation, all finite; export the model anew"
            )
        views.append(View(name, cameras[camera], pose[:4], pose[4:], start, size))
    return views


def read_points(folder: Path, *, min_track: int, max_error: float) -> Points:
    """Points that `min_track` observations agree on, to `max_error` pixels in the mean.

    COLMAP writes an error of -1 before it has computed one: such points are kept.
    """
    path = _file(folder, "points3D")
    numbers, values = array("q"), array("d")
    with _explained(path):
        rows = _points_binary(path) if path.suffix == ".bin" else _points_text(path)
        for number, x, y, z, error, track in rows:
            if track >= min_track and error <= max_error:
                numbers.append(number)
                values.extend((x, y, z))
    number = np.array(numbers, np.int64)
    place = np.array(values, np.float64).reshape(-1, 3)
    order = np.argsort(number, kind="stable")
    return Points(number[order], place[order])


def observe(
    folder: Path, view: View, points: Points, *, max_error: float
) -> Float64[np.ndarray, "n 3"]:
    """u, v where `view` saw each of `points`, in pixels of its camera, and z from its pose.

    u, v are as detected in the image, so lens distortion shifts none. An observation farther than
    `max_error` pixels from its point's projection is left out, as is a point behind the camera.
    """
    path = _file(folder, "images")
    with _explained(path):
        pixels, number = _observations(path, view)
    row = np.searchsorted(points.number, number)
    known = row < len(points.number)
    known[known] = points.number[row[known]] == number[known]
    pixels = pixels[known]
    place = points.place[row[known]] @ _rotation(view.rotation).T + view.translation
    z = place[:, 2]
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        error = np.linalg.norm(_project(view.camera, place) - pixels, axis=1)
    return np.column_stack([pixels, z])[(z > 0) & (error <= max_error)]


def _rotation(quaternion: tuple[float, ...]) -> Float64[np.ndarray, "3 3"]:
    w, x, y, z = np.array(quaternion) / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def _project(camera: Camera, place: Float64[np.ndarray, "n 3"]) -> Float64[np.ndarray, "n 2"]:
    """Pixels of points in camera coordinates, by OpenCV's model, which contains the others."""
    x, y = place[:, 0] / place[:, 2], place[:, 1] / place[:, 2]
    k1, k2, p1, p2 = camera.distortion
    square = x * x + y * y
    radial = 1 + square * (k1 + square * k2)
    bent = np.column_stack(
        [
            x * radial + 2 * p1 * x * y + p2 * (square + 2 * x * x),
            y * radial + 2 * p2 * x * y + p1 * (square + 2 * y * y),
        ]
    )
    return bent * camera.focal + camera.centre


def _file(folder: Path, part: str) -> Path:
    """A file of the model; the binary one where there are both, as COLMAP has it."""
    binary = (folder / "cameras.bin").is_file()
    return folder / f"{part}{'.bin' if binary else '.txt'}"


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (struct.error, ValueError, IndexError, OverflowError) as error:
        raise ValueError(
            f"{path} cannot be read: {error}; it is truncated or no COLMAP model, "
            "so copy it again, or export the model anew"
        ) from error


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def _lines(path: Path) -> Iterator[list[bytes]]:
    """The words of each line that says something."""
    with open(path, "rb") as file:
        for line in file:
            words = line.split()
            if words and not words[0].startswith(b"#"):
                yield words


def _read_cameras(path: Path) -> dict[int, Camera]:
    with _explained(path):
        rows = list(_cameras_binary(path) if path.suffix == ".bin" else _cameras_text(path))
    return {number: _camera(path, *row) for number, *row in rows}


def _camera(path: Path, model: str, width: int, height: int, values: tuple[float, ...]) -> Camera:
    if model not in ACCEPTED:
        raise ValueError(
            f"{path}: camera model {model} is not read, only {', '.join(ACCEPTED)}; undistort the "
            "images with `colmap image_undistorter`, and convert what it writes"
        )
    slots = ACCEPTED[model]
    if len(values) <= max(slots):
        raise ValueError(
            f"{path}: {model} has {max(slots) + 1} parameters, but {values} are given; "
            "export the model anew"
        )
    fx, fy, cx, cy, *bends = (values[slot] for slot in slots)
    k1, k2, p1, p2 = (*bends, 0.0, 0.0, 0.0, 0.0)[:4]
    if not (np.isfinite(values).all() and min(fx, fy) > 0 and min(width, height) > 0):
        raise ValueError(
            f"{path}: a camera of {width}x{height} pixels has parameters {values}, but focal "
            "lengths and sides must be positive; take out the images that use it"
        )
    return Camera(width, height, (fx, fy), (cx, cy), (k1, k2, p1, p2))


def _cameras_binary(path: Path) -> Iterator[tuple]:
    with _mapped(path) as data:
        (count,) = COUNT.unpack_from(data)
        offset = COUNT.size
        for _ in range(count):
            number, model, width, height = CAMERA.unpack_from(data, offset)
            name = MODELS[model] if 0 <= model < len(MODELS) else f"number {model}"
            layout = struct.Struct(f"<{max(ACCEPTED.get(name, (-1,))) + 1}d")
            values = layout.unpack_from(data, offset + CAMERA.size)
            offset += CAMERA.size + layout.size
            yield number, name, width, height, values
            if name not in ACCEPTED:
                return  # how long its record is, is not known


def _cameras_text(path: Path) -> Iterator[tuple]:
    for number, model, width, height, *values in _lines(path):
        name = model.decode(errors="replace")
        yield int(number), name, int(width), int(height), tuple(map(float, values))


def _views_binary(path: Path) -> Iterator[tuple]:
    with _mapped(path) as data:
        (count,) = COUNT.unpack_from(data)
        offset = COUNT.size
        for _ in range(count):
            _, *pose, camera = VIEW.unpack_from(data, offset)
            start = offset + VIEW.size
            end = data.find(b"\0", start)
            if end < 0:
                raise ValueError(f"the name at byte {start} does not end")
            (seen,) = COUNT.unpack_from(data, end + 1)
            name = os.fsdecode(data[start:end])
            start = end + 1 + COUNT.size
            offset = start + seen * OBSERVATION.itemsize
            if offset > len(data):
                raise ValueError(f"image {name!r} has {seen} observations, more than the file")
            yield name, tuple(pose), camera, start, offset - start


def _views_text(path: Path) -> Iterator[tuple]:
    with open(path, "rb") as file:
        for line in iter(file.readline, b""):
            # The rest of the line is the name: spaces belong to it.
            words = line.split(maxsplit=9)
            if not words or words[0].startswith(b"#"):
                continue
            start = file.tell()
            # The next line holds the observations, and may be empty.
            size = len(file.readline())
            pose = tuple(map(float, words[1:8]))
            yield os.fsdecode(words[9].rstrip(b"\r\n")), pose, int(words[8]), start, size


def _observations(
    path: Path, view: View
) -> tuple[Float64[np.ndarray, "n 2"], Int64[np.ndarray, " n"]]:
    with open(path, "rb") as file:
        file.seek(view.start)
        data = file.read(view.size)
    if path.suffix == ".bin":
        rows = np.frombuffer(data, OBSERVATION)
        return rows["place"].astype(np.float64), rows["point"].astype(np.int64)
    words = np.array(data.split(), np.bytes_).reshape(-1, 3)
    return words[:, :2].astype(np.float64), words[:, 2].astype(np.int64)


def _points_binary(path: Path) -> Iterator[tuple[int, float, float, float, float, int]]:
    with _mapped(path) as data:
        (count,) = COUNT.unpack_from(data)
        offset = COUNT.size
        for _ in range(count):
            row = POINT.unpack_from(data, offset)
            offset += POINT.size + row[-1] * TRACK.size
            if offset > len(data):
                raise ValueError(f"point {row[0]} has a track of {row[-1]}, more than the file")
            yield row


def _points_text(path: Path) -> Iterator[tuple[int, float, float, float, float, int]]:
    for words in _lines(path):
        x, y, z, error = (float(words[k]) for k in (1, 2, 3, 7))
        yield int(words[0]), x, y, z, error, (len(words) - 8) // 2
