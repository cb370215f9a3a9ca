"""Furniture of generated rooms: each piece stands on the floor around the origin and faces +z."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from mofo.data.world.raycast import Shape
from mofo.data.world.staging import Draw, Thing, mix, solid
from mofo.data.world.textures import Material

BRIGHT = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
BOLD = (*BRIGHT, "brown", "white", "black", "grey")

box = partial(solid, "box")
cylinder = partial(solid, "cylinder")
ball = partial(solid, "ball")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Its parts, half its footprint and its height."""

    thing: Thing
    parts: list[Shape]
    half: tuple[float, float]
    top: float


def piece(look: str, noun: str, parts: list[Shape], w: float, d: float, top: float) -> Piece:
    """A piece of full width and depth."""
    return Piece(thing=Thing(look=look, noun=noun), parts=parts, half=(w / 2, d / 2), top=top)


def wooden(draw: Draw, low: float = 0.25, high: float = 0.45) -> Material:
    """Planks between `low` and `high` metres wide."""
    dark = draw.shade("brown")
    return Material(
        pattern="wood", colour=mix(dark, 1.5, 0.05), accent=dark, period=draw.held(low, high)
    )


def _plain(draw: Draw, name: str) -> Material:
    return Material(colour=draw.shade(name))


def _finish(draw: Draw) -> tuple[str, Material]:
    if draw.chance(0.45):
        return "wooden", wooden(draw)
    name = draw.pick(("white", "black", "red", "yellow", "blue", "green"))
    return name, Material(colour=draw.shade(name), gloss=0.15)


def _cloth(draw: Draw) -> tuple[str, Material]:
    name = draw.pick(BOLD)
    cloth = _plain(draw, name)
    if not draw.chance(0.2):
        return name, cloth
    accent = draw.shade("white" if name != "white" else "grey")
    period = draw.held(0.35, 0.7)
    return "striped", replace(cloth, pattern="stripes", accent=accent, period=period)


def _sofa(draw: Draw) -> Piece:
    look, cloth = _cloth(draw)
    w, d = draw.uniform(1.5, 2.2), 0.9
    parts = [
        box(0.0, 0.1, 0.1, w, 0.32, d - 0.2, cloth),
        box(0.0, 0.1, -d / 2 + 0.12, w, 0.75, 0.24, cloth),
        box(-w / 2 + 0.1, 0.1, 0.0, 0.2, 0.52, d, cloth),
        box(w / 2 - 0.1, 0.1, 0.0, 0.2, 0.52, d, cloth),
    ]
    return piece(look, "sofa", parts, w, d, 0.85)


def _bed(draw: Draw) -> Piece:
    look, cloth = _cloth(draw)
    w, d = draw.uniform(1.1, 1.7), 2.0
    frame, sheet = wooden(draw), _plain(draw, "white")
    parts = [
        box(0.0, 0.1, 0.0, w, 0.2, d, frame),
        box(0.0, 0.3, 0.25, w + 0.04, 0.24, d - 0.5, cloth),
        box(0.0, 0.3, -d / 2 + 0.25, w, 0.2, 0.5, sheet),
        box(0.0, 0.5, -d / 2 + 0.3, w * 0.8, 0.14, 0.36, sheet),
        box(0.0, 0.0, -d / 2 + 0.04, w + 0.06, 1.0, 0.08, frame),
    ]
    return piece(look, "bed", parts, w, d, 1.0)


def _legs(w: float, d: float, h: float, thick: float, material: Material) -> list[Shape]:
    x, z = w / 2 - thick / 2, d / 2 - thick / 2
    return [box(i * x, 0.0, j * z, thick, h, thick, material) for i in (-1, 1) for j in (-1, 1)]


def _table(draw: Draw) -> Piece:
    look, material = _finish(draw)
    h, d = draw.uniform(0.5, 0.8), draw.uniform(0.7, 1.1)
    if draw.chance(0.3):
        parts = [
            cylinder(0.0, h - 0.06, 0.0, d, 0.06, d, material),
            cylinder(0.0, 0.0, 0.0, 0.12, h - 0.06, 0.12, material),
            cylinder(0.0, 0.0, 0.0, d * 0.5, 0.05, d * 0.5, material),
        ]
        return piece(look, "table", parts, d, d, h)
    w = draw.uniform(1.0, 1.7)
    board = box(0.0, h - 0.07, 0.0, w, 0.07, d, material)
    return piece(look, "table", [board, *_legs(w, d, h - 0.07, 0.09, material)], w, d, h)


def _chair(draw: Draw) -> Piece:
    look, material = _finish(draw)
    w, h = draw.uniform(0.45, 0.55), 0.45
    parts = [
        box(0.0, h - 0.07, 0.0, w, 0.09, w, material),
        box(0.0, h, -w / 2 + 0.04, w, draw.uniform(0.45, 0.6), 0.08, material),
        *_legs(w, w, h - 0.06, 0.07, material),
    ]
    return piece(look, "chair", parts, w, w, 1.0)


