"""Materials of generated scenes: colours painted over the two metric coordinates of a face.

A pattern fades to its mean where a pixel covers much of one period, so that the distance does not
flicker.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

Colour = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Material:
    """`colour` and `accent` are mixed by `pattern`, whose coarsest repeat is `period` metres."""

    colour: Colour
    pattern: str = "plain"
    accent: Colour = (1.0, 1.0, 1.0)
    period: float = 1.0
    gloss: float = 0.0
    glows: bool = False


def paint(
    material: Material,
    u: Float32[np.ndarray, " n"],
    v: Float32[np.ndarray, " n"],
    footprint: Float32[np.ndarray, " n"],
    half: tuple[float, float, float],
) -> Float32[np.ndarray, "3 n"]:
    """Colours at `u` across and `v` up a face, metres; `footprint` is a pixel's size there."""
    colour = np.asarray(material.colour, np.float32)[:, None]
    if material.pattern == "plain":
        return np.broadcast_to(colour, (3, len(u)))
    accent = np.asarray(material.accent, np.float32)[:, None]
    pattern, mean, detail = PATTERNS[material.pattern]
    period = np.float32(material.period)
    weight = pattern(u / period, v / period, half[0] / material.period, half[2] / material.period)
    fade = np.clip(1.6 - 1.6 * footprint / np.float32(detail * material.period), 0, 1)
    return colour + (accent - colour) * (mean + (weight - np.float32(mean)) * fade)


# A pattern takes u and v in periods, and half the sides of a quad; it returns the accent's weight.
Pattern = Callable[[np.ndarray, np.ndarray, float, float], np.ndarray]


def _checker(u: np.ndarray, v: np.ndarray, hu: float, hv: float) -> np.ndarray:
    return (np.floor(u * 2) + np.floor(v * 2)) % 2


def _stripes(u: np.ndarray, v: np.ndarray, hu: float, hv: float) -> np.ndarray:
    return np.floor(u * 2) % 2


def _bands(u: np.ndarray, v: np.ndarray, hu: float, hv: float) -> np.ndarray:
    return np.floor(v * 2) % 2


def _wood(u: np.ndarray, v: np.ndarray, hu: float, hv: float) -> np.ndarray:
    """Planks along v, each of its own tone, with dark seams."""
    plank = np.floor(u)
    tone = np.sin(plank * 12.9 + 4 * np.sin(plank * 3.7)) * 0.3 + 0.35
    grain = 0.12 * np.sin(u * 25 + 2 * np.sin(v * 2 + plank))
    return np.where(u - plank < 0.1, np.float32(1), np.clip(tone + grain, 0, 1))


def _brick(u: np.ndarray, v: np.ndarray, hu: float, hv: float) -> np.ndarray:
    """Rows half as high as long, some bricks paler; mortar is the accent."""
    row = np.floor(v * 2)
    along = u + 0.5 * (row % 2)
    seam = (v * 2 - row < 0.2) | (along - np.floor(along) < 0.12)
    paler = np.sin(np.floor(along) * 7.1 + row * 3.3) > 0.3
    return np.where(seam, np.float32(1), np.float32(0.25) * paler)


def _tiles(u: np.ndarray, v: np.ndarray, hu: float, hv: float) -> np.ndarray:
    return (u - np.floor(u) < 0.1) | (v - np.floor(v) < 0.1)


def _noise(u: np.ndarray, v: np.ndarray, hu: float, hv: float) -> np.ndarray:
    """Blotches, as of leaves or grass."""
    first = np.sin(6.3 * u + 1.8 * np.sin(4.1 * v))
    second = np.sin(5.7 * v + 1.8 * np.sin(4.7 * u + 2))
    return np.clip(0.5 + 0.4 * (first + second), 0, 1)


def _facade(u: np.ndarray, v: np.ndarray, hu: float, hv: float) -> np.ndarray:
    """A window per period across and per storey up, an even number of windows about the middle."""
    across, up = np.abs(u - np.floor(u) - 0.5), np.abs(v - np.floor(v) - 0.55)
    return (across < 0.24) & (up < 0.26)


