"""What a sample costs a network: operations, and what its backward pass needs kept.

Counted by running the network on tensors that have shapes and no storage, so a network of any size
takes seconds and no memory.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from mofo.model.dit import DiTConfig, ThreeStreamDiT
from mofo.training.parallel import blocks_of

# Of matrix products in bfloat16 without sparsity, by a part of the device's name (data sheets).
PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100": 989, "GH200": 989, "A100": 312, "L40S": 362}


class Shape(NamedTuple):
    """Lengths of a sample's streams: image tokens as (rows, columns), and text tokens."""

    grid: tuple[int, int]
    num_text: int


class Kept(NamedTuple):
    """Bytes that a forward pass keeps of one sample."""

    whole: int  # everything
    recomputed: int  # what enters each block, and the block that is computed again


def peak_flops(device: torch.device) -> float | None:
    """What the device can do in a second, if it is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def forward_flops(config: DiTConfig, shape: Shape, *, depth: bool = True) -> int:
    """Operations of the matrix products of a forward pass; a backward pass takes twice as many.

    Without `depth` it is that of a text-to-image network, as a network without depth always is.
    """
    with torch.device("meta"):
        dit = ThreeStreamDiT(config)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            _run(dit, shape, depth=depth)
    return counter.get_total_flops()


def step_flops(config: DiTConfig, shape: Shape, teacher: DiTConfig | None) -> int:
    """For each sample of a training step: the network forward and backward, the teacher forward."""
    learning = 3 * forward_flops(config, shape)
    return learning + (forward_flops(teacher, shape, depth=False) if teacher else 0)


def kept_activations(config: DiTConfig, shape: Shape, dtype: torch.dtype) -> Kept:
    """Of a body in `dtype`, with an attention that keeps no scores."""
    with torch.device("meta"):
        dit = ThreeStreamDiT(config)
    with FakeTensorMode():
        weights = {name: _weight(name, p, dtype) for name, p in dit.named_parameters()}
        counted = _Counted(dit, weights)
        with saved_tensors_hooks(counted.keep, lambda tensor: tensor):
            _run(dit, shape, weights=weights)
    inside, outside = counted.kept[:-1], counted.kept[-1]
    return Kept(
        whole=outside + sum(inside),
        recomputed=outside + sum(counted.entered) + max(inside, default=0),
    )


class _Counted:
    """Bytes by the block in which they are first kept; the last are those outside of all blocks."""

    def __init__(self, dit: ThreeStreamDiT, weights: Mapping[str, Tensor]) -> None:
        blocks = blocks_of(dit)
        self.kept = [0] * (len(blocks) + 1)
        self.entered = [0] * len(blocks)
        self.at = -1
        self.seen = {weight.untyped_storage()._cdata for weight in weights.values()}
        self.alive: list[Any] = []  # so that no two storages have the same id
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._enter, i))
            block.register_forward_hook(lambda *_: self._leave())

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.alive.append(storage)
            self.kept[self.at] += storage.nbytes()
        return tensor

    def _enter(self, i: int, _: Any, inputs: tuple[Any, ...]) -> None:
        self.at, x = i, inputs[0]
        streams = x.values() if isinstance(x, dict) else [x]
        self.entered[i] = sum(stream.nbytes for stream in streams)

    def _leave(self) -> None:
        self.at = -1


def _weight(name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The head is exact whatever the body."""
    dtype = torch.float32 if name.startswith("depth_final_layer.") else dtype
    return torch.empty(like.shape, dtype=dtype, requires_grad=True)


def _run(
    dit: ThreeStreamDiT,
    shape: Shape,
    *,
    depth: bool = True,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """A forward pass of one sample, with other weights than the network's own if they are given."""
    config, num_tokens = dit.config, shape.grid[0] * shape.grid[1]
    depth = depth and config.depth_channels > 0
    text = torch.empty(1, shape.num_text, config.context_in_dim)
    image = torch.empty(1, num_tokens, config.in_channels)
    maps = torch.empty(1, num_tokens, config.depth_channels) if depth else None
    time = torch.zeros(1)
    streams = (text, image, maps, time, time if depth else None)
    guidance = time if config.use_guidance_embed else None
    functional_call(dit, dict(weights or {}), streams, {"grid": shape.grid, "guidance": guidance})
