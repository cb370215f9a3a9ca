"""The `mofo` command: the three modes on files, training runs to releases, data sets.

    mofo joint --prompt "a cozy sunlit kitchen with wooden cabinets"
    mofo i2d --image photos/
    mofo d2i --depth depth.png --prompt "a shelf of books"
    mofo export runs/small --out release

The package is imported inside the subcommands, so that `mofo --help` answers at once.
"""

import argparse
import glob
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mofo import __version__

if TYPE_CHECKING:
    from mofo.pipeline import Mofo, Result

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
DEPTHS = (".npy", ".npz", ".png", ".tif", ".tiff", ".exr")
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
FITS = (
    "native",
    "letterbox",
    "stretch",
)  # as in mofo.data.fit, which costs half a second to import
SLUG_LENGTH = 48  # of the folder named after a prompt

ABOUT = """\
One model of pictures and their depth. What is given decides what is made:

  mofo joint --prompt "a cozy sunlit kitchen with wooden cabinets"   picture and depth
  mofo i2d --image photo.jpg                                         depth of a picture
  mofo d2i --depth depth.npy --prompt "a shelf of books"             picture for a depth map

A run writes a folder outputs/TIME-MODE: rgb.png, depth_raw.npy (float32, mean 1, 0 = not valid),
depth_magma.png (near is bright), cloud.glb and cloud.ply, metadata.json (all that makes the same
again). Of several inputs or samples each has a folder of its own in it.
`mofo MODE --help` lists the options of a mode."""


