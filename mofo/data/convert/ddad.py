"""DDAD, Dense Depth for Autonomous Driving: six cameras and long-range scanners at 10 Hz.

    mofo convert ddad --source DIR/ddad_train_val --out OUT [--split train]

Published layout, below the source (README of github.com/TRI-ML/DDAD; files: dgp/proto/dataset.proto
and dgp/datasets/base_dataset.py of github.com/TRI-ML/dgp):

    ddad.json                                scene_splits: {"0": train, "1": val}: filenames
    000000/scene_HASH.json                   samples: datum_keys, calibration_key; data: id, datum
    000000/calibration/HASH.json             names, intrinsics, extrinsics
    000000/rgb/CAMERA_01/TIME.png            named by the scene's json, as is
    000000/point_cloud/LIDAR/TIME.npz        data: (n, 4) x y z intensity, or named fields

Each datum has the pose of its sensor in the world at its own time, which carries returns into the
cameras (get_depth_from_point_cloud in dgp/utils/annotation.py). The cameras see parts of the
vehicle; returns behind those cannot be told, crop them away where it matters.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from mofo.data import lidar
from mofo.data.sample import Sample, decode_picture

VERSION = 1
LICENCE = "CC BY-NC-SA 4.0; cite Guizilini et al., CVPR 2020"
SAMPLES_PER_ITEM = 6
SPLITS = {"train": "0", "val": "1"}
OPTIONS = {
    "split": "train or val, of ddad.json",
}


class Datum(NamedTuple):
    file: Path
    rotation: tuple[float, ...]  # w x y z, of the sensor in the world
    translation: tuple[float, ...]


class Item(NamedTuple):
    calibration: Path
    scan: Datum
    images: tuple[tuple[str, Datum], ...]  # camera and image


def find(source: Path, *, split: str = "train") -> list[Item]:
    """Every sample of the scenes of a split."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, but must be one of {', '.join(SPLITS)}")
    listing = source / "ddad.json"
    if not listing.exists():
        raise ValueError(
            f"{source} holds no ddad.json; expected ddad.json and folders like 000000/ with "
            "scene_HASH.json, calibration/, rgb/ and point_cloud/: name the folder ddad_train_val"
        )
    scenes = json.loads(listing.read_text())["scene_splits"].get(SPLITS[split], {})
    items = [item for name in scenes.get("filenames", ()) for item in _find_scene(source / name)]
    if not items:
        raise ValueError(f"{listing} lists no scene of split {split!r} with images and a scan")
    return items


def _find_scene(path: Path) -> Iterator[Item]:
    scene = json.loads(path.read_text())
    data = {datum["key"]: datum for datum in scene["data"]}
    for sample in scene["samples"]:
        images, scan = [], None
        for datum in (data[key] for key in sample["datum_keys"]):
            name, content = datum["id"]["name"], datum["datum"]
            if "image" in content:
                images.append((name, _datum(path.parent, content["image"])))
            elif "point_cloud" in content:
                scan = _datum(path.parent, content["point_cloud"])
        if images and scan:
            calibration = path.parent / "calibration" / f"{sample['calibration_key']}.json"
            yield Item(calibration, scan, tuple(sorted(images)))


def _datum(folder: Path, content: dict) -> Datum:
    rotation, translation = content["pose"]["rotation"], content["pose"]["translation"]
    return Datum(
        folder / content["filename"],
        tuple(rotation[axis] for axis in ("qw", "qx", "qy", "qz")),
        tuple(translation[axis] for axis in "xyz"),
    )


def read(item: Item) -> Iterator[Sample]:
    """The images of one moment with the returns each camera sees."""
    calibration = json.loads(item.calibration.read_text())
    returns = lidar.move(_read_scan(item.scan.file), _transform(item.scan))
    for camera, datum in item.images:
        intrinsics = _intrinsics(calibration, camera)
        image_bytes = datum.file.read_bytes()
        picture = decode_picture(image_bytes)
        camera_from_world = np.linalg.inv(_transform(datum))
        uvz = lidar.project(lidar.move(returns, camera_from_world), intrinsics)
        points = lidar.visible(uvz, intrinsics[0, 0], (picture.height, picture.width))
        if not len(points):
            continue
        yield Sample(
            key=f"{item.calibration.parents[1].name}_{camera}_{datum.file.stem}",
            picture=picture,
            points=points,
            intrinsics=intrinsics,
            metric=True,
            source="ddad",
            licence=LICENCE,
            image_bytes=image_bytes,
        )


def _transform(datum: Datum) -> Float64[np.ndarray, "4 4"]:
    return lidar.transform(np.array(datum.rotation), np.array(datum.translation))


def _read_scan(path: Path) -> Float64[np.ndarray, "n 3"]:
    with np.load(path) as file:
        data = file["data"]
    if data.dtype.names:
        return np.stack([data[axis].reshape(-1) for axis in "XYZ"], axis=1).astype(np.float64)
    return data[:, :3].astype(np.float64)


def _intrinsics(calibration: dict, camera: str) -> Float64[np.ndarray, "3 3"]:
    lenses = dict(zip(calibration["names"], calibration["intrinsics"], strict=True))
    if camera not in lenses:
        raise ValueError(f"the calibration has no {camera}, only {sorted(lenses)}")
    fx, fy, cx, cy = (lenses[camera][name] for name in ("fx", "fy", "cx", "cy"))
    # Pixel centres count from 0 there (scale_intrinsics in dgp/utils/camera.py), ours lie at
    # half-integers.
    return np.array([[fx, 0, cx + 0.5], [0, fy, cy + 0.5], [0, 0, 1]], np.float64)
