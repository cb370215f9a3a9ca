"""The options of the `mofo` command: names and defaults of the method's own scripts, and more.

Only argparse is imported, so that help answers at once.
"""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import Parameter, signature
from math import isfinite
from pathlib import Path
from types import ModuleType
from typing import Any

from mofo import __version__

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
# As in mofo.data.fit, mofo.memory and mofo.calls, which cost seconds to import.
FITS = ("native", "letterbox", "stretch")
PLANS = ("resident", "turns", "offload")
NUM_SEEDS = 2**32
# Each converter is a file; to list them none is imported.
FOLDER = Path(__file__).parent / "data/convert"
CONVERTERS = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))
SOURCE = {"source": "the folder of the data set, laid out as described here"}

ABOUT = """\
One model of pictures and their depth. What is given decides what is made:

  mofo joint --prompt "a cozy sunlit kitchen with wooden cabinets"   picture and depth
  mofo i2d --image photo.jpg                                         depth of a picture
  mofo d2i --depth depth.npy --prompt "a shelf of books"             picture for a depth map

A run writes a folder outputs/TIME-MODE: rgb.png, depth_raw.npy (float32, mean 1, 0 = not valid),
depth_magma.png (near is bright), cloud.glb and cloud.ply, metadata.json (all that makes the same
again). Of several inputs or samples each has a folder of its own in it.
`mofo MODE --help` lists the options of a mode."""

REPORT = """\
The report of one evaluation run, or of several beside each other, from their lines alone:

  mofo report runs/eval/mine                            again, into the run's folder
  mofo report runs/eval/mine runs/eval/other --out both

Written are report.html (tables, published numbers of the same protocol, plots, pictures),
report.md, report.tex (booktabs), report.csv (a row for each number) and report.json; the tables
are printed.
A mean is over images and has a 95 % bootstrap interval. Two predictors are compared image by image
where protocol, set, list of images and fit are the same; where not, the report says why."""


