"""`EMA`, `Progress`, `Preview`, `Export`: what happens beside the training step."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor

from mofo import picture
from mofo.model.weights import replacing
from mofo.sampler import sample
from mofo.training.export import write
from mofo.training.module import ModalityForcing


class EMA(Callback):
    """Exponential moving average of the trained weights, in their dtype.

    `decay` is reached gradually, min(decay, (1 + n) / (10 + n)), so that early weights fade.
    """

    def __init__(self, *, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay is {decay}; accepted: 0 (off) up to below 1")
        self.decay = decay
        self.num_updates = 0
        self.average: dict[str, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: ModalityForcing) -> None:
        live = pl_module.dit.state_dict()
        if not self.average:
            self.average = {name: tensor.detach().clone() for name, tensor in live.items()}
        self.average = {name: self.average[name].to(live[name].device) for name in live}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.num_updates:  # still accumulating
            return
        self.num_updates = trainer.global_step
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        live = pl_module.dit.state_dict()
        torch._foreach_lerp_(list(self.average.values()), list(live.values()), 1 - decay)

    def state_dict(self) -> dict:
        return {"num_updates": self.num_updates, "average": self.average}

    def load_state_dict(self, state_dict: dict) -> None:
        self.num_updates, self.average = state_dict["num_updates"], state_dict["average"]


class Progress(Callback):
    """One line per `every_n_steps` on the terminal, and every step in `metrics.jsonl`.

    Losses are means over the micro-batches of a step. The file is the run's truth: rows after the
    step that a run resumes from are dropped, so it reads as if nothing had been interrupted.
    """

    def __init__(self, *, folder: str, every_n_steps: int) -> None:
        self.path, self.every_n_steps = Path(folder) / "metrics.jsonl", every_n_steps
        self.last_step = 0
        self.parts: list[dict[str, float]] = []  # what each micro-batch of this step logged

    def on_train_start(self, trainer: L.Trainer, pl_module: ModalityForcing) -> None:
        self.first_step = self.last_step = trainer.global_step
        self.started = time.monotonic()
        if not trainer.is_global_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [row for row in rows if _step(row) <= self.last_step]
        with replacing(self.path) as partial:
            partial.write_text("".join(row + "\n" for row in kept))
        self.file = self.path.open("a", buffering=1)
        count = sum(p.numel() for p in pl_module.dit.parameters())
        start = f"resuming at step {self.last_step}" if self.last_step else "starting"
        print(f"{start}: {count / 1e6:.2f} M parameters, {trainer.max_steps} steps", flush=True)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if not trainer.is_global_zero:
            return
        self.parts.append({k: float(v) for k, v in trainer.callback_metrics.items()})
        step = trainer.global_step
        if step == self.last_step:
            return
        self.last_step = step
        parts, self.parts = self.parts, []
        values = {k: sum(part[k] for part in parts) / len(parts) for k in parts[0]}
        values |= {k: v for k, v in parts[-1].items() if k == "train/grad_norm"}  # once a step
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        self.file.write(json.dumps({"step": step, **values, "lr": lr}) + "\n")
        if step % self.every_n_steps == 0 or step == trainer.max_steps:
            self._say(trainer, values)

    def _say(self, trainer: Any, values: dict[str, float]) -> None:
        step = trainer.global_step
        per_step = (time.monotonic() - self.started) / (step - self.first_step)
        left = per_step * (trainer.max_steps - step)
        rate = trainer.datamodule.batch_size / per_step
        terms = "  ".join(f"{k.removeprefix('train/')} {v:.4f}" for k, v in values.items())
        line = (
            f"step {step}/{trainer.max_steps}  {terms}  {rate:.0f} samples/s  "
            f"{int(left // 60)}:{int(left % 60):02d} left"
        )
        end = "\n" if not sys.stdout.isatty() or step == trainer.max_steps else "\r"
        print(line, end=end, flush=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: ModalityForcing) -> None:
        if trainer.is_global_zero:
            self.file.close()


def _step(row: str) -> int | float:
    try:
        return json.loads(row)["step"]
    except ValueError:  # the half line of a killed run
        return math.inf


class Preview(Callback):
    """Every `every_n_steps`, samples of `captions` as one picture, from the averaged weights."""

    def __init__(
        self, *, folder: str, every_n_steps: int, captions: list[str], num_steps: int = 25
    ) -> None:
        self.folder, self.every_n_steps = Path(folder) / "previews", every_n_steps
        self.captions, self.num_steps = list(captions), num_steps
        self.last_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: ModalityForcing) -> None:
        self.last_step = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        step = trainer.global_step
        due = step != self.last_step and step % self.every_n_steps == 0
        self.last_step = step
        if due and trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            drawn = Image.fromarray(self.draw(trainer, pl_module))
            drawn.save(self.folder / f"step_{step:08d}.png")

    def draw(self, trainer: Any, pl_module: ModalityForcing) -> picture.Picture:
        release = pl_module.release(averaged(trainer))
        h, w = (side // trainer.datamodule.patch for side in trainer.datamodule.size)
        encoders = pl_module.encoders
        text, null = encoders.text(self.captions), encoders.text([""])
        image, depth = sample(
            release.dit,
            release.schedule,
            text,
            grid=(h, w),
            null_text=null,
            cfg_scale=3.0,
            num_steps=self.num_steps,
            seeds=range(len(self.captions)),
        )
        rows = [[picture.from_unit(p.numpy()) for p in encoders.pixels(image, (h, w))]]
        if depth is not None:
            maps, valid = release.codec.decode(depth, grid=(h, w))
            pairs = zip(maps.numpy(), valid.numpy(), strict=True)
            rows.append([picture.depth_picture(m, v) for m, v in pairs])
        return picture.grid([[picture.enlarge(one, 3) for one in row] for row in rows])


class Export(Callback):
    """At the end, the averaged weights as a release folder, in the dtype they were trained in."""

    def __init__(self, *, folder: str) -> None:
        self.folder = Path(folder) / "export"

    def on_train_end(self, trainer: L.Trainer, pl_module: ModalityForcing) -> None:
        if trainer.is_global_zero and trainer.global_step >= trainer.max_steps:
            release = pl_module.release(averaged(trainer))
            write(release, pl_module.encoders.autoencoder, self.folder)
            print(f"exported to {self.folder}")


def averaged(trainer: Any) -> dict[str, Tensor] | None:
    """The EMA of a run, or None if it keeps none."""
    for callback in trainer.callbacks:
        if isinstance(callback, EMA) and callback.average and callback.decay > 0:
            return callback.average
    return None
