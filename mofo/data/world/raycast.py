"""A small numpy ray caster: solids with textures, lamps and a sun with shadows, exact z-depth.

World: x right, y up, z forward; the ground is y = 0; metres. A camera ray is `axes @ (x, y, 1)`,
the optical axis third, so its parameter t *is* the z-depth. Pixel (row i, column j) has its centre
at (j + 0.5, i + 0.5); its colour is the mean over a centre ray and a 2x2 pattern, its depth that of
the centre ray alone. Colours are in 0..1 as displayed, and squared for the arithmetic of light.

Speed comes from windows: a shape, or its shadow, is tested only against the pixels of its bounding
rectangle.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int, UInt8

from mofo.data.world.forms import MEET, face
from mofo.data.world.textures import Material, paint

Vector = tuple[float, float, float]
Window = tuple[slice, slice]

# The centre ray first: it alone measures depth.
SAMPLES = np.array([(0.5, 0.5), (0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)], np.float32)
NEAR = 0.05  # metres; nearer than any scene lets its camera come
HAZE = 0.004  # per metre, towards the colour of the horizon: far streets look far
RAISE = 2e-3  # metres that a shadow ray starts above its surface
SHADOW_REACH = 50.0
CORNERS = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)


def turn(yaw: float) -> Float64[np.ndarray, "3 3"]:
    """Axes (columns) of a frame turned by `yaw` radians about the vertical, from z towards x."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


# Local y (a quad's normal, a cylinder's axis) along the world's z or x instead.
UPRIGHT = np.array([[1.0, 0, 0], [0, 0, 1], [0, 1, 0]])
SIDEWAYS = np.array([[0, 1.0, 0], [0, 0, 1], [1, 0, 0]])


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A unit solid stretched by `half` along the columns of `axes` and moved to `centre`.

    `form` is one of `forms.MEET`; `owner` numbers the thing it is a part of, -1 for none.
    """

    form: str
    centre: Vector
    half: Vector
    material: Material
    axes: Float64[np.ndarray, "3 3"] = field(default_factory=lambda: np.eye(3))
    owner: int = -1
    casts: bool = True


@dataclass(frozen=True, kw_only=True)
class Light:
    """A lamp at `place`, or with `sun` a light infinitely far in the direction of `place`."""

    place: Vector
    colour: Vector
    sun: bool = False
    reach: float = 4.0


@dataclass(frozen=True, kw_only=True)
class Camera:
    """`yaw` from z towards x and `pitch` upwards, radians; `fov` is vertical, radians."""

    place: Vector
    yaw: float
    pitch: float
    fov: float

    @property
    def axes(self) -> Float64[np.ndarray, "3 3"]:
        """Columns: right, down and forward in the world."""
        cy, sy, cp, sp = np.cos(self.yaw), np.sin(self.yaw), np.cos(self.pitch), np.sin(self.pitch)
        right, up, forward = (cy, 0, -sy), (-sy * sp, cp, -cy * sp), (sy * cp, sp, cy * cp)
        return np.stack([right, np.negative(up), forward], 1)

    def intrinsics(self, size: tuple[int, int]) -> Float64[np.ndarray, "3 3"]:
        h, w = size
        focal = h / 2 / np.tan(self.fov / 2)
        return np.array([[focal, 0, w / 2], [0, focal, h / 2], [0, 0, 1]])


@dataclass(frozen=True, kw_only=True)
class View:
    """What a camera sees; pixels per thing: `seen` where it is hit first, `covered` at all."""

    image: UInt8[np.ndarray, "h w 3"]
    metres: Float32[np.ndarray, "h w"]
    shape: Int[np.ndarray, "h w"]
    seen: dict[int, int]
    covered: dict[int, int]


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """What the passes over one picture share."""

    shapes: list[Shape]
    camera: Camera
    size: tuple[int, int]
    rays: Float32[np.ndarray, "3 h w s"]
    centres: Float64[np.ndarray, "n 3"]
    to_local: Float64[np.ndarray, "n 3 3"]
    corners: Float64[np.ndarray, "n 8 3"]


def render(
    shapes: list[Shape],
    lights: list[Light],
    camera: Camera,
    *,
    ambient: Vector,
    sky: tuple[Vector, Vector],
    size: tuple[int, int],
) -> View:
    """Colour, z-depth (0 where nothing is hit) and shape number (-1 there) of each pixel.

    `sky` is the colour of the horizon and of the zenith.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        stage = _set_up(shapes, camera, size)
        depth, index, covered = _cast(stage)
        shown = _shade(stage, lights, depth, index, ambient=ambient, sky=sky)
    middle = index[..., 0]
    owners = np.array([shape.owner for shape in shapes] + [-1])[middle]
    counts = np.bincount(owners.reshape(-1) + 1)
    return View(
        image=np.rint(shown * 255).astype(np.uint8).transpose(1, 2, 0),
        metres=np.where(middle >= 0, depth[..., 0], 0).astype(np.float32),
        shape=middle,
        seen={owner - 1: int(count) for owner, count in enumerate(counts) if count},
        covered=covered,
    )


