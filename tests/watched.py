"""Tiny training runs, in this process or, started twice by tests/test_watch.py, on two ranks.

    RANK=0 WORLD_SIZE=2 ... python tests/watched.py FOLDER

trains under FSDP2, once as it is and once with validation and previews, and then until rank 1 stops
in the middle of a step. FOLDER holds `shards/` and gets `plain/`, `watched/` and `hanging/`.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf
from pictures import picture

import train
from mofo.data.write import write
from mofo.training import parallel
from mofo.training.watch import Watchdog

CONFIGS = Path(__file__).parents[1] / "configs"
STEPS = 6
HANGS_AFTER = 2
FSDP = ("trainer=fsdp", "trainer.accelerator=cpu")
WATCHED = ("callbacks.validation.every_n_steps=2", "callbacks.preview.every_n_steps=3")


def write_shards(folder: Path) -> None:
    write((picture(number, size=(32, 32)) for number in range(20)), folder, "pictures")


def tiny(root: Path, shards: Path, *overrides: str, name: str = "run") -> DictConfig:
    """A config of a run that takes a second; needs an initialised config folder."""
    cfg = compose(
        "train",
        overrides=[
            "model=xs",
            f"name={name}",
            f"paths.runs={root}",
            "~data.sources.real",
            f"data.sources.scenes.shards={shards}",
            "data.sources.scenes.make=null",
            "data.size=[32,32]",
            "data.batch_size=4",
            "optimizer.lr=1e-3",
            "optimizer.warmup_steps=4",
            "callbacks.ema.decay=0.5",
            "callbacks.preview.num_steps=2",
            "callbacks.validation.num_steps=2",
            "callbacks.validation.num_images=5",
            "callbacks.validation.batch_size=2",
            "callbacks.validation.num_pictures=1",
            f"trainer.max_steps={STEPS}",
            *overrides,
        ],
    )
    OmegaConf.set_struct(cfg, False)
    cfg.callbacks.validation.sets = {"held": {"shards": str(shards)}}
    return cfg


class Scales(Callback):
    """Weighs what a rank has of the training's state: bytes, as JSON in the run folder."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.gradients = 0

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.gradients = sum(parallel.local(p.grad).nbytes for p in pl_module.dit.parameters())

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        tensors = [
            value
            for state in trainer.optimizers[0].state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ]
        weighed = {
            "weights": sum(parallel.local(p).nbytes for p in pl_module.dit.parameters()),
            "gradients": self.gradients,
            "optimiser": sum(parallel.local(tensor).nbytes for tensor in tensors),
        }
        path = self.folder / f"bytes_{trainer.global_rank}.json"
        path.write_text(json.dumps(weighed))


class Stop(Callback):
    """Freezes the last rank in the middle of a step; the watchdog has seconds from then on."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == HANGS_AFTER:
            for callback in trainer.callbacks:
                if isinstance(callback, Watchdog):
                    callback.limit = 2.0
                    callback.allow(2.0)
            if trainer.global_rank:
                os.kill(os.getpid(), signal.SIGSTOP)


def with_callback(cfg: DictConfig, kind: type[Callback], **options: str) -> DictConfig:
    name = f"{Path(__file__).stem}.{kind.__name__}"
    cfg.callbacks = {**cfg.callbacks, kind.__name__: {"_target_": name, **options}}
    return cfg


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    sys.modules["watched"] = sys.modules[__name__]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        shards = folder / "shards"
        plain = tiny(folder, shards, *FSDP, name="plain")
        train.train(with_callback(plain, Scales, folder=str(folder / "plain")))
        train.train(tiny(folder, shards, *FSDP, *WATCHED, name="watched"))
        hanging = tiny(folder, shards, *FSDP, "callbacks.watchdog.patience_s=1", name="hanging")
        train.train(with_callback(hanging, Stop))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
