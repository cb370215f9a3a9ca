"""ARKitScenes: rooms seen by a tablet with a LiDAR; some also by a laser scanner.

    mofo convert arkitscenes --source DIR --out OUT

Layout, from DATA.md, raw/README.md, depth_upsampling/README.md and download_data.py of
github.com/apple/ARKitScenes, alike in its three sets (`raw`, `3dod`, `upsampling`; in `3dod` a
video's folders lie in one more, `VIDEO_frames`): 16-bit depth in millimetres, 0 = none, as large as
the picture of the same name; confidence 0 to 2; `.pincam` "width height fx fy cx cy", whose time
may be off by a millisecond (tenFpsDataLoader.py). Pixel centres are counted from 0 (there, and in
Apple's ARCamera.h). Pictures lie as the sensor does; `metadata.csv` says where the sky is in each
video, and samples are turned upright by it (rotate_image in depth_upsampling/dataset.py). A turned
picture has no published bytes, but the same pixels.
"""

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from PIL import Image

from mofo.data.sample import Sample, decode_depth, decode_image, decode_picture

VERSION = 1
LICENCE = "ARKitScenes licence of Apple (non-commercial); cite Baruch et al., NeurIPS 2021"
TREE = """
  SOURCE/metadata.csv
  SOURCE/{Training,Validation}/VIDEO/[VIDEO_frames/]
      lowres_wide/VIDEO_TIME.png      or, with highres,       wide/
      lowres_depth/VIDEO_TIME.png                             highres_depth/
      lowres_wide_intrinsics/VIDEO_TIME.pincam                wide_intrinsics/
      confidence/VIDEO_TIME.png
(intrinsics and confidence may be absent)"""
# Quarter turns, counter-clockwise, that bring the sky up.
QUARTERS = {"Up": 0, "Right": 1, "Down": 2, "Left": 3}
STEP = 0.001  # metres
CONFIDENT = 2  # of 0, 1, 2: below, the tablet has guessed from the picture
OPTIONS = {
    "highres": "1920x1440 with the laser scanner's depth, in place of 256x192 with the LiDAR's",
    "every": "take every N-th frame; neighbours are near-copies",
}


class Frame(NamedTuple):
    image: Path
    depth: Path
    confidence: Path | None
    camera: Path | None
    quarters: int


def find(source: Path, *, highres: bool = False, every: int = 1) -> list[Frame]:
    """Every `every`-th frame that has both picture and depth.

    256x192 with the LiDAR's depth, or with `highres` 1920x1440 with the laser scanner's.
    """
    if every < 1:
        raise ValueError(f"every is {every}, but must be at least 1: 10 takes each tenth frame")
    skies = _skies(source / "metadata.csv")
    frames = []
    for video in sorted([*source.glob("Training/*/"), *source.glob("Validation/*/")]):
        folder = video / f"{video.name}_frames"
        found = _pairs(folder if folder.is_dir() else video, highres)
        sky = skies.get(video.name)
        if found and sky not in QUARTERS:
            raise ValueError(
                f"{source}/metadata.csv: sky_direction of video {video.name} is {sky!r}, but must "
                f"be one of {list(QUARTERS)}; look at the video and write it there"
            )
        frames += [Frame(*paths, QUARTERS[str(sky)]) for paths in found[::every]]
    if not frames:
        raise ValueError(f"{source} holds no pair of picture and depth; expected{TREE}")
    return frames


def read(item: Frame) -> Iterator[Sample]:
    """The frame, upright."""
    published = item.image.read_bytes()
    picture = decode_picture(published)
    metres, valid = decode_depth(item.depth.read_bytes(), STEP)
    if item.confidence is not None:
        # Confidence is grey; a picture of it has it in each channel.
        valid &= decode_image(item.confidence.read_bytes())[..., 0] >= CONFIDENT
    if not valid.any():
        return
    intrinsics = None if item.camera is None else _camera(item.camera, *picture.size[::-1])
    for _ in range(item.quarters):
        intrinsics = None if intrinsics is None else _turn(intrinsics, picture.width)
        picture = picture.transpose(Image.Transpose.ROTATE_90)
        metres, valid = np.rot90(metres).copy(), np.rot90(valid).copy()
    yield Sample(
        key=item.image.stem.replace(".", "_"),
        picture=picture,
        image_bytes=published if item.quarters == 0 else None,
        metres=np.where(valid, metres, np.float32(0)),
        valid=valid,
        depth_scale=STEP,
        intrinsics=intrinsics,
        metric=True,
        source="ARKitScenes",
        licence=LICENCE,
    )


def _skies(path: Path) -> dict[str, str]:
    """On which side of its pictures each video has the sky."""
    if not path.is_file():
        raise ValueError(
            f"{path} is missing, which says how the pictures lie; download_data.py of ARKitScenes "
            f"downloads it with each set. Expected{TREE}"
        )
    with open(path, newline="") as file:
        return {row["video_id"]: row["sky_direction"] for row in csv.DictReader(file)}


def _pairs(folder: Path, highres: bool) -> list[tuple[Path, Path, Path | None, Path | None]]:
    """Picture, depth, confidence and camera of each frame of a video, in order of time."""
    wide, depth = ("wide", "highres_depth") if highres else ("lowres_wide", "lowres_depth")
    there = {name: _names(folder / name) for name in (wide, depth, "confidence")}
    confident = set() if highres else there["confidence"]
    cameras = _names(folder / f"{wide}_intrinsics")
    pairs = []
    names = [name for name in there[wide] & there[depth] if name.endswith(".png")]
    # Longer names are later times: they all have three decimals.
    for name in sorted(names, key=lambda name: (len(name), name)):
        video, _, time = name.removesuffix(".png").partition("_")
        times = (f"{video}_{float(time) + shift:.3f}.pincam" for shift in (0, -0.001, 0.001))
        camera = next((each for each in times if each in cameras), None)
        pairs.append(
            (
                folder / wide / name,
                folder / depth / name,
                folder / "confidence" / name if name in confident else None,
                folder / f"{wide}_intrinsics" / camera if camera else None,
            )
        )
    return pairs


def _names(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()


def _camera(path: Path, height: int, width: int) -> Float64[np.ndarray, "3 3"]:
    w, h, fx, fy, cx, cy = (float(number) for number in path.read_text().split())
    if (w, h) != (width, height):
        raise ValueError(f"{path} is for {w:g}x{h:g}, but the picture is {width}x{height}")
    return np.array([[fx, 0, cx + 0.5], [0, fy, cy + 0.5], [0, 0, 1]])


def _turn(intrinsics: Float64[np.ndarray, "3 3"], width: int) -> Float64[np.ndarray, "3 3"]:
    """Intrinsics of the picture, `width` pixels wide, after a quarter turn counter-clockwise.

    Pixel (u, v) comes to (v, width - u), and the camera's axes turn with the picture.
    """
    (fx, _, cx), (_, fy, cy), _ = intrinsics
    return np.array([[fy, 0, cy], [0, fx, width - cx], [0, 0, 1]])
