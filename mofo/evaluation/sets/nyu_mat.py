"""NYUv2's test images from the official files: nyu_depth_v2_labeled.mat and, beside it, splits.mat.

The first is MATLAB 7.3, which is HDF5 with its axes reversed: `images` (1449, 3, 640, 480),
`rawDepths` (1449, 640, 480) in metres, `scenes`, references to names. The second has `testNdxs`,
numbers from 1. Depth becomes whole millimetres, truncated, and keys are paths of the common
extraction, so that truth, list and keys equal those of Marigold's archive. Images keep their white
frame, which some extractions paint black.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import h5py
import numpy as np
from scipy.io import loadmat

from mofo.data.sample import DAMAGE, Sample
from mofo.evaluation.benchmark import Listed, Row
from mofo.evaluation.sets.truth import cut_and_mask, key_of, sha256

COLUMNS = ("rgb", "depth", "filled")


def open_set(row: Row) -> Listed:
    """The test split; `source` is the .mat file, or the folder that holds both."""
    if row.options:
        raise ValueError(f"{row.name}: options are {row.options}, but nyu_mat takes none")
    mat = Path(row.source)
    mat = mat if mat.suffix == ".mat" else mat / "nyu_depth_v2_labeled.mat"
    splits = mat.parent / "splits.mat"
    if missing := [str(path) for path in (mat, splits) if not path.is_file()]:
        raise ValueError(f"{row.name}: {', '.join(missing)} is missing; {row.download}")
    try:
        test = loadmat(splits, variable_names=["testNdxs"])["testNdxs"].ravel()
        numbers = [int(number) for number in test]
        with h5py.File(mat) as file:
            scenes = [_text(file, number) for number in numbers]
    except DAMAGE as error:
        raise ValueError(
            f"{row.name}: {mat} or {splits} is damaged ({type(error).__name__}: {error}); "
            f"{row.download}"
        ) from error
    lines = [
        [f"test/{scene}/{column}_{number:04d}.png" for column in COLUMNS]
        for scene, number in zip(scenes, numbers, strict=True)
    ]
    keys = [key_of(line[0]) for line in lines]
    return Listed(
        keys=keys,
        parts=[None] * len(keys),
        list_sha256=sha256("\n".join(" ".join(line) for line in lines).encode()),
        read=partial(_read, row, mat, keys, numbers),
    )


def _read(row: Row, mat: Path, keys: Sequence[str], numbers: Sequence[int], index: int) -> Sample:
    number = numbers[index]
    try:
        with h5py.File(mat) as file:
            pixels = np.asarray(_array(file, "images")[number - 1])
            raw = np.asarray(_array(file, "rawDepths")[number - 1], np.float32)
    except DAMAGE as error:
        raise ValueError(
            f"{mat}: image {number} is damaged ({type(error).__name__}: {error})"
        ) from error
    millimetres = np.trunc(raw.T * np.float32(1000)).astype(np.float64)
    metres = (millimetres / 1000).astype(np.float32)
    image = np.ascontiguousarray(pixels.transpose(2, 1, 0))
    return cut_and_mask(row, keys[index], image, metres)


def _text(file: h5py.File, number: int) -> str:
    reference = _array(file, "scenes")[0, number - 1]
    return "".join(map(chr, np.asarray(file[reference]).ravel()))


def _array(file: h5py.File, name: str) -> h5py.Dataset:
    array = file.get(name)
    if not isinstance(array, h5py.Dataset):
        raise ValueError(f"there is no array {name!r}, only {sorted(file)}")
    return array
