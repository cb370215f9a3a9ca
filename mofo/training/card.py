"""The model card of an export: `README.md` in the folder, and pictures drawn from its weights.

Everything in it is read off files: the weights, the run's frozen configuration and checkpoint, the
manifests of the sets it trained on, the reports that `evaluate.py` wrote of these very weights.
What no file says, the card says is not known.
"""

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mofo import __version__, picture
from mofo.data.shards import MANIFEST, Shards
from mofo.evaluation.formats import terminal
from mofo.evaluation.tables import from_plain
from mofo.model import weights
from mofo.pipeline import Mofo

CARD, SAMPLES = "README.md", "samples"
SIDE = 256  # pixels of a sample picture's side, at least: those of small models are enlarged
SOURCES_SHOWN = 50  # of one training set; its manifest lists all
# Of a data source, what the card says in words of its own.
_WORDED = ("shards", "weight", "make")


@dataclass(frozen=True, kw_only=True)
class Training:
    """Where an export's weights come from: a run, its frozen `config`, one of its checkpoints.

    `num_steps` and `num_seen` samples went into it, the last at `commit`; None where the checkpoint
    does not say.
    """

    run: Path
    config: Mapping[str, Any]
    num_steps: int | None
    num_seen: int | None
    commit: str | None
    averaged: bool

    @property
    def name(self) -> str:
        return self.config.get("name", self.run.name)


def write_card(folder: Path, training: Training, *, num_samples: int) -> None:
    """Draw `num_samples` pictures into `samples/`, then write the card of a finished release."""
    config = json.loads((folder / weights.CONFIG).read_text())
    has_depth = config["dit"]["depth_channels"] > 0
    prompts = _prompts(training.config, num_samples) if has_depth else []
    for seed, drawn in enumerate(draw(folder, prompts)):
        (folder / SAMPLES).mkdir(exist_ok=True)
        Image.fromarray(drawn).save(folder / SAMPLES / f"{seed}.png")
    parts = [
        _front_matter(has_depth),
        _title(training, config, has_depth),
        _facts(folder, config),
        _usage(config, has_depth),
        _samples(prompts),
        _training(training),
        _data(training.config),
        _evaluation(folder, training, has_depth),
        _licence(training, config),
    ]
    with weights.replacing(folder / CARD) as partial:
        partial.write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")


