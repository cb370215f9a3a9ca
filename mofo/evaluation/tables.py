"""From lines to tables: one per set, part of it and fit, with means, intervals and counts.

A number is the mean over images of an image's metric, each image counted once, never pixel-pooled;
an image without the number (NaN, or absent) is left out of that mean, as MoGe's evaluation does.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Float64

from mofo.evaluation.lines import Line
from mofo.evaluation.statistics import intervals, resampled_means

COMPARED = ("absrel", "delta1")  # the metrics of overviews and differences
NO_METRICS = ("scale", "shift", "floor")  # what else stands in a fit
ALIGNMENTS = {
    "none": "no alignment",
    "median": "median scale",
    "median_lower": "median scale (lower middle)",
    "scale": "least-squares scale",
    "affine": "least-squares scale and shift",
    "disparity": "least-squares scale and shift in disparity",
    "scale_l1": "weighted-L1 scale",
    "affine_l1": "weighted-L1 scale and shift",
    "scale_l1_truncated": "truncated weighted-L1 scale",
    "affine_l1_truncated": "truncated weighted-L1 scale and shift",
}

Interval = Sequence[float] | None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One predictor in a table: means over its images with 95 % intervals, and the counts.

    `absrel` has each scored image's, in the list's order; `draws` the resampled means of COMPARED,
    which stay in memory. `failed` says of each image that has no score why.
    """

    predictor: str
    kind: str
    weights: str | None
    means: dict[str, float]
    intervals: dict[str, Interval]
    num_images: int
    num_valid: int
    num_nonfinite: int
    num_nonpositive: int
    seconds: float | None
    failed: dict[str, str]
    made_by: dict[str, list[str]]
    absrel: list[float] = field(default_factory=list)
    draws: Float64[np.ndarray, "r k"] | None = field(default=None, repr=False, compare=False)

    @property
    def is_baseline(self) -> bool:
        return self.weights is None

    @property
    def num_asked(self) -> int:
        return self.num_images + len(self.failed)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """`first` minus `second` over the images that both have: paired, with 95 % intervals."""

    first: str
    second: str
    num_images: int
    means: dict[str, float]
    intervals: dict[str, Interval]


@dataclass(frozen=True, kw_only=True)
class Table:
    """One set, or a part of it, under one fit of one protocol.

    `rule` says in words what the fit does, `clip` what it does on this set alone. The list has
    `list_count` images, of which no run scored more than the first `limit` (None: all).
    """

    protocol: str
    set: str
    part: str | None
    fit: str
    about: str
    rule: str
    clip: str
    list_sha256: str
    list_count: int
    limit: int | None
    entries: list[Entry]
    differences: list[Difference] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.set} {self.part}" if self.part else self.set

    @property
    def metrics(self) -> list[str]:
        return list(dict.fromkeys(metric for entry in self.entries for metric in entry.means))

    @property
    def images(self) -> str:
        """How many, in words."""
        if self.limit is None:
            text = f"{self.list_count} images"
        else:
            whole = f" of {self.list_count}" if self.limit < self.list_count else ""
            text = f"the first {self.limit}{whole} images"
        return f"the {self.part} ones of {text}" if self.part else text

    def best(self, metric: str) -> float:
        values = [entry.means[metric] for entry in self.entries if metric in entry.means]
        return (max if higher_is_better(metric) else min)(values, default=np.nan)

    def main(self) -> Entry:
        """The entry in front: the first that has learned weights, else the first."""
        return next((entry for entry in self.entries if not entry.is_baseline), self.entries[0])

    def ratio(self, entry: Entry) -> float | None:
        """AbsRel relative to the better trivial baseline; None where either has no number."""
        rivals = [other for other in self.entries if other.is_baseline and other.num_images]
        best = min((other.means["absrel"] for other in rivals), default=0.0)
        if entry.is_baseline or not best or not entry.num_images:
            return None
        return entry.means["absrel"] / best

    def plain(self) -> dict[str, Any]:
        """As JSON has it: without what the lines say image by image."""
        entries = [replace(entry, absrel=[], draws=None) for entry in self.entries]
        plain = asdict(replace(self, entries=entries))
        for entry in plain["entries"]:
            del entry["absrel"], entry["draws"]
        return {**plain, "ratios": {entry.predictor: self.ratio(entry) for entry in self.entries}}


