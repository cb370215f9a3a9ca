"""Train: `python train.py experiment=small` (see configs/experiment/; `--cfg job` prints the rest).

The run folder is `runs/<name>`. The same command typed again continues it.
"""

from functools import partial
from pathlib import Path

import hydra
import lightning as L
from hydra.utils import instantiate
from omegaconf import DictConfig

from mofo.training import run
from mofo.training.module import ModalityForcing

build = partial(instantiate, _convert_="all")


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg: DictConfig) -> None:
    run.quieten()
    checkpoint = run.open_folder(Path(cfg.run_dir), cfg)
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    module = ModalityForcing(
        model=build(cfg.model),
        encoders=build(cfg.encoders),
        objective=build(cfg.objective),
        optimizer=build(cfg.optimizer),
        init_from=cfg.init_from,
        seed=cfg.seed,
        body_dtype=cfg.body_dtype,
    )
    callbacks = [build(callback) for callback in cfg.callbacks.values()]
    trainer = build(cfg.trainer, callbacks=callbacks, logger=build(cfg.logger) or False)
    trainer.fit(module, build(cfg.data), ckpt_path=checkpoint, weights_only=True)


if __name__ == "__main__":
    main()
