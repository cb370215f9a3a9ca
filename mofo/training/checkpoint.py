"""`Checkpoint`: what a run is made of, saved and restored; `store` says how it lies on the disk.

Tensors are `network/NAME`, `average/NAME` and `optimizer/NAME/exp_avg` and so on, with the names of
the network. Under FSDP2 each rank saves its shards, and any number of ranks goes on from them. All
else is a handful of numbers. There is no random state: noise and the order of the data follow from
(seed, position).
"""

import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from mofo import __version__
from mofo.data.module import DataModule
from mofo.evaluation.origin import commit
from mofo.training import run, store
from mofo.training.attempts import Refused
from mofo.training.dcp import DTYPES
from mofo.training.ema import EMA
from mofo.training.manifest import Manifest
from mofo.training.module import ModalityForcing
from mofo.training.store import Saving, newest

__all__ = ["Checkpoint", "newest"]


class Checkpoint(Callback):
    """Saves every `every_n_steps` optimiser steps and at the end, and restores at the start.

    The last `keep` checkpoints stay, and those of every `keep_every` steps (0: none). With
    `asynchronous`, training goes on while a copy of the state is written, for which the host needs
    as much memory as the state has. `resume` is "last", the folder of a checkpoint, or None to
    begin anew; later checkpoints of the run are then set aside.
    """

    fence: Callable[[], None] | None = None  # as `store.save` has it

    def __init__(
        self,
        *,
        folder: str,
        every_n_steps: int,
        keep: int = 2,
        keep_every: int = 0,
        asynchronous: bool = False,
        resume: str | None = "last",
    ) -> None:
        if every_n_steps < 1 or keep < 1 or keep_every < 0:
            raise ValueError(
                f"every_n_steps is {every_n_steps}, keep {keep}, keep_every {keep_every}; accepted "
                "are at least 1, 1 and 0"
            )
        self.folder, self.every_n_steps = Path(folder), every_n_steps
        self.keep, self.keep_every, self.asynchronous = keep, keep_every, asynchronous
        self.resume = resume
        self.last_step = 0
        self.saved_step: int | None = None
        self.saving: Saving | None = None  # the last one, perhaps in flight
        self.group: Any = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.run = Run(trainer, pl_module, self.folder.parent)
        if self.asynchronous and trainer.world_size > 1:
            self.group = dist.new_group(backend="gloo")  # what its thread sends meets nothing else
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            store.clean(self.folder)
        if path := self._choose():
            self.saved_step = self.run.restore(path)
        self.last_step = trainer.global_step
        if trainer.is_global_zero:
            for later in store.by_step(self.folder):
                if store.step_of(later) > self.last_step:
                    aside = store.set_aside(later, "superseded")
                    print(f"going on from step {self.last_step}; {later} is now {aside.name}")
            if path and 0 <= trainer.max_steps <= self.last_step:
                print(
                    f"this run is finished: {path} has all of {trainer.max_steps} steps; to go on, "
                    "give a higher trainer.max_steps"
                )

    def _choose(self) -> Path | None:
        """The checkpoint to go on from. The same command, again, does not start from `resume`."""
        if self.resume == "last":
            return newest(self.folder)
        self.run.origin = str(self.resume)
        try:
            own = newest(self.folder)
        except Refused:
            own = None  # the way out of what is refused: begin elsewhere
        if own and Manifest.read(own).facts["origin"] == self.run.origin:
            return own
        return None if self.resume is None else _given(Path(self.resume))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.last_step:  # still accumulating
            return
        self.last_step = trainer.global_step
        if self.last_step % self.every_n_steps == 0:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save(trainer, wait=True)
        if self.saving is not None:
            self.saving.settle()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        # Whoever is asked to leave (SystemExit) has no time for that.
        if self.saving is not None and isinstance(exception, Exception):
            self.saving.settle()

    def save(self, trainer: L.Trainer, *, wait: bool = False) -> None:
        """Save the state after the last step, all ranks together, unless that was done already.

        A disk that is full costs this checkpoint, not the run; but with `wait`, which is for the
        last chance, it is an error, and nothing is in flight afterwards.
        """
        if self.saved_step != trainer.global_step:
            self._finish(is_last=False)
            if self.saving is not None:
                self.saving.settle()
            self.saved_step = trainer.global_step
            self.saving = store.save(
                self.folder,
                trainer.global_step,
                self.run.tensors(),
                self.run.facts(),
                keep=self.keep,
                keep_every=self.keep_every,
                asynchronous=self.asynchronous,
                fence=self.fence,
                group=self.group,
            )
        if wait or not self.asynchronous:
            self._finish(is_last=wait)

    def _finish(self, *, is_last: bool) -> None:
        try:
            if self.saving is not None:
                self.saving.wait()
        except OSError as error:
            step, self.saving, self.saved_step = self.saved_step, None, None
            if is_last:
                raise
            if self.run.trainer.is_global_zero:
                print(f"no checkpoint of step {step}: {error}; training goes on", flush=True)


