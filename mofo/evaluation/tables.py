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
from mofo.evaluation.statistics import intervals, resampled

COMPARED = ("absrel", "delta1")  # the metrics of overviews and differences
NO_METRICS = ("scale", "shift", "floor")  # what else stands in a fit
SIZED = ("rmse", "sqrel", "i_rmse")  # which have the truth's unit, so that units may not be mixed
CALIBRATED = ("correlation", "ause")  # what is said of a predicted uncertainty
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
Column = Mapping[str, float]  # one number of each image, by its key


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One predictor in a table: means over its images with 95 % intervals, and the counts.

    `ratio` is AbsRel over that of the better trivial baseline, on the images that both have. Only
    entries that scored the same images, the most, are `is_ranked`: other means are of other images.
    `calibration` has the means of CALIBRATED and over how many images. `failed` says of each image
    that has no score why. `absrel` has each scored image's, in the list's order; `draws` the
    resampled means of COMPARED: both stay in memory.
    """

    predictor: str
    kind: str
    weights: str | None
    means: dict[str, float]
    intervals: dict[str, Interval]
    ratio: float | None
    is_ranked: bool
    calibration: dict[str, float | int]
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

    `rule` says in words what the fit does, `clip` what it does on this set alone. `is_metric`:
    truth is in metres (None: that of some images). The list has `list_count` images, of which no
    run looked at more than the first `limit` (None: all): `num_listed`, in a part those that any
    predictor has. `row` is how the set was read, and stays in memory.
    """

    protocol: str
    set: str
    part: str | None
    fit: str
    about: str
    rule: str
    clip: str
    is_metric: bool | None
    list_sha256: str
    list_count: int
    limit: int | None
    num_listed: int
    entries: list[Entry]
    differences: list[Difference] = field(default_factory=list)
    row: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

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
        """Of those that can be compared, NaN where there are not two."""
        own = [entry.means for entry in self.entries if entry.is_ranked]
        values = [means[metric] for means in own if metric in means]
        return (max if higher_is_better(metric) else min)(values) if len(values) > 1 else np.nan

    def is_best(self, entry: Entry, metric: str) -> bool:
        return entry.is_ranked and entry.means.get(metric) == self.best(metric)

    def main(self) -> Entry:
        """The entry in front: the first that has learned weights, else the first."""
        return next((entry for entry in self.entries if not entry.is_baseline), self.entries[0])

    def plain(self) -> dict[str, Any]:
        """As JSON has it: without what the lines say image by image."""
        entries = [replace(entry, absrel=[], draws=None) for entry in self.entries]
        plain = asdict(replace(self, entries=entries, row={}))
        del plain["row"]
        for entry in plain["entries"]:
            del entry["absrel"], entry["draws"]
        return plain


def from_plain(row: Mapping[str, Any]) -> Table:
    """What `plain` gave."""
    entries = [Entry(**entry) for entry in row["entries"]]
    differences = [Difference(**one) for one in row["differences"]]
    return Table(**{**row, "entries": entries, "differences": differences})


def higher_is_better(metric: str) -> bool:
    return metric.startswith(("delta", "boundary"))


def in_metres(line: Line) -> bool:
    """Whether an image's truth is; lines of images that could not be read say it of their set."""
    found = line.get("metric")
    return bool(line["row"].get("metric", False) if found is None else found)


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
    """The fits that any line has, those of learned predictors first, in the protocol's order.

    Without a score, the first that suits.
    """
    learned = {fit for line in lines if line["weights"] is not None for fit in line["fits"] or ()}
    had = {fit for line in lines for fit in line["fits"] or ()}
    suiting = lines[0]["settings"]["fits"]
    if not had:
        kinds = {line["kind"] for line in lines}
        had = {fit for fit, how in suiting.items() if kinds & set(how["predicts"])}
        had = set(list(filter(had.__contains__, suiting))[:1]) or {next(iter(suiting))}
    return sorted((fit for fit in suiting if fit in had), key=lambda fit: fit not in learned)


def _table(lines: Sequence[Line], fit: str, part: str | None) -> Table:
    of_predictor: dict[str, list[Line]] = {}
    for line in lines:
        of_predictor.setdefault(line["predictor"], []).append(line)
    suiting = {
        name: sorted(own, key=lambda line: line["index"])
        for name, own in of_predictor.items()
        if any(fit in (line["fits"] or ()) for line in own) or not any(x["fits"] for x in own)
    }
    units = {in_metres(line) for line in lines if line["fits"]} or {in_metres(lines[0])}
    left_out = NO_METRICS if len(units) == 1 else (*NO_METRICS, *SIZED)
    newest, limit = lines[-1], _limit(lines)
    list_count = max(line["list_count"] for line in lines)
    entries = [_entry(name, own, fit, left_out) for name, own in suiting.items()]
    entries, differences = _compared(entries, suiting, fit, newest["list_sha256"])
    rule, clip = _in_words(newest["settings"], fit, newest["row"])
    return Table(
        protocol=newest["protocol"],
        set=newest["set"],
        part=part,
        fit=fit,
        about=newest["row"]["about"],
        rule=rule,
        clip=clip,
        is_metric=units.pop() if len(units) == 1 else None,
        list_sha256=newest["list_sha256"],
        list_count=list_count,
        limit=limit,
        num_listed=len({line["key"] for line in lines}) if part else limit or list_count,
        entries=entries,
        differences=differences,
        row=newest["row"],
    )


