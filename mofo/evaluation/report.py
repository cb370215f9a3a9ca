"""The report of a run, made from its lines alone: text tables, report.json, one page report.html.

Nothing is predicted or measured here: whoever has the folder can make the report again.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mofo.evaluation.page import Section, html_page
from mofo.evaluation.run import read_lines
from mofo.evaluation.tables import tables, terminal
from mofo.model.weights import replacing


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
    # A full disk shows while writing, when neither of the old files is touched yet.
    with replacing(folder / "report.json") as first, replacing(folder / "report.html") as second:
        first.write_text(data, encoding="utf-8")
        second.write_text(page, encoding="utf-8")
    return "\n\n".join(map(terminal, made)) + f"\n\n{folder / 'report.html'}"