def _given(path: Path) -> Path:
    """What `resume` says, if it is a checkpoint and whole."""
    if path.is_file() or not path.exists():
        raise Refused(
            f"resume is {path}, which is no folder of a checkpoint; accepted: last, null, or a "
            "folder such as runs/NAME/checkpoints/step_00000250"
        )
    if wrong := store.verify(path):
        raise Refused(f"{path} is damaged ({'; '.join(wrong)}); resume from another")
    return path


class Run:
    """The parts of a run that make its state."""

    def __init__(self, trainer: L.Trainer, module: L.LightningModule, folder: Path) -> None:
        assert isinstance(module, ModalityForcing)
        self.trainer, self.module = trainer, module
        self.data: DataModule = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        self.scheduler = trainer.lr_scheduler_configs[0].scheduler
        callbacks: list[Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        self.ema = next((one for one in callbacks if isinstance(one, EMA)), None)
        self.config = run.shaping(folder)
        self.origin: str | None = None  # the `resume` that it was started from, if not by itself

    @property
    def network(self) -> dict[str, Tensor]:
        return self.module.dit.state_dict()

    def tensors(self) -> dict[str, Tensor]:
        # Not named_parameters, which shows how the network is wrapped.
        weights = self.module.dit.state_dict(keep_vars=True)
        names = {parameter: name for name, parameter in weights.items()}
        out = {f"network/{name}": tensor for name, tensor in self.network.items()}
        for optimizer in self.trainer.optimizers:
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    out[f"optimizer/{names[parameter]}/{key}"] = value
        if self.ema is not None:
            out |= {f"average/{name}": tensor for name, tensor in self.ema.average.items()}
        return out

    def facts(self) -> dict[str, Any]:
        config = json.dumps(self.config, sort_keys=True).encode()
        return {
            "data": self.data.state_dict(),
            "loop": self.trainer.fit_loop.state_dict(),
            "schedule": self.scheduler.state_dict(),
            "num_updates": self.ema.num_updates if self.ema else 0,
            "skipped": self.module.skipped.state_dict(),
            "origin": self.origin,
            "config": self.config,
            "config_hash": hashlib.sha256(config).hexdigest()[:16],
            "versions": {
                "mofo": __version__,
                "torch": torch.__version__,
                "lightning": L.__version__,
                "python": platform.python_version(),
            },
            "commit": commit() or None,
        }

    def restore(self, path: Path) -> int:
        """Become what a checkpoint says; Refused, before anything is changed, if it cannot."""
        manifest = Manifest.read(path)
        facts, network = manifest.facts, self.network
        if differing := run.differences(facts["config"], self.config):
            listed = "\n  ".join(differing[:10])
            raise Refused(
                f"{path} is a checkpoint of another configuration:\n  {listed}\n"
                "resume from one of this run, or with the configuration it had"
            )
        tensors = {f"network/{name}": tensor for name, tensor in network.items()}
        manifest.compare(path, tensors)
        self.data.load_state_dict(facts["data"])
        tensors |= self._optimizer(manifest)
        if self.ema is not None:
            if any(name.startswith("average/") for name in manifest.tensors):
                self.ema.average = {name: torch.empty_like(one) for name, one in network.items()}
                tensors |= {f"average/{name}": one for name, one in self.ema.average.items()}
                self.ema.num_updates = facts["num_updates"]
            elif self.trainer.is_global_zero:
                print(f"{path} has no average of the weights: one begins at step {manifest.step}")
        store.load(path, tensors)

        self.scheduler.load_state_dict(facts["schedule"])
        groups = self.trainer.optimizers[0].param_groups
        for group, lr in zip(groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = lr
        self.trainer.fit_loop.load_state_dict(facts["loop"])
        self.module.skipped.load_state_dict(facts["skipped"])
        self.origin = self.origin or facts["origin"]
        return manifest.step

    def _optimizer(self, manifest: Manifest) -> dict[str, Tensor]:
        """Room for the optimiser state that a checkpoint has: none is there before a first step."""
        weights = self.module.dit.state_dict(keep_vars=True)
        (optimizer,) = self.trainer.optimizers
        out = {}
        for name, one in manifest.tensors.items():
            part, *rest = name.split("/")
            if part != "optimizer" or rest[0] not in weights:
                continue
            weight, key = weights[rest[0]], rest[1]
            out[name] = optimizer.state[weight][key] = _room(weight, one)
        return out


def _room(weight: Tensor, one: Mapping[str, Any]) -> Tensor:
    """Laid out as the weight is, if it has its shape; else it is a count, whole on each rank."""
    dtype = DTYPES[one["dtype"]]
    if one["shape"] and list(weight.shape) == one["shape"]:
        return torch.zeros_like(weight, dtype=dtype, requires_grad=False)
    return torch.zeros(one["shape"], dtype=dtype, device=weight.device)
