"""NYU Depth V2, the labelled part: 1449 indoor frames of a Kinect.

    mofo convert nyuv2 --source DIR --out OUT

Layout, from /datasets/nyu_depth_v2.html of cs.nyu.edu/~silberman and its toolbox: one MATLAB 7.3
file (which is HDF5, so axes are reversed) with `images` (1449, 3, 640, 480) uint8, `rawDepths`
(1449, 640, 480) in metres, registered to the images, 0 = none, and `depths`, the same filled in,
which is not measured and not used. `splits.mat` numbers 795 images for training, 654 for testing,
from 1. The toolbox clamps depth to `maxDepth`, so that value is no measurement. Its
`rgb_plane2rgb_world.m` (a copy: github.com/zhirongw/3DShapeNets, 3D/) unprojects with the pixels
counted from 1: the first pixel's centre, ours 0.5, is 1. Images keep their white frame.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from PIL import Image
from scipy.io import loadmat

from mofo.data.sample import Sample

VERSION = 1
LICENCE = "NYU Depth V2 (no licence stated); cite Silberman et al., ECCV 2012"
TREE = """
  SOURCE/nyu_depth_v2_labeled.mat
  SOURCE/splits.mat"""
SPLITS = {"train": "trainNdxs", "test": "testNdxs"}
# camera_params.m of the toolbox.
FX, FY = 5.1885790117450188e02, 5.1946961112127485e02
CX, CY = 3.2558244941119034e02, 2.5373616633400465e02
MAX_DEPTH = 10.0
OPTIONS = {
    "split": "train, test or all, by splits.mat",
}


class Frame(NamedTuple):
    mat: Path
    number: int  # from 1, as published


def find(source: Path, *, split: str = "train") -> list[Frame]:
    """The frames of a split, "train" or "test", or "all" of them."""
    if split not in {*SPLITS, "all"}:
        raise ValueError(f"split is {split!r}, but must be one of {[*SPLITS, 'all']}")
    mat = source / "nyu_depth_v2_labeled.mat"
    needed = [mat] if split == "all" else [mat, source / "splits.mat"]
    missing = [path.name for path in needed if not path.is_file()]
    if missing:
        raise ValueError(f"{source} does not hold {missing}; expected{TREE}")
    with h5py.File(mat) as file:
        numbers = range(1, len(_array(file, "images")) + 1)
    if split != "all":
        numbers = loadmat(source / "splits.mat", variable_names=[SPLITS[split]])[SPLITS[split]]
        numbers = sorted(int(number) for number in numbers.ravel())
    return [Frame(mat, number) for number in numbers]


def read(item: Frame) -> Iterator[Sample]:
    """The frame with its raw depth."""
    with h5py.File(item.mat) as file:
        image = np.asarray(_array(file, "images")[item.number - 1])
        metres = np.asarray(_array(file, "rawDepths")[item.number - 1], np.float32)
    metres = np.ascontiguousarray(metres.T)
    valid = (metres > 0) & (metres < MAX_DEPTH)
    if not valid.any():
        return
    yield Sample(
        key=f"nyuv2_{item.number:04d}",
        picture=Image.fromarray(np.ascontiguousarray(image.transpose(2, 1, 0))),
        metres=np.where(valid, metres, np.float32(0)),
        valid=valid,
        intrinsics=np.array([[FX, 0, CX - 0.5], [0, FY, CY - 0.5], [0, 0, 1]]),
        metric=True,
        source="NYU Depth V2",
        licence=LICENCE,
    )


def _array(file: h5py.File, name: str) -> h5py.Dataset:
    array = file.get(name)
    if not isinstance(array, h5py.Dataset):
        raise ValueError(f"{file.filename} has no array {name!r}; it has {sorted(file)}")
    return array
