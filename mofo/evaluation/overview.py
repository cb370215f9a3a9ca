"""All sets of a protocol on one screen: our means, and published ones of that very protocol.

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


@dataclass(frozen=True, kw_only=True)
class Cell:
    """AbsRel and delta1 on one set, or over sets: numbers as text in percent, "" where unknown."""

    percent: dict[str, str]
    values: dict[str, float]
    intervals: dict[str, Interval]
    is_partial: bool = False


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
    """One fit of one protocol over all its sets."""

    protocol: str
    fit: str
    rule: str
    sets: list[str]
    counted: str
    rows: list[Ranked]

    def best(self, column: int | None, metric: str) -> float:
        """Of ours, in a set's column, or in that of means over all sets (None)."""
        own = [row for row in self.rows if row.source is None]
        cells = [
            row.cells[column] if column is not None else row.mean
            for row in own
            if column is not None or not row.missing
        ]
        values = [cell.values[metric] for cell in cells if cell and metric in cell.values]
        return (min if metric == "absrel" else max)(values, default=np.nan)


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
        for row in _published()
        if protocol in row["protocols"] and fit == row["fit"] and set(sets) & set(row["sets"])
    ]


@cache
def _published() -> list[Mapping[str, Any]]:
    return tomllib.loads(PUBLISHED.read_text(encoding="utf-8"))["row"]


def _overview(protocol: str, fit: str, group: Sequence[Table]) -> Overview:
    names = [table.set for table in group]
    twice = {name for name in names if names.count(name) > 1}
    sets = [
        f"{table.set} (list {short(table.list_sha256)})" if table.set in twice else table.set
        for table in group
    ]
    predictors = dict.fromkeys(entry.predictor for table in group for entry in table.entries)
    rows = [_ours(name, group, sets) for name in predictors]
    rows += [_theirs(row, sets) for row in published(protocol, fit, sets)]
    return Overview(
        protocol=protocol,
        fit=fit,
        rule=group[0].rule,
        sets=sets,
        counted="; ".join(_counts(name, table) for name, table in zip(sets, group, strict=True)),
        rows=rows,
    )


def _counts(name: str, table: Table) -> str:
    """What stands behind a column."""
    most = max(table.entries, key=lambda entry: entry.num_images)
    return (
        f"{name}, list {short(table.list_sha256)}: {most.num_images} of {table.list_count} images, "
        f"{most.num_valid:,} pixels"
    )


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
            is_partial=any(cell is not None and cell.is_partial for cell in cells),
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
        is_partial=table.limit is not None or entry.num_images < table.list_count,
    )


def _theirs(row: Mapping[str, Any], sets: Sequence[str]) -> Ranked:
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
        missing=[name for name, cell in zip(sets, cells, strict=True) if cell is None],
    )


def _quoted(numbers: Sequence[str]) -> Cell:
    quoted = {metric: text for metric, text in zip(COMPARED, numbers, strict=True) if text}
    values = {metric: float(text) / 100 for metric, text in quoted.items()}
    return Cell(percent=quoted, values=values, intervals={})


def percent(metric: str, value: float) -> str:
    """As papers print it: two decimals of AbsRel, one of delta1."""
    return f"{100 * value:.{2 if metric == 'absrel' else 1}f}"
