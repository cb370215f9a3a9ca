"""The report as one HTML page that needs nothing else: style, pictures and curves are inside."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mofo.evaluation import formats
from mofo.evaluation.formats import Grid, Word
from mofo.evaluation.lines import Line
from mofo.evaluation.overview import Overview
from mofo.evaluation.pictures import MAX_SIDE, chosen_keys, picture_folder, picture_paths
from mofo.evaluation.plots import curve, distribution, scale_bar, strip
from mofo.evaluation.tables import Entry, Table, in_metres, short
from mofo.picture import Picture

# (title, HTML or pictures with a caption each, caption of the section)
Section = tuple[str, str | Sequence[tuple[Picture, str]], str]

STYLE = Path(__file__).with_name("page.css")
MANY = 6  # sets, beyond which an overview is set in smaller type
NUM_EXAMINED = 4  # predictors with pictures: of every set each costs about a megabyte
SHARP = 128  # pictures up to this side are drawn with hard pixels: smoothing would invent detail


def html_page(
    title: str,
    made: Sequence[Table],
    seen: Sequence[Overview],
    lines: Sequence[Line],
    folders: Mapping[str, Path],
    *,
    apart: Sequence[str] = (),
    sections: str = "",
) -> str:
    """The whole page as text; `folders` are the runs', where pictures lie, by the lines' `run`."""
    parts = [f"<h1>{html.escape(title)}</h1>", _tiles(made[0]), _overviews(seen)]
    groups: dict[tuple[str, str, str], list[Table]] = {}
    for table in made:
        groups.setdefault((table.protocol, table.set, table.list_sha256), []).append(table)
    for name, group in groups.items():
        own = [x for x in lines if (x["protocol"], x["set"], x["list_sha256"]) == name]
        parts.append(_set(group, own, folders))
    if apart:
        items = "".join(f"<li>{html.escape(one)}" for one in apart)
        parts.append(f"<h2>Not compared</h2><ul class=notes>{items}</ul>")
    parts += [sections, _footer(made, lines)]
    style = STYLE.read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{style}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def sections_html(sections: Sequence[Section]) -> str:
    """What others add to the page, as part of it."""
    parts = []
    for name, content, caption in sections:
        inner = content if isinstance(content, str) else _figures(content)
        parts.append(f"<h2>{html.escape(name)}</h2><p class=soft>{html.escape(caption)}</p>{inner}")
    return "".join(parts)


def _tiles(table: Table) -> str:
    """The numbers of the model in front, large."""
    entry = table.main()
    if not entry.num_images:
        return "<p>No image could be scored; the reasons stand below.</p>"
    listed = f" of {table.num_listed}" if entry.num_images < table.num_listed else ""
    tiles = [
        (f"{entry.means['absrel']:.4f}", "AbsRel, lower is better"),
        (f"{entry.means['delta1']:.4f}", "δ1, higher is better"),
        *(
            [(f"{entry.ratio:.2f}×", "AbsRel of the better trivial baseline, on the same images")]
            if entry.ratio is not None
            else []
        ),
        (f"{entry.num_images}{listed}", f"images, {entry.num_valid:,} measured pixels"),
    ]
    tile = "<div class=tile><b>{}</b><span>{}</span></div>"
    cells = "".join(tile.format(*words) for words in tiles)
    names = f"{html.escape(entry.predictor)} on {html.escape(table.set)}"
    rule = html.escape(f"{table.protocol}, {table.rule}")
    return (
        f"<p class=soft>{names}: {rule}</p><div class=tiles>{cells}</div><p class=soft>Numbers are "
        "means over images, each counted once. The best of a column is bold, of those "
        "that scored the same images; the small numbers are "
        "95 % bootstrap intervals over images.</p>"
    )


def _overviews(seen: Sequence[Overview]) -> str:
    """One for each fit; none where a set's own table says it all."""
    parts = []
    for overview in seen:
        if not overview.says_more:
            continue
        title = html.escape(f"{overview.protocol}: {overview.rule}")
        width = "dense many" if len(overview.sets) > MANY else "dense"
        table = _grid(formats.overview_grid(overview), width)
        parts.append(f"<h3>{title}</h3>{table}{_notes(formats.overview_notes(overview)[1:])}")
    return "".join(["<h2>Overview</h2>", *parts]) if parts else ""


def _set(group: Sequence[Table], lines: Sequence[Line], folders: Mapping[str, Path]) -> str:
    """All of one set: a table for each fit and part, then the main fit's images."""
    first = group[0]
    parts = [
        f"<h2>{html.escape(first.set)} <span class=tag>{html.escape(first.protocol)}</span></h2>"
        f"<p>{html.escape(first.about)}</p>"
    ]
    parts += [_table(table, is_headed=len(group) > 1) for table in group]
    whole = [table for table in group if table.part is None]
    plots = _distributions(whole) + _calibration(whole, lines)
    parts += [_differences(whole), f"<div class=plots>{plots}</div>" * bool(plots)]
    entries = {entry.predictor: entry for table in whole for entry in table.entries}
    names = [name for name, entry in entries.items() if not entry.is_baseline] or list(entries)[:1]
    for name in names[:NUM_EXAMINED]:
        own = [line for line in lines if line["predictor"] == name]
        parts.append(_examples(name, own, folders, is_open=name == names[0]))
    return "".join(parts)


