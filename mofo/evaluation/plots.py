"""Curves, strips and scale bars as HTML that stands alone; the page's style has their colours."""

import html
from collections.abc import Mapping, Sequence

import numpy as np

from mofo.picture import MAGMA

MAX_POINTS = 400  # of one line
MAX_DOTS = 300  # images drawn in a strip
NUM_COLOURS = 8  # --s0 to --s7 of the style; lines beyond are dashed in the same colours
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 250, 52, 12, 24, 34
DASHES = ("", "6 4", "2 3")


def curve(
    series: Mapping[str, Sequence[tuple[float | int, float | int]]],
    *,
    x: str = "step",
    y: str = "loss",
    y_ends: tuple[float, float] | None = None,
) -> str:
    """Lines over a shared pair of axes, with a legend, for a section; y as far as they go."""
    drawn = {name: np.array(points, np.float64) for name, points in series.items() if len(points)}
    if not drawn:
        raise ValueError("there is nothing to plot: every series is empty")
    every = np.concatenate(list(drawn.values()))
    if not np.isfinite(every).all():
        raise ValueError("a plot needs finite numbers; leave the others out")
    low, high = every.min(0), every.max(0)
    if y_ends is not None:
        low[1], high[1] = y_ends
    span = np.where(high > low, high - low, 1.0)
    lines, names = [], []
    for number, (name, points) in enumerate(drawn.items()):
        thin = points[:: -(-len(points) // MAX_POINTS)]
        if len(thin) < len(points):
            thin = np.concatenate([thin, points[-1:]])
        at = (thin - low) / span * (WIDTH - LEFT - RIGHT, TOP + BOTTOM - HEIGHT)
        path = " ".join(f"{u:.1f},{v:.1f}" for u, v in at + (LEFT, HEIGHT - BOTTOM))
        dash = DASHES[number // NUM_COLOURS % len(DASHES)]
        style = f"stroke:var(--s{number % NUM_COLOURS});stroke-dasharray:{dash or 'none'}"
        lines.append(f'<path d="M{path}" style="{style}"/>')
        key = f'<svg viewBox="0 0 22 6"><path d="M0,3 22,3" style="{style}"/></svg>'
        names.append(f"<span>{key}{html.escape(name)}</span>")
    axes = _axes(low, high, span, x, y)
    return (
        f"<div class=graph><div class='legend soft'>{''.join(names)}</div>"
        f'<svg class=plot viewBox="0 0 {WIDTH} {HEIGHT}" role=img '
        f'aria-label="{html.escape(f"{y} over {x}")}">{axes}{"".join(lines)}</svg></div>'
    )


def distribution(absrel: Mapping[str, tuple[Sequence[float], int]], reach: float) -> str:
    """Of each predictor, which share of the images has an error up to x; cut at `reach`.

    Beside its errors stands of how many images: those without an error are never reached.
    """
    series = {}
    for name, (values, num_asked) in absrel.items():
        ranked = np.sort(values)
        share = np.arange(1, len(ranked) + 1) / num_asked
        if len(ranked) < num_asked:
            name += f", {len(ranked)} of {num_asked} images have a score"
        inside = np.searchsorted(ranked, reach, side="right")
        # Steps: the share changes at an image's error, not before it.
        points = [(0.0, 0.0)]
        keep = np.unique(np.linspace(0, inside - 1, min(inside, MAX_POINTS // 2)).astype(int))
        for at in keep if inside else ():
            points += [(ranked[at], points[-1][1]), (ranked[at], share[at])]
        series[name] = [*points, (reach, points[-1][1])]
    return curve(series, x="AbsRel of an image", y="share of images", y_ends=(0.0, 1.0))


def strip(absrel: Sequence[float], mean: float, reach: float) -> str:
    """One dot per image along AbsRel, a bar at the mean."""
    thin = sorted(absrel)[:: -(-len(absrel) // MAX_DOTS)]
    opacity = max(0.2, min(0.7, 16 / len(thin)))
    dots = "".join(f'<circle cx="{_across(a, reach)}" cy="9" r="2.6"/>' for a in thin)
    bar = _across(mean, reach)
    return (
        f'<svg class=strip viewBox="0 0 130 18"><g opacity="{opacity:.2f}">{dots}</g>'
        f'<line x1="{bar}" x2="{bar}" y1="2" y2="16"/></svg>'
    )


def scale_bar(low: str, high: str) -> str:
    """The colours of a picture, from dark to bright, between two words."""
    stops = ",".join("rgb({:.0f},{:.0f},{:.0f})".format(*stop) for stop in MAGMA)
    bar = f'<i class=bar style="background:linear-gradient(90deg,{stops})"></i>'
    return f"<span>{html.escape(low)} {bar} {html.escape(high)}</span>"


def _axes(low: np.ndarray, high: np.ndarray, span: np.ndarray, x: str, y: str) -> str:
    parts = []
    for share in (0.0, 0.5, 1.0):
        across = LEFT + share * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)
        value_x, value_y = low + share * np.where(high > low, span, 0)
        anchor = "end" if share == 1 else "middle"
        parts.append(f'<line class=axis x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down}" y2="{down}"/>')
        parts.append(
            f'<text x="{LEFT - 8}" y="{down + 4}" text-anchor=end>{_tick(value_y)}</text>'
            f'<text x="{across}" y="{HEIGHT - 18}" text-anchor={anchor}>{_tick(value_x)}</text>'
        )
    names = f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor=end>{html.escape(x)}</text>'
    return "".join(parts) + names + f'<text x="0" y="11">{html.escape(y)}</text>'


def _tick(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _across(absrel: float, reach: float) -> str:
    return f"{3 + 124 * min(absrel / reach, 1.0):.1f}"