def draw(folder: Path, prompts: Sequence[str]) -> Iterator[picture.Picture]:
    """For each prompt one picture of three: joint's image and depth, and i2d's of that image.

    The seed is the prompt's place, the settings are the pipeline's own.
    """
    if not prompts:
        return
    try:
        mofo = Mofo.load(folder)
    except ValueError as error:
        raise ValueError(
            f"no samples can be drawn: {error}. Or export without them (--samples 0)"
        ) from error
    for seed, prompt in enumerate(prompts):
        made = mofo.joint(prompt, seeds=seed)
        again = mofo.image_to_depth(made.image, seeds=seed)
        depths = [picture.depth_picture(one.depth, one.valid) for one in (made, again)]
        factor = -(-SIDE // max(made.depth.shape))
        row = [picture.enlarge(one, factor) for one in (made.image, *depths)]
        yield picture.grid([row], ["image", "its depth", "depth from the image alone"])


def _prompts(config: Mapping[str, Any], count: int) -> list[str]:
    """What the run previewed, else what it trained on, repeated (with other seeds) if too few."""
    preview = (config.get("callbacks") or {}).get("preview") or {}
    found = preview.get("captions") or _captions(config["data"].get("sources", {}), count)
    return list(islice(cycle(found or [""]), count))


def _captions(sources: Mapping[str, Mapping[str, Any]], count: int) -> list[str]:
    """Of each set that is still there, the first captions."""
    there = (row["shards"] for row in sources.values() if Path(row["shards"], MANIFEST).exists())
    sets = [Shards(path) for path in there]
    samples = (one.read(index) for one in sets for index in range(min(count, len(one))))
    return [caption for sample in samples for caption in sample.captions[:1]]


def _front_matter(has_depth: bool) -> str:
    tags = ["diffusion", "flow-matching", "text-to-image"]
    tags += ["depth-estimation", "modality-forcing"] if has_depth else []
    lines = ["license: other", "library_name: mofo", "tags:", *(f"- {tag}" for tag in tags)]
    return "\n".join(["---", *lines, "---"])


def _title(training: Training, config: dict[str, Any], has_depth: bool) -> str:
    h, w = config["use"]["image_size"]
    if not has_depth:
        about = f"""\
A text-to-image diffusion transformer, trained at {h}x{w} pixels: a base for post-training with
mofo. It has no depth stream."""
    else:
        about = f"""\
A diffusion transformer over text, image and depth (*Modality Forcing*, arXiv 2606.13676), trained
with mofo at {h}x{w} pixels. Image and depth have noise levels of their own, so one set of weights
has three modes: image and depth from text (`joint`), depth of an image (`i2d`), an image for a
depth map (`d2i`). Depth is relative: its mean is about 1, and 0 marks a pixel that cannot be
trusted."""
    return f"# {training.name}\n\n{about}"


def _facts(folder: Path, config: dict[str, Any]) -> str:
    tensors = weights.read_tensors(folder / weights.WEIGHTS)
    count = sum(tensor.numel() for tensor in tensors.values())
    size = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    python = platform.python_version()
    return _table(
        ("parameters", f"{size} in {len(tensors)} tensors, {' and '.join(dtypes)}"),
        ("resolution", "{}x{} pixels".format(*config["use"]["image_size"])),
        ("variant", config["variant"]),
        ("text encoder", config["use"]["text"]),
        ("autoencoder", "in this folder"),
        ("weights hash", f"`{weights.digest(folder)}` (sha256 of the network's file, 16 digits)"),
        ("written by", f"mofo {__version__}, torch {torch.__version__}, python {python}"),
    )


def _usage(config: dict[str, Any], has_depth: bool) -> str:
    """Commands that run as they stand, but for the names in capitals."""
    text = config["use"]["text"]
    more = "" if text == "small" else " --text-encoder TEXT_ENCODER"
    encoder = f" `TEXT_ENCODER` is a copy of `{text}`." if more else ""
    if not has_depth:
        commands = "python train.py name=post_trained init_from=FOLDER  # and the model=... of this"
    else:
        commands = f"""\
mofo joint --model FOLDER{more} --prompt "a street with a yellow car"
mofo i2d --model FOLDER{more} --image photo.jpg
mofo d2i --model FOLDER{more} --depth depth.npy --prompt "a room with a red sofa\""""
    return f"## Use\n\n`FOLDER` is this folder.{encoder}\n\n```bash\n{commands}\n```"


def _samples(prompts: Sequence[str]) -> str:
    if not prompts:
        return ""
    shown = [
        f"{' '.join(prompt.split()) or '(no text)'} (seed {seed})\n\n"
        f"![image, depth, depth from the image alone]({SAMPLES}/{seed}.png)"
        for seed, prompt in enumerate(prompts)
    ]
    about = "Drawn from these weights with the default settings, none left out."
    return "\n\n".join(["## Samples", about, *shown])


def _training(training: Training) -> str:
    config = training.config
    ema = ((config.get("callbacks") or {}).get("ema") or {}).get("decay")
    rows = {
        "run": training.name,
        "commit": training.commit,
        "steps": training.num_steps,
        "samples seen": training.num_seen,
        "samples of a step": config["data"].get("batch_size"),
        "seed": config.get("seed"),
        "started from": config.get("init_from") or "random weights",
        "weights": f"average over training, decay {ema}" if training.averaged else "the last",
        "computed in": config.get("body_dtype"),
        "network": _stated(config["model"]),
        "objective": _stated(config["objective"]),
        "optimizer": _stated(config.get("optimizer")),
    }
    filled = {name: "not recorded" if value is None else value for name, value in rows.items()}
    about = "The whole configuration, as it was frozen at the start, is `config.yaml`."
    return f"## Training\n\n{_table(*filled.items())}\n\n{about}"


def _data(config: Mapping[str, Any]) -> str:
    sources = config["data"].get("sources") or {}
    described = [_source(name, row) for name, row in sources.items()]
    return "\n\n".join(["## Training data", *(described or ["Not recorded."])])


def _source(name: str, row: Mapping[str, Any]) -> str:
    """One training set: counts, sources and licences by its manifest, if that is still there."""
    made_by = row.get("make") or {}
    used = _stated({key: value for key, value in row.items() if key not in _WORDED})
    head = f"**{name}**, weight {row.get('weight')}; {used}."
    if made_by:
        head += f" Made by `mofo convert`: {_stated(made_by)}."
    path = Path(row["shards"], MANIFEST)
    if not path.exists():
        return f"{head} `{path}` is not there, so counts, sources and licences are not known."
    manifest = json.loads(path.read_text())
    found = manifest["made_from"] or {}
    if any(found.get(key) != value for key, value in made_by.items()):
        return (
            f"{head} `{path}` is now of another set ({_stated(found)}), so counts, sources and "
            "licences of the one that was trained on are not known."
        )
    counts = "{samples:,} samples, {with_depth:,} with depth, {metric:,} in metres".format(
        **manifest
    )
    sources = manifest["sources"]
    left = len(sources) - SOURCES_SHOWN
    lines = [f"- from {source}" for source in sources[:SOURCES_SHOWN]]
    lines += [f"- and {left} more in `{path}`"] if left > 0 else []
    lines += [f"- licence: {licence}" for licence in manifest["licences"]]
    return "\n".join([f"{head} {counts}; sha256 of the set `{manifest['hash'][:16]}`.", "", *lines])


def _evaluation(folder: Path, training: Training, has_depth: bool) -> str:
    """The tables of every report of these weights: beside the run, or in `eval` beside all runs."""
    if not has_depth:
        return ""
    run = training.run
    paths = [run / "report.json", *sorted(run.parent.glob("eval/*/report.json"))]
    reports = {path: json.loads(path.read_text()) for path in paths if path.exists()}
    hashes = _hashes(folder, run / "export") if reports else []
    shown = [_report(path, data, hashes, training.name) for path, data in reports.items()]
    if not any(shown):
        command = f"python evaluate.py name={training.name} model=FOLDER"
        shown = [f"Not evaluated. `{command}` does it; an export after that has the numbers."]
    return "\n\n".join(["## Evaluation", *filter(None, shown)])


def _hashes(folder: Path, trained: Path) -> list[str]:
    """The hashes of these weights: of this folder, and of the run's own export if it agrees."""
    hashes = [weights.digest(folder)]
    if (trained / weights.CONFIG).exists():
        ours = weights.read_tensors(folder / weights.WEIGHTS)
        theirs = weights.read_tensors(trained / weights.WEIGHTS)
        same = ours.keys() == theirs.keys()
        if same and all(torch.equal(theirs[name].to(t.dtype), t) for name, t in ours.items()):
            hashes.append(weights.digest(trained))
    return hashes


def _report(path: Path, data: dict[str, Any], hashes: list[str], name: str) -> str:
    """What a report says of these weights and of the baselines, which have none; "" if nothing."""
    entries = [entry for row in data.get("tables", []) for entry in row["entries"]]
    measured = {entry["weights"] for entry in entries} & set(hashes)
    if not measured:
        return ""
    try:
        tables = [from_plain(row) for row in data["tables"]]
        made_by = {key: ", ".join(data[key]) for key in ("command", "commit", "machine")}
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no report of this version ({error!r}); make it again with evaluate.py, or "
            "move it away"
        ) from error
    texts = []
    for table in tables:
        own = [replace(e, predictor=name) for e in table.entries if e.weights in hashes]
        if not own:
            continue
        baselines = [entry for entry in table.entries if entry.is_baseline]
        told = terminal(replace(table, entries=own + baselines))
        texts.append(f"{table.name}: {table.about}\n\n```text\n{told}\n```")
    about = "Depth from the image alone, beside baselines that see no image."
    if measured != {hashes[0]}:
        about += f" Measured on weights {hashes[1]}: these, before the cast to the dtype here."
    origin = "Command `{command}`, commit {commit}, on {machine}.".format(**made_by)
    return "\n\n".join([f"{about} {origin}", *texts])


def _licence(training: Training, config: dict[str, Any]) -> str:
    start, text = training.config.get("init_from"), config["use"]["text"]
    bound = ["- the licences of the training data above"]
    if start:
        bound.append(f"- those of `{start}`, which training started from, and of its data")
    if text != "small":
        bound.append(f"- that of the text encoder, `{text}`")
    about = "Not chosen yet: that is for whoever publishes these weights. To be heeded are"
    return "\n".join(["## Licence", "", about, "", *bound])


def _stated(value: Any) -> str:
    """A part of a config on one line; what is built from it is called by its class."""
    if isinstance(value, Mapping):
        kind = str(value.get("_target_", "")).rpartition(".")[2]
        inside = ", ".join(f"{k}={_stated(v)}" for k, v in value.items() if k != "_target_")
        return f"{kind}({inside})" if kind else inside
    if isinstance(value, list):
        return f"[{', '.join(map(_stated, value))}]"
    return str(value)


def _table(*rows: tuple[str, Any]) -> str:
    cells = [(name, str(value).replace("|", "\\|")) for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells)])
