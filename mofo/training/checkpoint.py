"""`Checkpoint`: training state that survives a kill at any moment, and `newest` to find it.

A checkpoint is written beside its final name, flushed to the disk and renamed, so that a file under
`step_N.ckpt` is complete. Older ones are removed only after a newer one is in place.
"""

import os
import re
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback


class Checkpoint(Callback):
    """Saves every `every_n_steps` optimiser steps and at the end; keeps the last `keep`."""

    def __init__(self, *, folder: str, every_n_steps: int, keep: int = 2) -> None:
        self.folder, self.every_n_steps, self.keep = Path(folder), every_n_steps, keep
        self.saved_step = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.saved_step = trainer.global_step
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            for partial in self.folder.glob(".*.partial"):
                partial.unlink()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        step = trainer.global_step
        if step != self.saved_step and step % self.every_n_steps == 0:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step != self.saved_step:
            self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        self.saved_step = trainer.global_step
        target = self.folder / f"step_{trainer.global_step:08d}.ckpt"
        partial = self.folder / f".{target.name}.partial"
        trainer.save_checkpoint(partial, weights_only=False)
        if not trainer.is_global_zero:
            return
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(target)
        for old in _by_step(self.folder)[self.keep :]:
            old.unlink()


def newest(folder: str | Path) -> Path | None:
    """The latest checkpoint that can be read; damaged ones are set aside and named."""
    for path in _by_step(Path(folder)):
        try:
            torch.load(path, map_location="meta", weights_only=True)
        except Exception as error:  # any failure of the reader means the file is damaged
            aside = path.with_suffix(".damaged")
            path.rename(aside)
            print(f"{path} cannot be read ({error}); set aside as {aside.name}")
        else:
            return path
    return None


def _by_step(folder: Path) -> list[Path]:
    """Checkpoints, newest first."""
    found = [p for p in folder.glob("step_*.ckpt") if re.fullmatch(r"step_\d+\.ckpt", p.name)]
    return sorted(found, reverse=True)