def main(argv: list[str] | None = None) -> int:
    """Run a command line; 0, or 2 after one line on stderr that says what was wrong."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    args.line = shlex.join(["mofo", *argv])
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        _complain(args.mode, error)
        return 2


def joint(args: argparse.Namespace) -> int:
    def generate(mofo: "Mofo", prompts: list[Any], **settings: Any) -> list["Result"]:
        how = {"log2_alpha": args.log2_alpha, "refine": args.refine_depth}
        return mofo.joint(prompts, **how, **settings)

    return _generate(args, args.prompt, lambda prompt: prompt, generate)


def i2d(args: argparse.Namespace) -> int:
    from mofo.data.inputs import read_picture

    def generate(mofo: "Mofo", pictures: list[Any], **settings: Any) -> list["Result"]:
        how = {"fit": args.fit, "ensemble": args.ensemble}
        return mofo.image_to_depth(pictures, args.prompt, **how, **settings)

    return _generate(args, find(args.image, PICTURES), read_picture, generate)


def d2i(args: argparse.Namespace) -> int:
    from mofo.data.inputs import read_depth

    def generate(mofo: "Mofo", depths: list[Any], **settings: Any) -> list["Result"]:
        metres, valid = map(list, zip(*depths, strict=True))
        how = {"fit": args.fit, "log2_alpha": args.log2_alpha, "valid": valid}
        return mofo.depth_to_image(metres, args.prompt, **how, **settings)

    return _generate(args, find(args.depth, DEPTHS), read_depth, generate)


def export(args: argparse.Namespace) -> int:
    import torch

    from mofo.training.export import export

    dtype = getattr(torch, DTYPES[args.dtype])
    export(args.run_folder, args.out, averaged=args.weights == "ema", dtype=dtype)
    print(f"{args.run_folder} -> {args.out}")
    return 0


def convert(args: argparse.Namespace) -> int:
    from mofo.data.make import make

    names = {"samples": ("keys",), "generated": ("split", "count", "seed", "size")}
    options = {name: getattr(args, name) for name in names[args.name]}
    made = make(args.out, converter=args.name, samples_per_shard=args.samples_per_shard, **options)
    print(f"{args.name} -> {args.out}" if made else f"{args.out} is finished already")
    return 0


def find(patterns: Iterable[str], suffixes: tuple[str, ...]) -> list[Path]:
    """Files named one by one, by folder (those with one of `suffixes`) or by pattern, in order."""
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_file():
            files = [path]
        elif path.is_dir():
            files = sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes)
        else:
            files = sorted(p for p in map(Path, glob.glob(pattern, recursive=True)) if p.is_file())
        if not files:
            what = f"holds no {', '.join(suffixes)}" if path.is_dir() else "matches no file"
            raise ValueError(
                f"{pattern} {what}; give files, folders or patterns such as 'in/*.png'"
            )
        found += files
    return list(dict.fromkeys(found))


def _generate(
    args: argparse.Namespace,
    sources: list[Any],
    read: Callable[[Any], Any],
    generate: Callable[..., list["Result"]],
) -> int:
    """All sources with one model; one that cannot be read is named and skipped, and makes it 2."""
    from tqdm import tqdm

    started, num_bad = time.perf_counter(), 0
    mofo, folder = _load(args), _run_folder(args.output_dir, args.mode)
    seeds = range(args.seed, args.seed + args.num_samples)
    named = zip(sources, _names(sources), strict=True)
    items = [(source, name, seed) for source, name in named for seed in seeds]

    @lru_cache(maxsize=1)  # the seeds of one input come one after another
    def given(source: Any) -> Any:
        try:
            return read(source)
        except (ValueError, OSError) as error:
            _complain(args.mode, error)
            return None

    with tqdm(total=len(items), unit="sample", disable=None) as progress:
        for first in range(0, len(items), args.batch):
            batch = items[first : first + args.batch]
            values = [given(source) for source, _, _ in batch]
            made = [item for item, value in zip(batch, values, strict=True) if value is not None]
            num_bad += len(batch) - len(made)
            if made:
                values = [value for value in values if value is not None]
                results = generate(mofo, values, **_settings(args, made, progress))
                _save(args, folder, made, results, progress, alone=len(items) == 1)
            progress.update(len(batch))
    seconds = time.perf_counter() - started
    if len(items) > 1:
        print(f"{len(items) - num_bad} of {len(items)} made in {seconds:.1f} s: {folder}")
    return 2 if num_bad else 0


def _settings(args: argparse.Namespace, items: list[tuple], progress: Any) -> dict[str, Any]:
    return {
        "seeds": [seed for _, _, seed in items],
        "num_steps": args.num_steps,
        "cfg_scale": args.cfg_scale,
        "size": args.resolution,
        "on_step": lambda done, total: progress.set_postfix_str(f"step {done}/{total}"),
    }


def _save(
    args: argparse.Namespace,
    folder: Path,
    items: list[tuple],
    results: list["Result"],
    progress: Any,
    *,
    alone: bool,
) -> None:
    """Write the folders of a batch, and one line for each input."""
    for (source, name, seed), result in zip(items, results, strict=True):
        part = name if args.num_samples == 1 else f"{name}-seed{seed}"
        target = folder if alone else folder / part
        made_by = {"input": str(source), "command": args.line, "model": args.model}
        result = replace(result, metadata=result.metadata | made_by)
        shown = {"edge_rtol": args.edge_rtol, "drop_outliers": args.sor}
        result.save(target, fov_deg=args.fov_deg, **shown)
        height, width = result.depth.shape
        progress.write(f"{source} -> {target} ({width}x{height}, {_spread(result)})")


def _spread(result: "Result") -> str:
    """How far the depth of a result reaches, and how sure it is."""
    if not result.valid.any():
        return "no valid depth"
    depth = result.depth[result.valid]
    text = f"depth {depth.min():.2f} to {depth.max():.2f}"
    if result.uncertainty is not None:
        text += f", uncertainty {result.uncertainty[result.valid].mean():.1%}"
    return text


def _load(args: argparse.Namespace) -> "Mofo":
    """The model that was asked for; by default the method's release, or the small one on a CPU."""
    import torch

    from mofo.pipeline import OFFICIAL, Mofo

    if args.model is None:
        on_gpu = torch.cuda.is_available() and not str(args.device).startswith("cpu")
        args.model = OFFICIAL if on_gpu else "small"
        print(f"model: {args.model} (--model takes another)", file=sys.stderr)
    return Mofo.load(args.model, device=args.device, text_encoder=args.text_encoder)


def _run_folder(parent: Path, mode: str) -> Path:
    """A new folder named after the time."""
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{mode}"
    folder, count = parent / name, 1
    while folder.exists():
        count += 1
        folder = parent / f"{name}-{count}"
    return folder


def _names(sources: Iterable[str | Path]) -> list[str]:
    """A folder name for each source, all different; none leaves the output folder."""
    names: list[str] = []
    for source in sources:
        if isinstance(source, Path):
            stem = source.stem.strip(".") or "input"
        else:
            words = re.sub(r"[^\w]+", "-", source.lower()).strip("-")
            stem = words[:SLUG_LENGTH].rstrip("-") or "no-prompt"
        name, count = stem, 1
        while name in names:
            count += 1
            name = f"{stem}-{count}"
        names.append(name)
    return names


