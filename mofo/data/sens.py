"""ScanNet's `.sens` files: one scan as a stream of compressed colour and depth frames.

Version 4, little-endian, as SensReader/README.md, SensReader/c++/src/sensorData.h and
SensReader/python/SensorData.py of github.com/ScanNet/ScanNet define it: a header (calibrations,
compressions, sizes, integers per metre, number of frames), then the frames, each a pose, two time
stamps, two byte counts and the two compressed images. What follows them is not read.
"""

import struct
import zlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, UInt16

VERSION = 4
NAME = struct.Struct("<IQ")  # version, length of the sensor's name
HEADER = struct.Struct("<64f2i4IfQ")  # four 4x4 matrices; compressions; sizes; step; frames
FRAME = struct.Struct("<16f4Q")  # pose; two time stamps; bytes of colour and of depth
PICTURES = {1: "PNG", 2: "JPEG"}
DEPTHS = {0: "raw", 1: "zlib"}  # a third, "occi", needs a library that is not public
# More than any sensor has: what a header asks for is allocated.
MAX_SIDE = 16384


class Header(NamedTuple):
    """Sizes are (height, width); `units` is the number of integer steps in a metre."""

    colour_size: tuple[int, int]
    depth_size: tuple[int, int]
    colour_intrinsics: Float64[np.ndarray, "3 3"]
    depth_intrinsics: Float64[np.ndarray, "3 3"]
    depth_to_colour: Float64[np.ndarray, "4 4"]
    units: float
    depths: str
    num_frames: int
    start: int


def read_header(path: Path) -> Header:
    """What one scan holds."""
    with open(path, "rb") as file:
        end = file.seek(0, 2)
        file.seek(0)
        version, length = NAME.unpack(_exactly(file.read(NAME.size), NAME.size, path))
        if version != VERSION:
            raise ValueError(f"{path} is .sens version {version}, but only {VERSION} can be read")
        file.seek(min(NAME.size + length, end))
        row = HEADER.unpack(_exactly(file.read(HEADER.size), HEADER.size, path))
        start = file.tell()
    colour, colour_pose, depth, depth_pose = np.array(row[:64], np.float64).reshape(4, 4, 4)
    colour_kind, depth_kind, cw, ch, dw, dh, units, num_frames = row[64:]
    if colour_kind not in PICTURES or depth_kind not in DEPTHS:
        raise ValueError(
            f"{path}: colour is compressed by method {colour_kind}, depth by {depth_kind}; only "
            f"{PICTURES} and {DEPTHS} can be read, as in the release"
        )
    if not (all(0 < side <= MAX_SIDE for side in (cw, ch, dw, dh)) and 0 < units < np.inf):
        raise ValueError(
            f"{path}: colour {cw}x{ch}, depth {dw}x{dh}, {units:g} steps a metre cannot be; the "
            "header is damaged, download the file again"
        )
    if num_frames > (end - start) // FRAME.size:
        raise ValueError(
            f"{path}: {num_frames} frames do not fit into {end} bytes; the file is damaged, "
            "download it again"
        )
    return Header(
        colour_size=(ch, cw),
        depth_size=(dh, dw),
        colour_intrinsics=colour[:3, :3],
        depth_intrinsics=depth[:3, :3],
        depth_to_colour=np.linalg.inv(colour_pose) @ depth_pose,
        units=units,
        depths=DEPTHS[depth_kind],
        num_frames=num_frames,
        start=start,
    )


def read_frame(path: Path, index: int) -> tuple[Header, bytes, UInt16[np.ndarray, "h w"]]:
    """The header, the encoded picture, and the integer depth of one frame; 0 is no depth."""
    header, spans = _index(path)
    if index >= len(spans):
        raise ValueError(
            f"{path}: frame {index} of {header.num_frames} is missing, the file ends early; "
            "download it again"
        )
    at, colour, depth = spans[index]
    with open(path, "rb") as file:
        file.seek(at)
        picture, packed = file.read(colour), file.read(depth)
    h, w = header.depth_size
    if header.depths == "zlib":
        try:
            packed = zlib.decompressobj().decompress(packed, 2 * h * w + 1)
        except zlib.error as error:
            raise ValueError(f"{path}: depth of frame {index} is damaged: {error}") from error
    if len(packed) != 2 * h * w:
        raise ValueError(f"{path}: depth of frame {index} is not {w}x{h}; the file is damaged")
    return header, picture, np.frombuffer(packed, "<u2").reshape(h, w)


# Where a frame stands only those before it tell, and frames are read scan by scan.
@lru_cache(maxsize=2)
def _index(path: Path) -> tuple[Header, list[tuple[int, int, int]]]:
    """The header, and of each frame that is there in full its offset and its two sizes."""
    header = read_header(path)
    spans, at = [], header.start
    with open(path, "rb", buffering=0) as file:
        end = file.seek(0, 2)
        while len(spans) < header.num_frames and at + FRAME.size <= end:
            file.seek(at)
            *_, colour, depth = FRAME.unpack(file.read(FRAME.size))
            spans.append((at + FRAME.size, colour, depth))
            at += FRAME.size + colour + depth
    return header, spans if at <= end else spans[:-1]


def _exactly(data: bytes, size: int, path: Path) -> bytes:
    if len(data) != size:
        raise ValueError(f"{path} ends within its header; download it again")
    return data
