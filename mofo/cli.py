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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mofo import __version__

if TYPE_CHECKING:
    from mofo.pipeline import Mofo, Result

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
DEPTHS = (".npy", ".png", ".tif", ".tiff")
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
SLUG_LENGTH = 48  # of the folder named after a prompt

ABOUT = """\
One model of pictures and their depth. What is given decides what is made:

  mofo joint --prompt "a cozy sunlit kitchen with wooden cabinets"   picture and depth
  mofo i2d --image photo.jpg                                         depth of a picture
  mofo d2i --depth depth.npy --prompt "a shelf of books"             picture for a depth map

Each input gets a folder: rgb.png, depth_raw.npy (float32, mean 1, 0 = not valid), depth_magma.png
(near is bright), cloud.glb and cloud.ply, metadata.json (all that makes the same again).
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
    def generate(mofo: "Mofo", prompt: str, seed: int) -> "Result":
        return mofo.joint(prompt, log2_alpha=args.log2_alpha, **_settings(args, seed))

    return _generate(args, args.prompt, lambda prompt: prompt, generate)


def i2d(args: argparse.Namespace) -> int:
    from mofo.data.inputs import read_picture

    def generate(mofo: "Mofo", picture: Any, seed: int) -> "Result":
        return mofo.image_to_depth(picture, args.prompt, **_settings(args, seed))

    return _generate(args, find(args.image, PICTURES), read_picture, generate)


def d2i(args: argparse.Namespace) -> int:
    from mofo.data.inputs import read_depth

    def generate(mofo: "Mofo", depth: Any, seed: int) -> "Result":
        metres, valid = depth
        settings = _settings(args, seed) | {"log2_alpha": args.log2_alpha, "valid": valid}
        return mofo.depth_to_image(metres, args.prompt, **settings)

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
    generate: Callable[["Mofo", Any, int], "Result"],
) -> int:
    """All sources with one model; one that cannot be read is named and skipped, and makes it 2."""
    from tqdm import tqdm

    from mofo.pipeline import Mofo

    folder = args.output_dir or Path("outputs", f"{datetime.now():%Y%m%d-%H%M%S}-{args.mode}")
    mofo = Mofo.load(args.model, device=args.device, text_encoder=args.text_encoder)
    seeds = range(args.seed, args.seed + args.num_samples)
    num_bad = 0
    with tqdm(total=len(sources) * len(seeds), unit="sample", disable=None) as progress:
        for source, name in zip(sources, _names(sources), strict=True):
            try:
                given = read(source)
            except (ValueError, OSError) as error:
                _complain(args.mode, error)
                num_bad += 1
                progress.update(len(seeds))
                continue
            for seed in seeds:
                started = time.perf_counter()
                result = generate(mofo, given, seed)
                made_by = {"input": str(source), "command": args.line}
                result = replace(result, metadata=result.metadata | made_by)
                target = folder / (name if len(seeds) == 1 else f"{name}-seed{seed}")
                result.save(target, fov_deg=args.fov_deg, drop_outliers=args.sor)
                progress.update()
                progress.write(f"{source} -> {target} ({time.perf_counter() - started:.1f} s)")
    return 2 if num_bad else 0


def _settings(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    size = None if args.resolution is None else (args.resolution, args.resolution)
    return {"seeds": seed, "num_steps": args.num_steps, "cfg_scale": args.cfg_scale, "size": size}


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

    mode = modes.add_parser("joint", help="picture and depth from a prompt")
    mode.add_argument("--prompt", nargs="+", required=True, help="one or several, each in quotes")
    _add_sampling(mode, joint, cfg_scale=4.0)
    _add_tilt(mode, 5.0, "above 0 the picture is resolved before the depth")

    mode = modes.add_parser("i2d", help="depth of pictures")
    mode.add_argument("--image", nargs="+", required=True, help="files, folders or patterns")
    mode.add_argument("--prompt", default="", help="what the pictures show (default: nothing)")
    _add_sampling(mode, i2d, cfg_scale=1.0)

    mode = modes.add_parser("d2i", help="pictures for depth maps")
    about = "files (.npy, 16-bit PNG or TIFF; metres or relative, 0 = not valid), folders, patterns"
    mode.add_argument("--depth", nargs="+", required=True, help=about)
    mode.add_argument("--prompt", required=True, help="what the pictures shall show")
    _add_sampling(mode, d2i, cfg_scale=4.0)
    _add_tilt(mode, None, "keep the depth loosely, from -5 (weakest) to -15; left out: exactly")

    mode = modes.add_parser("export", help="a training run as a release folder")
    mode.add_argument("run_folder", metavar="RUN", type=Path, help="such as runs/small")
    mode.add_argument("--out", type=Path, required=True, help="the folder to write")
    about = "averaged over training, or as trained last (default: %(default)s)"
    mode.add_argument("--weights", choices=("ema", "raw"), default="ema", help=about)
    mode.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="(default: bf16)")
    mode.set_defaults(run=export)

    mode = modes.add_parser("convert", help="raw data as the shards that training reads")
    _add_converters(mode)
    return parser


def _add_sampling(mode: argparse.ArgumentParser, run: Callable, *, cfg_scale: float) -> None:
    default = "(default: %(default)s)"
    add = mode.add_argument
    add("--model", default="small", help=f"a release folder, or small {default}")
    add("--text-encoder", help="a Qwen3 folder, for releases that do not bring their own")
    add("--num-steps", type=int, default=50, help=f"steps of the sampler {default}")
    add("--cfg-scale", type=float, default=cfg_scale, help=f"weight of the prompt {default}")
    add("--seed", type=int, default=0, help=f"of the first sample {default}")
    add("--num-samples", type=_count, default=1, help=f"seeds for each input {default}")
    add("--resolution", type=int, help="side of the network's square (default: as it was trained)")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    add("--output-dir", type=Path, help="(default: outputs/TIME-MODE); a folder in it per input")
    add("--fov-deg", type=_degrees, default=65.0, help=f"vertical, of the point cloud {default}")
    add("--sor", action="store_true", help="drop outliers from the point cloud")
    mode.set_defaults(run=run)


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


def _degrees(text: str) -> float:
    if not 0 < (value := float(text)) < 180:
        raise argparse.ArgumentTypeError(f"{value} degrees; accepted: between 0 and 180")
    return value


if __name__ == "__main__":
    sys.exit(main())
