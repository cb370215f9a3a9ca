"""The unit solids: where a ray enters them, and what their faces look like from close by.

All live in a local frame in which they fill [-1, 1]: a ball of radius 1, a box, a cylinder along
y, a prism (a roof: its ridge along z), and a quad (y = 0). An affine map keeps the parameter t of
a ray, so one test serves every size.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32

ALONG_Y = np.array([[0], [1], [0]], np.float32)
ALONG_Z = np.array([[0], [0], [1]], np.float32)


def _slab(o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where a ray is within [-1, 1]: for d = 0 everywhere or nowhere, by the rules of infinity."""
    inverse = 1 / d
    first, second = (-1 - o) * inverse, (1 - o) * inverse
    return np.minimum(first, second), np.maximum(first, second)


def _finish(enter: np.ndarray, leave: np.ndarray) -> np.ndarray:
    return np.where((enter < leave) & (enter > 0), enter, np.float32(np.inf))


def _meet_box(o: np.ndarray, d: np.ndarray) -> np.ndarray:
    enter, leave = _slab(o, d)
    return _finish(enter.max(0), leave.min(0))


def _round(o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # The discriminant from the closest approach: b^2 - ac cancels in float32 for a small far ball.
    square = (d * d).sum(0)
    closest = -(o * d).sum(0) / square
    miss = o + closest * d
    half = np.sqrt(np.maximum(1 - (miss * miss).sum(0), 0) / square)
    return closest - half, closest + half


def _meet_ball(o: np.ndarray, d: np.ndarray) -> np.ndarray:
    return _finish(*_round(o, d))


def _meet_cylinder(o: np.ndarray, d: np.ndarray) -> np.ndarray:
    enter, leave = _slab(o[1], d[1])
    side_in, side_out = _round(o[::2], d[::2])
    return _finish(np.maximum(enter, side_in), np.minimum(leave, side_out))


def _meet_prism(o: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Planes: y > -1, |z| < 1 and 2|x| + y < 1, so the roof has the height of its box."""
    enter, leave = _slab(o[2], d[2])
    for distance, slope in (
        (-1 - o[1], -d[1]),
        (2 * o[0] + o[1] - 1, 2 * d[0] + d[1]),
        (-2 * o[0] + o[1] - 1, -2 * d[0] + d[1]),
    ):
        t = -distance / slope
        enter = np.where(slope < 0, np.maximum(enter, t), enter)
        leave = np.where(slope > 0, np.minimum(leave, t), leave)
    return _finish(enter, leave)


def _meet_quad(o: np.ndarray, d: np.ndarray) -> np.ndarray:
    t = -o[1] / d[1]
    inside = (np.abs(o[0] + t * d[0]) < 1) & (np.abs(o[2] + t * d[2]) < 1) & (t > 0)
    return np.where(inside, t, np.float32(np.inf))


MEET = {
    "box": _meet_box,
    "ball": _meet_ball,
    "cylinder": _meet_cylinder,
    "prism": _meet_prism,
    "quad": _meet_quad,
}


def face(
    form: str, half: tuple[float, float, float], local: Float32[np.ndarray, "3 n"]
) -> tuple[Float32[np.ndarray, "3 n"], Float32[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
    """Local normal, and metres along the face: u across, v up from the base (quad: the centre)."""
    x, y, z = local * np.asarray(half, np.float32)[:, None]
    up = y + np.float32(half[1])
    if form == "quad":
        return np.broadcast_to(ALONG_Y, local.shape), x, z
    if form == "ball":
        return local, np.arctan2(local[0], local[2]) * np.float32(half[0]), y
    if form == "cylinder":
        cap = np.abs(local[1]) > 0.999
        normal = np.where(cap, local * ALONG_Y, local * (1 - ALONG_Y))
        return normal, np.arctan2(local[0], local[2]) * np.float32(half[0]), up
    if form == "prism":
        gable = np.abs(local[2]) > 0.999
        side = np.sign(local[0])
        slope = np.stack([2 * side, np.ones_like(side), np.zeros_like(side)])
        normal = np.where(gable, np.sign(local) * ALONG_Z, slope)
        return normal, np.where(gable, x, z), up
    axis = np.abs(local).argmax(0)
    normal = np.where(axis == np.arange(3)[:, None], np.sign(local), 0).astype(np.float32)
    return normal, np.where(axis == 0, z, x), np.where(axis == 1, z, up)
