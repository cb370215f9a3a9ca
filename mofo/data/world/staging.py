"""What rooms and streets are built with: named colours, choices that keep the splits apart, scenes.

See `mofo.data.scenes` for what the splits promise.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from mofo.data.world.raycast import UPRIGHT, Camera, Light, Shape, turn
from mofo.data.world.textures import Colour, Material

Option = TypeVar("Option")

SPLITS = ("train", "test")
COLOURS: dict[str, Colour] = {
    "red": (0.80, 0.13, 0.12),
    "orange": (0.93, 0.50, 0.10),
    "yellow": (0.95, 0.80, 0.15),
    "green": (0.20, 0.60, 0.22),
    "blue": (0.15, 0.32, 0.78),
    "purple": (0.50, 0.22, 0.65),
    "pink": (0.95, 0.55, 0.68),
    "brown": (0.45, 0.27, 0.14),
    "white": (0.90, 0.90, 0.88),
    "grey": (0.50, 0.50, 0.52),
    "black": (0.12, 0.12, 0.13),
    "beige": (0.84, 0.75, 0.58),
}
TEETH, TEST_TEETH = 10, (2, 7)
TEST_SHARE = 5  # one arrangement in five is a test arrangement
THIN = 0.01  # a quad has no thickness, but its window is that of a box


class Draw:
    """Random choices of one scene; `held` and `arrange` make those that tell the splits apart."""

    def __init__(self, rng: np.random.Generator, split: str) -> None:
        self.rng, self.split = rng, split
        self.teeth = [i for i in range(TEETH) if (i in TEST_TEETH) == (split == "test")]

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.rng.random()

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def pick(self, options: Sequence[Option]) -> Option:
        return options[int(self.rng.random() * len(options))]

    def held(self, low: float, high: float) -> float:
        """Uniform over the teeth of [low, high) that the split owns."""
        return low + (high - low) * (self.pick(self.teeth) + self.uniform(0.001, 0.999)) / TEETH

    def arrange(self, propose: Callable[[], tuple[str, ...]]) -> tuple[str, ...]:
        """The first proposal that the split owns."""
        while True:
            arrangement = propose()
            if owner_of(arrangement) == self.split:
                return arrangement

    def shade(self, name: str) -> Colour:
        """An instance of a named colour: lighter or darker, warmer or cooler."""
        level, warmth = self.held(0.82, 1.1), self.held(-0.04, 0.04)
        r, g, b = COLOURS[name]
        return mix((r * level * (1 + warmth), g * level, b * level * (1 - warmth)), 1.0)


def owner_of(arrangement: tuple[str, ...]) -> str:
    """The split that an arrangement belongs to."""
    return SPLITS[zlib.crc32("|".join(arrangement).encode()) % TEST_SHARE == 0]


def mix(colour: Colour, scale: float, lift: float = 0.0) -> Colour:
    """Scaled, lifted and kept displayable."""
    r, g, b = (min(max(scale * channel + lift, 0.02), 0.98) for channel in colour)
    return r, g, b


@dataclass(frozen=True, kw_only=True)
class Thing:
    """Something a caption can name: its look ("red", "wooden", or none) and its noun."""

    look: str
    noun: str


@dataclass(kw_only=True)
class Scene:
    """What `compose` builds; `cameras` are tried in order."""

    kind: str
    arrangement: tuple[str, ...]
    shapes: list[Shape] = field(default_factory=list)
    things: list[Thing] = field(default_factory=list)
    lights: list[Light] = field(default_factory=list)
    ambient: Colour = (0.4, 0.4, 0.4)
    sky: tuple[Colour, Colour] = ((0.8, 0.9, 1.0), (0.3, 0.5, 0.9))
    # Phrases such as "blue walls", each with the shapes that must be seen for it (-1 is the sky).
    surroundings: list[tuple[str, set[int]]] = field(default_factory=list)
    cameras: list[Camera] = field(default_factory=list)

    def add(self, thing: Thing, parts: Sequence[Shape]) -> None:
        self.shapes += [replace(part, owner=len(self.things)) for part in parts]
        self.things.append(thing)


def solid(
    form: str, x: float, y: float, z: float, w: float, h: float, d: float, material: Material
) -> Shape:
    """A shape of full width, height and depth standing on height y."""
    centre, half = (x, y + h / 2, z), (w / 2, h / 2, d / 2)
    return Shape(form=form, centre=centre, half=half, material=material)


def carpet(x: float, y: float, z: float, w: float, d: float, material: Material) -> Shape:
    """A flat piece of ground, floor or ceiling."""
    centre, half = (x, y, z), (w / 2, THIN, d / 2)
    return Shape(form="quad", centre=centre, half=half, material=material, casts=False)


def panel(x: float, y: float, z: float, w: float, h: float, material: Material) -> Shape:
    """A flat piece of wall around (x, y, z), seen along z."""
    centre, half = (x, y, z), (w / 2, THIN, h / 2)
    return Shape(
        form="quad", centre=centre, half=half, axes=UPRIGHT, material=material, casts=False
    )


def placed(part: Shape, yaw: float, x: float, z: float) -> Shape:
    """The part turned about the vertical, then moved."""
    frame = turn(yaw)
    cx, cy, cz = (frame @ np.array(part.centre)).tolist()
    return replace(part, centre=(cx + x, cy, cz + z), axes=frame @ part.axes)
