"""Tables as text: for the terminal, Markdown, LaTeX (booktabs) and CSV.

An overview is in percent, as papers have it, and may stand beside published rows; a set's own table
is in fractions. The best of ours is starred in the terminal and bold elsewhere.
"""

import csv
import io
import re
from collections.abc import Sequence
from typing import NamedTuple

from mofo.evaluation.overview import FAILED, FEWER_SETS, LIMITED, Cell, Overview, Ranked, percent
from mofo.evaluation.statistics import excludes_zero
from mofo.evaluation.tables import CALIBRATED, COMPARED, SIZED, Entry, Interval, Table, short

TITLES = {
    "absrel": "AbsRel ↓", "delta1": "δ1 ↑", "delta2": "δ2 ↑", "delta3": "δ3 ↑", "rmse": "RMSE ↓",
    "rmse_log": "log RMSE ↓", "log10": "log10 ↓", "sqrel": "SqRel ↓", "silog": "SILog ↓",
    "i_rmse": "iRMSE ↓", "boundary_f1": "edge F1 ↑",
}  # fmt: skip
ANY_SIZE = ("rmse", "sqrel", "silog", "i_rmse")  # of any size: digits, not decimals
LONG = (*tuple(TITLES)[:9], "boundary_f1")  # what papers quote; CSV and JSON have all
SHORT = ("absrel", "delta1", "delta2", "delta3", "rmse", "log10")  # what a terminal has room for
NUM_FAILED_SHOWN = 10  # of one predictor in a table
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "↓": r"$\downarrow$", "↑": r"$\uparrow$", "δ1": r"$\delta_1$", "δ2": r"$\delta_2$",
    "δ3": r"$\delta_3$", "×": r"$\times$", "∞": r"$\infty$", "–": "--", "−": "$-$",
}  # fmt: skip


class Word(NamedTuple):
    text: str
    best: bool = False
    interval: str = ""


class Grid(NamedTuple):
    """A table ready to be written: `groups` are titles over so many columns after the first.

    Each row has its kind ("main", "other", "base", "published") and a word for each column.
    """

    groups: list[tuple[str, int]]
    head: list[str]
    rows: list[tuple[str, list[Word]]]


def overview_grid(overview: Overview) -> Grid:
    """A row each, published ones last, sources numbered; a set's intervals are in its own table."""
    with_mean = len(overview.sets) > 1
    columns = [*range(len(overview.sets)), *([None] if with_mean else [])]
    groups = [(name, len(COMPARED)) for name in [*overview.sets, *(["mean"] if with_mean else [])]]
    numbers = {source: number for number, source in enumerate(sources(overview), start=1)}
    rows = []
    for row in overview.rows:
        words = [Word(row.name if row.source is None else f"{row.name} [{numbers[row.source]}]")]
        for column in columns:
            words += _overview_words(overview, row, column)
        kind = "published" if row.source else "base" if row.is_baseline else "other"
        rows.append((kind, words))
    return Grid(groups, ["in %", *([TITLES[m] for m in COMPARED] * len(columns))], rows)


def _overview_words(overview: Overview, row: Ranked, column: int | None) -> list[Word]:
    cell = row.mean if column is None else row.cells[column]
    marks = cell.marks if cell else ""
    marks += FEWER_SETS * bool(column is None and row.missing)
    words = []
    for metric in COMPARED:
        if cell is None or metric not in cell.percent:
            words.append(Word("–"))
            continue
        best = cell.is_ranked and cell.values[metric] == overview.best(column, metric)
        ends = cell.intervals.get(metric) if column is None else None
        interval = "–".join(percent(metric, end) for end in ends) if ends else ""
        words.append(Word(cell.percent[metric] + marks, best, interval))
    return words


def sources(overview: Overview) -> list[str]:
    return list(dict.fromkeys(row.source for row in overview.rows if row.source))


