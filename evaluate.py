"""Evaluate: `python evaluate.py model=small eval=small` scores depth from images beside baselines.

`model` is a mofo release or a depth model of transformers, `eval` a protocol with its sets; see
configs/evaluate.yaml. Lines and report are in `runs/eval/<name>`; the same command typed again
continues it, and typed several times at once it shares the work.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import Any

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from mofo.data.storage import FULL
from mofo.evaluation import gallery
from mofo.evaluation.benchmark import (
    Images,
    Row,
    check_counts,
    choose,
    open_rows,
    read_samples,
    training_row,
)
from mofo.evaluation.claims import Claims
from mofo.evaluation.contender import Contender
from mofo.evaluation.kept import keeping
from mofo.evaluation.origin import origin
from mofo.evaluation.page import Section
from mofo.evaluation.predictors import Predictor, constant, mean_map
from mofo.evaluation.protocol import Protocol
from mofo.evaluation.report import report
from mofo.evaluation.run import CLAIMS, Task, run

CONFIGS = Path(__file__).parent / "configs"
build = partial(instantiate, _convert_="all")
TYPED = " ".join(["python", *sys.argv])
OF_A_SET = ("source", "count", "list_sha256")
ASKED = ("predictions", "kind", "unit", "num_steps", "ensemble", "seed", "fit", "size", "label")


def commented() -> str:
    """What --help prints: evaluate.yaml down to where Hydra's own keys begin, and the protocols."""
    head, _, keys = (CONFIGS / "evaluate.yaml").read_text().partition("defaults:\n")
    keys = keys[keys.index("\nname:") : keys.index("\nhydra:")]
    evals = ""
    for path in sorted(CONFIGS.glob("eval/*.yaml")):
        comment = path.read_text().partition("\ndefaults:")[0].replace("# ", "")
        sentence = comment.replace("\n", " ").partition(". ")[0].rstrip(".")
        evals += fill(f"  {path.stem:16}{sentence}", 100, subsequent_indent=" " * 18) + "\n"
    head = head.replace("# ", "")
    return f"{head}\neval=NAME, one of:\n{evals}\nKEY=VALUE, with what holds otherwise:\n{keys}"


# A template's own fields begin with $.
OmegaConf.register_new_resolver("commented", lambda: commented().replace("$", "$$"), replace=True)


@hydra.main(version_base="1.3", config_path="configs", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    try:
        print(evaluate(cfg))
    except ValueError as error:  # what a user can cause says what to do, without a traceback
        raise SystemExit(f"evaluate.py: {error}") from error
    except OSError as error:
        if error.errno not in FULL:
            raise
        again = "free some space, and the same command goes on"
        raise SystemExit(f"evaluate.py: {error}; {again}") from error


def evaluate(cfg: DictConfig) -> str:
    """Run what the config says and write the report; returns its tables."""
    check_name(str(cfg.name))
    check_counts(workers=cfg.workers)
    folder, chosen = Path(cfg.run_dir), build(cfg)
    protocol, rows = chosen["eval"]["protocol"], chosen["eval"]["rows"]
    asked = {name: chosen[name] for name in (*ASKED, "device", "batch_size")}
    first = Contender(model=cfg.release, **asked)
    others = [first.another(*other) for other in (chosen["also"] or {}).items()]
    picked = list(wanted(rows, protocol, chosen))
    for row in picked:
        for contender in (first, *others):  # before sets are made and weights loaded
            protocol.fits_for(contender.predicts, is_metric=row.metric)
    opened, tasks = open_rows(picked), []
    for row, images in zip(picked, opened, strict=True):
        judged = [contender.predictor(row, images) for contender in (first, *others)]
        if cfg.dump:
            judged = [keeping(one, folder / "predictions", row.name) for one in judged]
        judged += baselines(row, protocol) if cfg.baselines else []
        order = [one.name for one in rows].index(row.name)
        tasks.append(Task(row=row, images=images, predictors=judged, order=order))
    made_by = replace(origin(), command=TYPED)
    run(tasks, protocol=protocol, folder=folder, batch_size=cfg.batch_size, origin=made_by,
        workers=cfg.workers, retry=cfg.retry)  # fmt: skip
    title = f"{tasks[0].predictors[0].name}: depth from one image"
    with Claims(folder / CLAIMS).claim("sections") as ours:  # one process of many draws them
        made = list(sections(cfg, first, opened[0], folder)) if ours else []
        return report(folder, title=title, sections=made)


def check_name(name: str) -> None:
    """Refuse what would lead out of the folder of all runs."""
    if name in ("", ".", "..") or set(name) & set("/\\\0"):
        raise ValueError(
            f"name is {name!r}, but must be the plain name of a folder, without / and \\; another "
            "place is said with run_dir=PATH"
        )


def wanted(rows: Sequence[Row], protocol: Protocol, cfg: Mapping[str, Any]) -> Iterator[Row]:
    """The rows chosen, with what the command line says of them."""
    own: dict[str, dict[str, Any]] = {row.name: {} for row in rows}
    for field in OF_A_SET:
        given = cfg[field] or {}
        if not isinstance(given, Mapping):
            raise ValueError(f"{field} is {given!r}, but must name sets: '{field}={{SET: VALUE}}'")
        choose(rows, list(given), protocol.id)  # refuses names of no set
        for name, value in given.items():
            own[name][field] = value
    limit = {} if cfg["limit"] is None else {"limit": cfg["limit"]}
    for row in choose(rows, cfg["sets"], protocol.id):
        yield replace(row, **limit, **own[row.name])


def baselines(row: Row, protocol: Protocol) -> Iterator[Predictor]:
    """Trivial predictors that this protocol can score."""
    if any(constant.kind in fit.predicts for fit in protocol.fits.values()):
        yield constant
        if (training := training_row(row)) is not None:
            yield mean_map(read_samples(training), training.protocol())


def sections(
    cfg: DictConfig, contender: Contender, images: Images, folder: Path
) -> Iterator[Section]:
    """What numbers do not show."""
    mofo = contender.mofo
    if cfg.captions and mofo is not None:
        yield gallery.from_text(mofo, cfg.captions, num_steps=cfg.drawing_steps)
        if samples := gallery.held_out(map(images.read, range(len(images.keys))), 4):
            shown = gallery.clouds(mofo, samples, num_steps=cfg.num_steps)
            Image.fromarray(gallery.poster(shown[:2])).save(folder / "poster.png")
            yield gallery.from_depth(mofo, samples, num_steps=cfg.drawing_steps)
            yield gallery.cloud_section(shown)
    if cfg.losses:
        yield gallery.losses(cfg.losses)


if __name__ == "__main__":
    # configs/model/ is a group of train.py, for which Hydra would take `model=FOLDER`
    sys.argv = [re.sub(r"^model=", "release=", argument) for argument in sys.argv]
    main()
