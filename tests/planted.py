"""Points planted in front of a camera, and what the camera must then see of them.

Worked out point by point, with rotations by Rodrigues' formula: nothing of the package is used.
"""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mofo.data.sample import Sample

SIZE = (48, 64)
# From a vehicle (x forward, y left, z up) to a camera that looks forward.
FORWARD = np.array([[0.0, -1, 0], [0, 0, -1], [1, 0, 0]])


def rodrigues(axis: tuple[float, float, float], angle: float) -> np.ndarray:
    x, y, z = np.array(axis) / math.hypot(*axis)
    k = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + math.sin(angle) * k + (1 - math.cos(angle)) * k @ k


def quaternion(axis: tuple[float, float, float], angle: float) -> list[float]:
    """w, x, y, z of the same rotation."""
    unit = np.array(axis) / math.hypot(*axis)
    return [math.cos(angle / 2), *(math.sin(angle / 2) * unit)]


def picture(path: Path, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path.read_bytes()


def targets(seed: int, count: int = 40) -> np.ndarray:
    """u, v, depth with distinct pixels, in depths too alike to hide one another."""
    rng = np.random.default_rng(seed)
    pixel = rng.choice(SIZE[0] * SIZE[1], count, replace=False)
    u, v = pixel % SIZE[1] + rng.uniform(0.1, 0.9, count), pixel // SIZE[1] + 0.5
    return np.stack([u, v, rng.uniform(20, 20.5, count)], axis=1)


def lift(uvz: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Points in camera coordinates that a camera sees at u, v, in pixels with half-int centres."""
    x = (uvz[:, 0] - k[0, 2]) / k[0, 0] * uvz[:, 2]
    y = (uvz[:, 1] - k[1, 2]) / k[1, 1] * uvz[:, 2]
    return np.stack([x, y, uvz[:, 2]], axis=1)


def assert_sees(sample: Sample, points: np.ndarray, k: np.ndarray, least: int) -> None:
    """Every pixel of the sample has the exact depth of a point, and those of all points do."""
    expected: dict[tuple[int, int], float] = {}
    for x, y, z in points:
        if z > 0:
            u, v = k[0, 0] * x / z + k[0, 2], k[1, 1] * y / z + k[1, 2]
            if 0 <= u < SIZE[1] and 0 <= v < SIZE[0]:
                pixel = (int(v), int(u))
                expected[pixel] = min(z, expected.get(pixel, np.inf))
    sample.check()
    assert sample.depth is not None
    metres, valid = sample.depth
    assert len(expected) >= least
    assert {(int(r), int(c)) for r, c in np.argwhere(valid)} == set(expected)
    for pixel, depth in expected.items():
        assert metres[pixel] == pytest.approx(depth, rel=2e-7)
    np.testing.assert_allclose(sample.intrinsics, k, rtol=1e-12)
    assert sample.metric


def from_matrix(matrix: np.ndarray) -> list[float]:
    """The quaternion of a rotation: the eigenvector of its axis, the angle from its trace."""
    values, vectors = np.linalg.eig(matrix)
    axis = np.real(vectors[:, np.argmin(np.abs(values - 1))])
    skew = matrix - matrix.T
    sine = axis @ [skew[2, 1], skew[0, 2], skew[1, 0]] / 2
    return quaternion(tuple(axis), math.atan2(sine, (np.trace(matrix) - 1) / 2))