def overview_notes(overview: Overview) -> list[str]:
    """What stands below an overview: protocol, counts, what is missing, sources."""
    ours = [row for row in overview.rows if row.source is None]
    cells = [cell for row in ours for cell in row.cells if cell]
    lacking = [f"{row.name} lacks {', '.join(row.missing)}" for row in ours if row.missing]
    notes = [f"protocol {overview.protocol}: {overview.rule}", "; ".join(overview.counted)]
    if any(LIMITED in cell.marks for cell in cells):
        notes.append(f"{LIMITED} only some images of the set's list were looked at")
    if any(FAILED in cell.marks for cell in cells):
        notes.append(f"{FAILED} some images have no score")
    unranked = [
        f"{row.name} on {name}"
        for row in ours
        for name, cell in zip(overview.sets, row.cells, strict=True)
        if cell and not cell.is_ranked
    ]
    if unranked:
        notes.append(f"scored on other images: not ranked: {', '.join(unranked)}")
    if lacking and len(overview.sets) > 1:
        notes.append(f"{FEWER_SETS} mean over fewer sets, not to be compared: {'; '.join(lacking)}")
    notes += overview.unpublished
    numbered = enumerate(sources(overview), start=1)
    return notes + [f"[{number}] published: {source}" for number, source in numbered]


def table_grid(
    table: Table, metrics: Sequence[str] | None = None, with_intervals: Sequence[str] = COMPARED
) -> Grid:
    """A row each: the metrics (by default all), intervals of some, and the counts."""
    shown = [name for name in metrics or table.metrics if name in table.metrics]
    head = [TITLES.get(name, name) for name in shown]
    with_ratio = any(entry.ratio is not None for entry in table.entries)
    head[1:1] = ["× baseline"] * with_ratio
    rows = []
    for entry in table.entries:
        words = [_measured(table, entry, name, with_intervals) for name in shown]
        words[1:1] = [Word("" if entry.ratio is None else f"{entry.ratio:.2f}")] * with_ratio
        images = f"{entry.num_images}/{table.num_listed}"
        words = [Word(entry.predictor), *words, Word(images), Word(f"{entry.num_valid:,}")]
        kind = "base" if entry.is_baseline else "main" if entry is table.main() else "other"
        rows.append((kind, words))
    return Grid([], [table.name, *head, "images", "pixels"], rows)


def _measured(table: Table, entry: Entry, metric: str, with_intervals: Sequence[str]) -> Word:
    value = entry.means.get(metric)
    interval = entry.intervals.get(metric) if metric in with_intervals else None
    return Word(figures(metric, value), table.is_best(entry, metric), between(metric, interval))


def table_notes(table: Table) -> list[str]:
    """The protocol, then what a reader must know before trusting a row."""
    rule = ", ".join(filter(None, (table.protocol, table.rule, table.clip)))
    notes = [f"protocol: {rule}; list {short(table.list_sha256)}, {table.images}; {unit(table)}"]
    for entry in table.entries:
        notes += [f"{entry.predictor}: {remark}" for remark in remarks(entry)]
    return notes


def unit(table: Table) -> str:
    """That of the truth, without which RMSE says nothing."""
    if table.is_metric is not None:
        return "truth in metres" if table.is_metric else "relative truth, without a unit"
    names = ", ".join(TITLES[metric].split()[0] for metric in SIZED)
    return f"truth of some images in metres, of others relative: {names} have no mean"


def remarks(entry: Entry, rest: str = "all of them in report.json") -> list[str]:
    """Oddities of an entry and its first failed images; `rest` says where the others stand."""
    found = [
        (entry.num_nonfinite, "measured pixels had no finite prediction, scored as depth 0"),
        (entry.num_nonpositive, "measured pixels were predicted at or below 0 before alignment"),
    ]
    first = list(entry.failed.items())[:NUM_FAILED_SHOWN]
    left = len(entry.failed) - len(first)
    apart = entry.num_images > 0 and not entry.is_ranked
    return [
        *(["scored on other images: not ranked"] * apart),
        *(f"{count} {what}" for count, what in found if count),
        *(f"{key} not scored: {why}" for key, why in first),
        *([f"{left} more not scored, {rest}"] if left else []),
    ]