def _differences(whole: Sequence[Table]) -> str:
    """Of the main fit all, of further ones those between learned predictors."""
    parts = []
    for table in whole:
        grid = formats.difference_grid(table, with_baselines=table is whole[0])
        if grid is not None:
            head = f"<h3>{html.escape(table.rule)}</h3>" if len(whole) > 1 else ""
            parts.append(head + _grid(grid, "narrow"))
    if not parts:
        return ""
    return (
        f"<details open><summary>Paired differences</summary>{''.join(parts)}<p class=soft>Mean "
        "over the images that both have, with its 95 % interval. Where two are equally good, one "
        "in twenty excludes 0 by chance.</p></details>"
    )


def _table(table: Table, *, is_headed: bool) -> str:
    title = f"{table.part}: {table.rule}" if table.part else table.rule
    head = f"<h3>{html.escape(title)}</h3>" if is_headed else ""
    grid = formats.table_grid(table, formats.LONG)
    strips = _strips(table)
    notes = [
        f"{e.predictor}: {text}"
        for e in table.entries
        for text in formats.remarks(e, "listed below")
    ]
    more = "".join(_failures(entry) for entry in table.entries)
    reach = _reach(table)
    said = html.escape(formats.table_notes(table)[0])
    grid = grid._replace(head=["", *grid.head[1:]])
    return (
        f"{head}{_grid(grid, '', extra=('per image', strips))}<p class=soft>{said}. Strips: AbsRel "
        f"from 0 to {reach:.2f}, the bar is the mean.</p>"
        f"{_notes(notes)}{more}"
    )


def _reach(table: Table) -> float:
    """How far plots of AbsRel go: all but the worst images of the worst predictor."""
    # "higher": up to fifty images, none is left out
    found = [np.percentile(e.absrel, 98, method="higher") for e in table.entries if e.absrel]
    return float(max(found, default=0.0)) or 1.0


def _strips(table: Table) -> list[str]:
    reach = _reach(table)
    return [
        strip(entry.absrel, entry.means["absrel"], reach) if entry.absrel else ""
        for entry in table.entries
    ]


def _failures(entry: Entry) -> str:
    """The rest of the images without a score, folded away."""
    rest = list(entry.failed.items())[formats.NUM_FAILED_SHOWN :]
    items = "".join(f"<li>{html.escape(key)}: {html.escape(why)}" for key, why in rest)
    about = html.escape(f"{entry.predictor}: {len(rest)} more images without a score")
    return f"<details><summary>{about}</summary><ul class=notes>{items}</ul></details>" * bool(rest)