def from_plain(row: Mapping[str, Any]) -> Table:
    """What `plain` gave."""
    fields = {key: value for key, value in row.items() if key != "ratios"}
    entries = [Entry(**entry) for entry in row["entries"]]
    differences = [Difference(**one) for one in row["differences"]]
    return Table(**{**fields, "entries": entries, "differences": differences})


def higher_is_better(metric: str) -> bool:
    return metric.startswith(("delta", "boundary"))


def average(records: Iterable[Mapping[str, float | None]]) -> dict[str, float]:
    """The mean of each key over the records that have it; None and NaN count as missing."""
    values: dict[str, list[float]] = {}
    for record in records:
        for key, value in record.items():
            if value is not None and not math.isnan(value):
                values.setdefault(key, []).append(value)
    return {key: float(np.mean(numbers)) for key, numbers in values.items()}


def tables(lines: Sequence[Line]) -> list[Table]:
    """Of each set, in the order of the lines: a table for each fit, then those of its parts."""
    groups: dict[tuple[str, str, str], list[Line]] = {}
    for line in lines:
        name = (line["protocol"], line["set"], line["list_sha256"])
        groups.setdefault(name, []).append(line)
    made = []
    for own in groups.values():
        fits = _fits(own)
        parts = list(dict.fromkeys(line["part"] for line in own if line["part"] is not None))
        for part in (None, *parts):
            chosen = [line for line in own if part in (None, line["part"])]
            made += [_table(chosen, fit, part) for fit in fits]
    return made


def short(digest: str | None) -> str:
    return (digest or "unknown")[:8]


def _in_words(settings: Mapping[str, Any], fit: str, row: Mapping[str, Any]) -> tuple[str, str]:
    """What is done to a prediction under a protocol: for every set, and for this one."""
    how = settings["fits"][fit]
    words = ALIGNMENTS[how["alignment"]]
    if how["grid"]:
        words += " on a {0}×{0} sample".format(how["grid"])
    if how["alignment"] == "disparity":
        floor = "1 / the farthest truth" if how["floor"] is None else how["floor"]
        words += f", at least {floor}"
    if settings["negatives_pass"]:
        words += ", negative depth counts as correct"
    if not settings["clip"]:
        return words, ""
    low, high = row["low"], row["high"]
    if low is None and high is None:
        return words, ""
    ends = f"{low or 0:g}", "∞" if high is None else f"{high:g}"
    return words, "clipped to {}–{}".format(*ends)


def _fits(lines: Sequence[Line]) -> list[str]:
    """The fits that any line has, in the protocol's order; without a score, the first that suits"""
    had = {fit for line in lines for fit in line["fits"] or ()}
    suiting = lines[0]["settings"]["fits"]
    if not had:
        kinds = {line["kind"] for line in lines}
        had = {fit for fit, how in suiting.items() if kinds & set(how["predicts"])}
        had = set(list(filter(had.__contains__, suiting))[:1]) or {next(iter(suiting))}
    return [fit for fit in suiting if fit in had]


def _table(lines: Sequence[Line], fit: str, part: str | None) -> Table:
    of_predictor: dict[str, list[Line]] = {}
    for line in lines:
        of_predictor.setdefault(line["predictor"], []).append(line)
    suiting = {
        name: sorted(own, key=lambda line: line["index"])
        for name, own in of_predictor.items()
        if any(fit in (line["fits"] or ()) for line in own) or not any(x["fits"] for x in own)
    }
    entries = [_entry(name, own, fit) for name, own in suiting.items()]
    entries, differences = _with_statistics(entries, suiting, fit)
    newest = lines[-1]
    rule, clip = _in_words(newest["settings"], fit, newest["row"])
    return Table(
        protocol=newest["protocol"],
        set=newest["set"],
        part=part,
        fit=fit,
        about=newest["row"]["about"],
        rule=rule,
        clip=clip,
        list_sha256=newest["list_sha256"],
        list_count=max(line["list_count"] for line in lines),
        limit=_limit(lines),
        entries=entries,
        differences=differences,
    )


