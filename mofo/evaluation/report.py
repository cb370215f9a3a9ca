"""The report of runs, made from their lines alone: text tables, and the same for people and tools.

    mofo report runs/eval/marigold runs/eval/other --out outputs/both

writes report.html, report.json, report.md, report.tex and report.csv. Nothing is predicted or
measured here: whoever has the folders can make the report again.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from mofo.evaluation import formats
from mofo.evaluation.lines import Line, read_lines
from mofo.evaluation.merge import merge, uncompared
from mofo.evaluation.overview import Overview, overviews
from mofo.evaluation.page import Section, html_page, sections_html
from mofo.evaluation.tables import Table, tables
from mofo.model.weights import replacing

SECTIONS = "sections.html"  # what a run added to its page, for when the page is made again
MAX_TABLES = 8  # printed; beyond, the overviews and the main fits' tables


def report(
    *runs: str | Path,
    out: str | Path | None = None,
    title: str = "Depth evaluation",
    sections: Sequence[Section] = (),
) -> str:
    """Write the report of one run into its folder, or of several into `out`; returns the tables.

    `sections` are (title, content, caption); content is HTML or a list of (picture, caption).
    """
    if out is None and len(runs) != 1:
        raise ValueError(f"{len(runs)} runs have no folder in common; say out=, or --out")
    folders = _named(runs)
    folder = Path(out) if out is not None else Path(runs[0])
    of_run = {name: read_lines(path) for name, path in folders.items()}
    for name, lines in of_run.items():
        if not lines:
            raise ValueError(f"{folders[name]} has no lines to report on; run evaluate.py first")
    lines = merge(of_run)
    made = tables(lines)
    seen, apart = overviews(made), uncompared(made)
    own = sections_html(sections) or _kept_sections(folders)
    page = html_page(title, made, seen, lines, folders, apart=apart, sections=own)
    documents = {
        "report.json": _json(title, made, seen, apart, lines),
        "report.html": page,
        "report.md": _markdown(title, made, seen, apart, lines),
        "report.tex": _latex(made, seen),
        "report.csv": formats.comma_separated(made, seen),
    }
    documents |= {SECTIONS: own} if sections else {}
    folder.mkdir(parents=True, exist_ok=True)
    # A full disk shows while writing, when none of the old files is touched yet.
    with ExitStack() as stack:
        for name, text in documents.items():
            file = stack.enter_context(replacing(folder / name))
            file.write_text(text, encoding="utf-8")
    return f"{_text(made, seen, apart)}\n\n{folder / 'report.html'}"


def _named(runs: Sequence[str | Path]) -> dict[str, Path]:
    """Each run under the name of its folder, under its path where two have the same name."""
    paths = list(dict.fromkeys(map(Path, runs)))
    names = [path.resolve().name for path in paths]
    return {
        str(path) if names.count(name) > 1 else name: path
        for name, path in zip(names, paths, strict=True)
    }


def _kept_sections(folders: Mapping[str, Path]) -> str:
    kept = [path / SECTIONS for path in folders.values()]
    return "".join(path.read_text(encoding="utf-8") for path in kept if path.exists())


def _origins(lines: Sequence[Line]) -> dict[str, list[str]]:
    return {
        name: list(dict.fromkeys(line[name] for line in lines))
        for name in ("command", "commit", "machine")
    }


def _json(
    title: str,
    made: Sequence[Table],
    seen: Sequence[Overview],
    apart: Sequence[str],
    lines: Sequence[Line],
) -> str:
    data = {
        "title": title,
        **_origins(lines),
        "tables": [table.plain() for table in made],
        "overviews": [asdict(overview) for overview in seen],
        "not_compared": list(apart),
    }
    return json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False)


def _text(made: Sequence[Table], seen: Sequence[Overview], apart: Sequence[str]) -> str:
    shown, left = list(made), 0
    if len(made) > MAX_TABLES:
        mains = {(table.protocol, table.set, table.list_sha256): table for table in reversed(made)}
        shown = [table for table in made if table in mains.values()]
        left = len(made) - len(shown)
    parts = [formats.terminal(table) for table in shown]
    parts += [formats.terminal_differences(table) for table in shown]
    parts += [formats.terminal_calibration(table) for table in shown]
    parts += [formats.terminal_overview(overview) for overview in seen if overview.says_more]
    parts += ["\n".join(apart)]
    parts += [f"{left} more tables are in report.md"] if left else []
    return "\n\n".join(filter(None, parts))


def _markdown(
    title: str,
    made: Sequence[Table],
    seen: Sequence[Overview],
    apart: Sequence[str],
    lines: Sequence[Line],
) -> str:
    parts = [f"# {title}", "Means over images, in brackets 95 % bootstrap intervals over images."]
    for overview in (one for one in seen if one.says_more):
        grid, notes = formats.overview_grid(overview), formats.overview_notes(overview)
        parts += [f"## {overview.protocol}: {overview.rule}", formats.markdown(grid, notes)]
    for table in made:
        grid, notes = formats.table_grid(table, formats.LONG), formats.table_notes(table)
        parts += [
            f"## {table.name}, {table.protocol}: {table.rule}",
            table.about,
            formats.markdown(grid, notes),
        ]
        for grid in (formats.difference_grid(table), formats.calibration_grid([table])):
            parts += [formats.markdown(grid, [])] if grid is not None else []
    parts += ["## Not compared", "\n".join(f"- {one}" for one in apart)] if apart else []
    origins = [f"- {name}: `{one}`" for name, own in _origins(lines).items() for one in own]
    weights = {e.predictor: e.weights for table in made for e in table.entries if e.weights}
    origins += [f"- weights of {name}: sha256 `{one}`" for name, one in weights.items()]
    lists = {table.set: table.list_sha256 for table in made}
    origins += [f"- list of {name}: sha256 `{one}`" for name, one in lists.items()]
    return "\n\n".join([*filter(None, parts), "## Origin", "\n".join(origins)]) + "\n"


def _latex(made: Sequence[Table], seen: Sequence[Overview]) -> str:
    parts = ["% needs \\usepackage{booktabs}; overviews in percent, then each set in fractions"]
    for one in seen:
        grid, notes = formats.overview_grid(one), formats.overview_notes(one)
        parts.append(formats.latex(grid, notes, f"{one.protocol} {one.fit}"))
    for table in made:
        grid, notes = formats.table_grid(table, formats.SHORT), formats.table_notes(table)
        label = f"{table.protocol} {table.name} {table.fit}"
        parts.append(formats.latex(grid, notes, label))
    return "\n\n".join(parts) + "\n"
