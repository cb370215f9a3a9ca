"""Train: `python train.py experiment=small` (see configs/experiment/; `--cfg job` prints the rest).

The run folder is `runs/<name>`. The same command typed again continues it, under SLURM
(`slurm/train.sbatch`), under `torchrun` and as it is.
"""

if __name__ == "__main__":
    # First of all: the imports take seconds, in which a signal would end the process.
    from mofo.training import signals

    signals.install()

import atexit
import os
import sys
from functools import partial
from pathlib import Path

import hydra
import lightning as L
from hydra.utils import instantiate
from omegaconf import DictConfig

from mofo.training import parallel, plan, run
from mofo.training.guard import Guard
from mofo.training.launch import Launch
from mofo.training.module import ModalityForcing

build = partial(instantiate, _convert_="all")


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg: DictConfig) -> None:
    try:
        if cfg.plan:
            print(plan.describe(cfg))
        else:
            train(cfg)
    except run.FOR_USERS as error:  # here, or Hydra adds a line of its own
        run.say_briefly(type(error), error, error.__traceback__)
        raise SystemExit(1) from error


def train(cfg: DictConfig) -> None:
    run.quieten()
    launch, folder = Launch.read(), Path(cfg.run_dir)
    placed = launch.trainer(cfg)
    run.check_start(cfg.init_from, build(cfg.model))
    with run.opened(folder, cfg, launch.rank) as attempt:
        L.seed_everything(cfg.seed, workers=True, verbose=False)
        module = ModalityForcing(
            model=build(cfg.model),
            encoders=build(cfg.encoders),
            objective=build(cfg.objective),
            optimizer=build(cfg.optimizer),
            init_from=cfg.init_from,
            seed=cfg.seed,
            body_dtype=cfg.body_dtype,
            recompute=cfg.recompute,
            compile=cfg.compile,
            max_skipped=cfg.max_skipped,
        )
        callbacks = [build(callback) for callback in cfg.callbacks.values()]
        callbacks.append(Guard(folder=folder, attempt=attempt))
        logger = build(cfg.logger) or False
        trainer = build(cfg.trainer, callbacks=callbacks, logger=logger, **placed)
        trainer.fit(module, build(cfg.data))
    atexit.register(parallel.leave)


if __name__ == "__main__":
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or it prints tracebacks of its own
    sys.excepthook = run.say_briefly
    run.show_log()
    if (frozen := run.of_job()) is not None:
        train(frozen)
    else:
        main()
