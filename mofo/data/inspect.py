"""A look at a set of shards: what its manifest says, pictures of some samples, and what to doubt.

report = inspect("data/made/real_train")
print(report.text())
save(report, "look")                     # look/sheet.png and look/index.html
"""

import html
import io
import json
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from mofo.data.caption import OVERLAY, read_overlay
from mofo.data.sample import DAMAGE, Sample, rasterise
from mofo.data.shards import DamagedSample, Shards, sidecar_path
from mofo.data.storage import atomic, read_bytes, write_text
from mofo.data.summary import Tally, add, describe, tally
from mofo.data.suspicion import Finding, judge, judge_set, measure
from mofo.picture import MAGMA, Picture, depth_picture, grid

SIDE = 256  # pixels of the longer side of a picture
DOTTED = 0.02  # of the image measured; below it, points are drawn 3 pixels wide
BLOCKS = " ▁▂▃▄▅▆▇█"
SKY = (112, 164, 214)
NUM_SOURCES, NUM_FINDINGS, NUM_REPEATS = 12, 40, 5
LETTER = 6  # pixels, in the labels of a grid
SHEET_COLUMNS = 2

STYLE = """
:root{--ink:#1c1e21;--soft:#666c75;--line:#e3e5e8;--paper:#fff;--warn:#b3261e;
color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--ink:#e8e9eb;--soft:#9aa1ab;--line:#31353b;--paper:#15171a;
--warn:#ff9a8f}}
body{margin:0 auto;max-width:1080px;padding:2rem 1.5rem 4rem;background:var(--paper);
color:var(--ink);font:15px/1.5 system-ui,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
h1{font-size:1.5rem;margin:0 0 .6rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.4rem 0 .5rem}
pre{overflow-x:auto;font:13px/1.45 ui-monospace,"Liberation Mono","DejaVu Sans Mono",monospace}
.card{border-top:1px solid var(--line);padding:.9rem 0}
.card h3{font-size:.95rem;margin:0;overflow-wrap:anywhere} .card p{margin:.15rem 0 .4rem}
.soft{color:var(--soft);font-size:.86rem;overflow-wrap:anywhere} .flag{color:var(--warn)}
.row{display:grid;grid-template-columns:repeat(3,1fr);gap:.6rem}
img{width:100%;display:block;image-rendering:pixelated;border-radius:4px}
i{display:inline-block;width:90px;height:9px;border-radius:5px;margin:0 .4rem}
"""


class Card(NamedTuple):
    """One sample to look at: the image, its depth and one upon the other."""

    key: str
    pictures: list[Picture]
    about: str
    caption: str
    terms: str
    findings: list[Finding]


@dataclass(frozen=True, kw_only=True)
class Report:
    """`statistics` has the keys of a manifest; `sources` holds the same of the samples seen.

    Both are of the shards alone: `num_overlaid` samples more have a caption by `mofo caption`.
    """

    name: str
    manifest: Mapping[str, Any]
    statistics: Mapping[str, Any]
    sources: Mapping[str, Mapping[str, Any]]
    findings: Sequence[Finding]
    cards: Sequence[Card]
    num_overlaid: int

    def text(self) -> str:
        lines = [self.name, *_table(self), "", *_sources(self), ""]
        if not self.findings:
            lines.append("nothing suspicious")
        for what, count in Counter(finding.what for finding in self.findings).most_common():
            lines.append(f"{count} x {what}")
        lines += [f"  {finding}" for finding in self.findings[:NUM_FINDINGS]]
        if (more := len(self.findings) - NUM_FINDINGS) > 0:
            lines.append(f"  and {more} more")
        return "\n".join(lines)