def difference_grid(table: Table, *, with_baselines: bool = True) -> Grid | None:
    """Each learned one less each other; pairs of baselines are in report.json alone."""
    learned = [entry.predictor for entry in table.entries if not entry.is_baseline]
    rows = []
    for one in table.differences:
        own = [name for name in (one.first, one.second) if name in learned]
        if len(own) < (1 if with_baselines else 2):
            continue
        sign, rival = (1, one.second) if own[0] == one.first else (-1, one.first)
        words = [Word(f"{own[0]} − {rival}")]
        for metric in COMPARED:
            interval = one.intervals.get(metric)
            if interval is not None:
                interval = sorted(sign * end for end in interval)
            value = figures(metric, sign * one.means[metric], signed=True)
            sure = "yes" if excludes_zero(interval) else "no"
            words += [Word(value, False, between(metric, interval, signed=True)), Word(sure)]
        rows.append(("other", [*words, Word(f"{one.num_images}")]))
    head = [f"{table.name}, paired"]
    for metric in COMPARED:
        head += [TITLES[metric].split()[0], "excludes 0"]
    return Grid([], [*head, "images"], rows) if rows else None


def calibration_grid(made: Sequence[Table]) -> Grid | None:
    """Of those that say how sure they are, whether that tells where the error is."""
    rows = []
    for table in made:
        for entry in table.entries:
            if said := entry.calibration:
                words = [Word(entry.predictor), *(Word(f"{said[key]:.3f}") for key in CALIBRATED)]
                rows.append(("other", [*words, Word(f"{said['num_images']}")]))
    head = [f"{made[0].name}, uncertainty", "rank correlation ↑", "AUSE ↓", "images"]
    return Grid([], head, rows) if rows else None


def figures(metric: str, value: float | None, *, signed: bool = False) -> str:
    """Four decimals; four digits of what may be of any size."""
    if value is None:
        return "–"
    text = f"{value:.4g}" if metric in ANY_SIZE else f"{value:{'+' if signed else ''}.4f}"
    return text.replace("-", "−") if signed else text


def between(metric: str, interval: Interval, *, signed: bool = False) -> str:
    if interval is None:
        return ""
    low, high = (figures(metric, end, signed=signed) for end in interval)
    return f"{low} to {high}" if signed else f"{low}–{high}"


def terminal(table: Table) -> str:
    """The table as text, numbers right-aligned, the best of each column starred."""
    return _aligned(table_grid(table, SHORT, SHORT[:1]), table_notes(table))


def terminal_overview(overview: Overview) -> str:
    grid = overview_grid(overview)
    rows = [(kind, [word._replace(interval="") for word in words]) for kind, words in grid.rows]
    return _aligned(grid._replace(rows=rows), overview_notes(overview))


def terminal_differences(table: Table) -> str:
    """Of the learned ones alone: that baselines are worse is seen without it."""
    grid = difference_grid(table, with_baselines=False)
    return "" if grid is None else _aligned(grid, [])


def terminal_calibration(table: Table) -> str:
    grid = calibration_grid([table])
    return "" if grid is None else _aligned(grid, [])


def _aligned(grid: Grid, notes: Sequence[str]) -> str:
    first = grid.rows[0][1] if grid.rows else []
    starred = [any(words[at].best for _, words in grid.rows) for at in range(len(first))]
    body = [grid.head]
    for _, words in grid.rows:
        texts = [
            word.text + ("*" if word.best else " " * star)
            for word, star in zip(words, starred, strict=True)
        ]
        ends = [f" {word.interval}" if word.interval else "" for word in words]
        body.append([text + end for text, end in zip(texts, ends, strict=True)])
    widths = [max(map(len, column)) for column in zip(*body, strict=True)]
    above = [""]
    at = 1
    for title, span in grid.groups:
        above.append(f"{title:>{sum(widths[at : at + span]) + 2 * (span - 1)}}")
        at += span
    text = [
        "  ".join(f"{cell:{'>' if at else '<'}{widths[at]}}" for at, cell in enumerate(row))
        for row in body
    ]
    if grid.groups:
        text[:0] = ["  ".join([" " * widths[0], *above[1:]])]
    rule = "-" * len(text[-1])
    heads = 2 if grid.groups else 1
    return "\n".join([*text[:heads], rule, *text[heads:], rule, *notes])


def markdown(grid: Grid, notes: Sequence[str]) -> str:
    titles = [title for title, span in grid.groups for _ in range(span)]
    head = [grid.head[0]]
    for at, name in enumerate(grid.head[1:]):
        head.append(f"{titles[at]} {name}" if titles else name)
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for _, words in grid.rows:
        cells = [f"**{word.text}**" if word.best else word.text for word in words]
        ends = [f" [{word.interval}]" if word.interval else "" for word in words]
        lines.append([cell + end for cell, end in zip(cells, ends, strict=True)])
    escaped = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines)
    rows = "\n".join(f"| {line} |" for line in escaped)
    return "\n\n".join([rows, "\n".join(f"- {note}" for note in notes)]) if notes else rows


