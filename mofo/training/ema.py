"""`EMA`: the moving average of the weights, which previews, validation and exports use.

It is kept on the shards that each rank trains, so it costs no communication: under FSDP2 the
average is a dictionary of DTensors. `averaged` finds it; `averaged_weights` trains nothing but lets
the network compute with it for a while.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from mofo.training.parallel import local, reshard


class EMA(Callback):
    """Exponential moving average of the trained weights, in their dtype and on their shards.

    `decay` is reached gradually, min(decay, (1 + n) / (10 + n)), so that early weights fade. A step
    that was skipped does not count. `average` has the network's names.
    """

    def __init__(self, *, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay is {decay}; accepted: 0 (off) up to below 1")
        self.decay = decay
        self.num_updates = 0
        self.average: dict[str, Tensor] = {}
        self.last_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.last_step = trainer.global_step
        live = pl_module.dit.state_dict()
        if not self.average:
            self.average = {name: tensor.detach().clone() for name, tensor in live.items()}
        self.average = {name: self.average[name].to(live[name].device) for name in live}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.last_step:  # still accumulating
            return
        self.last_step = trainer.global_step
        if pl_module.skipped.in_a_row:
            return
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        live = pl_module.dit.state_dict()
        torch._foreach_lerp_(
            [local(tensor) for tensor in self.average.values()],
            [local(live[name]) for name in self.average],
            1 - decay,
        )


def averaged(trainer: Any) -> dict[str, Tensor] | None:
    """The EMA of a run, or None if it keeps none; on shards where the weights are."""
    for callback in trainer.callbacks:
        if isinstance(callback, EMA) and callback.average and callback.decay > 0:
            return callback.average
    return None


@contextmanager
@torch.no_grad()
def averaged_weights(trainer: Any, pl_module: Any) -> Iterator[None]:
    """Inside, the network computes with the average, if there is one; all ranks enter together.

    The two change places shard by shard, so it takes no memory, and back again bit by bit.
    """
    average = averaged(trainer) or {}
    _exchange(pl_module, average)
    try:
        yield
    finally:
        _exchange(pl_module, average)


@torch.no_grad()
def _exchange(pl_module: Any, average: dict[str, Tensor]) -> None:
    reshard(pl_module.dit)  # or the next forward pass would still see what it gathered before
    live = pl_module.dit.state_dict()
    for name, tensor in average.items():
        here, there = local(live[name]), local(tensor)
        kept = here.clone()
        here.copy_(there)
        there.copy_(kept)
