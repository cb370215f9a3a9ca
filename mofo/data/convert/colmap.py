"""Any COLMAP project: its 3-D points as sparse depth of each image that observes them.

    mofo convert colmap --source DIR --out OUT

Published layout (doc/format.rst of github.com/colmap/colmap), anywhere below the source:

    PROJECT/sparse/0/{cameras,images,points3D}.{bin,txt}
    PROJECT/images/NAME                 as the images file names them

`model` and `images` name other folders of a project: `--model sparse` reads what `colmap
image_undistorter` writes, `--model colmap/sparse/0 --images images_4` DL3DV-10K at 960p, once its
COLMAP cache is unpacked over its images. Images may be resized copies of those the model is of.

A reconstruction knows no metres: `metric` is False unless the caller scaled it. COLMAP ignores EXIF
rotation (issue 1456 of its repository), our images are upright: points turn with their image.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from PIL import Image
from PIL.ExifTags import Base as ExifTag

from mofo.data.colmap import Camera, Points, View, is_model, observe, read_points, read_views
from mofo.data.sample import Sample, decode_picture

VERSION = 1
LICENCE = "unknown"
ROUNDING = 1.0  # pixels by which the sides of a resized copy may miss their proportion
OPTIONS = {
    "model": "folder of the reconstruction, relative to each project's folder",
    "images": "folder of the images, relative to each project's folder",
    "min_track": "leave out points that fewer images than this observe",
    "max_error": "pixels of the camera; leave out what is reprojected farther off than this",
    "metric": "the reconstruction was scaled to metres",
    "dataset": "name of the data set, the source of each sample",
    "licence": "its terms, kept with each sample",
}


class Project(NamedTuple):
    model: Path
    images: Path
    min_track: int
    max_error: float
    metric: bool
    dataset: str
    licence: str


class Item(NamedTuple):
    key: str
    project: Project
    view: View


def find(
    source: Path,
    *,
    model: str = "sparse/0",
    images: str = "images",
    min_track: int = 3,
    max_error: float = 2.0,
    metric: bool = False,
    dataset: str = "colmap",
    licence: str = LICENCE,
) -> list[Item]:
    """Every registered image of every project below `source`.

    Points with fewer than `min_track` observations are left out; two views alone cannot disprove
    each other. So is what is off by more than `max_error` pixels of the camera: points in the mean
    of their observations, and each observation by itself (COLMAP's own limit is 4).
    """
    depth = len(PurePosixPath(model).parts)
    folders = sorted(folder for folder in source.rglob(model) if is_model(folder))
    if not folders:
        raise ValueError(
            f"{source} holds no COLMAP project; expected PROJECT/{model}/cameras, images, points3D "
            f"(all .bin or all .txt) and PROJECT/{images}/; name other folders with model, images"
        )
    items = []
    for folder in folders:
        root = folder.parents[depth - 1]
        if not (root / images).is_dir():
            raise ValueError(f"{root} has a model, but no folder {images}; name it with images")
        settings = (min_track, max_error, metric, dataset, licence)
        project = Project(folder, root / images, *settings)
        for view in read_views(folder):
            _refuse_escape(folder, view.name)
            name = PurePosixPath(root.relative_to(source).as_posix(), view.name).with_suffix("")
            items.append(Item(re.sub(r"[./\\]", "_", str(name)), project, view))
    return items


def read(item: Item) -> Iterator[Sample]:
    """The image with the points it observes; nothing if no point passes."""
    key, project, view = item
    points = _points(project.model, project.min_track, project.max_error)
    seen = observe(project.model, view, points, max_error=project.max_error)
    image_bytes = (project.images / view.name).read_bytes()
    picture = decode_picture(image_bytes)
    with Image.open(BytesIO(image_bytes)) as opened:
        orientation = opened.getexif().get(ExifTag.Orientation, 1)
    turned = orientation in (5, 6, 7, 8)
    width, height = picture.size[::-1] if turned else picture.size
    scale = _scale(key, view.camera, width, height)
    pixels = _upright(seen[:, :2] * scale, width, height, orientation)
    found = np.column_stack([pixels, seen[:, 2]]).astype(np.float32)
    inside = (found[:, :2] >= 0) & (found[:, :2] < picture.size)
    found = found[inside.all(axis=1)]
    if not len(found):
        return
    intrinsics = None
    if not any(view.camera.distortion):
        focal = view.camera.focal * scale
        fx, fy = focal[::-1] if turned else focal
        centre = np.array([view.camera.centre]) * scale
        cx, cy = _upright(centre, width, height, orientation)[0]
        intrinsics = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], np.float64)
    yield Sample(
        key=key,
        picture=picture,
        points=found,
        intrinsics=intrinsics,
        metric=project.metric,
        source=project.dataset,
        licence=project.licence,
        image_bytes=image_bytes,
    )


# Items of one model follow each other, so one is enough; reading it can take seconds.
@lru_cache(maxsize=1)
def _points(folder: Path, min_track: int, max_error: float) -> Points:
    return read_points(folder, min_track=min_track, max_error=max_error)


def _refuse_escape(folder: Path, name: str) -> None:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name:
        raise ValueError(
            f"{folder}: image name {name!r} is not a path inside the folder of images; names must "
            "be relative, with '/' and without '..'; rename that image in the model"
        )


def _scale(key: str, camera: Camera, width: int, height: int) -> Float64[np.ndarray, "2"]:
    scale = np.array([width / camera.width, height / camera.height])
    off = abs(scale[0] - scale[1]) * np.array([camera.width, camera.height])
    if off.min() > ROUNDING:
        raise ValueError(
            f"{key}: the stored image is {width}x{height}, but its camera {camera.width}x"
            f"{camera.height}; take the images the model was made from, or resized copies of them"
        )
    return scale


def _upright(
    pixels: Float64[np.ndarray, "n 2"], width: int, height: int, orientation: int
) -> Float64[np.ndarray, "n 2"]:
    """Where pixels of the stored image, `width` x `height`, come to lie in the upright one."""
    u, v = pixels.T
    if orientation in (2, 3, 7, 8):
        u = width - u
    if orientation in (3, 4, 6, 7):
        v = height - v
    return np.column_stack([v, u] if orientation in (5, 6, 7, 8) else [u, v])