def inspect(source: str | Path, *, num_samples: int = 48, seed: int = 0) -> Report:
    """Read `num_samples` of a set, drawn by `seed`, and judge them; repeats are sought in all."""
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}, but must be 1 or more")
    shards = Shards(source)
    overlay = read_overlay(source)
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(shards), min(num_samples, len(shards)), replace=False)
    cards, measures, findings = [], [], []
    total: Tally = {}
    by_source: dict[str, Tally] = {}
    for index in tqdm(sorted(chosen.tolist()), desc=f"reading {source}", disable=None):
        sample = _read(shards, index)
        if isinstance(sample, Finding):
            findings.append(sample)
            continue
        measures.append(measure(sample))
        doubts = list(judge(sample, measures[-1]))
        findings += doubts
        captions = sample.captions or overlay.get(sample.key, ())
        cards.append(_card(replace(sample, captions=captions), doubts))
        counts = tally(sample)
        add(total, counts)
        add(by_source.setdefault(sample.source, {}), counts)
    manifest = shards.manifest or {}
    # Format 1 kept no statistics, and a pattern has no manifest.
    is_full = "depth_histogram" in manifest
    return Report(
        name=str(source),
        manifest=manifest,
        statistics=manifest if is_full else describe(total) if total else {},
        sources={name: describe(counts) for name, counts in _combined(by_source).items()},
        findings=[*judge_set(measures), *_repeats(shards), *findings],
        cards=cards,
        num_overlaid=sum(map(bool, overlay.values())),
    )


