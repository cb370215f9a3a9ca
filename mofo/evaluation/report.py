"""The report of a run, made from its lines alone: text tables, report.json, one page report.html.

Nothing is predicted or measured here: whoever has the folder can make the report again.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mofo.evaluation.page import Section, html_page
from mofo.evaluation.run import read_lines
from mofo.evaluation.tables import tables, terminal


def report(
    folder: str | Path, *, title: str = "Depth evaluation", sections: Sequence[Section] = ()
) -> str:
    """Write report.json and report.html into `folder` from its lines; returns the text tables.

    `sections` are (title, content, caption); content is HTML or a list of (picture, caption).
    """
    folder = Path(folder)
    lines = read_lines(folder)
    if not lines:
        raise ValueError(f"{folder} has no lines to report on; run evaluate.py first")
    made = tables(lines)
    origins = {
        name: list(dict.fromkeys(line[name] for line in lines))
        for name in ("command", "commit", "machine")
    }
    rows = [
        {**asdict(table), "ratios": {e.predictor: table.ratio(e) for e in table.entries}}
        for table in made
    ]
    data = json.dumps({"title": title, **origins, "tables": rows}, indent=1, allow_nan=False)
    page = html_page(title, made, lines, origins, folder, sections)
    # Both are complete before either is touched, so a page never stands beside older numbers.
    _write_text(folder / "report.json", data)
    _write_text(folder / "report.html", page)
    return "\n\n".join(map(terminal, made)) + f"\n\n{folder / 'report.html'}"


def _write_text(path: Path, text: str) -> None:
    """Whole or not at all, whatever happens to the disk."""
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