def _shelf(draw: Draw) -> Piece:
    look, material = _finish(draw)
    w, d, boards = draw.uniform(0.9, 1.5), 0.35, 4
    gap = draw.uniform(0.4, 0.48)
    h = boards * gap + 0.05
    parts = [
        box(0.0, 0.0, -d / 2 + 0.02, w, h, 0.04, material),
        box(-w / 2 + 0.03, 0.0, 0.0, 0.06, h, d, material),
        box(w / 2 - 0.03, 0.0, 0.0, 0.06, h, d, material),
        *[box(0.0, i * gap, 0.0, w, 0.06, d, material) for i in range(boards + 1)],
    ]
    for i in range(boards):
        if draw.chance(0.8):
            length = w * draw.uniform(0.35, 0.85)
            x = draw.uniform(-1.0, 1.0) * (w - length - 0.12) / 2
            first, second = draw.shade(draw.pick(BRIGHT)), draw.shade(draw.pick(BRIGHT))
            books = Material(
                pattern="stripes", colour=first, accent=second, period=draw.held(0.25, 0.35)
            )
            parts.append(box(x, i * gap + 0.06, 0.0, length, gap * 0.68, d * 0.7, books))
    return piece(look, "shelf", parts, w, d, h)


def _cabinet(draw: Draw) -> Piece:
    look, material = _finish(draw)
    w, d, h = draw.uniform(0.8, 1.5), draw.uniform(0.45, 0.6), draw.uniform(0.8, 2.0)
    dark, knob = Material(colour=mix(material.colour, 0.5)), _plain(draw, "black")
    parts = [
        box(0.0, 0.0, 0.0, w, h, d, material),
        box(0.0, 0.06, d / 2, 0.035, h - 0.12, 0.02, dark),
        box(-0.1, h * 0.5, d / 2, 0.05, 0.16, 0.06, knob),
        box(0.1, h * 0.5, d / 2, 0.05, 0.16, 0.06, knob),
    ]
    return piece(look, "cabinet", parts, w, d, h)


def _lamp(draw: Draw) -> Piece:
    name = draw.pick(("white", "yellow", "red", "orange"))
    pole, h = _plain(draw, "black"), draw.uniform(1.2, 1.7)
    parts = [
        cylinder(0.0, 0.0, 0.0, 0.34, 0.05, 0.34, pole),
        cylinder(0.0, 0.0, 0.0, 0.07, h, 0.07, pole),
        cylinder(0.0, h - 0.1, 0.0, 0.46, 0.36, 0.46, replace(_plain(draw, name), glows=True)),
    ]
    return piece(name, "lamp", parts, 0.5, 0.5, h + 0.3)


def _plant(draw: Draw) -> Piece:
    green = draw.shade("green")
    leaf = Material(
        pattern="noise", colour=green, accent=mix(green, 0.5), period=draw.held(0.5, 0.9)
    )
    pot, r = _plain(draw, draw.pick(("red", "white", "brown", "blue"))), draw.uniform(0.28, 0.42)
    parts = [
        cylinder(0.0, 0.0, 0.0, 0.36, 0.36, 0.36, pot),
        cylinder(0.0, 0.3, 0.0, 0.07, 0.4, 0.07, _plain(draw, "brown")),
        ball(0.0, 0.5, 0.0, 2 * r, 2.4 * r, 2 * r, leaf),
    ]
    return piece("", "plant", parts, 2 * r, 2 * r, 1.5)


def _ball(draw: Draw) -> Piece:
    name, side = draw.pick(BRIGHT), draw.uniform(0.36, 0.8)
    material = replace(_plain(draw, name), gloss=0.5)
    if draw.chance(0.3):
        stripe = draw.shade("white")
        material = replace(material, pattern="bands", accent=stripe, period=side / 2)
        name = "striped"
    return piece(name, "ball", [ball(0.0, 0.0, 0.0, side, side, side, material)], side, side, side)


def _box(draw: Draw) -> Piece:
    name, side = draw.pick(BOLD), draw.uniform(0.35, 0.7)
    h = side * draw.uniform(0.7, 1.2)
    parts = [box(0.0, 0.0, 0.0, side, h, side, _plain(draw, name))]
    return piece(name, "box", parts, side, side, h)


PIECES: dict[str, Callable[[Draw], Piece]] = {
    "sofa": _sofa,
    "bed": _bed,
    "table": _table,
    "chair": _chair,
    "shelf": _shelf,
    "cabinet": _cabinet,
    "lamp": _lamp,
    "plant": _plant,
    "ball": _ball,
    "box": _box,
}
