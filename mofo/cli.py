"""The `mofo` command: the three modes on files, training runs to releases, data sets, reports.

    mofo joint --prompt "a cozy sunlit kitchen with wooden cabinets"
    mofo i2d --image photos/
    mofo d2i --depth depth.png --prompt "a shelf of books"
    mofo demo
    mofo export runs/small --out release
    mofo report runs/eval/small

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

from mofo.options import DTYPES, convert_parser, parser

if TYPE_CHECKING:
    from mofo.pipeline import Mofo, Result

PICTURES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"),
    *(".gif", ".ppm", ".pgm", ".jp2"),
)
DEPTHS = (".npy", ".npz", ".png", ".tif", ".tiff", ".exr")
SLUG_LENGTH = 48  # of the folder named after a prompt
RESUMABLE = ("convert", "caption")


def main(argv: list[str] | None = None) -> int:
    """Run a command line; 0, 2 after one line on stderr that says what was wrong, 130 on Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser(ACTIONS).parse_args(argv)
    args.line = shlex.join(["mofo", *argv])
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        from mofo.data.storage import FULL

        missing = error.filename if isinstance(error, FileNotFoundError) else None
        if missing:
            error = f"there is no file {missing}; {_sought()}"
        elif isinstance(error, OSError) and error.errno in FULL:
            error = f"{error}; free some space{_goes_on(args.mode)}"
        _complain(args.mode, error)
        return 2
    except KeyboardInterrupt:
        print(f"\nmofo {args.mode}: stopped{_goes_on(args.mode)}", file=sys.stderr)
        return 130


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


def demo(args: argparse.Namespace) -> int:
    try:
        from mofo.demo.page import launch
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed; it is of the extra [demo]") from error
    launch(
        _load(args),
        model=args.model,
        text_encoder=args.text_encoder,
        host=args.host,
        port=args.port,
    )
    return 0


def export(args: argparse.Namespace) -> int:
    import torch

    from mofo.training.export import export

    dtype = getattr(torch, DTYPES[args.dtype])
    averaged = args.weights == "ema"
    export(args.run_folder, args.out, averaged=averaged, dtype=dtype, num_samples=args.samples)
    print(f"{args.run_folder} -> {args.out}")
    return 0


def convert(args: argparse.Namespace) -> int:
    from mofo.data.make import load, make, summary

    module = load(args.name)
    options = vars(convert_parser(args.name, module).parse_args(args.rest))
    source, out = options.get("source"), options.pop("out")
    if source is not None and not Path(source).is_dir():
        raise ValueError(f"there is no folder {source}; {_sought()}")
    made = make(out, converter=args.name, **options)
    if not made:
        print(f"{out} is finished already; to read its source anew, delete it")
    print(summary(out))
    return 0


def inspect(args: argparse.Namespace) -> int:
    from mofo.data.inspect import inspect, save

    report = inspect(args.shards, num_samples=args.num_samples, seed=args.seed)
    folder = args.out or _run_folder(Path("outputs"), args.mode)
    save(report, folder)
    print(report.text())
    print(f"open {folder / 'index.html'}")
    return 0


def caption(args: argparse.Namespace) -> int:
    from mofo.data.caption import PROMPT, caption

    written = caption(
        args.shards,
        model=args.model,
        prompt=args.prompt or PROMPT,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        device=args.device,
        overlay=args.overlay,
    )
    print(f"{written.captions} captions written, {written.empty} came out empty")
    if written.damaged:
        _complain(
            args.mode, f"{len(written.damaged)} samples cannot be read: {written.damaged[:5]}"
        )
    return 2 if written.damaged else 0


def report(args: argparse.Namespace) -> int:
    from mofo.evaluation.report import report

    out = args.out
    if out is None and len(args.runs) > 1:
        out = _run_folder(Path("outputs"), args.mode)
    for run in args.runs:
        if not run.is_dir():
            raise ValueError(f"{run} is no folder; give folders that evaluate.py wrote")
    print(report(*args.runs, out=out, title=args.title))
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


ACTIONS = {
    "joint": joint,
    "i2d": i2d,
    "d2i": d2i,
    "demo": demo,
    "export": export,
    "convert": convert,
    "inspect": inspect,
    "caption": caption,
    "report": report,
}


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
    mofo.read_prompts([args.prompt] if isinstance(args.prompt, str) else args.prompt)
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
    return Mofo.load(
        args.model,
        device=args.device,
        text_encoder=args.text_encoder,
        revision=args.revision,
        plan=args.plan,
        compiled=args.compile,
        size=args.resolution,
        num_samples=args.batch,
        cfg_scale=args.cfg_scale,
        announce=partial(print, file=sys.stderr),
    )


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


def _goes_on(mode: str) -> str:
    return "; the same command goes on from here" if mode in RESUMABLE else ""


def _sought() -> str:
    return f"relative paths are looked for in the current directory, {Path.cwd()}"


def _complain(mode: str, error: object) -> None:
    print(f"mofo {mode}: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
