"""What watches a run that nobody looks at: `Watchdog`, `LossAlarm`, `DiskAlarm`."""

import faulthandler
import os
import platform
import shutil
import statistics
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from mofo.training.attempts import TRY_AGAIN
from mofo.training.parallel import gather
from mofo.training.progress import last_rows

MAD_TO_SIGMA = 1.4826  # of a normal distribution
SUSPENDED_S = 5.0  # between two looks of the watchdog, on a busy machine
FEW = 20  # losses, below which nothing can be said about the next


class Watchdog(Callback):
    """Ends a process that does nothing any more, so that the scheduler starts it again.

    After `minutes` without a step (`first_minutes` before the first one, which loads, compiles and
    makes data) the stacks of all threads go to `stacks/` in the run folder and to stderr, and the
    process exits with 75. When one rank hangs, the others wait for it in a collective, and each
    tells so itself: hence a thread, which runs while the main one waits, and a moment's patience
    before the first exit takes all ranks along.
    """

    def __init__(
        self,
        *,
        folder: str,
        minutes: float | int,
        first_minutes: float | int,
        patience_s: float | int = 10,
    ) -> None:
        if not 0 < minutes <= first_minutes:
            raise ValueError(
                f"the watchdog waits {minutes} minutes for a step and {first_minutes} for the "
                "first; the one must be above 0, the other no less"
            )
        self.folder = Path(folder) / "stacks"
        self.limit, self.first_limit = 60.0 * minutes, 60.0 * first_minutes
        self.patience = float(patience_s)
        self.rank = self.step = 0
        self.over: threading.Event | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.rank = trainer.global_rank
        self.allow(self.first_limit)
        self.over = threading.Event()
        threading.Thread(
            target=self._watch, args=(self.over,), name="watchdog", daemon=True
        ).start()

    def allow(self, seconds: float) -> None:
        """Something was done; the next thing has so much time."""
        self.deadline = time.monotonic() + seconds

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        # The batch is there. A first one may take long, also to compile what it runs.
        if self.step:
            self.allow(self.limit)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.step = trainer.global_step
        self.allow(self.limit)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.allow(self.first_limit)  # to save and to export

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._end()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._end()

    def _end(self) -> None:
        if self.over is not None:
            self.over.set()

    def _watch(self, over: Any) -> None:
        looked = time.monotonic()
        while not over.wait(min(1.0, self.limit / 4)):
            before, looked = looked, time.monotonic()
            if looked - before > max(SUSPENDED_S, self.limit / 2):
                self.allow(self.limit)  # it was this process that was stopped, and goes on now
            if looked > self.deadline:
                self._bark()
                if not over.wait(self.patience):
                    os._exit(TRY_AGAIN)

    def _bark(self) -> None:
        title = (
            f"rank {self.rank} on {platform.node()}, process {os.getpid()}: nothing done for too "
            f"long after step {self.step}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
        )
        try:  # a hanging disk may be what it barks at: stderr comes first
            self._dump(title, sys.__stderr__)
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"rank_{self.rank:05d}.txt").open("a") as file:
                self._dump(title, file)
        except (OSError, ValueError) as error:
            print(f"the stacks of rank {self.rank} are nowhere: {error}", file=sys.__stderr__)

    @staticmethod
    def _dump(title: str, stream: Any) -> None:
        stream.write(f"mofo: {title}")
        stream.flush()
        faulthandler.dump_traceback(stream, all_threads=True)


class LossAlarm(Callback):
    """Says when the loss of a step is far above what it was: which step, which samples.

    Far is `threshold` times the spread of the last `window` steps, both by median, so that one
    spike does not hide the next. With `stop` the run ends there. Comes after what logs the loss.
    """

    def __init__(
        self, *, folder: str, window: int, threshold: float | int, stop: bool = False
    ) -> None:
        if window < FEW or threshold <= 0:
            raise ValueError(
                f"the alarm has a window of {window} steps and a threshold of {threshold}; give at "
                f"least {FEW} steps, and a threshold above 0"
            )
        self.folder, self.threshold, self.stop = Path(folder), threshold, stop
        self.losses: deque[float] = deque(maxlen=window)
        self.keys: list[str] = []  # of this step's samples, on this rank
        self.last_step = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.last_step = trainer.global_step
        # As if never interrupted; from rank 0, so that all ranks judge alike.
        past = last_rows(self.folder, self.losses.maxlen) if trainer.is_global_zero else []
        found = [row["train/loss"] for row in gather(past)[0] if row.get("train/loss") is not None]
        self.losses.extend(found)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.keys.extend(batch.key)
        if trainer.global_step == self.last_step:
            return
        self.last_step = trainer.global_step
        keys, self.keys = self.keys, []
        loss = trainer.callback_metrics["train/loss"]  # the mean over ranks
        if not torch.isfinite(loss):  # counted elsewhere
            return
        limit = self.limit()
        self.losses.append(float(loss))
        if loss > limit:
            self._tell(trainer, float(loss), limit, keys)

    def limit(self) -> float:
        """The loss above which a step is strange."""
        if len(self.losses) < FEW:
            return float("inf")
        middle = statistics.median(self.losses)
        spread = MAD_TO_SIGMA * statistics.median(abs(loss - middle) for loss in self.losses)
        return middle + self.threshold * spread

    def _tell(self, trainer: Any, loss: float, limit: float, mine: list[str]) -> None:
        keys = ", ".join(key for rank in gather(mine) for key in rank)
        text = (
            f"the loss of step {self.last_step} is {loss:.4g}, although those before it let expect "
            f"at most {limit:.4g}; its samples: {keys}"
        )
        if self.stop:
            raise RuntimeError(f"{text}. Look at these, or set callbacks.loss_alarm.stop=false")
        if trainer.is_global_zero:
            print(text, flush=True)


class DiskAlarm(Callback):
    """Says when the disk of the run folder is nearly full; the training goes on."""

    def __init__(self, *, folder: str, every_n_steps: int, least_gib: float | int) -> None:
        self.folder, self.every_n_steps = Path(folder), every_n_steps
        self.least = least_gib * 2**30
        self.told = False

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.is_global_zero and trainer.global_step % self.every_n_steps == 0:
            self.look()

    def look(self) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < self.least and not self.told:
            print(
                f"the disk of {self.folder} has {free / 2**30:.1f} GiB left, less than "
                f"{self.least / 2**30:.1f}: make room, or checkpoints will fail",
                flush=True,
            )
        self.told = free < self.least


def still_busy(trainer: Any) -> None:
    """Tell the watchdog that something was done which is no step: another batch of a validation."""
    for callback in trainer.callbacks:
        if isinstance(callback, Watchdog):
            callback.allow(callback.limit)
