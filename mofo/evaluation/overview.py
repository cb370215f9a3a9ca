"""All sets of a protocol on one screen: our means, and published ones of that very protocol.

Published numbers stand beside ours only where truth and list of images are those that they were
measured on, and all images have a score; elsewhere a note says what is different.

The mean over sets is unweighted, as MoGe's is: a set counts once, however many images it has. It is
formed of the sets that a row has, and a row that lacks one says so.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mofo.evaluation.statistics import intervals
from mofo.evaluation.tables import COMPARED, Entry, Interval, Table, average, short

PUBLISHED = Path(__file__).with_name("published.toml")
TRUTH = ("crop", "region", "low", "high", "size")  # what of a row decides which pixels count
LIMITED, FAILED, FEWER_SETS = "†", "§", "‡"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """AbsRel and delta1 on one set, or over sets: numbers as text in percent, "" where unknown.

    `marks` stand behind the numbers; one that is not `is_ranked` is of other images than the rest.
    """

    percent: dict[str, str]
    values: dict[str, float]
    intervals: dict[str, Interval]
    marks: str = ""
    is_ranked: bool = False


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """One row: a predictor of ours, or a published method with its source."""

    name: str
    is_baseline: bool
    source: str | None
    cells: list[Cell | None]
    mean: Cell | None
    missing: list[str]


@dataclass(frozen=True, kw_only=True)
class Overview:
    """One fit of one protocol over all its sets; `unpublished`: where nothing published stands."""

    protocol: str
    fit: str
    rule: str
    sets: list[str]
    counted: list[str]
    unpublished: list[str]
    rows: list[Ranked]

    @property
    def says_more(self) -> bool:
        """Than the table of its only set."""
        quotes = any(row.source for row in self.rows)
        return len(self.sets) > 1 or quotes or bool(self.unpublished)

    def best(self, column: int | None, metric: str) -> float:
        """Of what is ranked in a set's column, or in that of means over all sets (None).

        NaN where there are not two.
        """
        cells = [row.mean if column is None else row.cells[column] for row in self.rows]
        ranked = [cell.values for cell in cells if cell and cell.is_ranked]
        values = [own[metric] for own in ranked if metric in own]
        return (min if metric == "absrel" else max)(values) if len(values) > 1 else np.nan


def overviews(made: Sequence[Table]) -> list[Overview]:
    """One for each protocol and fit, in the order of the tables; parts of sets are left out."""
    groups: dict[tuple[str, str], list[Table]] = {}
    for table in made:
        if table.part is None:
            groups.setdefault((table.protocol, table.fit), []).append(table)
    return [_overview(*name, group) for name, group in groups.items()]


def published(protocol: str, fit: str, sets: Sequence[str]) -> list[Mapping[str, Any]]:
    """The published rows of this protocol and fit that have any of these sets."""
    return [
        row
        for row in _published("row")
        if protocol in row["protocols"] and fit == row["fit"] and set(sets) & set(row["sets"])
    ]


def measured_on(protocol: str) -> dict[str, Mapping[str, Any]]:
    """The protocol's sets as published numbers have them, by name; none where none are published"""
    found: dict[str, Mapping[str, Any]] = {}
    for one in _published("measured_on"):
        found |= one["sets"] if protocol in one["protocols"] else {}
    return found


@cache
def _published(what: str) -> list[Mapping[str, Any]]:
    return tomllib.loads(PUBLISHED.read_text(encoding="utf-8"))[what]


def _overview(protocol: str, fit: str, group: Sequence[Table]) -> Overview:
    names = [table.set for table in group]
    twice = {name for name in names if names.count(name) > 1}
    sets = [
        f"{table.set} (list {short(table.list_sha256)})" if table.set in twice else table.set
        for table in group
    ]
    predictors = dict.fromkeys(entry.predictor for table in group for entry in table.entries)
    rows = [_ours(name, group, sets) for name in predictors]
    quoted, unpublished = _quotable(protocol, fit, group)
    return Overview(
        protocol=protocol,
        fit=fit,
        rule=group[0].rule,
        sets=sets,
        counted=[_counts(name, table) for name, table in zip(sets, group, strict=True)],
        unpublished=unpublished,
        rows=[*rows, *quoted],
    )


def _quotable(protocol: str, fit: str, group: Sequence[Table]) -> tuple[list[Ranked], list[str]]:
    """Published rows, each where it may stand, and why there is none beside a set that has any."""
    known = measured_on(protocol)
    rows = published(protocol, fit, list(known))
    why = [_obstacle(table, known.get(table.set)) for table in group]
    alike = [None if one else table.set for one, table in zip(why, group, strict=True)]
    lost: dict[str, list[str]] = {}
    for table, one in zip(group, why, strict=True):
        if one and any(table.set in row["sets"] or table.set not in known for row in rows):
            lost.setdefault(one, []).append(table.set)
    return [_theirs(row, alike) for row in rows if set(alike) & set(row["sets"])], [
        f"no published numbers beside {', '.join(dict.fromkeys(names))}: {one}"
        for one, names in lost.items()
    ]