def save(report: Report, folder: str | Path) -> None:
    """Write `sheet.png` and `index.html`, which needs no other file, into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if report.cards:
        with atomic(folder / "sheet.png") as file:
            Image.fromarray(sheet(report)).save(file, format="PNG")
    write_text(folder / "index.html", page(report))


def sheet(report: Report) -> Picture:
    """All pictures in one; what is suspicious has a mark before its key."""
    cells = []
    for card in report.cards:
        labels = [f"! {card.key}" if card.findings else card.key, card.about, card.caption]
        room = card.pictures[0].shape[1] // LETTER
        labels = [_plain(label)[:room] for label in labels[: len(card.pictures)]]
        cells.append(grid([card.pictures], labels))
    width = max(cell.shape[1] for cell in cells)
    bands = []
    for i in range(0, len(cells), SHEET_COLUMNS):
        row = cells[i : i + SHEET_COLUMNS]
        # A row is as high as its own pictures.
        band = np.full(
            (max(cell.shape[0] for cell in row), SHEET_COLUMNS * width, 3), 255, np.uint8
        )
        for j, cell in enumerate(row):
            band[: cell.shape[0], j * width : j * width + cell.shape[1]] = cell
        bands.append(band)
    return np.concatenate(bands)


def page(report: Report) -> str:
    cards = "".join(map(_card_html, report.cards))
    stops = ",".join("rgb({:.0f},{:.0f},{:.0f})".format(*stop) for stop in MAGMA)
    bar = f'<i style="background:linear-gradient(90deg,{stops})"></i>'
    return (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(report.name)}</title>"
        "<meta name=viewport content='width=device-width'>"
        f"<style>{STYLE}</style><h1>{html.escape(report.name)}</h1>"
        f"<pre>{html.escape(report.text().partition(chr(10))[2])}</pre>"
        f"<h2>{len(report.cards)} samples</h2>"
        f"<p class=soft>image, depth, depth upon the image. far{bar}near, "
        "grey: not measured, blue: sky</p>"
        f"{cards}"
    )


def _read(shards: Shards, index: int) -> Sample | Finding:
    try:
        sample = shards.read(index)
    except DamagedSample as error:
        return Finding(f"{error.shard} {error.key}", "damaged", error.reason)
    try:
        sample.check()
    except ValueError as error:
        return Finding(sample.key, "damaged", str(error))
    return sample


def _repeats(shards: Shards) -> Iterator[Finding]:
    """Images, and depths, whose bytes occur twice in a set: by the checksums of its sidecars."""
    if shards.is_remote:
        return
    seen: dict[str, dict[tuple[int, ...], list[str]]] = {"image": {}, "depth": {}}
    for path in shards.paths:
        # What is wrong with a shard, reading its samples says.
        with suppress(*DAMAGE):
            for key, spans, *_ in json.loads(read_bytes(sidecar_path(path)))["samples"]:
                for extension, (_, *size_and_crc) in spans.items():
                    kind = "depth" if extension in ("depth.png", "points.bin") else "image"
                    if extension not in ("json", "sky.png"):
                        seen[kind].setdefault(tuple(size_and_crc), []).append(key)
    for kind, keys_of in seen.items():
        groups = [keys for keys in keys_of.values() if len(keys) > 1]
        if groups:
            shown = "; ".join(" = ".join(keys[:NUM_REPEATS]) for keys in groups[:NUM_REPEATS])
            count = sum(map(len, groups)) - len(groups)
            yield Finding(None, f"duplicate {kind}", f"{count} with the bytes of another: {shown}")


def _combined(by_source: Mapping[str, Tally]) -> dict[str, Tally]:
    """The largest sources, and the others together."""
    names = sorted(by_source, key=lambda name: (-sum(by_source[name]["size"].values()), name))
    kept = names if len(names) <= NUM_SOURCES else names[: NUM_SOURCES - 1]
    combined = {name: by_source[name] for name in kept}
    if others := names[len(kept) :]:
        rest: Tally = {}
        for name in others:
            add(rest, by_source[name])
        combined[f"{len(others)} other sources"] = rest
    return combined


def _table(report: Report) -> Iterator[str]:
    manifest, facts = report.manifest, report.statistics
    made = manifest.get("made_from") or {}
    if manifest:
        num_samples = sum(shard["samples"] for shard in manifest["shards"])
        size = sum(shard["bytes"] for shard in manifest["shards"]) / 1e6
        yield f"  samples     {num_samples} in {len(manifest['shards'])} shard(s), {size:,.1f} MB"
        yield f"  made by     {made.get('converter', manifest['name'])} {made.get('version', '')}"
        yield f"  hash        {manifest['hash'][:16]}, format {manifest['format']}"
    if (bad := manifest.get("bad", {}).get("items")) is not None:
        yield f"  left out    {bad} items that could not be converted"
    if empty := manifest.get("empty", {}).get("items"):
        yield f"  left out    {empty} items in which nothing usable is measured"
    if not facts:
        return
    if facts is not report.manifest:
        yield f"  of the {facts['samples']} samples seen:"
    names = ("depth", "points", "sky", "intrinsics", "captions")
    more = f" and {report.num_overlaid} in {OVERLAY}" if report.num_overlaid else ""
    counts = ", ".join(f"{name} {facts[f'with_{name}']}" for name in names)
    yield f"  with        {counts}{more}"
    sizes = {name: "x".join(map(str, size)) for name, size in facts["image_sizes"].items()}
    yield f"  images      {sizes['min']} to {sizes['max']}, median {sizes['median']}"
    for licence in facts["licences"][:NUM_SOURCES]:
        yield f"  licence     {licence[:90]}"
    if (measured := facts["measured"]) is not None:
        ranks = measured["percentiles"]
        spread = ", ".join(f"{ranks[p]:.2%}" for p in ("1", "50", "99"))
        yield f"  measured    {measured['mean']:.2%} of the pixels (1 %, 50 %, 99 %: {spread})"
    for kind, histogram in facts["depth_histogram"].items():
        unit = "m" if kind == "metric" else "units"
        yield f"  {f'{kind} depth':<16}{_bars(histogram)} {unit}"


def _sources(report: Report) -> Iterator[str]:
    yield f"of {len(report.cards)} samples seen: number, measured, source, depth"
    for name, facts in report.sources.items():
        share = f"{facts['measured']['mean']:.2%}" if facts["measured"] else "no depth"
        bars = " ".join(map(_bars, facts["depth_histogram"].values()))
        yield f"  {facts['samples']:>4}  {share:>8}  {name[:40]:<40}  {bars}"


def _bars(histogram: Mapping[str, Sequence[float]]) -> str:
    """A histogram in one line, between its outer edges."""
    edges, pixels = histogram["edges"], histogram["pixels"]
    # Every bin that holds a pixel is seen.
    heights = [-(-count * (len(BLOCKS) - 1) // max(pixels)) for count in pixels]
    return f"{edges[0]:.3g} {''.join(BLOCKS[int(height)] for height in heights)} {edges[-1]:.3g}"


def _card(sample: Sample, findings: list[Finding]) -> Card:
    about = "no depth"
    if sample.depth is not None:
        metres, valid = sample.depth
        low, high = np.percentile(metres[valid], (1, 99))
        unit = "m" if sample.metric else "units"
        about = f"{low:.3g} to {high:.3g} {unit}, {valid.mean():.2%} measured"
    if sample.sky is not None and sample.sky.any():
        about += ", blue: sky"
    return Card(
        key=sample.key,
        pictures=_pictures(sample),
        about=about,
        caption=" / ".join(sample.captions) or "no caption",
        terms=f"{sample.source}. {sample.licence}",
        findings=findings,
    )


def _pictures(sample: Sample) -> list[Picture]:
    """Small pictures of one size: the image, its depth, and depth upon the grey image."""
    h, w = sample.shape
    scale = SIDE / max(h, w)
    size = max(1, round(h * scale)), max(1, round(w * scale))
    resample = Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST
    image = np.array(sample.picture.resize((size[1], size[0]), resample))
    if sample.depth is None:
        return [image]
    share = sample.depth[1].mean()
    # Drawn no larger than the map, which would have holes, and enlarged.
    side = 1 if share > DOTTED else 3
    cells = max(1, min(size[0], h) // side), max(1, min(size[1], w) // side)
    rows, columns = (np.arange(n) * k // n for n, k in zip(size, cells, strict=True))
    small = rasterise(_scaled(sample, cells), cells)
    metres, valid = (values[np.ix_(rows, columns)] for values in small)
    depth = depth_picture(metres, valid)
    if sample.sky is not None:
        rows, columns = (np.arange(n) * k // n for n, k in zip(size, (h, w), strict=True))
        depth[~valid & sample.sky[np.ix_(rows, columns)]] = SKY
    grey = np.repeat(image.mean(-1, keepdims=True) * 0.7, 3, axis=-1)
    weight = 0.6 if share > 0.5 else 0.9  # lone dots hide little
    mixed = np.where(valid[..., None], weight * depth + (1 - weight) * grey, grey)
    return [image, depth, mixed.round().astype(np.uint8)]


def _scaled(sample: Sample, size: tuple[int, int]) -> np.ndarray:
    """Where the image has depth, as points of a picture of `size`."""
    h, w = sample.shape
    if sample.points is not None:
        u, v, z = sample.points.T
    else:
        assert sample.metres is not None
        assert sample.valid is not None
        rows, columns = np.nonzero(sample.valid)
        u, v, z = columns + 0.5, rows + 0.5, sample.metres[rows, columns]
    return np.stack([u * size[1] / w, v * size[0] / h, z], axis=-1).astype(np.float32)


def _plain(text: str) -> str:
    """Letters that the font of a grid has."""
    return text.encode("latin-1", "replace").decode("latin-1")


def _card_html(card: Card) -> str:
    flags = "".join(
        f"<p class=flag>{html.escape(f'{finding.what}: {finding.why}')}</p>"
        for finding in card.findings
    )
    return (
        f"<div class=card><h3>{html.escape(card.key)}</h3>{flags}"
        f"<p>{html.escape(card.caption)}</p>"
        f"<div class=row>{''.join(map(_img, card.pictures))}</div>"
        f"<p class=soft>{html.escape(card.about)}. {html.escape(card.terms)}</p></div>"
    )


def _img(picture: Picture) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return f'<img alt="" src="data:image/png;base64,{b64encode(buffer.getvalue()).decode()}">'
