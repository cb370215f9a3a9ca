"""Hypersim: 74,619 rendered pictures of 461 furnished rooms.

    mofo convert hypersim --source DIR --out OUT

Layout, from README.md and contrib/mikeroberts3000 of github.com/apple/ml-hypersim: tone-mapped
previews as JPEG, and HDF5 files whose `dataset` is the distance to the optical centre in metres,
NaN where nothing was hit. The camera of each scene is a row of `metadata_camera_parameters.csv`
(in that contrib folder, to be put beside the scenes): `M_cam_from_uv` takes (u, v, 1), u to the
right and v up from -1 to 1 between the outer edges of the picture, to a ray with y up and z
backward; for most scenes that is a focal length of 886.81 pixels and the centre in the middle.

Some scenes have a lens that is shifted or tilted: z of that ray is then not the axis of the image
plane, as the z of a pinhole's intrinsics is. But any matrix from pixels to rays is R T, R a
rotation and T upper triangular: T is the inverse of the intrinsics of a camera in the same place
that looks along the axis of the image plane, and with t33 = 1 depth is distance / |T (u, v, 1)|.
Where nothing is tilted, R is the identity.
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from jaxtyping import Float, Float64

from mofo.data.sample import Sample, decode_picture
from mofo.geometry import unproject

VERSION = 1
LICENCE = "CC BY-SA 3.0; cite Roberts et al., Hypersim, ICCV 2021"
CAMERAS = "metadata_camera_parameters.csv"
TREE = f"""
  SOURCE/{CAMERAS}
  SOURCE/ai_VVV_NNN/images/
      scene_cam_XX_final_preview/frame.IIII.tonemap.jpg
      scene_cam_XX_geometry_hdf5/frame.IIII.depth_meters.hdf5"""


class Frame(NamedTuple):
    key: str
    image: Path
    distance: Path
    cam_from_uv: tuple[float, ...]  # row by row


def find(source: Path) -> list[Frame]:
    """Every frame that has both picture and distance."""
    if not (source / CAMERAS).is_file():
        raise ValueError(
            f"{source / CAMERAS} is missing; it is in contrib/mikeroberts3000 of "
            f"github.com/apple/ml-hypersim. Expected{TREE}"
        )
    cameras = _cameras(source / CAMERAS)
    frames = []
    for previews in sorted(source.glob("ai_*/images/scene_cam_*_final_preview")):
        scene, camera = previews.parts[-3], previews.name[6:12]
        geometry = previews.with_name(f"scene_{camera}_geometry_hdf5")
        known = {path.name for path in geometry.glob("frame.*.depth_meters.hdf5")}
        for image in sorted(previews.glob("frame.*.tonemap.jpg")):
            number = image.name.split(".")[1]
            distance = f"frame.{number}.depth_meters.hdf5"
            if distance not in known:
                continue
            if scene not in cameras:
                raise ValueError(f"{source / CAMERAS} has no scene {scene}; download it again")
            key = f"{scene}_{camera}_{number}"
            frames.append(Frame(key, image, geometry / distance, cameras[scene]))
    if not frames:
        raise ValueError(f"{source} holds no pair of picture and distance; expected{TREE}")
    return frames


def read(item: Frame) -> Iterator[Sample]:
    """The frame, its distances made depths."""
    with h5py.File(item.distance) as file:
        distance = np.asarray(file["dataset"], np.float64)
    intrinsics = pinhole(np.reshape(item.cam_from_uv, (3, 3)), *distance.shape)
    rays = unproject(np.ones(distance.shape), intrinsics)
    metres = (distance / np.linalg.norm(rays, axis=-1)).astype(np.float32)
    valid = np.isfinite(metres) & (metres > 0)
    if not valid.any():
        return
    image_bytes = item.image.read_bytes()
    yield Sample(
        key=item.key,
        picture=decode_picture(image_bytes),
        image_bytes=image_bytes,
        metres=np.where(valid, metres, np.float32(0)),
        valid=valid,
        intrinsics=intrinsics,
        metric=True,
        source="Hypersim",
        licence=LICENCE,
    )


def pinhole(
    cam_from_uv: Float[np.ndarray, "3 3"], height: int, width: int
) -> Float64[np.ndarray, "3 3"]:
    """Intrinsics that see what the published matrix sees, in a camera turned to the image plane."""
    uv_from_pixel = np.array([[2 / width, 0, -1], [0, -2 / height, 1], [0, 0, 1]])
    rays = np.diag([1.0, -1, -1]) @ cam_from_uv @ uv_from_pixel
    _, upper = np.linalg.qr(rays)
    # A decomposition is unique up to signs; a camera's diagonal is positive.
    upper *= np.sign(np.diag(upper))[:, None]
    intrinsics = np.linalg.inv(upper / upper[2, 2])
    intrinsics[2] = (0, 0, 1)
    return intrinsics


def _cameras(path: Path) -> dict[str, tuple[float, ...]]:
    """The nine numbers of each scene's matrix."""
    columns = [f"M_cam_from_uv_{row}{column}" for row in range(3) for column in range(3)]
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        missing = [
            name for name in ("scene_name", *columns) if name not in (reader.fieldnames or ())
        ]
        if missing:
            raise ValueError(f"{path} has no column {missing}; download it again")
        return {row["scene_name"]: tuple(float(row[name]) for name in columns) for row in reader}