def _set_up(shapes: list[Shape], camera: Camera, size: tuple[int, int]) -> _Stage:
    h, w = size
    rays = np.ones((3, h, w, len(SAMPLES)), np.float32)
    focal = h / 2 / np.tan(camera.fov / 2)
    rays[0] = (np.arange(w)[None, :, None] + SAMPLES[:, 0] - w / 2) / focal
    rays[1] = (np.arange(h)[:, None, None] + SAMPLES[:, 1] - h / 2) / focal
    centres = np.array([shape.centre for shape in shapes], float)
    half = np.array([shape.half for shape in shapes], float)
    axes = np.stack([shape.axes for shape in shapes])
    return _Stage(
        shapes=shapes,
        camera=camera,
        size=size,
        rays=_apply(camera.axes, rays),
        centres=centres,
        to_local=axes.transpose(0, 2, 1) / half[:, :, None],
        corners=centres[:, None] + (CORNERS * half[:, None]) @ axes.transpose(0, 2, 1),
    )


def _apply(matrix: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    return (matrix.astype(np.float32) @ vectors.reshape(3, -1)).reshape(vectors.shape)


def _column(vector: np.ndarray, like: np.ndarray) -> np.ndarray:
    return vector.astype(np.float32).reshape(3, *(1,) * (like.ndim - 1))


def _windows(
    corners: Float64[np.ndarray, "n m 3"], camera: Camera, size: tuple[int, int]
) -> list[Window | None]:
    """Rows and columns of pixels that can see each convex hull of corners; None without any."""
    h, w = size
    x, y, z = np.moveaxis((corners - np.array(camera.place)) @ camera.axes, -1, 0)
    focal = h / 2 / np.tan(camera.fov / 2)
    u, v = x / z * focal + w / 2, y / z * focal + h / 2
    bounds = np.stack([v.min(1) - 1, v.max(1) + 2, u.min(1) - 1, u.max(1) + 2], 1)
    # A hull that crosses the plane of the camera may be anywhere in the picture.
    bounds = np.where((z.min(1) < NEAR)[:, None], (0, h, 0, w), bounds)
    bounds = np.clip(bounds, 0, (h, h, w, w)).astype(int)
    hidden = z.max(1) < NEAR
    return [
        None if gone or top >= bottom or left >= right else (slice(top, bottom), slice(left, right))
        for gone, (top, bottom, left, right) in zip(hidden.tolist(), bounds.tolist(), strict=True)
    ]


def _cast(
    stage: _Stage,
) -> tuple[Float32[np.ndarray, "h w s"], Int[np.ndarray, "h w s"], dict[int, int]]:
    """Depth and number of the shape each ray hits first, and pixels that each thing covers."""
    depth = np.full(stage.rays.shape[1:], np.inf, np.float32)
    index = np.full(depth.shape, -1, np.int16)
    covered: dict[int, int] = {}
    eye = np.array(stage.camera.place, float)
    windows = _windows(stage.corners, stage.camera, stage.size)
    for number, (shape, window) in enumerate(zip(stage.shapes, windows, strict=True)):
        if window is None:
            continue
        matrix = stage.to_local[number]
        part = stage.rays[:, *window]
        start = _column(matrix @ (eye - stage.centres[number]), part)
        t = MEET[shape.form](start, _apply(matrix, part))
        if shape.owner >= 0:
            touched = int(np.count_nonzero(t[..., 0] < np.inf))
            covered[shape.owner] = covered.get(shape.owner, 0) + touched
        nearer = t < depth[window]
        np.copyto(depth[window], t, where=nearer)
        np.copyto(index[window], number, where=nearer)
    return depth, index, covered


def _shade(
    stage: _Stage,
    lights: list[Light],
    depth: Float32[np.ndarray, "h w s"],
    index: Int[np.ndarray, "h w s"],
    *,
    ambient: Vector,
    sky: tuple[Vector, Vector],
) -> Float32[np.ndarray, "3 h w"]:
    rays, hit = stage.rays, index >= 0
    reach = np.where(hit, depth, 1)
    points = rays * reach + _column(np.array(stage.camera.place), rays)
    pixel = 2 * np.tan(stage.camera.fov / 2) / stage.size[0]
    albedo, normal, gloss, glow = _surface(stage, points, reach * np.float32(pixel), index)
    light = np.array(ambient, np.float32)[:, None] * (0.85 + 0.15 * normal[1])
    shine = np.zeros_like(gloss)
    for lamp in lights:
        lit, flash = _illuminate(stage, lamp, points, normal, gloss)
        light += np.array(lamp.colour, np.float32)[:, None] * lit
        shine += flash
    light[:, glow] = 1
    linear = (albedo * albedo * light + shine * gloss).reshape(rays.shape)

    horizon, zenith = (_column(np.array(colour) ** 2, rays) for colour in sky)
    up = np.clip(rays[1] / np.sqrt((rays * rays).sum(0)) * 1.6, 0, 1)
    air = horizon + (zenith - horizon) * up
    clear = np.where(hit, np.exp(-HAZE * reach), 0)
    return np.sqrt(np.clip(air + (linear - air) * clear, 0, 1).mean(-1))


def _surface(
    stage: _Stage,
    points: Float32[np.ndarray, "3 h w s"],
    footprint: Float32[np.ndarray, "h w s"],
    index: Int[np.ndarray, "h w s"],
) -> tuple[
    Float32[np.ndarray, "3 n"],
    Float32[np.ndarray, "3 n"],
    Float32[np.ndarray, " n"],
    Bool[np.ndarray, " n"],
]:
    """Colour, unit normal towards the viewer, gloss and glow of each hit; 0 where there is none."""
    flat, count = index.reshape(-1), index.size
    points, footprint = points.reshape(3, -1), footprint.reshape(-1)
    rays = stage.rays.reshape(3, -1)
    albedo, normal = np.zeros((3, count), np.float32), np.zeros((3, count), np.float32)
    gloss, glow = np.zeros(count, np.float32), np.zeros(count, bool)
    order = np.argsort(flat, kind="stable")
    ends = np.cumsum(np.bincount(flat + 1, minlength=len(stage.shapes) + 1))
    for number, shape in enumerate(stage.shapes):
        picked = order[ends[number] : ends[number + 1]]
        if not len(picked):
            continue
        matrix = stage.to_local[number].astype(np.float32)
        seen = points[:, picked]
        local = matrix @ (seen - _column(stage.centres[number], seen))
        facing, u, v = face(shape.form, shape.half, local)
        outward = matrix.T @ facing
        outward /= np.sqrt((outward**2).sum(0))
        slant = (outward * rays[:, picked]).sum(0)
        if shape.form == "quad":
            outward *= -np.sign(slant)
        normal[:, picked] = outward
        spread = footprint[picked] / np.clip(np.abs(slant), 0.2, 1)
        albedo[:, picked] = paint(shape.material, u, v, spread, shape.half)
        gloss[picked] = shape.material.gloss
        glow[picked] = shape.material.glows
    return albedo, normal, gloss, glow


def _illuminate(
    stage: _Stage,
    lamp: Light,
    points: Float32[np.ndarray, "3 h w s"],
    normal: Float32[np.ndarray, "3 n"],
    gloss: Float32[np.ndarray, " n"],
) -> tuple[Float32[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
    """Diffuse and specular light of one lamp at each hit, 0 in shadow."""
    place, flat = np.array(lamp.place, np.float32)[:, None], points.reshape(3, -1)
    towards = place if lamp.sun else place - flat
    distance2 = (towards * towards).sum(0)
    unit = towards / np.sqrt(distance2)
    lit = np.maximum((normal * unit).sum(0), 0)
    if not lamp.sun:
        lit *= 2 / (1 + distance2 / np.float32(lamp.reach**2))
    lit *= ~_shadow(stage, lamp, points + RAISE * normal.reshape(points.shape)).reshape(-1)
    shine = np.zeros_like(lit)
    shiny = np.flatnonzero((gloss > 0) & (lit > 0))
    view = -stage.rays.reshape(3, -1)[:, shiny]
    middle = (unit if lamp.sun else unit[:, shiny]) + view / np.sqrt((view * view).sum(0))
    cosine = (normal[:, shiny] * middle).sum(0) / np.sqrt((middle * middle).sum(0) + 1e-6)
    shine[shiny] = np.maximum(cosine, 0) ** 40
    return lit, shine


def _shadow(
    stage: _Stage, lamp: Light, points: Float32[np.ndarray, "3 h w s"]
) -> Bool[np.ndarray, "h w s"]:
    """Which points a shape hides from the lamp."""
    place = np.array(lamp.place, float)
    away = np.broadcast_to(-place, stage.corners.shape) if lamp.sun else stage.corners - place
    # The hull of a shape and of its shadow on the ground, or far out if that never lands.
    fall = -away[..., 1:2]
    reach = np.where(fall > 1e-3, stage.corners[..., 1:2] / fall, SHADOW_REACH)
    landed = stage.corners + np.clip(reach, 0, SHADOW_REACH) * away
    windows = _windows(np.concatenate([stage.corners, landed], 1), stage.camera, stage.size)
    shadow = np.zeros(points.shape[1:], bool)
    for number, (shape, window) in enumerate(zip(stage.shapes, windows, strict=True)):
        if window is None or not shape.casts:
            continue
        matrix, part = stage.to_local[number], points[:, *window]
        start = _apply(matrix, part) - _column(matrix @ stage.centres[number], part)
        target = _column(matrix @ (place if lamp.sun else place - stage.centres[number]), part)
        t = MEET[shape.form](start, target if lamp.sun else target - start)
        shadow[window] |= t < (np.inf if lamp.sun else 1)
    return shadow