def _complain(mode: str, error: Exception) -> None:
    print(f"mofo {mode}: {error}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mofo", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"mofo {__version__}")
    modes = parser.add_subparsers(dest="mode", metavar="MODE", required=True)

    # An option must be typed whole: an abbreviation that works today is ambiguous tomorrow.
    add = partial(modes.add_parser, allow_abbrev=False)

    mode = add("joint", help="picture and depth from a prompt")
    mode.add_argument("--prompt", nargs="+", required=True, help="one or several, each in quotes")
    _add_sampling(mode, joint, cfg_scale=4.0)
    _add_tilt(mode, 5.0, "above 0 the picture is resolved before the depth")
    about = "predict the depth once more, from the finished picture"
    mode.add_argument("--refine-depth", action="store_true", help=about)

    mode = add("i2d", help="depth of pictures")
    mode.add_argument("--image", nargs="+", required=True, help="files, folders or patterns")
    mode.add_argument("--prompt", default="", help="what the pictures show (default: nothing)")
    _add_sampling(mode, i2d, cfg_scale=1.0)
    _add_fit(mode)
    about = "median of this many predictions, and how far they differ (default: %(default)s)"
    mode.add_argument("--ensemble", type=_count, default=1, help=about)

    mode = add("d2i", help="pictures for depth maps")
    about = (
        "files (.npy, .npz, 16-bit PNG or TIFF, .exr; any unit, 0 = not valid), folders, patterns"
    )
    mode.add_argument("--depth", nargs="+", required=True, help=about)
    mode.add_argument("--prompt", required=True, help="what the pictures shall show")
    _add_sampling(mode, d2i, cfg_scale=4.0)
    _add_fit(mode)
    _add_tilt(mode, None, "keep the depth loosely, from -5 (weakest) to -15; left out: exactly")

    mode = add("export", help="a training run as a release folder")
    mode.add_argument("run_folder", metavar="RUN", type=Path, help="such as runs/small")
    mode.add_argument("--out", type=Path, required=True, help="the folder to write")
    about = "averaged over training, or as trained last (default: %(default)s)"
    mode.add_argument("--weights", choices=("ema", "raw"), default="ema", help=about)
    mode.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="(default: bf16)")
    mode.set_defaults(run=export)

    mode = add("convert", help="raw data as the shards that training reads")
    _add_converters(mode)
    return parser


def _add_sampling(mode: argparse.ArgumentParser, run: Callable, *, cfg_scale: float) -> None:
    default = "(default: %(default)s)"
    add = mode.add_argument
    about = "small, a release folder, or a hub id (default: the method's release; small on a CPU)"
    add("--model", help=about)
    add("--text-encoder", help="a Qwen3 folder or hub id, in place of the release's own")
    add("--num-steps", type=_count, default=50, help=f"steps of the sampler {default}")
    add("--cfg-scale", type=float, default=cfg_scale, help=f"weight of the prompt {default}")
    add("--seed", type=int, default=0, help=f"of the first sample {default}")
    add("--num-samples", type=_count, default=1, help=f"seeds for each input {default}")
    add("--batch", type=_count, default=1, help=f"samples made at once {default}")
    about = "SIDE or WIDTHxHEIGHT that the network works at (default: as it was trained)"
    add("--resolution", type=_resolution, help=about)
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
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
    mode.add_argument("--log2-alpha", type=float, default=default, help=about + shown)


def _add_converters(mode: argparse.ArgumentParser) -> None:
    names = mode.add_subparsers(dest="name", metavar="NAME", required=True)
    real = names.add_parser("samples", help="the photographs of data/samples")
    real.add_argument("--keys", required=True, help="a file with the names to take, one a line")
    scenes = names.add_parser("generated", help="ray-cast rooms and streets")
    scenes.add_argument("--split", default="train", help="train or test (default: %(default)s)")
    scenes.add_argument("--count", type=int, required=True, help="how many")
    scenes.add_argument("--seed", type=int, default=0, help="of the set (default: %(default)s)")
    size = {"nargs": 2, "type": int, "default": [64, 64], "metavar": ("H", "W")}
    scenes.add_argument("--size", help="pixels (default: 64 64)", **size)
    for converter in (real, scenes):
        converter.add_argument("--out", required=True, help="the folder to write")
        about = "(default: %(default)s)"
        converter.add_argument("--samples-per-shard", type=_count, default=1000, help=about)
        converter.set_defaults(run=convert)


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive; give 1 or more")
    return value


def _resolution(text: str) -> tuple[int, int]:
    """(height, width) of SIDE or WIDTHxHEIGHT."""
    sides = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if sides is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give 512, or 640x384")
    return int(sides[2] or sides[1]), int(sides[1])


def _share(text: str) -> float:
    if not 0 <= (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is no share of the depth; give 0 or more")
    return value


def _degrees(text: str) -> float:
    if not 0 < (value := float(text)) < 180:
        raise argparse.ArgumentTypeError(f"{value} degrees; accepted: between 0 and 180")
    return value


if __name__ == "__main__":
    sys.exit(main())
