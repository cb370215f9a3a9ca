"""Evaluate: `python evaluate.py model=small eval=small` scores image-to-depth beside baselines.

`model` is a release folder, or "small". Lines and report are in `runs/eval/<name>`; the same
command typed again continues it.
"""

from functools import partial
from pathlib import Path

import hydra
from hydra.utils import instantiate
from mofo.pipeline import Mofo
from omegaconf import DictConfig

from mofo.evaluation import predictors
from mofo.evaluation.benchmark import read_samples, training_row
from mofo.evaluation.report import report
from mofo.evaluation.run import origin, run

build = partial(instantiate, _convert_="all")


@hydra.main(version_base="1.3", config_path="configs", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    folder = Path(cfg.run_dir)
    made_by = origin({cfg.label: cfg.model})
    mofo = Mofo.load(cfg.model)
    model = predictors.of_model(mofo.image_to_depth, num_steps=cfg.num_steps, seed=cfg.seed)
    for row in build(cfg.eval.rows):
        judged = {cfg.label: model, "constant": predictors.constant}
        if (training := training_row(row)) is not None:
            judged["mean_map"] = predictors.mean_map(read_samples(training))
        samples = read_samples(row)
        run(judged, samples, row=row, folder=folder, batch_size=cfg.batch_size, origin=made_by)
    print(report(folder, title=f"{cfg.label}: depth from one image"))


if __name__ == "__main__":
    main()
