"""Evaluate: `python evaluate.py model=small eval=small` scores image-to-depth beside baselines.

`model` is a release folder, or "small"; `also` has more of them for the same tables. Lines and
report are in `runs/eval/<name>`; the same command typed again continues it.
"""

import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image

from mofo.evaluation import gallery, predictors
from mofo.evaluation.benchmark import read_samples, training_row
from mofo.evaluation.report import report
from mofo.evaluation.run import origin, run
from mofo.pipeline import Mofo

build = partial(instantiate, _convert_="all")


@hydra.main(version_base="1.3", config_path="configs", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    folder = Path(cfg.run_dir)
    paths = {cfg.label: cfg.release, **(cfg.also or {})}
    made_by = origin(paths)
    models = {label: Mofo.load(path) for label, path in paths.items()}
    rows = [replace(row, limit=cfg.limit or row.limit) for row in build(cfg.eval.rows)]
    for row in rows:
        judged = {
            label: predictors.of_model(mofo.image_to_depth, num_steps=cfg.num_steps, seed=cfg.seed)
            for label, mofo in models.items()
        } | {"constant": predictors.constant}
        if (training := training_row(row)) is not None:
            judged["mean_map"] = predictors.mean_map(read_samples(training))
        run(judged, read_samples(row), row=row, folder=folder,
            batch_size=cfg.batch_size, origin=made_by)  # fmt: skip
    sections = []
    if cfg.captions:
        mofo, samples = models[cfg.label], gallery.held_out(read_samples(rows[0]), 4)
        shown = gallery.clouds(mofo, samples, num_steps=cfg.num_steps)
        Image.fromarray(gallery.poster(shown[:2])).save(folder / "poster.png")
        sections = [
            gallery.from_text(mofo, cfg.captions, num_steps=cfg.drawing_steps),
            gallery.from_depth(mofo, samples, num_steps=cfg.drawing_steps),
            gallery.cloud_section(shown),
        ]
    if cfg.losses:
        sections.append(gallery.losses(cfg.losses))
    print(report(folder, title=f"{cfg.label}: depth from one image", sections=sections))


if __name__ == "__main__":
    # configs/model/ is a group of train.py, for which Hydra would take `model=FOLDER`
    sys.argv = [re.sub(r"^model=", "release=", argument) for argument in sys.argv]
    main()
