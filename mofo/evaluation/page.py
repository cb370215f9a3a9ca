"""The report as one HTML page that needs nothing else: style, pictures and curves are inside."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image

from mofo.evaluation.run import MAX_SIDE, Line, chosen_keys, picture_folder
from mofo.evaluation.tables import SHOWN, TITLES, Entry, Table, figures, notes
from mofo.picture import MAGMA, Picture

# (title, HTML or pictures with a caption each, caption of the section)
Section = tuple[str, str | Sequence[tuple[Picture, str]], str]

SHARP = 128  # pictures up to this side are drawn with hard pixels: smoothing would invent detail
MAX_DOTS = 300  # images drawn per strip
MAX_POINTS = 400  # per line of a plot

STYLE = """
:root{--ink:#1c1e21;--soft:#666c75;--line:#e3e5e8;--paper:#fff;--card:#f7f8f9;--accent:#7b2d86;
--s0:#7b2d86;--s1:#e0643c;--s2:#2f7ebc;--s3:#4c9a5b;color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--ink:#e8e9eb;--soft:#9aa1ab;--line:#31353b;--paper:#15171a;
--card:#1d2024;--accent:#d98ae0;--s0:#d98ae0;--s1:#ff9a76;--s2:#7cc0f5;--s3:#8fd39c}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1080px;padding:2.5rem 1.5rem 4rem;background:var(--paper);
color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",
sans-serif}
h1{font-size:1.9rem;line-height:1.2;letter-spacing:-.015em;margin:0 0 .3rem}
h2{font-size:1.25rem;letter-spacing:-.01em;margin:3rem 0 .3rem}
h3{font-size:.95rem;margin:1.8rem 0 .5rem}
p{margin:.3rem 0;max-width:85ch}
p.soft{max-width:none}
.soft,figcaption,footer{color:var(--soft);font-size:.86rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));
gap:.8rem;margin:1.6rem 0 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.8rem 1rem}
.tile b{display:block;font-size:1.7rem;font-weight:650;letter-spacing:-.02em;line-height:1.25;
font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:.84rem;display:block;line-height:1.35}
.scroll{overflow-x:auto;margin:.9rem 0 .5rem}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.92rem}
th,td{padding:.5rem 0 .5rem .8rem;text-align:right;white-space:nowrap;
border-bottom:1px solid var(--line)}
th{color:var(--soft);font-weight:500;font-size:.82rem}
th:first-child,td:first-child{text-align:left;padding-left:0;position:sticky;left:0;
background:var(--paper)}
td.best{font-weight:700}
tr.base td{color:var(--soft)} tr.base td.best{color:var(--ink)}
tr.main td:first-child{font-weight:600}
.tag{font-size:.72rem;border:1px solid var(--line);border-radius:99px;padding:.05rem .5rem;
margin-left:.5rem;color:var(--soft);font-weight:400}
.strip{width:120px;height:18px;display:block;margin-left:auto} .strip circle{fill:var(--accent)}
.base .strip circle{fill:var(--soft)} .strip line{stroke:var(--ink);stroke-width:2}
.figures{display:grid;grid-template-columns:repeat(4,1fr);gap:.8rem;margin:.6rem 0}
.wide{grid-template-columns:repeat(auto-fit,minmax(min(100%,380px),1fr));align-items:start}
.wide figure{max-width:720px}
figure{margin:0} figure img{width:100%;display:block;border-radius:6px;background:var(--card)}
figcaption{margin-top:.25rem;line-height:1.35}
.sharp{image-rendering:pixelated}
.legend{display:flex;flex-wrap:wrap;gap:.4rem 2rem;margin:.8rem 0}
.legend span{display:flex;align-items:center;gap:.5rem}
.bar{width:90px;height:9px;border-radius:5px}
.plot{width:100%;max-width:760px;height:auto;display:block;margin:.8rem 0}
.plot text{fill:var(--soft);font-size:12px} .plot path{fill:none;stroke-width:1.8}
.plot .axis{stroke:var(--line);stroke-width:1}
ul.notes{color:var(--soft);font-size:.86rem;padding-left:1.1rem;margin:.4rem 0}
footer{margin-top:3.5rem;border-top:1px solid var(--line);padding-top:1rem;overflow-wrap:anywhere}
footer dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem;margin:0}
footer dd{margin:0} code{font:.84rem ui-monospace,"Liberation Mono",Menlo,monospace}
@media(max-width:640px){body{padding:1.5rem 1rem 3rem}h1{font-size:1.5rem}
.figures{grid-template-columns:1fr 1fr}
.wide{grid-template-columns:1fr}td:first-child{white-space:normal;min-width:6rem}
.tag{margin-left:0;display:inline-block}.tiles{grid-template-columns:1fr 1fr}}
"""


def html_page(
    title: str,
    made: Sequence[Table],
    lines: Sequence[Line],
    origins: Mapping[str, Sequence[str]],
    folder: Path,
    sections: Sequence[Section],
) -> str:
    """The whole page as text."""
    body = [f"<h1>{html.escape(title)}</h1>", _tiles(made[0])]
    for table in made:
        body += [_table(table), _examples(table, lines, folder)]
    for name, content, caption in sections:
        inner = content if isinstance(content, str) else _figures(content)
        body.append(f"<h2>{html.escape(name)}</h2><p class=soft>{html.escape(caption)}</p>{inner}")
    body.append(_footer(made, lines, origins))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
        f"<body>{''.join(body)}</body></html>\n"
    )


def curve(
    series: Mapping[str, Sequence[tuple[float | int, float | int]]],
    *,
    x: str = "step",
    y: str = "loss",
) -> str:
    """Lines over a shared pair of axes, as SVG for a section."""
    drawn = {name: np.array(points, np.float64) for name, points in series.items() if len(points)}
    if not drawn:
        raise ValueError("there is nothing to plot: every series is empty")
    every = np.concatenate(list(drawn.values()))
    if not np.isfinite(every).all():
        raise ValueError("a plot needs finite numbers; leave the others out")
    low, high = every.min(0), every.max(0)
    span = np.where(high > low, high - low, 1.0)
    width, height, left, bottom = 640, 250, 52, 34
    parts = [_axes(low, high, span, (width, height, left, bottom), x, y)]
    for number, (name, points) in enumerate(drawn.items()):
        thin = points[:: -(-len(points) // MAX_POINTS)]
        at = (thin - low) / span * (width - left - 12, 30 + bottom - height)
        path = " ".join(f"{u:.1f},{v:.1f}" for u, v in at + (left, height - bottom))
        colour = f"var(--s{number % 4})"
        parts.append(f'<path d="M{path}" style="stroke:{colour}"/>')
        label = f'x="{left + 8 + 150 * number}" y="14" style="fill:{colour}"'
        parts.append(f"<text {label}>{html.escape(name)}</text>")
    return f'<svg class=plot viewBox="0 0 {width} {height}" role=img>{"".join(parts)}</svg>'


def _axes(
    low: np.ndarray, high: np.ndarray, span: np.ndarray, frame: tuple[int, ...], x: str, y: str
) -> str:
    width, height, left, bottom = frame
    parts = []
    for share in (0.0, 0.5, 1.0):
        across = left + share * (width - left - 12)
        down = height - bottom - share * (height - bottom - 30)
        value_x, value_y = low + share * np.where(high > low, span, 0)
        anchor = "end" if share == 1 else "middle"
        parts.append(f'<line class=axis x1="{left}" x2="{width - 12}" y1="{down}" y2="{down}"/>')
        parts.append(
            f'<text x="{left - 8}" y="{down + 4}" text-anchor=end>{value_y:.3g}</text>'
            f'<text x="{across}" y="{height - 18}" text-anchor={anchor}>{value_x:.6g}</text>'
        )
    names = f'<text x="{width - 12}" y="{height - 3}" text-anchor=end>{html.escape(x)}</text>'
    return "".join(parts) + names + f'<text x="0" y="14">{html.escape(y)}</text>'


def _tiles(table: Table) -> str:
    """The numbers of the model in front, large."""
    entry = table.main()
    if not entry.num_images:
        return "<p>No image could be scored; the reasons stand below.</p>"
    ratio = table.ratio(entry)
    tiles = [
        (f"{entry.means['absrel']:.4f}", "AbsRel, lower is better"),
        (f"{entry.means['delta1']:.4f}", "δ1, higher is better"),
        *([(f"{ratio:.2f}×", "AbsRel of the better trivial baseline")] if ratio else []),
        (f"{entry.num_images}", f"images, {entry.num_valid:,} measured pixels"),
    ]
    tile = "<div class=tile><b>{}</b><span>{}</span></div>"
    cells = "".join(tile.format(*words) for words in tiles)
    names = f"{html.escape(entry.predictor)} on {html.escape(table.benchmark)}"
    return f"<p class=soft>{names}: {html.escape(table.protocol)}</p><div class=tiles>{cells}</div>"


def _table(table: Table) -> str:
    titles = [TITLES["absrel"], "× baseline", *(TITLES[name] for name in SHOWN[1:])]
    head = "".join(f"<th>{name}" for name in ["", *titles, "images", "pixels", "per image"])
    reach = max((np.percentile(e.absrel, 98) for e in table.entries if e.absrel), default=1.0)
    rows = "".join(_table_row(table, entry, reach) for entry in table.entries)
    remarks = "".join(f"<li>{html.escape(note)}" for e in table.entries for note in notes(e))
    return (
        f"<h2>{html.escape(table.benchmark)}</h2><p>{html.escape(table.about)}</p>"
        f"<div class=scroll><table><thead><tr>{head}</thead><tbody>{rows}</tbody></table></div>"
        f"<p class=soft>Protocol: {html.escape(table.protocol)}. Mean over images, each counted "
        f"once; the best of a column is bold. Strips run from 0 to {reach:.2f}, the bar is the "
        f"mean.</p><ul class=notes>{remarks}</ul>"
    )


def _table_row(table: Table, entry: Entry, reach: float) -> str:
    numbers = {}
    for name in SHOWN:
        value = entry.means.get(name)
        best = " class=best" if value == table.best(name) else ""
        numbers[name] = f"<td{best}>{figures(name, value)}"
    ratio = table.ratio(entry)
    kind = "base" if entry.is_baseline else "main" if entry is table.main() else "other"
    tag = "<span class=tag>baseline</span>" if entry.is_baseline else ""
    total = entry.num_images + len(entry.failed)
    images = f"{entry.num_images}" + (f" of {total}" if entry.failed else "")
    return (
        f"<tr class={kind}><td>{html.escape(entry.predictor)}{tag}{numbers.pop('absrel')}"
        f"<td>{'' if ratio is None else format(ratio, '.2f')}{''.join(numbers.values())}"
        f"<td>{images}<td>{entry.num_valid:,}<td>{_strip(entry, reach)}"
    )


def _strip(entry: Entry, reach: float) -> str:
    """One dot per image along AbsRel, a bar at the mean."""
    if not entry.absrel:
        return ""
    thin = sorted(entry.absrel)[:: -(-len(entry.absrel) // MAX_DOTS)]
    opacity = max(0.2, min(0.7, 16 / len(thin)))
    dots = "".join(f'<circle cx="{_across(a, reach)}" cy="9" r="2.6"/>' for a in thin)
    mean = _across(entry.means["absrel"], reach)
    return (
        f'<svg class=strip viewBox="0 0 130 18"><g opacity="{opacity:.2f}">{dots}</g>'
        f'<line x1="{mean}" x2="{mean}" y1="2" y2="16"/></svg>'
    )


def _across(absrel: float, reach: float) -> str:
    return f"{3 + 124 * min(absrel / reach, 1.0):.1f}"


def _examples(table: Table, lines: Sequence[Line], folder: Path) -> str:
    """Best, median and worst image of the model in front, and the first, which no one chose."""
    main = table.main().predictor
    own = [x for x in lines if (x["benchmark"], x["predictor"]) == (table.benchmark, main)]
    named: dict[str, list[str]] = {}
    for pick, key in chosen_keys(own).items():
        named.setdefault(key, []).append(pick)
    of_key = {line["key"]: line for line in own}
    cards = []
    for key, picks in named.items():
        pictures = picture_folder(folder, table.benchmark, key)
        stem = quote(main, safe="")
        names = ("image.png", "truth.png", f"{stem}.depth.png", f"{stem}.error.png")
        paths = [pictures / name for name in names]
        if not all(path.exists() for path in paths):
            continue  # a longer run may choose an image whose pictures a shorter one dropped
        line = of_key[key]
        titles = ("image", "measured depth", "predicted depth", "relative error")
        shown = [(np.asarray(Image.open(path)), t) for path, t in zip(paths, titles, strict=True)]
        score = f"AbsRel {line['metrics']['absrel']:.4f}, δ1 {line['metrics']['delta1']:.4f}"
        cards.append(
            f"<h3>{' and '.join(picks).capitalize()} · {html.escape(key)}</h3>"
            f"<p class=soft>{score} · {html.escape(line['credit'])}</p>{_figures(shown)}"
        )
    return "".join(cards) + _legend() if cards else ""


def _legend() -> str:
    stops = ",".join("rgb({:.0f},{:.0f},{:.0f})".format(*stop) for stop in MAGMA)
    bar = f'<i class=bar style="background:linear-gradient(90deg,{stops})"></i>'
    return (
        f"<div class='legend soft'><span>far {bar} near</span><span>0 {bar} 50 % error</span>"
        "<span>grey: not measured, or no depth predicted</span></div>"
    )


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


def _footer(
    made: Sequence[Table], lines: Sequence[Line], origins: Mapping[str, Sequence[str]]
) -> str:
    """Where the numbers come from, and the licence texts that travel with the pictures."""
    weights = {e.predictor: e.weights for table in made for e in table.entries if e.weights}
    rows = [(name.capitalize(), value) for name, values in origins.items() for value in values]
    rows += [(f"Weights of {name}", f"sha256 {digest}…") for name, digest in weights.items()]
    pairs = "".join(
        f"<dt>{html.escape(name)}<dd><code>{html.escape(value or 'unknown')}</code>"
        for name, value in rows
    )
    terms = {x["credit"]: x["licence"] for x in lines if x["licence"] not in x["credit"]}
    licences = "".join(
        f"<p class=soft>{html.escape(credit)}: {html.escape(text)}"
        for credit, text in terms.items()
    )
    return f"<footer><dl>{pairs}</dl>{licences}</footer>"
