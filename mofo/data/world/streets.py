"""Generated streets: a road between rows of houses, cars, trees, lamp posts; five ways to look."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np

from mofo.data.world.furniture import ball, box, cylinder
from mofo.data.world.raycast import SIDEWAYS, Camera, Light, Shape
from mofo.data.world.staging import Draw, Scene, Thing, carpet, mix, panel, placed, solid
from mofo.data.world.textures import Material

PAINTS = ("red", "yellow", "blue", "white", "green", "orange", "black", "pink")
HOUSES = ("white", "beige", "yellow", "pink", "blue", "orange", "grey", "brick")
DOORS = ("red", "green", "blue", "brown", "white")
ROOFS = ("brown", "red", "grey", "black")
ROW = ("house", "house", "house", "tower", "trees", "hedge")
ROW_LENGTH = 4
KERBSIDE = ("car", "car", "bus", "tree", "tree", "lamp post", "none", "none")
KERBSIDE_LENGTH = 6
ENDS = ("open", "open", "closed")
WEATHER = ("clear", "clear", "cloudy", "sunset")
VIEWS = ("road", "pavement", "across", "above", "near")
TRIES = 6
DEEP = 8.0  # metres from the front of a building to its back

prism = partial(solid, "prism")


def compose_street(draw: Draw) -> Scene:
    """A street along z; the camera stands near z = 0."""
    road, walk = draw.held(5.5, 9.5), draw.held(1.8, 3.5)

    def propose() -> tuple[str, ...]:
        rows = (draw.pick(ROW) for _ in range(2 * ROW_LENGTH))
        kerbside = (draw.pick(KERBSIDE) for _ in range(KERBSIDE_LENGTH))
        return (*rows, *kerbside, draw.pick(ENDS))

    scene = Scene(kind="street", arrangement=draw.arrange(propose))
    rows, kerbside = scene.arrangement[: 2 * ROW_LENGTH], scene.arrangement[2 * ROW_LENGTH : -1]
    _add_light(draw, scene)
    _add_ground(draw, scene, road, walk)
    _add_row(draw, scene, -1, road / 2 + walk, rows[:ROW_LENGTH])
    _add_row(draw, scene, 1, road / 2 + walk, rows[ROW_LENGTH:])
    if scene.arrangement[-1] == "closed":
        _add_building(
            draw, scene, "house", 0.0, draw.held(20.0, 60.0), np.pi, draw.uniform(9.0, 14.0)
        )
    spots = _add_kerbside(draw, scene, road, walk, kerbside)
    scene.cameras = [_aim(draw, road, walk, spots) for _ in range(TRIES)]
    return scene


def _add_light(draw: Draw, scene: Scene) -> None:
    weather, angle, tone = draw.pick(WEATHER), draw.uniform(-np.pi, np.pi), draw.held(0.9, 1.05)
    low, high, sun, ambient, horizon, zenith = {
        "clear": (
            0.6,
            1.2,
            (0.62, 0.6, 0.54),
            (0.36, 0.39, 0.45),
            (0.75, 0.88, 0.98),
            (0.25, 0.5, 0.92),
        ),
        "cloudy": (
            1.1,
            1.2,
            (0.16, 0.16, 0.16),
            (0.55, 0.56, 0.58),
            (0.86, 0.87, 0.88),
            (0.66, 0.68, 0.72),
        ),
        "sunset": (
            0.25,
            0.45,
            (0.6, 0.42, 0.25),
            (0.34, 0.31, 0.38),
            (0.98, 0.72, 0.42),
            (0.55, 0.35, 0.55),
        ),
    }[weather]
    height = draw.uniform(low, high)
    flat = math.cos(height)
    place = (flat * math.sin(angle), math.sin(height), flat * math.cos(angle))
    scene.lights.append(Light(place=place, colour=sun, sun=True))
    scene.ambient, scene.sky = ambient, (horizon, mix(zenith, tone))
    scene.surroundings.append((f"a {weather} sky", {-1}))


def _leaves(draw: Draw, low: float, high: float) -> Material:
    green = draw.shade("green")
    return Material(
        pattern="noise", colour=green, accent=mix(green, 0.55), period=draw.held(low, high)
    )


def _add_ground(draw: Draw, scene: Scene, road: float, walk: float) -> None:
    grass = replace(_leaves(draw, 3.0, 5.0), accent=(0.35, 0.62, 0.25))
    asphalt = Material(
        pattern="dashes",
        colour=mix(draw.shade("grey"), 0.7),
        accent=(0.95, 0.95, 0.9),
        period=draw.held(4.0, 6.0),
    )
    stone = draw.shade("grey")
    paving = Material(
        pattern="tiles", colour=mix(stone, 1.35), accent=stone, period=draw.held(0.9, 1.6)
    )
    scene.shapes += [
        carpet(0.0, 0.0, 0.0, 300.0, 300.0, grass),
        carpet(0.0, 0.01, 0.0, road, 240.0, asphalt),
    ]
    for side in (-1, 1):
        kerb = box(side * (road + walk) / 2, 0.0, 0.0, walk, 0.14, 240.0, paving)
        scene.shapes.append(replace(kerb, casts=False))


def _add_row(draw: Draw, scene: Scene, side: int, edge: float, kinds: tuple[str, ...]) -> None:
    z = draw.held(-14.0, -6.0)
    for kind in kinds:
        length = draw.held(8.0, 16.0)
        if kind in ("house", "tower"):
            yaw = -side * np.pi / 2
            _add_building(draw, scene, kind, side * edge, z + length / 2, yaw, length)
        elif kind == "hedge":
            leaf, h = _leaves(draw, 1.4, 2.4), draw.uniform(1.2, 2.2)
            hedge = box(side * (edge + 0.5), 0.0, z + length / 2, 1.0, h, length, leaf)
            scene.add(Thing(look="green", noun="hedge"), [hedge])
        else:
            for share in (0.25, 0.75):
                x = side * (edge + draw.uniform(1.5, 4.0))
                _add_tree(draw, scene, x, z + length * share, 1.3)
        z += length + draw.pick((0.0, 0.0, 3.0))


def _add_building(
    draw: Draw, scene: Scene, kind: str, x: float, z: float, yaw: float, length: float
) -> None:
    """A building whose front, of the given length, has its middle at (x, z) and faces `yaw`."""
    name, pitch = draw.pick(HOUSES), draw.held(2.5, 3.3)
    storeys = draw.pick((2, 2, 3)) if kind == "house" else draw.pick((5, 6, 7))
    height, columns = storeys * pitch, max(int(length / pitch), 1)
    pattern = "office" if kind == "tower" else ("facade", "facade_odd")[columns % 2]
    colour = mix((0.64, 0.27, 0.2), draw.held(0.85, 1.15)) if name == "brick" else draw.shade(name)
    wall = Material(
        pattern=pattern + "_brick" if name == "brick" else pattern,
        colour=colour,
        accent=draw.pick(((0.16, 0.22, 0.32), (0.45, 0.62, 0.78))),
        period=pitch,
    )
    roof = Material(colour=draw.shade(draw.pick(ROOFS)))
    door = Material(pattern="panel", colour=draw.shade(draw.pick(DOORS)), accent=(0.2, 0.15, 0.12))
    wide = columns * pitch
    doorway = pitch / 2 if columns % 2 == 0 else 0.0  # below a window, never across two
    parts = [
        box(0.0, 0.0, -DEEP / 2, wide, height, DEEP, wall),
        panel(doorway, 1.15, 0.02, 1.3, 2.3, door),
    ]
    if kind == "house":
        ridge = prism(0.0, height, 0.0, DEEP + 0.8, 2.6, wide + 0.4, roof)
        parts.append(replace(placed(ridge, np.pi / 2, 0.0, -DEEP / 2)))
    else:
        parts.append(box(0.0, height, -DEEP / 2, wide + 0.4, 0.5, DEEP + 0.4, roof))
    scene.add(Thing(look=name, noun=kind), [placed(part, yaw, x, z) for part in parts])


def _add_tree(draw: Draw, scene: Scene, x: float, z: float, scale: float) -> None:
    h, w = draw.uniform(1.6, 2.4) * scale, draw.uniform(2.0, 3.0) * scale
    thick, trunk = 0.35 * scale, Material(colour=draw.shade("brown"))
    parts = [
        cylinder(x, 0.0, z, thick, h + 0.5, thick, trunk),
        ball(x, h, z, w, w * draw.uniform(0.9, 1.4), w, _leaves(draw, 1.6, 2.6)),
    ]
    scene.add(Thing(look="", noun="tree"), parts)


def _wheels(x: float, z: float, radius: float) -> list[Shape]:
    tyre = Material(colour=(0.08, 0.08, 0.08))
    half = (radius, 0.11, radius)
    return [
        Shape(
            form="cylinder", centre=(i * x, radius, j * z), half=half, axes=SIDEWAYS, material=tyre
        )
        for i in (-1, 1)
        for j in (-1, 1)
    ]


def _car(draw: Draw) -> tuple[Thing, list[Shape]]:
    name = draw.pick(PAINTS)
    paint = Material(colour=draw.shade(name), gloss=0.4)
    glass = Material(colour=(0.25, 0.33, 0.42), gloss=0.4)
    front, rear = Material(colour=(0.98, 0.95, 0.7)), Material(colour=(0.9, 0.1, 0.05))
    parts = [
        box(0.0, 0.32, 0.0, 1.75, 0.55, 4.1, paint),
        box(0.0, 0.87, -0.2, 1.5, 0.5, 2.1, glass),
        box(0.0, 1.35, -0.2, 1.52, 0.08, 2.0, paint),
        *[box(i * 0.6, 0.55, 2.06, 0.35, 0.18, 0.02, front) for i in (-1, 1)],
        *[box(i * 0.6, 0.55, -2.06, 0.35, 0.18, 0.02, rear) for i in (-1, 1)],
        *_wheels(0.82, 1.25, 0.34),
    ]
    return Thing(look=name, noun="car"), parts


def _bus(draw: Draw) -> tuple[Thing, list[Shape]]:
    name, length = draw.pick(PAINTS), draw.uniform(6.0, 9.0)
    paint = Material(colour=draw.shade(name), gloss=0.3)
    parts = [
        box(0.0, 0.35, 0.0, 2.2, 1.1, length, paint),
        box(0.0, 1.45, 0.0, 2.16, 0.8, length - 0.06, Material(colour=(0.25, 0.35, 0.45))),
        box(0.0, 2.25, 0.0, 2.2, 0.45, length, paint),
        *_wheels(1.02, length * 0.3, 0.48),
    ]
    return Thing(look=name, noun="bus"), parts


def _lamp_post(draw: Draw, side: int) -> tuple[Thing, list[Shape]]:
    pole, h = Material(colour=draw.shade("black")), draw.uniform(3.6, 5.0)
    bulb = Material(colour=(0.98, 0.93, 0.65), glows=True)
    parts = [
        cylinder(0.0, 0.0, 0.0, 0.2, h, 0.2, pole),
        box(-side * 0.5, h, 0.0, 1.2, 0.12, 0.14, pole),
        ball(-side * 0.9, h - 0.32, 0.0, 0.5, 0.36, 0.5, bulb),
    ]
    return Thing(look="", noun="lamp post"), parts


def _add_kerbside(
    draw: Draw, scene: Scene, road: float, walk: float, kinds: tuple[str, ...]
) -> list[tuple[float, float]]:
    """Cars at the kerb or in a lane, trees and lamp posts beside; returns where the cars are."""
    spots = []
    for i, kind in enumerate(kinds):
        side, z = 1 if i % 2 else -1, draw.held(3.0, 12.0) + 11 * (i // 2)
        if kind in ("car", "bus"):
            x = side * (road / 2 - 1.3 if draw.chance(0.7) else road / 4)
            thing, parts = (_car if kind == "car" else _bus)(draw)
            scene.add(thing, [placed(part, np.pi if side < 0 else 0.0, x, z) for part in parts])
            spots.append((x, z))
        elif kind == "tree":
            _add_tree(draw, scene, side * (road / 2 + min(walk * 0.5, 1.2)), z, 0.9)
        elif kind == "lamp post":
            thing, parts = _lamp_post(draw, side)
            scene.add(thing, [placed(part, 0.0, side * (road / 2 + 0.4), z) for part in parts])
    return spots


def _aim(draw: Draw, road: float, walk: float, spots: list[tuple[float, float]]) -> Camera:
    view, side, fov = draw.pick(VIEWS), draw.pick((-1, 1)), np.radians(draw.held(40.0, 65.0))
    yaw, pitch, z = draw.held(-0.3, 0.3), draw.held(-0.12, 0.1), draw.held(-3.0, 2.0)
    if view == "road":
        x, y = draw.uniform(-0.25, 0.25) * road, draw.held(1.2, 2.0)
    elif view == "pavement":
        x, y = side * (road / 2 + walk * draw.uniform(0.3, 0.7)), draw.held(1.3, 1.9)
        yaw -= side * draw.held(-0.1, 0.3)
    elif view == "across":
        x, y = -side * (road / 2 + walk * draw.uniform(0.2, 0.6)), draw.held(1.2, 2.2)
        yaw, z = side * draw.held(0.75, 1.65), draw.held(0.0, 12.0)
    elif view == "above":
        x, y = draw.uniform(-0.5, 0.5) * road, draw.held(3.5, 8.0)
        yaw, pitch = draw.held(-0.9, 0.9), draw.held(-0.6, -0.2)
    else:
        spot = draw.pick(spots) if spots else (0.0, 8.0)
        angle, reach, edge = draw.held(-1.2, 1.2), draw.uniform(3.6, 7.0), road / 2 + walk - 0.5
        x = min(max(spot[0] - reach * np.sin(angle), -edge), edge)
        y, z = draw.held(0.9, 2.0), spot[1] - reach * np.cos(angle)
        yaw = np.arctan2(spot[0] - x, spot[1] - z) + draw.held(-0.25, 0.25)
    return Camera(place=(float(x), y, float(z)), yaw=float(yaw), pitch=pitch, fov=float(fov))
