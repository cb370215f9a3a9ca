"""What the tests do to a run from the inside; everything else they do to it from the outside.

    '+callbacks.fault={_target_: tests.slurm.faults.Fault, folder: ..., pace_s: 0.1}'

It also writes down, for each rank and step, which samples were trained on.
"""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback


class Fault(Callback):
    """`pace_s`: how long each step takes, at least; `fsync_s`: each flush to the disk.

    Both until the job was requeued more than `restarts` times.
    `nan_at`: on rank 1 the pictures of that step are not finite. `die_at`: rank 1 dies of it.
    """

    def __init__(
        self,
        *,
        folder: str,
        pace_s: float = 0.0,
        fsync_s: float = 0.0,
        restarts: int = 0,
        nan_at: int | None = None,
        die_at: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        is_slow = int(os.environ.get("SLURM_RESTART_COUNT", "0")) <= restarts
        self.pace_s, self.fsync_s = (pace_s, fsync_s) if is_slow else (0.0, 0.0)
        self.nan_at, self.die_at = nan_at, die_at

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        rank = trainer.global_rank
        (self.folder / f"rank_{rank}.pid").write_text(str(os.getpid()))
        self.file = (self.folder / f"samples_{rank}.jsonl").open("a", buffering=1)
        if self.fsync_s:
            flush = os.fsync

            def slowly(descriptor: Any) -> None:
                time.sleep(self.fsync_s)
                flush(descriptor)

            os.fsync = slowly

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
        time.sleep(self.pace_s)
        step = trainer.global_step + 1
        self.file.write(json.dumps({"step": step, "positions": batch.position.tolist()}) + "\n")
        if step == self.nan_at and trainer.global_rank == 1:
            encoders, encode = pl_module.encoders, pl_module.encoders.image

            def broken(images: torch.Tensor) -> torch.Tensor:
                encoders.image = encode
                return torch.full_like(encode(images), torch.nan)

            encoders.image = broken

    def on_before_backward(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step + 1 == self.die_at and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