def _limit(lines: Sequence[Line]) -> int | None:
    """The largest limit, where each line had one that took effect."""
    found = [(line["row"]["limit"], line["list_count"]) for line in lines]
    limits = [limit for limit, count in found if limit is not None and limit <= count]
    return max(limits) if len(limits) == len(found) else None


def _entry(name: str, lines: Sequence[Line], fit: str, left_out: Sequence[str]) -> Entry:
    """What is said of a predictor alone."""
    scored = [line for line in lines if fit in (line["fits"] or ())]
    times = [line["seconds"] for line in lines if line["seconds"] is not None]
    means = average(line["fits"][fit] for line in scored)
    # An uncertainty is that of the main fit's depth.
    main = [line for line in scored if next(iter(line["fits"])) == fit]
    sure = [line["uncertainty"] for line in main if line["uncertainty"] is not None]
    of_uncertainty = {key: float(np.mean([one[key] for one in sure])) for key in CALIBRATED if sure}
    return Entry(
        predictor=name,
        kind=lines[0]["kind"],
        weights=lines[0]["weights"],
        means={metric: mean for metric, mean in means.items() if metric not in left_out},
        intervals={},
        ratio=None,
        is_ranked=False,
        calibration={**of_uncertainty, "num_images": len(sure)} if sure else {},
        num_images=len(scored),
        num_valid=sum(line["num_valid"] for line in scored),
        num_nonfinite=sum(line["num_nonfinite"] for line in scored),
        num_nonpositive=sum(line["num_nonpositive"] for line in scored),
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


def _compared(
    entries: Sequence[Entry], lines: Mapping[str, Sequence[Line]], fit: str, list_sha256: str
) -> tuple[list[Entry], list[Difference]]:
    """Entries with intervals, ratio and rank, and the difference of every pair."""
    pairs = list(combinations([entry.predictor for entry in entries], 2))
    columns = _columns(entries, lines, fit, pairs)
    draws = resampled(columns, of=list_sha256)
    found = (
        dict(zip(draws, intervals(np.stack([*draws.values()], 1)), strict=True)) if draws else {}
    )
    absrel = {entry.predictor: columns.get((entry.predictor, "absrel"), {}) for entry in entries}
    baselines = [absrel[entry.predictor] for entry in entries if entry.is_baseline]
    ranked = _ranked(absrel)
    finished = []
    for entry in entries:
        name = entry.predictor
        own = {m: found[name, m] for m in entry.means if (name, m) in found}
        drawn = [draws[name, m] for m in COMPARED if (name, m) in draws]
        ratio = None if entry.is_baseline else _ratio(absrel[name], baselines)
        both = np.stack(drawn, axis=1) if drawn else None
        changes = {"intervals": own, "ratio": ratio, "is_ranked": name in ranked, "draws": both}
        finished.append(replace(entry, **changes))
    return finished, [
        Difference(
            first=one,
            second=other,
            num_images=max(map(len, both.values())),
            means={metric: float(np.mean([*column.values()])) for metric, column in both.items()},
            intervals={metric: found.get((one, other, metric)) for metric in both},
        )
        for one, other in pairs
        if (both := {m: columns[one, other, m] for m in COMPARED if (one, other, m) in columns})
    ]


def _columns(
    entries: Sequence[Entry],
    lines: Mapping[str, Sequence[Line]],
    fit: str,
    pairs: Sequence[tuple[str, str]],
) -> dict[tuple[str, ...], Column]:
    """Each predictor's metrics image by image, and each pair's differences."""
    columns: dict[tuple[str, ...], Column] = {}
    for entry in entries:
        scores = {
            x["key"]: x["fits"][fit] for x in lines[entry.predictor] if fit in (x["fits"] or ())
        }
        for metric in entry.means:
            found = {key: _number(score.get(metric)) for key, score in scores.items()}
            column = {key: value for key, value in found.items() if not math.isnan(value)}
            columns[entry.predictor, metric] = column
    for one, other in pairs:
        for metric in COMPARED:
            a, b = columns.get((one, metric), {}), columns.get((other, metric), {})
            if both := {key: a[key] - b[key] for key in a if key in b}:
                columns[one, other, metric] = both
    return columns


def _ranked(absrel: Mapping[str, Column]) -> list[str]:
    """Those that have a score on the very same images, of which there are the most."""
    groups: dict[frozenset[str], list[str]] = {}
    for name, column in absrel.items():
        if column:
            groups.setdefault(frozenset(column), []).append(name)
    return max(groups.items(), key=lambda one: (len(one[0]), len(one[1])), default=((), []))[1]


def _ratio(own: Column, baselines: Sequence[Column]) -> float | None:
    """To the better baseline, to each on the images that both have; None where one is perfect."""
    ratios = []
    for rival in baselines:
        both = [key for key in own if key in rival]
        theirs = sum(rival[key] for key in both)
        if both and not theirs:
            return None
        ratios += [sum(own[key] for key in both) / theirs] if both else []
    return max(ratios, default=None)


def _number(value: float | None) -> float:
    return math.nan if value is None else value
