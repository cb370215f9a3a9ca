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
from typing import Any

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image

from mofo.evaluation import gallery
from mofo.evaluation.benchmark import Images, Row, choose, open_row, read_samples, training_row
from mofo.evaluation.claims import Claims
from mofo.evaluation.contender import Contender
from mofo.evaluation.kept import keeping
from mofo.evaluation.page import Section
from mofo.evaluation.predictors import Predictor, constant, mean_map
from mofo.evaluation.protocol import Protocol
from mofo.evaluation.report import report
from mofo.evaluation.run import CLAIMS, Task, origin, run

build = partial(instantiate, _convert_="all")
TYPED = " ".join(["python", *sys.argv])
ASKED = ("predictions", "kind", "unit", "num_steps", "ensemble", "seed", "fit", "size", "label")


@hydra.main(version_base="1.3", config_path="configs", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    try:
        print(evaluate(cfg))
    except ValueError as error:  # what a user can cause says what to do, without a traceback
        raise SystemExit(f"evaluate.py: {error}") from error


def evaluate(cfg: DictConfig) -> str:
    """Run what the config says and write the report; returns its tables."""
    folder, chosen = Path(cfg.run_dir), build(cfg)
    protocol, rows = chosen["eval"]["protocol"], chosen["eval"]["rows"]
    opened = [(row, open_row(row)) for row in wanted(rows, protocol, chosen)]
    asked = {name: chosen[name] for name in (*ASKED, "device", "batch_size")}
    first = Contender(model=cfg.release, **asked)
    others = [first.another(*other) for other in (chosen["also"] or {}).items()]
    tasks = []
    for row, images in opened:
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
        made = list(sections(cfg, first, opened[0][1], folder)) if ours else []
        return report(folder, title=title, sections=made)


def wanted(rows: Sequence[Row], protocol: Protocol, cfg: Mapping[str, Any]) -> Iterator[Row]:
    """The rows chosen, with what the command line says of them."""
    sources = cfg["source"] or {}
    choose(rows, list(sources), protocol.id)  # refuses names of no set
    for row in choose(rows, cfg["sets"], protocol.id):
        source, limit = sources.get(row.name, row.source), cfg["limit"] or row.limit
        yield replace(row, source=source, limit=limit)


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