def parser(run: Mapping[str, Callable]) -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="mofo", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--version", action="version", version=f"mofo {__version__}")
    modes = top.add_subparsers(dest="mode", metavar="MODE", required=True)

    # An option must be typed whole: an abbreviation that works today is ambiguous tomorrow.
    add = partial(modes.add_parser, allow_abbrev=False)

    mode = add("joint", help="picture and depth from a prompt")
    mode.add_argument(
        "--prompt", nargs="+", action="extend", required=True, help="one or several, each in quotes"
    )
    _add_sampling(mode, run["joint"], cfg_scale=None)
    _add_tilt(mode, 5.0, "above 0 the picture is resolved before the depth")
    about = "predict the depth once more, from the finished picture"
    mode.add_argument("--refine-depth", action="store_true", help=about)

    mode = add("i2d", help="depth of pictures")
    mode.add_argument(
        "--image", nargs="+", action="extend", required=True, help="files, folders or patterns"
    )
    mode.add_argument("--prompt", default="", help="what the pictures show (default: nothing)")
    _add_sampling(mode, run["i2d"], cfg_scale=1.0)
    _add_fit(mode)
    about = "median of this many predictions, and how far they differ (default: %(default)s)"
    mode.add_argument("--ensemble", type=_count, default=1, help=about)

    mode = add("d2i", help="pictures for depth maps")
    about = (
        "files (.npy, .npz, 16-bit PNG or TIFF, .exr; any unit, 0 = not valid), folders, patterns"
    )
    mode.add_argument("--depth", nargs="+", action="extend", required=True, help=about)
    mode.add_argument("--prompt", required=True, help="what the pictures shall show")
    _add_sampling(mode, run["d2i"], cfg_scale=None)
    _add_fit(mode)
    _add_tilt(mode, None, "keep the depth loosely, from -5 (weakest) to -15; left out: exactly")

    mode = add("demo", help="a page in the browser where the three modes are tried")
    _add_model(mode)
    about = "who may reach it: 127.0.0.1 this machine alone, 0.0.0.0 all (default: %(default)s)"
    mode.add_argument("--host", default="127.0.0.1", help=about)
    mode.add_argument("--port", type=int, help="(default: the first free one from 7860)")
    mode.set_defaults(run=run["demo"], resolution=None, batch=1, cfg_scale=None)

    mode = add("export", help="a training run as a release folder")
    mode.add_argument("run_folder", metavar="RUN", type=Path, help="such as runs/small")
    mode.add_argument("--out", type=Path, required=True, help="the folder to write")
    about = "averaged over training, or as trained last (default: %(default)s)"
    mode.add_argument("--weights", choices=("ema", "raw"), default="ema", help=about)
    mode.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="(default: bf16)")
    about = "pictures for the model card, 0: none (default: %(default)s)"
    mode.add_argument("--samples", type=int, default=4, help=about)
    mode.set_defaults(run=run["export"])

    mode = add(
        "convert",
        help="raw data as the shards that training reads",
        description="`mofo convert NAME --help` says how a set is laid out and lists its options.",
        epilog="\n".join(["NAME is", *(f"  {name:<12} {_about(name)}" for name in CONVERTERS)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    mode.add_argument("name", metavar="NAME", choices=CONVERTERS, help="of the data set")
    mode.add_argument("rest", metavar="...", nargs=argparse.REMAINDER, help="options of that set")
    mode.set_defaults(run=run["convert"])

    mode = add("inspect", help="what a set of shards holds, and what is suspicious in it")
    mode.add_argument("shards", metavar="SHARDS", help="a set's folder, a pattern of tars, a URL")
    about = "where sheet.png and index.html are written (default: outputs/TIME-inspect)"
    mode.add_argument("--out", type=Path, help=about)
    about = "that are looked at and shown (default: %(default)s)"
    mode.add_argument("--num-samples", type=_count, default=48, help=about)
    about = "of the choice of samples (default: %(default)s)"
    mode.add_argument("--seed", type=int, default=0, help=about)
    mode.set_defaults(run=run["inspect"])

    mode = add("caption", help="captions for the samples of a set that have none")
    mode.add_argument("shards", metavar="SHARDS", help="a set's folder; it is not changed")
    about = "an image-text-to-text model of transformers: a folder or hub id"
    mode.add_argument("--model", required=True, help=about)
    mode.add_argument("--prompt", help="what the model is asked (default: for one sentence)")
    about = "images at once (default: %(default)s)"
    mode.add_argument("--batch-size", type=_count, default=8, help=about)
    about = "of a caption (default: %(default)s)"
    mode.add_argument("--max-new-tokens", type=_count, default=64, help=about)
    mode.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    about = "the file to write (default: captions.jsonl in the set's folder, where training looks)"
    mode.add_argument("--overlay", type=Path, help=about)
    mode.set_defaults(run=run["caption"])

    mode = add(
        "report",
        help="tables and a page of evaluation runs",
        description=REPORT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    about = "folders that evaluate.py wrote, such as runs/eval/small"
    mode.add_argument("runs", metavar="RUN", nargs="+", type=Path, help=about)
    about = "the folder to write (default: RUN itself, or outputs/TIME-report for several)"
    mode.add_argument("--out", type=Path, help=about)
    mode.add_argument("--title", default="Depth evaluation", help="(default: %(default)s)")
    mode.set_defaults(run=run["report"])
    return top


def _add_model(mode: argparse.ArgumentParser) -> None:
    add = mode.add_argument
    about = "small, a release folder, or a hub id (default: the method's release; small on a CPU)"
    add("--model", help=about)
    add("--revision", help="branch, tag or commit of a hub id")
    add("--text-encoder", help="a Qwen3 folder or hub id, in place of the release's own")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    about = (
        "of the device's memory: resident (all at once), turns (text encoder, then network), "
        "offload (blocks one by one); default: the first that fits"
    )
    add("--plan", choices=PLANS, help=about)
    about = "compile the network's blocks: minutes once, faster afterwards"
    add("--compile", action="store_true", help=about)


def _add_sampling(mode: argparse.ArgumentParser, run: Callable, *, cfg_scale: float | None) -> None:
    default = "(default: %(default)s)"
    _add_model(mode)
    add = mode.add_argument
    add("--num-steps", type=_count, default=50, help=f"steps of the sampler {default}")
    about = default if cfg_scale else "(default: what the model recommends, 4.0 if it says nothing)"
    add("--cfg-scale", type=_finite, default=cfg_scale, help=f"weight of the prompt {about}")
    add("--seed", type=_seed, default=0, help=f"of the first sample {default}")
    add("--num-samples", type=_count, default=1, help=f"seeds for each input {default}")
    add("--batch", type=_count, default=1, help=f"samples made at once {default}")
    about = "SIDE or WIDTHxHEIGHT that the network works at (default: as it was trained)"
    add("--resolution", type=_resolution, help=about)
    about = f"where the run's folder is made {default}"
    add("--output-dir", type=Path, default=Path("outputs"), help=about)
    add("--fov-deg", type=_degrees, default=65.0, help=f"vertical, of the point cloud {default}")
    about = f"drop points at depth jumps above this share of the depth; 0: none {default}"
    add("--edge-rtol", type=_share, default=0.04, help=about)
    add("--sor", action="store_true", help="drop statistical outliers from the point cloud")
    mode.set_defaults(run=run)


def _add_fit(mode: argparse.ArgumentParser) -> None:
    about = (
        "how an input reaches the network: native keeps its aspect, letterbox pads it, stretch "
        "distorts it as the method's own script does (default: %(default)s)"
    )
    mode.add_argument("--fit", choices=FITS, default=FITS[0], help=about)


def _add_tilt(mode: argparse.ArgumentParser, default: float | None, about: str) -> None:
    shown = "" if default is None else " (default: %(default)s)"
    mode.add_argument("--log2-alpha", type=_finite, default=default, help=about + shown)


def convert_parser(name: str, module: ModuleType) -> argparse.ArgumentParser:
    """Options of `mofo convert NAME`: those of every converter, and the arguments of its `find`.

    Its `OPTIONS` says what these mean, its `TREE` which files are expected.
    """
    tree = getattr(module, "TREE", None)
    top = argparse.ArgumentParser(
        prog=f"mofo convert {name}",
        description=module.__doc__,
        epilog=tree and f"expected:{tree}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    default = "(default: %(default)s)"
    for option in signature(module.find).parameters.values():
        _add_parameter(top, option, (SOURCE | getattr(module, "OPTIONS", {})).get(option.name, ""))
    top.add_argument("--out", required=True, help="the folder to write")
    about = f"samples of one shard {default}"
    top.add_argument("--samples-per-shard", type=_count, default=1000, help=about)
    about = "number that write shards at once (default: one for each core)"
    top.add_argument("--processes", type=_count, help=about)
    about = f"share of all samples that may be impossible to convert, 0 to 1 {default}"
    top.add_argument("--max-bad-fraction", type=_share, default=0.01, help=about)
    return top


def _about(name: str) -> str:
    """The first line of a converter, which is read and not imported."""
    with open(FOLDER / f"{name}.py", encoding="utf-8") as file:
        return file.readline().strip().strip('"')


def _add_parameter(top: argparse.ArgumentParser, option: Parameter, about: str) -> None:
    """An argument of a converter as an option of the command line, by its type and default."""
    kind, default = option.annotation, option.default
    needed = default is Parameter.empty
    settings: dict[str, Any] = {"required": needed, "default": None if needed else default}
    settings["help"] = about if needed or default is None else f"{about} (default: %(default)s)"
    chosen = next((one for one in (bool, int, float) if kind in (one, one | None)), None)
    if chosen is bool:
        settings["action"] = argparse.BooleanOptionalAction
    elif chosen is not None:
        settings["type"] = chosen
    elif kind == Sequence[int]:
        settings |= {"type": int, "nargs": "+"}
    top.add_argument(f"--{option.name.replace('_', '-')}", **settings)


def _count(text: str) -> int:
    if not text.isdecimal() or (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1; give 1 or more")
    return value


def _seed(text: str) -> int:
    if not text.isdecimal() or (value := int(text)) >= NUM_SEEDS:
        raise argparse.ArgumentTypeError(f"{text} is no seed; give 0 to {NUM_SEEDS - 1}")
    return value


def _finite(text: str) -> float:
    if not isfinite(value := float(text)):
        raise argparse.ArgumentTypeError(f"{text} is not finite; give a number")
    return value


def _resolution(text: str) -> tuple[int, int]:
    """(height, width) of SIDE or WIDTHxHEIGHT."""
    sides = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    size = (int(sides[2] or sides[1]), int(sides[1])) if sides else (0, 0)
    if min(size) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give 512, or 640x384")
    return size


def _share(text: str) -> float:
    if not 0 <= (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is no share of the depth; give 0 or more")
    return value


def _degrees(text: str) -> float:
    if not 0 < (value := float(text)) < 180:
        raise argparse.ArgumentTypeError(f"{value} degrees; accepted: between 0 and 180")
    return value
