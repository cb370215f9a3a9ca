"""From depth to points: intrinsics, unprojection, point clouds and their files.

Camera: intrinsics K are 3x3 in pixels, with pixel centres at half integers: the ray of column u,
row v is K^-1 (u + 1/2, v + 1/2, 1). Depth is the distance along the optical axis, not along the
ray. Camera coordinates are x right, y down, z forward (OpenCV's).

Cloud: (x, -y, -z) of the camera's, so x right, +Y up, looking down -Z (OpenGL's and glTF's: a
viewer shows it upright and as the camera saw it), in the unit of depth. Its median is then moved to
the origin, so the camera stands at minus that median, about (0, 0, +median depth).
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, UInt8
from scipy.ndimage import maximum_filter, minimum_filter
from scipy.spatial import KDTree

# The conventions of the released command line (its README).
FIELD_OF_VIEW = 65.0  # vertical, degrees
EDGE = 0.04  # a pixel whose 3x3 depths spread over more than this share of its depth is on an edge
MAX_POINTS = 1_200_000
NEIGHBOURS = 5  # of the statistical outlier test
SIGMAS = 1.0

FORMATS = (".ply", ".glb")


class Cloud(NamedTuple):
    points: Float32[np.ndarray, "n 3"]
    colours: UInt8[np.ndarray, "n 3"]


def intrinsics_from_fov(
    height: int, width: int, fov: float = FIELD_OF_VIEW
) -> Float64[np.ndarray, "3 3"]:
    """Pinhole with square pixels, its centre in the middle; `fov` is vertical, in degrees."""
    if not 0 < fov < 180:
        raise ValueError(f"field of view is {fov} degrees, but must lie between 0 and 180")
    focal = height / 2 / np.tan(np.radians(fov) / 2)
    return np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]])


def unproject(
    depth: Float[np.ndarray, "h w"], intrinsics: Float[np.ndarray, "3 3"]
) -> Float64[np.ndarray, "h w 3"]:
    """Camera coordinates of every pixel, in the unit of depth."""
    h, w = depth.shape
    u, v = np.meshgrid(np.arange(w) + 0.5, np.arange(h) + 0.5)
    rays = np.stack([u, v, np.ones_like(u)], axis=-1) @ np.linalg.inv(intrinsics).T
    return rays * depth[..., None].astype(np.float64)


def on_edge(
    depth: Float[np.ndarray, "h w"], valid: Bool[np.ndarray, "h w"], threshold: float = EDGE
) -> Bool[np.ndarray, "h w"]:
    """Where the valid depths of the 3x3 neighbourhood spread over more than threshold * depth."""
    largest = maximum_filter(np.where(valid, depth, -np.inf), size=3, mode="nearest")
    smallest = minimum_filter(np.where(valid, depth, np.inf), size=3, mode="nearest")
    spread = np.where(valid, largest, 0) - np.where(valid, smallest, 0)
    return valid & (spread > threshold * np.where(valid, depth, 0))


def point_cloud(
    depth: Float[np.ndarray, "h w"],
    image: UInt8[np.ndarray, "h w 3"],
    intrinsics: Float[np.ndarray, "3 3"],
    valid: Bool[np.ndarray, "h w"] | None = None,
    *,
    edge_rtol: float = EDGE,
    drop_outliers: bool = False,
) -> Cloud:
    """Coloured points of the valid pixels that are on no depth edge, thinned to MAX_POINTS.

    A pixel is on an edge where the 3x3 depths spread over more than `edge_rtol` of its own; 0 keeps
    all. `drop_outliers` drops those of `outliers` as well. Row-major, as the pixels are.
    """
    if not 0 <= edge_rtol < np.inf:
        raise ValueError(
            f"edge_rtol is {edge_rtol}, but must be a share of the depth, 0 or more; 0 keeps edges"
        )
    valid = np.ones(depth.shape, bool) if valid is None else valid
    valid = valid & np.isfinite(depth) & (depth > 0)
    keep = valid & ~on_edge(depth, valid, edge_rtol) if edge_rtol else valid
    if not keep.any():
        raise ValueError(
            f"no point is left of {valid.sum()} pixels with depth: all lie on depth edges; "
            "raise edge_rtol, or pass 0 to keep them"
            if valid.any()
            else "no pixel has depth, so there is no point cloud to make"
        )
    points = unproject(depth, intrinsics)[keep] * (1, -1, -1)
    colours = image[keep]
    if len(points) > MAX_POINTS:
        evenly = np.linspace(0, len(points) - 1, MAX_POINTS).astype(np.int64)
        points, colours = points[evenly], colours[evenly]
    if drop_outliers and len(points) > NEIGHBOURS:
        dense = ~outliers(points)
        points, colours = points[dense], colours[dense]
    return Cloud((points - np.median(points, axis=0)).astype(np.float32), colours)


def outliers(points: Float[np.ndarray, "n 3"]) -> Bool[np.ndarray, " n"]:
    """Points whose mean distance to 5 neighbours is above the cloud's mean by over 1 sigma."""
    distance, _ = KDTree(points).query(points, k=NEIGHBOURS + 1, workers=1)
    distance = distance[:, 1:].mean(axis=1)
    return distance > distance.mean() + SIGMAS * distance.std()


def save_cloud(
    points: Float[np.ndarray, "n 3"], colours: UInt8[np.ndarray, "n 3"], path: str | Path
) -> None:
    """Write a .ply or .glb whole or not at all; `colours` are a picture's (sRGB).

    A .ply holds them as they are. A .glb holds linear light, which glTF demands: viewers encode it
    again, and would show the picture's own numbers washed out.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"cannot write {path.name}: a point cloud ends in .ply or .glb")
    import trimesh  # slow to import, and only clouds need it

    if path.suffix == ".glb":
        colours = linear(colours)
    data = trimesh.PointCloud(points, colors=colours).export(file_type=path.suffix[1:])
    assert isinstance(data, bytes)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def linear(colours: UInt8[np.ndarray, "n 3"]) -> UInt8[np.ndarray, "n 3"]:
    """Light of sRGB colours (IEC 61966-2-1); 8 bits of it lose at most 6 steps, in the dark."""
    code = np.arange(256) / 255
    light = np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)
    return np.rint(255 * light).astype(np.uint8)[colours]


def render(
    cloud: Cloud,
    size: tuple[int, int],
    *,
    yaw: float = 25.0,
    pitch: float = 12.0,
    background: tuple[int, int, int] = (24, 24, 28),
) -> UInt8[np.ndarray, "h w 3"]:
    """Picture of a cloud (height, width) from aside, nearest point in front; angles in degrees."""
    height, width = size
    a, b = np.radians([yaw, pitch])
    turn = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    tilt = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    points = cloud.points.astype(np.float64) @ (tilt @ turn).T
    # The farthest hundredth may fall outside: a few far points must not shrink all others.
    low, high = np.percentile(points, [1, 99], axis=0)
    scale = 0.9 * min(width / (high - low)[0], height / (high - low)[1])
    centre = (low + high) / 2
    column = (width / 2 + scale * (points[:, 0] - centre[0])).astype(np.int64)
    row = (height / 2 - scale * (points[:, 1] - centre[1])).astype(np.int64)
    back_to_front = np.argsort(points[:, 2], kind="stable")
    picture = np.full((height, width, 3), background, np.uint8)
    side = max(1, round(1.2 * np.sqrt(0.8 * height * width / len(points))))
    for dy in range(side):
        for dx in range(side):
            y, x = row[back_to_front] + dy, column[back_to_front] + dx
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            picture[y[inside], x[inside]] = cloud.colours[back_to_front][inside]
    return picture
