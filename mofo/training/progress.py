"""`Progress`: what a run tells of itself, on the terminal and in two files of its folder.

    metrics.jsonl   what was trained, a row a step. Rows follow from the training alone, and those
                    after the step that a run goes on from are dropped: however often it was
                    interrupted, the file is the one of a run that nothing interrupted.
    system.jsonl    how it went: when, where, how fast, how much memory, over all attempts.

A logger, such as Weights & Biases, gets both as a mirror.
"""

import json
import math
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import Profiler

from mofo.data.storage import FULL
from mofo.model.weights import replacing
from mofo.training import attempts
from mofo.training.cost import Shape, peak_flops, step_flops
from mofo.training.module import ModalityForcing

METRICS, SYSTEM = "metrics.jsonl", "system.jsonl"
REDRAW_S = 0.1  # of the live line on a terminal


class Progress(Callback):
    """Comes after all that adds to a step's row, and before all that saves the step.

    `peak_tflops` is what a device can do in the dtype that it computes in, for the MFU (the part of
    it that the networks' matrix products make use of); None takes a known GPU's bfloat16 number.
    """

    def __init__(
        self, *, folder: str, every_n_steps: int, peak_tflops: float | int | None = None
    ) -> None:
        self.folder, self.every_n_steps = Path(folder), every_n_steps
        self.peak_tflops = peak_tflops
        self.extra: dict[str, float] = {}  # what other callbacks add to this step's row
        self.last_step = 0
        self.clock = Clock()
        self.metrics: Rows | None = None  # of rank 0, as the next
        self.system: Rows | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        trainer.profiler = self.clock  # pyright: ignore[reportAttributeAccessIssue]

    def on_train_start(self, trainer: L.Trainer, pl_module: ModalityForcing) -> None:
        self.first_step = self.last_step = trainer.global_step
        self.pace = Pace(trainer, pl_module, self.peak_tflops)
        self.clock.restart(self.last_step)
        self.started, self.drawn = time.monotonic(), 0.0
        if trainer.is_global_zero:
            self._open(trainer)
            count = sum(p.numel() for p in pl_module.dit.parameters())
            start = f"resuming at step {self.last_step}" if self.last_step else "starting"
            print(f"{start}: {count / 1e6:.2f} M parameters, {trainer.max_steps} steps", flush=True)

    def _open(self, trainer: Any) -> None:
        """Both files, the metrics up to the step that the run goes on from."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / METRICS
        rows = path.read_text().splitlines() if path.exists() else []
        kept = [row for row in rows if _step(row) <= self.last_step]
        missing = self.last_step - (_step(kept[-1]) if kept else 0)
        if missing > 0:
            print(f"{path} lacks {missing} steps before {self.last_step}: lost with a machine")
        # A new file, also when nothing is dropped: what a fenced-off attempt may still append goes
        # to the old one, which has no name any more.
        with replacing(path) as partial:
            partial.write_text("".join(row + "\n" for row in kept))
        self.metrics, self.system = Rows(path), Rows(self.folder / SYSTEM)
        self.attempt = attempts.count(self.folder)
        self.system.append(
            {
                "started": _now(),
                "attempt": self.attempt,
                "step": self.last_step,
                "host": platform.node(),
                "job": os.environ.get("SLURM_JOB_ID"),
                "ranks": trainer.world_size,
            }
        )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        step = trainer.global_step
        if step == self.last_step:  # still accumulating
            return
        self.last_step = step
        due = step % self.every_n_steps == 0 or step == trainer.max_steps
        # By all ranks: a slow disk or a full device is often that of one.
        speed = self.pace.measure(self.clock, step, pl_module.device) if due else {}
        if not trainer.is_global_zero:
            return
        values = {k: float(v) for k, v in trainer.callback_metrics.items()} | self.extra
        self.extra = {}
        row: dict[str, Any] = {"step": step, **values}
        row["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        if pl_module.skipped.in_a_row:
            row["skipped"] = pl_module.skipped.last[-1]["keys"]
        self._write(trainer, self.metrics, row)
        if due:
            left = round(self._seconds_left(trainer), 1)
            row = {"step": step, "attempt": self.attempt, "time": _now(), **speed}
            row |= {"skipped": pl_module.skipped.total, "seconds_left": left}
            self._write(trainer, self.system, row)
        if due or (sys.stdout.isatty() and time.monotonic() - self.drawn > REDRAW_S):
            self._draw(trainer, values, speed, stays=due)

    def _write(self, trainer: Any, rows: "Rows | None", row: dict[str, Any]) -> None:
        if rows is None:
            return
        rows.append(row)
        prefix = "" if rows is self.metrics else "system/"
        shown = {f"{prefix}{k}": v for k, v in row.items() if _is_number(v) and k != "step"}
        for logger in trainer.loggers:
            logger.log_metrics(shown, step=row["step"])

    def _seconds_left(self, trainer: Any) -> float:
        """Validation, checkpoints and all else included."""
        step = trainer.global_step
        spent = time.monotonic() - self.started
        return spent / (step - self.first_step) * (trainer.max_steps - step)

    def _draw(
        self, trainer: Any, values: dict[str, float], speed: dict[str, float], *, stays: bool
    ) -> None:
        """One line; on a terminal it is drawn over until it `stays`."""
        step, left = trainer.global_step, int(self._seconds_left(trainer))
        terms = [f"{k[6:]} {v:.4f}" for k, v in values.items() if k.startswith("train/")]
        parts = [f"step {step}/{trainer.max_steps}", *terms, *told(speed)]
        if skipped := trainer.lightning_module.skipped.total:
            parts.append(f"{skipped} skipped")
        if self.attempt > 1:
            parts.append(f"attempt {self.attempt}")
        line = "  ".join([*parts, f"{_clock_time(left)} left"])
        if not sys.stdout.isatty():
            print(line, flush=True)
            return
        self.drawn = time.monotonic()
        # A line that wraps could not be drawn over.
        line = line if stays else line[: shutil.get_terminal_size().columns - 1]
        print(f"\r\x1b[K{line}", end="\n" if stays else "", flush=True)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for rows in (self.metrics, self.system):
            if rows is not None:
                rows.close()
        self.metrics = self.system = None


class Rows:
    """JSON lines that are only appended; a full disk delays them and loses none."""

    def __init__(self, path: Path) -> None:
        self.path, self.waiting = path, b""
        self.file = path.open("a+b", buffering=0)
        self.file.seek(0)
        # A killed process leaves half a line, at which the next one would begin.
        self.size = self.file.read().rfind(b"\n") + 1
        self.file.truncate(self.size)

    def append(self, row: Mapping[str, Any]) -> None:
        """Numbers that are not finite become null: JSON has no others."""
        plain = {k: None if _is_number(v) and not math.isfinite(v) else v for k, v in row.items()}
        begins = not self.waiting
        self.waiting += json.dumps(plain).encode() + b"\n"
        try:
            written = self.file.write(self.waiting)
            error = "no space left"
        except OSError as caught:
            if caught.errno not in FULL:
                raise
            written, error = 0, str(caught.strerror)
        if written == len(self.waiting):
            self.size, self.waiting = self.size + written, b""
            return
        self.file.truncate(self.size)
        if begins:
            print(f"{self.path}: {error}; rows wait until there is room again", flush=True)

    def close(self) -> None:
        if self.waiting:
            lost = self.waiting.count(b"\n")
            print(f"{self.path}: there was no room for the last {lost} rows")
        self.file.close()


class Clock(Profiler):
    """Where the time of the steps goes; Lightning says what begins and ends."""

    def __init__(self) -> None:
        super().__init__()
        self._begun: dict[str, float] = {}
        self.restart(0)

    def restart(self, step: int) -> None:
        self.step, self.since = step, time.perf_counter()
        self.waited = self.paused = 0.0

    def start(self, action_name: str) -> None:
        self._begun[action_name] = time.perf_counter()

    def stop(self, action_name: str) -> None:
        spent = time.perf_counter() - self._begun.pop(action_name)
        if action_name.endswith("train_dataloader_next"):
            self.waited += spent
        # This callback waits for the device, which is part of the step; the others pause it.
        elif action_name.startswith("[Callback]") and "[Callback]Progress" not in action_name:
            self.paused += spent


class Pace:
    """How fast the slowest rank is, and how much of the devices that makes use of."""

    def __init__(self, trainer: Any, pl_module: ModalityForcing, tflops: float | int | None):
        data = trainer.datamodule
        self.batch_size = data.batch_size
        self.peak = None if tflops is None else 1e12 * tflops
        if self.peak is None:
            self.peak = peak_flops(pl_module.device)
        self.flops = 0
        if self.peak is not None and trainer.is_global_zero:
            grid = (data.size[0] // data.patch, data.size[1] // data.patch)
            teacher = pl_module.teacher and pl_module.teacher.dit.config
            shape = Shape(grid, pl_module.encoders.text_encoder.length)
            self.flops = step_flops(pl_module.config, shape, teacher)
            self.peak *= trainer.world_size

    def measure(self, clock: Clock, step: int, device: torch.device) -> dict[str, float]:
        """The steps since the clock was started, which is started again; called by all ranks."""
        seconds = time.perf_counter() - clock.since - clock.paused
        mine = [seconds / (step - clock.step), clock.waited / seconds, float(_memory(device))]
        clock.restart(step)
        per_step, waiting, memory = _most_over_ranks(mine, device)
        out = {
            "seconds_per_step": round(per_step, 6),
            "samples_per_second": round(self.batch_size / per_step, 3),
            "data_wait": round(waiting, 4),
            "memory": int(memory),
        }
        if self.flops and self.peak:
            out["mfu"] = round(self.flops * self.batch_size / per_step / self.peak, 4)
        return out


def told(speed: Mapping[str, float]) -> list[str]:
    """A pace for the progress line."""
    if not speed:
        return []
    per_step, rate = speed["seconds_per_step"], speed["samples_per_second"]
    parts = [
        f"{1e3 * per_step:.0f} ms/step" if per_step < 1 else f"{per_step:.2f} s/step",
        f"{rate:.0f} samples/s" if rate >= 10 else f"{rate:.2g} samples/s",
        f"data {100 * speed['data_wait']:.0f} %",
        f"{speed['memory'] / 2**30:.1f} GiB",
    ]
    return parts + ([f"MFU {100 * speed['mfu']:.0f} %"] if "mfu" in speed else [])


def progress_of(trainer: Any) -> Progress | None:
    """The run's Progress, for callbacks that add to a row or read one."""
    return next((one for one in trainer.callbacks if isinstance(one, Progress)), None)


def last_rows(folder: Path, count: int | None = None) -> list[dict[str, Any]]:
    """The last rows of a run's metrics."""
    path = folder / METRICS
    rows = path.read_text().splitlines() if path.exists() else []
    return [json.loads(row) for row in rows[-(count or 0) :]]


def _most_over_ranks(values: list[float], device: torch.device) -> list[float]:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def _memory(device: torch.device) -> int:
    """The most bytes that were taken: of the device's memory, on a CPU by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    scale = 1 if sys.platform == "darwin" else 1024
    return scale * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _step(row: str) -> int | float:
    try:
        return json.loads(row)["step"]
    except ValueError:  # the half line of a killed run
        return math.inf


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _clock_time(seconds: int) -> str:
    days, rest = divmod(seconds, 86_400)
    hours, rest = divmod(rest, 3600)
    minutes, seconds = divmod(rest, 60)
    if days:
        return f"{days} d {hours} h"
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