def latex(grid: Grid, notes: Sequence[str], label: str) -> str:
    """A table for \\usepackage{booktabs}; its caption says what the numbers are."""
    lines = []
    if grid.groups:
        titles = [rf"\multicolumn{{{span}}}{{c}}{{{_tex(title)}}}" for title, span in grid.groups]
        lines.append(" & ".join(["", *titles]) + r" \\")
        at, rules = 2, []
        for _, span in grid.groups:
            rules.append(rf"\cmidrule(lr){{{at}-{at + span - 1}}}")
            at += span
        lines.append("".join(rules))
    lines += [" & ".join(map(_tex, grid.head)) + r" \\", r"\midrule"]
    before = None
    for kind, words in grid.rows:
        if kind == "published" and before not in (None, "published"):
            lines.append(r"\midrule")
        before = kind
        lines.append(" & ".join(map(_latex_word, words)) + r" \\")
    columns = "l" + "r" * (len(grid.head) - 1)
    caption = " ".join(_tex(note.rstrip(".") + ".") for note in notes)
    return "\n".join([
        r"\begin{table}", r"\centering", rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *lines,
        r"\bottomrule", r"\end{tabular}", rf"\caption{{{caption}}}",
        rf"\label{{tab:{re.sub(r'[^a-z0-9]+', '-', label.lower()).strip('-')}}}", r"\end{table}",
    ])  # fmt: skip


def _latex_word(word: Word) -> str:
    text = _tex(word.text)
    text = rf"\textbf{{{text}}}" if word.best else text
    return text + (rf" {{\scriptsize [{_tex(word.interval)}]}}" if word.interval else "")


def _tex(text: str) -> str:
    return re.sub("|".join(map(re.escape, LATEX)), lambda found: LATEX[found[0]], text)


def comma_separated(made: Sequence[Table], overviews: Sequence[Overview]) -> str:
    """One row for each protocol, fit, set, predictor and metric."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([
        "protocol", "fit", "set", "part", "predictor", "kind", "metric", "mean", "low", "high",
        "images", "not_scored", "list_count", "valid_pixels", "nonfinite", "nonpositive",
        "list_sha256", "weights", "commit", "command",
    ])  # fmt: skip
    for table in made:
        for entry in table.entries:
            for metric in table.metrics:
                writer.writerow([
                    table.protocol, table.fit, table.set, table.part, entry.predictor, entry.kind,
                    metric, entry.means.get(metric), *(entry.intervals.get(metric) or ("", "")),
                    entry.num_images, len(entry.failed), table.list_count, entry.num_valid,
                    entry.num_nonfinite, entry.num_nonpositive, table.list_sha256, entry.weights,
                    *(" ; ".join(entry.made_by[what]) for what in ("commit", "command")),
                ])  # fmt: skip
            # of another number of images, if some have too few pixels to say
            for key in CALIBRATED if entry.calibration else ():
                writer.writerow([
                    table.protocol, table.fit, table.set, table.part, entry.predictor, entry.kind,
                    f"uncertainty_{key}", entry.calibration[key], "", "",
                    entry.calibration["num_images"], "", table.list_count, "", "", "",
                    table.list_sha256, entry.weights,
                    *(" ; ".join(entry.made_by[what]) for what in ("commit", "command")),
                ])  # fmt: skip
    for overview in overviews:
        for row in overview.rows:
            if row.source is None and row.mean is not None:
                _write_mean(writer, overview, row, row.mean)
    return file.getvalue()


def _write_mean(writer, overview: Overview, row: Ranked, mean: Cell) -> None:
    name = f"mean of {len(overview.sets) - len(row.missing)} of {len(overview.sets)} sets"
    for metric, value in mean.values.items():
        ends = mean.intervals.get(metric) or ("", "")
        writer.writerow([
            overview.protocol, overview.fit, name, "", row.name, "", metric, value, *ends,
            *[""] * 10,
        ])  # fmt: skip
