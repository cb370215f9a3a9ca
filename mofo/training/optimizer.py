"""AdamW with two parameter groups and a warm-up, as settings."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

DECAYS = ("constant", "cosine")


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Matrices decay; norm scales and cross alphas, which live around 1 and 0, do not.

    The rate rises linearly over `warmup_steps`, then stays ("constant") or falls along a cosine
    to `final_lr_fraction` of itself at the last step. Gradients are clipped to `clip_norm`.
    """

    lr: float = 1e-4
    betas: Sequence[float] = (0.9, 0.95)
    weight_decay: float = 0.01
    warmup_steps: int = 1000
    decay: str = "constant"
    final_lr_fraction: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.decay not in DECAYS:
            raise ValueError(f"optimizer.decay is {self.decay!r}; accepted: {', '.join(DECAYS)}")

    def build(self, network: nn.Module, max_steps: int) -> tuple[torch.optim.AdamW, LambdaLR]:
        """Optimiser and per-step schedule for the trainable parameters of `network`."""
        if self.decay == "cosine" and max_steps <= 0:
            raise ValueError(f"a cosine needs an end, but trainer.max_steps is {max_steps}")
        trainable = [p for p in network.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trainable if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            groups, lr=self.lr, betas=(self.betas[0], self.betas[1]), fused=True
        )
        return optimizer, LambdaLR(optimizer, lambda step: self.rate(step, max_steps))

    def rate(self, step: int, max_steps: int) -> float:
        """The learning rate at `step`, as a fraction of `lr`."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        if self.decay == "constant":
            return warm
        progress = (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
        return warm * (self.final_lr_fraction + (1 - self.final_lr_fraction) * cosine)
