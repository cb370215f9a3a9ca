"""`Guard`: a run leaves together, and between two steps; it starts only where it can.

A signal (`signals`) is noted by the rank that gets it. Once a step all ranks compare their notes;
if any has one, all save together and leave. What could only fail later, after hours in the queue
and at the price of a whole job, is looked at before the network is built.
"""

import atexit
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from mofo.data.module import DataModule
from mofo.data.sample import Batch
from mofo.training import attempts, parallel, signals
from mofo.training.attempts import TRY_AGAIN, Attempt, FencedOff, Refused
from mofo.training.checkpoint import Checkpoint

SHARED_S = 60.0  # until what one node wrote is seen by all: network file systems cache for 30 s
FENCED = 99  # beside the numbers of signals


class Guard(Callback):
    """Comes last: what it saves is the state after everything else that belongs to the step."""

    def __init__(self, *, folder: Path, attempt: Attempt | None) -> None:
        self.folder, self.attempt = folder, attempt
        self.step = -1
        self.group: Any = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Lightning's SIGTERM handler broadcasts from inside of the handler, which can hang.
        trainer._signal_connector.register_signal_handlers = lambda: None
        if trainer.world_size > 1:
            # The notes are on the CPU: no step waits for the device because of them.
            self.group = dist.new_group(backend="gloo")
        self.number = self._shared(self.attempt.number if self.attempt else 0)
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(callback, Checkpoint) and self.attempt is not None:
                callback.fence = self.attempt.check
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        self._same_data(data, files=trainer.local_rank == 0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        signals.keep()
        self.step = trainer.global_step
        self._leave_if_asked(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        samples = [
            f"{key} (position {position})"
            for key, position in zip(batch.key, batch.position.tolist(), strict=True)
        ]
        attempts.fly(
            self.folder, trainer.global_rank, self.number, trainer.global_step + 1, samples
        )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step != self.step:  # else still accumulating
            self.step = trainer.global_step
            self._leave_if_asked(trainer)

    def _leave_if_asked(self, trainer: L.Trainer) -> None:
        noted = int(signals.noted() or 0)
        if self.attempt is not None and not self.attempt.still_ours():
            noted = FENCED
        noted = self._most(noted)
        if noted == FENCED:
            raise FencedOff(f"another attempt has taken over {self.folder}; nothing was written")
        # After the last step it is saved, and exported, in any case.
        if not noted or 0 <= trainer.max_steps <= trainer.global_step:
            return
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(callback, Checkpoint):
                callback.save(trainer, wait=True)
        status = self._most(requeue(noted) if self.attempt is not None else 0)
        atexit.register(parallel.leave)
        sys.exit(status)

    def _most(self, value: int) -> int:
        """The largest `value` of all ranks."""
        if self.group is None:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return int(tensor)

    def _shared(self, number: int) -> int:
        """The attempt's number, from rank 0; Refused where its file cannot be seen."""
        if self.group is None:
            return number
        mine = self.attempt and (self.attempt.path.name, self.attempt.path.read_text())
        name, text = self._gather(mine)[0][1]
        path = self.folder / "attempts" / name
        seen = self._gather(_appears(path, text))
        if blind := [host for host, sees in seen if not sees]:
            raise Refused(
                f"the run folder {self.folder.absolute()} is not shared: rank 0 on "
                f"{seen[0][0]} wrote {path}, which these do not see: "
                f"{', '.join(sorted(set(blind)))}. Put it where all nodes see it: paths.runs=..., "
                "or MOFO_RUNS in slurm/env.sh"
            )
        return int(path.stem)

    def _same_data(self, data: DataModule, *, files: bool) -> None:
        """Refused unless every node has the same shards, all of them."""
        try:
            found: dict[str, str] | str = data.fingerprint(files=files)
        except ValueError as error:
            found = str(error)
        answers = self._gather(found)
        several = len({host for host, _ in answers}) > 1
        faults = {f"{host}: " * several + one for host, one in answers if isinstance(one, str)}
        if faults:
            raise Refused("the training data is not complete\n  " + "\n  ".join(sorted(faults)))
        first_host, first = answers[0]
        for host, one in answers:
            differing = [name for name in first if one[name] != first[name]]
            if differing:
                raise Refused(
                    f"{host} has other shards than {first_host} for {', '.join(differing)}; copy "
                    "the sets again, so that all nodes have the same"
                )

    def _gather(self, value: Any) -> list[tuple[str, Any]]:
        """Host and `value` of every rank."""
        mine = (os.environ.get("SLURMD_NODENAME", socket.gethostname()), value)
        if self.group is None:
            return [mine]
        out: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(out, mine, group=self.group)
        return out


def requeue(noted: int, environ: Mapping[str, str] = os.environ) -> int:
    """Have SLURM start the job again, where it has one; the exit status for all ranks.

    0: it goes on by itself. TRY_AGAIN: the same command goes on.
    """
    job = environ.get("SLURM_JOB_ID")
    name = signals.name(noted)
    if job is None or "SLURM_STEP_NUM_TASKS" not in environ:
        print(f"{name}: saved; the same command goes on from here", flush=True)
        return TRY_AGAIN
    if noted == signals.END and _is_ending(job):
        print(f"{name}: saved; SLURM ends this job, and requeues it if it preempts it", flush=True)
        return 0
    print(f"{name}: saved; requeueing job {job}", flush=True)
    return _scontrol("requeue", job)[0] and TRY_AGAIN


def _is_ending(job: str) -> bool:
    """Whether SLURM has decided about the job already: whoever cancelled it wants no other."""
    return "JobState=COMPLETING" in _scontrol("show", "job", "-o", job)[1]


def _scontrol(*arguments: str) -> tuple[int, str]:
    try:
        done = subprocess.run(
            ["scontrol", *arguments], capture_output=True, text=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:  # in a container there may be none
        print(f"scontrol {' '.join(arguments)}: {error}", flush=True)
        return TRY_AGAIN, ""
    if done.returncode:
        print(f"scontrol {' '.join(arguments)}: {done.stderr.strip()}", flush=True)
    return done.returncode, done.stdout


def _appears(path: Path, text: str) -> bool:
    """Whether a file that another node wrote is to be seen here, within SHARED_S."""
    end = time.monotonic() + SHARED_S
    while True:
        with suppress(FileNotFoundError):
            if path.read_text().startswith(text):
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