def _facade_odd(u: np.ndarray, v: np.ndarray, hu: float, hv: float) -> np.ndarray:
    return _facade(u + 0.5, v, hu, hv)


def _office(u: np.ndarray, v: np.ndarray, hu: float, hv: float) -> np.ndarray:
    """One long band of glass per storey."""
    return np.abs(v - np.floor(v) - 0.55) < 0.25


def _in_brick(openings: Pattern) -> Pattern:
    """The same openings in a brick wall."""

    def pattern(u: np.ndarray, v: np.ndarray, hu: float, hv: float) -> np.ndarray:
        seams = _brick(u * 2.5, v * 2.5, hu, hv) > 0.5
        return np.maximum(openings(u, v, hu, hv), np.float32(0.3) * seams)

    return pattern


def _window(u: np.ndarray, v: np.ndarray, hu: float, hv: float) -> np.ndarray:
    """Panes (colour) behind a frame and a cross (accent)."""
    x, y = np.abs(u / hu), np.abs(v / hv)
    return (np.maximum(x, y) > 0.86) | (x < 0.08) | (y < 0.06)


def _picture(u: np.ndarray, v: np.ndarray, hu: float, hv: float) -> np.ndarray:
    """A disc and a ground (colour) on paler paper, in a frame of the accent."""
    x, y = u / hu, v / hv
    frame = np.maximum(np.abs(x), np.abs(y)) > 0.8
    motif = ((x - 0.2) ** 2 + (y - 0.25) ** 2 < 0.1) | (y < -0.25 + 0.2 * np.sin(3 * x))
    return np.maximum(np.float32(0.75) * ~motif, frame)


def _border(u: np.ndarray, v: np.ndarray, hu: float, hv: float) -> np.ndarray:
    """A rug: the accent along the edge and in the middle."""
    edge = np.maximum(np.abs(u / hu), np.abs(v / hv))
    return ((edge > 0.7) & (edge < 0.88)) | (edge < 0.3)


def _panel(u: np.ndarray, v: np.ndarray, hu: float, hv: float) -> np.ndarray:
    """A door: two sunk panels, outlined."""
    x, y = np.abs(u / hu), v / hv
    outline = (np.abs(x - 0.62) < 0.09) & (np.abs(y) < 0.8)
    across = (x < 0.7) & ((np.abs(np.abs(y) - 0.8) < 0.05) | (np.abs(y) < 0.05))
    return outline | across


def _dashes(u: np.ndarray, v: np.ndarray, hu: float, hv: float) -> np.ndarray:
    """A road along v: a broken line in the middle, unbroken ones at the sides."""
    middle = (np.abs(u) < 0.035) & (v - np.floor(v) < 0.5)
    return middle | (np.abs(np.abs(u) - hu + 0.06) < 0.025)


# Name: pattern, mean weight, and its finest detail as a share of the period.
PATTERNS: dict[str, tuple[Pattern, float, float]] = {
    "checker": (_checker, 0.5, 0.5),
    "stripes": (_stripes, 0.5, 0.5),
    "bands": (_bands, 0.5, 0.5),
    "wood": (_wood, 0.4, 0.5),
    "brick": (_brick, 0.35, 0.4),
    "tiles": (_tiles, 0.19, 0.5),
    "noise": (_noise, 0.5, 0.6),
    "facade": (_facade, 0.25, 0.6),
    "facade_odd": (_facade_odd, 0.25, 0.6),
    "facade_brick": (_in_brick(_facade), 0.33, 0.5),
    "facade_odd_brick": (_in_brick(_facade_odd), 0.33, 0.5),
    "office": (_office, 0.5, 0.5),
    "office_brick": (_in_brick(_office), 0.55, 0.5),
    "window": (_window, 0.3, 1e3),
    "picture": (_picture, 0.5, 1e3),
    "border": (_border, 0.3, 1e3),
    "panel": (_panel, 0.2, 1e3),
    "dashes": (_dashes, 0.05, 1.0),
}