def _counts(name: str, table: Table) -> str:
    """What stands behind a column, of whom where it is not the same for all."""
    groups: dict[tuple[int, int], list[str]] = {}
    for entry in table.entries:
        if entry.num_images:
            groups.setdefault((entry.num_images, entry.num_valid), []).append(entry.predictor)
    said = [
        f"{images} of {table.list_count} images, {pixels:,} pixels"
        + (f" ({', '.join(names)})" if len(groups) > 1 else "")
        for (images, pixels), names in groups.items()
    ]
    return f"{name}, list {short(table.list_sha256)}: {'; '.join(said) or 'no image has a score'}"


def _obstacle(table: Table, own: Mapping[str, Any] | None) -> str:
    """Why published numbers are of something else than a set's table; "" if they are not."""
    if own is None:
        return f"{table.protocol} does not define the set"
    row = {**table.row, "list_count": table.list_count, "list_sha256": table.list_sha256}
    for name in ("reader", *TRUTH, "list_count", "list_sha256"):
        # None is a value of what makes a truth, and says nothing of the others.
        if row.get(name) != own.get(name) and (name in TRUTH or name in own):
            what = "list" if name.startswith("list") else "truth"
            there, here = (
                short(one[name]) if name == "list_sha256" else one.get(name) for one in (own, row)
            )
            return f"they are of another {what}, {name} is {there} there and {here} here"
    learned = [entry for entry in table.entries if not entry.is_baseline] or table.entries
    if all(entry.num_images < table.list_count for entry in learned):
        return f"they are of all {table.list_count} images, of which not all have a score here"
    return ""


def _ours(name: str, group: Sequence[Table], sets: Sequence[str]) -> Ranked:
    entries = [next((e for e in table.entries if e.predictor == name), None) for table in group]
    cells = [
        None if entry is None or not entry.num_images else _cell(entry, table)
        for entry, table in zip(entries, group, strict=True)
    ]
    used = [entry for entry in entries if entry is not None and entry.num_images]
    means = average({m: entry.means.get(m) for m in COMPARED} for entry in used)
    draws = [entry.draws for entry in used]
    mean = None
    if len(sets) > 1 and means:
        # Sets are drawn one by one, so that every draw has each set once.
        found = [None] * len(COMPARED)
        if all(one is not None and one.shape[1] == len(COMPARED) for one in draws):
            found = intervals(np.mean([one for one in draws if one is not None], axis=0))
        mean = Cell(
            percent={metric: percent(metric, value) for metric, value in means.items()},
            values=means,
            intervals=dict(zip(COMPARED, found, strict=True)),
            marks=_marks([cell.marks for cell in cells if cell is not None]),
            is_ranked=all(cell is not None and cell.is_ranked for cell in cells),
        )
    return Ranked(
        name=name,
        is_baseline=all(entry.is_baseline for entry in entries if entry is not None),
        source=None,
        cells=cells,
        mean=mean,
        missing=[name for name, cell in zip(sets, cells, strict=True) if cell is None],
    )


def _cell(entry: Entry, table: Table) -> Cell:
    values = {metric: entry.means[metric] for metric in COMPARED if metric in entry.means}
    return Cell(
        percent={metric: percent(metric, value) for metric, value in values.items()},
        values=values,
        intervals={metric: entry.intervals.get(metric) for metric in values},
        marks=LIMITED * (entry.num_asked < table.list_count) + FAILED * bool(entry.failed),
        is_ranked=entry.is_ranked,
    )


def _marks(found: Sequence[str]) -> str:
    return "".join(mark for mark in (LIMITED, FAILED) if any(mark in one for one in found))


def _theirs(row: Mapping[str, Any], sets: Sequence[str | None]) -> Ranked:
    """A published row; it has a mean, of its own rounded numbers, only where it has all sets."""
    cells = [_quoted(row["sets"][name]) if name in row["sets"] else None for name in sets]
    found = [cell.values for cell in cells if cell is not None]
    means = {
        metric: mean
        for metric, mean in average(found).items()
        if sum(metric in values for values in found) == len(sets) > 1
    }
    percents = {metric: percent(metric, value) for metric, value in means.items()}
    return Ranked(
        name=f"{row['method']} ({row['setting']})" if row["setting"] else row["method"],
        is_baseline=False,
        source=row["source"],
        cells=cells,
        mean=Cell(percent=percents, values=means, intervals={}) if means else None,
        missing=[name for name, cell in zip(sets, cells, strict=True) if name and cell is None],
    )


def _quoted(numbers: Sequence[str]) -> Cell:
    quoted = {metric: text for metric, text in zip(COMPARED, numbers, strict=True) if text}
    values = {metric: float(text) / 100 for metric, text in quoted.items()}
    return Cell(percent=quoted, values=values, intervals={})


def percent(metric: str, value: float) -> str:
    """As papers print it: two decimals of AbsRel, one of delta1."""
    return f"{100 * value:.{2 if metric == 'absrel' else 1}f}"