def _limit(lines: Sequence[Line]) -> int | None:
    """The largest limit, where each line had one that took effect."""
    found = [(line["row"]["limit"], line["list_count"]) for line in lines]
    limits = [limit for limit, count in found if limit is not None and limit <= count]
    return max(limits) if len(limits) == len(found) else None


def _entry(name: str, lines: Sequence[Line], fit: str) -> Entry:
    """All but the statistics."""
    scored = [line for line in lines if fit in (line["fits"] or ())]
    times = [line["seconds"] for line in lines if line["seconds"] is not None]
    means = average(line["fits"][fit] for line in scored)
    return Entry(
        predictor=name,
        kind=lines[0]["kind"],
        weights=lines[0]["weights"],
        means={metric: mean for metric, mean in means.items() if metric not in NO_METRICS},
        intervals={},
        num_images=len(scored),
        num_valid=sum(line["num_valid"] for line in scored),
        num_nonfinite=sum(line["num_nonfinite"] for line in lines),
        num_nonpositive=sum(line["num_nonpositive"] for line in lines),
        seconds=float(np.mean(times)) if times else None,
        failed={
            line["key"]: line["failed"] or f"the fit {fit!r} gave no score"
            for line in lines
            if fit not in (line["fits"] or ())
        },
        made_by={
            what: list(dict.fromkeys(line[what] for line in lines))
            for what in ("command", "commit", "machine")
        },
        absrel=[line["fits"][fit]["absrel"] for line in scored],
    )


def _with_statistics(
    entries: list[Entry], lines: Mapping[str, Sequence[Line]], fit: str
) -> tuple[list[Entry], list[Difference]]:
    """Entries with their intervals, and the difference of every pair, from one set of draws."""
    keys = {line["key"]: 0 for own in lines.values() for line in own if fit in (line["fits"] or ())}
    places = {key: number for number, key in enumerate(keys)}
    if len(places) < 2:
        return entries, []
    columns: dict[tuple[str, ...], Float64[np.ndarray, " n"]] = {}
    for entry in entries:
        scored = [line for line in lines[entry.predictor] if fit in (line["fits"] or ())]
        at = [places[line["key"]] for line in scored]
        for metric in entry.means:
            column = np.full(len(places), np.nan)
            column[at] = [_number(line["fits"][fit].get(metric)) for line in scored]
            columns[entry.predictor, metric] = column
    pairs = list(combinations([entry.predictor for entry in entries], 2))
    for one, other in pairs:
        for metric in COMPARED:
            if (one, metric) in columns and (other, metric) in columns:
                difference = columns[one, metric] - columns[other, metric]
                columns[one, other, metric] = difference
    means = resampled_means(np.stack(list(columns.values()), axis=1))
    found = dict(zip(columns, intervals(means), strict=True))
    place = {name: number for number, name in enumerate(columns)}
    finished = []
    for entry in entries:
        own = {metric: found[entry.predictor, metric] for metric in entry.means}
        at = [place[entry.predictor, metric] for metric in COMPARED if metric in entry.means]
        finished.append(replace(entry, intervals=own, draws=means[:, at] if at else None))
    return finished, [
        made for one, other in pairs if (made := _difference(one, other, columns, found))
    ]


def _difference(
    one: str, other: str, columns: Mapping[tuple[str, ...], np.ndarray], found: Mapping[Any, Any]
) -> Difference | None:
    values = {m: columns[one, other, m] for m in COMPARED if (one, other, m) in columns}
    both = {metric: column[~np.isnan(column)] for metric, column in values.items()}
    if not both or not min(map(len, both.values())):
        return None
    return Difference(
        first=one,
        second=other,
        num_images=max(map(len, both.values())),
        means={metric: float(column.mean()) for metric, column in both.items()},
        intervals={metric: found[one, other, metric] for metric in both},
    )


def _number(value: float | None) -> float:
    return np.nan if value is None else value