def _grid(grid: Grid, kind: str, extra: tuple[str, Sequence[str]] | None = None) -> str:
    """A table; `extra` is one more column of HTML."""
    above = "".join(f"<th colspan={span}>{html.escape(name)}" for name, span in grid.groups)
    heads = [*map(html.escape, grid.head), *([extra[0]] if extra else [])]
    head = f"<tr><th>{above}</tr>" * bool(above) + "<tr>" + "".join(f"<th>{one}" for one in heads)
    rows = []
    for number, (row_kind, words) in enumerate(grid.rows):
        tag = "<span class=tag>baseline</span>" if row_kind == "base" else ""
        cells = [f"<td>{html.escape(words[0].text)}{tag}", *map(_word, words[1:])]
        if extra:
            cells.append(f"<td>{extra[1][number]}")
        rows.append(f"<tr class={row_kind}>{''.join(cells)}")
    return (
        f"<div class=scroll><table class='{kind}'><thead>{head}</thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _word(word: Word) -> str:
    small = f"<small>{html.escape(word.interval)}</small>" if word.interval else ""
    return f"<td{' class=best' if word.best else ''}>{html.escape(word.text)}{small}"


def _notes(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(note)}" for note in notes)
    return f"<ul class=notes>{items}</ul>" if notes else ""


def _distributions(whole: Sequence[Table]) -> str:
    """A plot of the main fit, and of a further one if it has other learned predictors."""
    seen: set[str] = set()
    parts = []
    for table in whole:
        learned = {entry.predictor for entry in table.entries if not entry.is_baseline}
        own = [entry for entry in table.entries if entry.absrel]
        if max((len(e.absrel) for e in own), default=0) < 2 or (seen and learned <= seen):
            continue
        found = {entry.predictor: (entry.absrel, entry.num_asked) for entry in own}
        seen |= learned
        title = "Images, one by one" + (f": {table.rule}" if len(whole) > 1 else "")
        parts.append(
            f"<div><h3>{html.escape(title)}</h3><p class=soft>Which share of the images has an "
            "AbsRel up to x: further left is better. One without a score is never reached."
            f"</p>{distribution(found, _reach(table))}</div>"
        )
    return "".join(parts)


def _calibration(whole: Sequence[Table], lines: Sequence[Line]) -> str:
    """Error against predicted uncertainty, of predictors that say how sure they are."""
    of_predictor: dict[str, list[dict]] = {}
    for line in lines:
        if line["uncertainty"] is not None:
            of_predictor.setdefault(line["predictor"], []).append(line["uncertainty"])
    grid = formats.calibration_grid(whole)
    if grid is None:
        return ""
    series, ends = {}, [0.0]
    for name, own in of_predictor.items():
        at = np.mean([[one["uncertainty"], one["error"]] for one in own], axis=0)
        series[name] = list(map(tuple, at.T))
        ends.append(min(at[0].max(), at[1].max()))
    series["error = uncertainty"] = [(0.0, 0.0), (max(ends), max(ends))]
    return (
        "<div><h3>Does the uncertainty tell where the error is?</h3><p class=soft>Each image's "
        "pixels in tenths, from the most certain to the least; means over images. AUSE: by how "
        "much more the error would fall if the worst pixels left first, not the least certain.</p>"
        f"{curve(series, x='predicted relative uncertainty', y='relative error')}"
        f"{_grid(grid, 'narrow')}</div>"
    )


def _examples(name: str, own: Sequence[Line], folders: Mapping[str, Path], *, is_open: bool) -> str:
    """A predictor's best, median and worst image, and the first, which no one chose."""
    named: dict[str, list[str]] = {}
    for pick, key in chosen_keys(own).items():
        named.setdefault(key, []).append(pick)
    of_key = {line["key"]: line for line in own}
    cards = []
    for key, picks in named.items():
        line = of_key[key]
        pictures = picture_folder(folders[line["run"]], line["set"], key)
        paths = picture_paths(pictures, line["name"])
        if not all(path.exists() for path in paths):
            continue  # a longer run may choose an image whose pictures a shorter one dropped
        titles = ("image", "measured depth", "predicted depth", "relative error")
        opened = [Image.open(path) for path in paths]
        shown = [(np.asarray(one), about) for one, about in zip(opened, titles, strict=True)]
        scores = next(iter(line["fits"].values()))
        score = f"AbsRel {scores['absrel']:.4f}, δ1 {scores['delta1']:.4f}"
        cards.append(
            f"<h3>{' and '.join(picks).capitalize()} · {html.escape(key)}</h3>"
            f"<p class=soft>{score} · {html.escape(line['credit'])}</p>"
            f"{_figures(shown)}{_legend(opened[1].info, is_metric=in_metres(line))}"
        )
    if not cards:
        return ""
    title = f"<summary>{html.escape(name)}, image by image</summary>"
    return f"<details{' open' * is_open}>{title}{''.join(cards)}</details>"


def _legend(limits: Mapping, *, is_metric: bool) -> str:
    """What the colours mean; `limits` are those that a picture of depth says it has."""
    unit = " m" if is_metric else ""
    far, near = (
        f"{name} {float(limits[name]):.3g}{unit}" if name in limits else name
        for name in ("far", "near")
    )
    grey = "<span>grey: not measured, or no depth predicted</span>"
    bars = f"{scale_bar(far, near)}{scale_bar('0', '50 % error')}"
    return f"<div class='legend soft'>{bars}{grey}</div>"


def _figures(pictures: Iterable[tuple[Picture, str]]) -> str:
    """Small pictures four abreast, so that image and depth pairs line up; large ones wide."""
    pictures = list(pictures)
    kind = " wide" if any(picture.shape[1] > MAX_SIDE for picture, _ in pictures) else ""
    cells = []
    for picture, caption in pictures:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
        data = base64.b64encode(buffer.getvalue()).decode()
        sharp = " class=sharp" if max(picture.shape[:2]) <= SHARP else ""
        text = html.escape(caption)
        cells.append(
            f'<figure><img{sharp} alt="{text}" src="data:image/png;base64,{data}">'
            f"<figcaption>{text}</figcaption></figure>"
        )
    return f'<div class="figures{kind}">{"".join(cells)}</div>'


def _footer(made: Sequence[Table], lines: Sequence[Line]) -> str:
    """Where the numbers come from, and the licence texts that travel with the pictures."""
    rows: dict[tuple[str, str], None] = {}
    rows |= dict.fromkeys((line["protocol"], line["settings"]["about"]) for line in lines)
    for name in ("command", "commit", "machine"):
        rows |= dict.fromkeys((name.capitalize(), line[name] or "unknown") for line in lines)
    for table in made:
        for entry in table.entries:
            if entry.weights:
                rows[f"Weights of {entry.predictor}", f"sha256 {short(entry.weights)}…"] = None
    for table in made:
        rows[f"List of {table.set}", f"sha256 {table.list_sha256}"] = None
    pairs = "".join(
        f"<dt>{html.escape(name)}<dd><code>{html.escape(value)}</code>" for name, value in rows
    )
    terms = {x["credit"]: x["licence"] for x in lines if x["licence"] not in x["credit"]}
    licences = "".join(
        f"<p class=soft>{html.escape(credit)}: {html.escape(text)}"
        for credit, text in terms.items()
    )
    return f"<footer><dl>{pairs}</dl>{licences}</footer>"
