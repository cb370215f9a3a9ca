"""BlendedMVS and BlendedMVG: photos blended with renderings of a textured mesh, and its depth.

    mofo convert blendedmvs --source DIR --out OUT

Published layout (README of github.com/YoYo000/BlendedMVS), anywhere below the source:

    PID/blended_images/00000000.jpg
    PID/rendered_depth_maps/00000000.pfm        0 = the mesh has a hole
    PID/cams/00000000_cam.txt                   extrinsic, intrinsic, depth range

Camera files are MVSNet's (README of github.com/YoYo000/MVSNet), whose pixel centres lie at
half-integers (get_pixel_grids in mvsnet/homography_warping.py there). Rows of a PFM run from the
bottom to the top. Scale is unknown.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Float64

from mofo.data.sample import Sample, decode_picture

VERSION = 1
LICENCE = "CC BY 4.0; cite Yao et al., BlendedMVS, CVPR 2020"


class Item(NamedTuple):
    project: Path
    name: str


def find(source: Path) -> list[Item]:
    """Every depth map of every project."""
    maps = sorted(source.rglob("rendered_depth_maps/*.pfm"))
    if not maps:
        raise ValueError(
            f"{source} holds no depth map of BlendedMVS; expected PID/rendered_depth_maps/"
            "00000000.pfm, PID/blended_images/00000000.jpg and PID/cams/00000000_cam.txt"
        )
    return [Item(path.parents[1], path.stem) for path in maps]


def read(item: Item) -> Iterator[Sample]:
    """The image with its depth; nothing if the rendering is empty."""
    project, name = item
    metres = _read_pfm(project / "rendered_depth_maps" / f"{name}.pfm")
    valid = np.isfinite(metres) & (metres > 0)
    if not valid.any():
        return
    image_bytes = (project / "blended_images" / f"{name}.jpg").read_bytes()
    yield Sample(
        key=re.sub(r"[./\\]", "_", f"{project.name}_{name}"),
        picture=decode_picture(image_bytes),
        metres=np.where(valid, metres, np.float32(0)),
        valid=valid,
        intrinsics=_read_intrinsics(project / "cams" / f"{name}_cam.txt"),
        metric=False,
        source="blendedmvs",
        licence=LICENCE,
        image_bytes=image_bytes,
    )


def _read_pfm(path: Path) -> Float32[np.ndarray, "h w"]:
    data = path.read_bytes()
    header = re.match(rb"Pf\s+(\d+)\s+(\d+)\s+(-?[\d.eE+-]+)\s", data)
    if header is None:
        raise ValueError(f"{path} starts with {data[:20]!r}, no grey PFM; extract it again")
    width, height = int(header[1]), int(header[2])
    if len(data) - header.end() != 4 * width * height:
        raise ValueError(
            f"{path} has {len(data) - header.end()} bytes of depth, but {width}x{height} need "
            f"{4 * width * height}; extract it again"
        )
    # The sign of the scale tells the byte order.
    order = "<f4" if float(header[3]) < 0 else ">f4"
    values = np.frombuffer(data, order, offset=header.end()).reshape(height, width)
    return values[::-1].astype(np.float32)


def _read_intrinsics(path: Path) -> Float64[np.ndarray, "3 3"]:
    words = path.read_text().split()
    try:
        start = words.index("intrinsic") + 1
        return np.array(words[start : start + 9], np.float64).reshape(3, 3)
    except ValueError as error:
        raise ValueError(
            f"{path} has no nine numbers after 'intrinsic' ({error}); extract it again"
        ) from error
