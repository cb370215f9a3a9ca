"""From lines to tables: means over images with the counts and the protocol beside them.

A number is the mean over images of an image's metric, each image counted once, never pixel-pooled.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mofo.evaluation.run import Line
from mofo.metrics import METRICS

SHOWN = ("absrel", "delta1", "delta2", "delta3", "rmse", "log10")
TITLES = {
    "absrel": "AbsRel ↓", "delta1": "δ1 ↑", "delta2": "δ2 ↑", "delta3": "δ3 ↑",
    "rmse": "RMSE ↓", "log10": "log10 ↓",
}  # fmt: skip
ALIGNMENT_TITLES = {
    "none": "no alignment",
    "median": "median scale",
    "scale": "least-squares scale",
    "affine": "least-squares scale and shift",
    "disparity": "least-squares scale and shift in disparity",
    "scale_l1": "weighted-L1 scale on 64×64",
    "affine_l1": "weighted-L1 scale and shift on 64×64",
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One predictor on one benchmark: unweighted means over its scored images, and the counts."""

    predictor: str
    weights: str | None
    means: dict[str, float]
    absrel: list[float]
    num_images: int
    num_valid: int
    num_nonfinite: int
    num_nonpositive: int
    failed: dict[str, str]

    @property
    def is_baseline(self) -> bool:
        return self.weights is None


@dataclass(frozen=True, kw_only=True)
class Table:
    """One benchmark under one protocol."""

    benchmark: str
    about: str
    protocol: str
    entries: list[Entry]

    def best(self, metric: str) -> float:
        values = [entry.means[metric] for entry in self.entries if entry.num_images]
        return (max if metric.startswith("delta") else min)(values, default=np.nan)

    def main(self) -> Entry:
        """The entry in front: the first that has learned weights, else the first."""
        return next((entry for entry in self.entries if not entry.is_baseline), self.entries[0])

    def ratio(self, entry: Entry) -> float | None:
        """AbsRel relative to the better trivial baseline; None where either has no number."""
        rivals = [other for other in self.entries if other.is_baseline and other.num_images]
        if entry.is_baseline or not rivals or not entry.num_images:
            return None
        return entry.means["absrel"] / min(other.means["absrel"] for other in rivals)


def tables(lines: Sequence[Line]) -> list[Table]:
    """One table per benchmark, predictors in the order of their first line."""
    rows: dict[str, dict[str, list[Line]]] = {}
    for line in lines:
        rows.setdefault(line["benchmark"], {}).setdefault(line["predictor"], []).append(line)
    return [
        Table(
            benchmark=benchmark,
            about=(newest := list(predictors.values())[-1][-1]["row"])["about"],
            protocol=protocol_title(newest),
            entries=[_entry(name, own) for name, own in predictors.items()],
        )
        for benchmark, predictors in rows.items()
    ]


def protocol_title(row: dict[str, Any]) -> str:
    """What stands beside a number: alignment, clip, size."""
    parts = [ALIGNMENT_TITLES[row["alignment"]]]
    low, high = row["low"], row["high"]
    if low is not None or high is not None:
        low, high = (0 if low is None else low), ("∞" if high is None else high)
        parts.append(f"clipped to {low}–{high}")
    parts.append("{}×{} centre crop".format(*row["size"]) if row["size"] else "native size")
    return ", ".join(parts)


def terminal(table: Table) -> str:
    """The table as text, numbers right-aligned, the best of each column starred."""
    head = [table.benchmark, *(TITLES[name] for name in SHOWN), "× baseline", "images", "pixels"]
    body = [head]
    for entry in table.entries:
        numbers = [_number(table, entry, name) for name in SHOWN]
        ratio = table.ratio(entry)
        images = f"{entry.num_images}/{entry.num_images + len(entry.failed)}"
        last = ["" if ratio is None else f"{ratio:.2f}", images, f"{entry.num_valid}"]
        body.append([entry.predictor, *numbers, *last])
    widths = [max(map(len, column)) for column in zip(*body, strict=True)]
    text = [
        "  ".join(f"{cell:{'>' if at else '<'}{widths[at]}}" for at, cell in enumerate(row))
        for row in body
    ]
    rule = "-" * len(text[0])
    remarks = [note for entry in table.entries for note in notes(entry)]
    return "\n".join([text[0], rule, *text[1:], rule, f"protocol: {table.protocol}", *remarks])


def _entry(name: str, lines: list[Line]) -> Entry:
    scored = [line["metrics"] for line in lines if line["failed"] is None]
    return Entry(
        predictor=name,
        weights=lines[0]["weights"],
        means={m: float(np.mean([s[m] for s in scored])) for m in METRICS} if scored else {},
        absrel=[metrics["absrel"] for metrics in scored],
        num_images=len(scored),
        num_valid=sum(metrics["num_valid"] for metrics in scored),
        num_nonfinite=sum(line["num_nonfinite"] for line in lines),
        num_nonpositive=sum(line["num_nonpositive"] for line in lines),
        failed={line["key"]: line["failed"] for line in lines if line["failed"] is not None},
    )


def _number(table: Table, entry: Entry, metric: str) -> str:
    value = entry.means.get(metric)
    return figures(metric, value) + ("*" if value == table.best(metric) else " ")


def figures(metric: str, value: float | None) -> str:
    """Four decimals; four digits of an error in metres, which may be of any size."""
    if value is None:
        return "–"
    return f"{value:.4g}" if metric == "rmse" else f"{value:.4f}"


def notes(entry: Entry) -> list[str]:
    """What a reader must know before trusting the row."""
    found = [
        (entry.num_nonfinite, "measured pixels had no finite prediction, scored as depth 0"),
        (entry.num_nonpositive, "measured pixels were predicted at or below 0 before alignment"),
    ]
    remarks = [f"{entry.predictor}: {count} {what}" for count, what in found if count]
    first = list(entry.failed.items())[:10]
    return remarks + [f"{entry.predictor}: {key} not scored: {why}" for key, why in first]
