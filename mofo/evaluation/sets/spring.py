"""Spring's training frames: depth from the disparity of the left camera.

    SCENE/frame_left/frame_left_0001.png          1920x1080
    SCENE/disp1_left/disp1_left_0001.dsp5         HDF5, `disparity`, 3840x2160, pixels of the frame
    SCENE/cam_data/intrinsics.txt                 a row of fx, fy, cx, cy per frame

Depth is fx * 0.065 / disparity, disparity taken at every second row and column; sky is 0 or NaN.
Layout and rule are those of sceneflow_plot3D.py by the set's authors, github.com/cv-stuttgart.
"""

import io
from collections.abc import Sequence
from functools import partial
from pathlib import PurePosixPath

import h5py
import numpy as np
from jaxtyping import Float32

from mofo.data.sample import Sample
from mofo.evaluation.benchmark import Listed, Row
from mofo.evaluation.sets.archive import Archive
from mofo.evaluation.sets.decode import image
from mofo.evaluation.sets.truth import cut_and_mask, key_of, sha256

BASELINE = 0.065  # metres between the cameras


def open_set(row: Row) -> Listed:
    """Every frame of every scene; `source` is the folder that holds the scenes, or a zip of it."""
    archive = Archive(row.source, **row.options)
    archive.require([], row.download)
    names = archive.names()
    frames = sorted(name for name in names if PurePosixPath(name).match("frame_left/*.png"))
    archive.require((other for name in frames for other in _beside(name)), row.download)
    return Listed(
        keys=[key_of(name) for name in frames],
        parts=[None] * len(frames),
        list_sha256=sha256("\n".join(frames).encode()),
        read=partial(_read, row, archive, frames),
    )


def _beside(frame: str) -> tuple[str, str]:
    """The files of a frame's disparity and of its scene's intrinsics."""
    scene, number = PurePosixPath(frame).parents[1], _number(frame)
    return f"{scene}/disp1_left/disp1_left_{number}.dsp5", f"{scene}/cam_data/intrinsics.txt"


def _number(frame: str) -> str:
    return PurePosixPath(frame).stem.rpartition("_")[2]


def _read(row: Row, archive: Archive, frames: Sequence[str], index: int) -> Sample:
    name = frames[index]
    disparity_file, intrinsics_file = _beside(name)
    pixels = archive.decode(name, image)
    disparity = archive.decode(disparity_file, _disparity)[::2, ::2]
    focal = archive.decode(intrinsics_file, _focal, int(_number(name)))
    with np.errstate(divide="ignore"):
        metres = np.float32(focal * BASELINE) / disparity
    return cut_and_mask(row, key_of(name), pixels, metres)


def _disparity(data: bytes) -> Float32[np.ndarray, "h w"]:
    with h5py.File(io.BytesIO(data)) as file:
        return np.asarray(file["disparity"], np.float32)


def _focal(data: bytes, frame: int) -> float:
    """fx of a frame, counted from 1."""
    return float(np.loadtxt(io.BytesIO(data), ndmin=2)[frame - 1, 0])
