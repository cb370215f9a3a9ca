"""How the network is laid over ranks and memory, from outside: `mofo.model` knows nothing of it.

Done to each block, in this order, and then to the network around them:

    recompute   activations are computed again in the backward pass instead of being kept
    compile     by torch.compile, a block at a time
    shard       FSDP2: every rank keeps its rows of each weight and gathers a block when it is due

A network that is not sharded (one device, DDP) computes in another dtype by the rule of one that
is: block by block, weights are cast when they are due, and stay float32 where the optimiser sees
them. The depth head always computes in float32.
"""

import gc
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from mofo.model.dit import ThreeStreamDiT

BLOCKS = ("double_blocks", "single_blocks", "depth_decoder_blocks")  # in the order they are due

T = TypeVar("T")


class Sharded(ModelParallelStrategy):
    """FSDP2: weights, gradients, optimiser state and EMA are split over the ranks.

    `replicas` > 1 is HSDP: that many groups of neighbouring ranks (give the number of nodes) hold
    one copy each, and only gradients travel between them. `hold_gradients` keeps the gradients of
    a step's micro-batches whole on each rank, 4 bytes a parameter, so that only the last
    communicates. `shard_teacher`: split the teacher as well, else each rank has all of it.
    `offload` keeps weights and optimiser state in the host's memory, where the optimiser then runs.
    """

    def __init__(
        self,
        *,
        replicas: int = 1,
        hold_gradients: bool = True,
        shard_teacher: bool = True,
        offload: bool = False,
    ) -> None:
        # The norm of gradients is reduced where they are, with `offload` in the host's memory.
        both = "cpu:gloo,cuda:nccl" if offload and torch.cuda.is_available() else None
        super().__init__(data_parallel_size=1, tensor_parallel_size=1, process_group_backend=both)
        self.replicas, self.hold_gradients = replicas, hold_gradients
        self.shard_teacher, self.offload = shard_teacher, offload

    def setup_environment(self) -> None:
        world = self.num_nodes * self.num_processes
        if self.replicas < 1 or world % self.replicas:
            raise ValueError(
                f"replicas is {self.replicas}, but must divide the number of ranks, {world}; give "
                "1, or the number of nodes"
            )
        self._data_parallel_size = world  # Lightning's "auto" is the number of nodes
        super().setup_environment()
        shape, names = (self.replicas, world // self.replicas), ("replicate", "shard")
        if self.replicas == 1:
            shape, names = shape[1:], names[1:]
        self.mesh: DeviceMesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)

    def model_to_device(self) -> None:
        if not self.offload:
            super().model_to_device()

    def shard(
        self, dit: ThreeStreamDiT, dtype: torch.dtype, weights: Mapping[str, Tensor] | None
    ) -> None:
        """Split a network that is to learn; it computes in `dtype`, gradients add up in float32.

        `weights` are whole tensors for one that is on the meta device; None: it has its own.
        """
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        exact = MixedPrecisionPolicy(torch.float32, torch.float32, cast_forward_inputs=False)
        on_cuda = self.root_device.type == "cuda"
        offload = CPUOffloadPolicy(pin_memory=on_cuda) if self.offload else OffloadPolicy()
        split = partial(fully_shard, mesh=self.mesh, offload_policy=offload)
        for block in blocks_of(dit):
            split(block, mp_policy=policy)
        # The backward pass begins with the heads: to give their weights away would be for nothing.
        split(dit.final_layer, mp_policy=policy, reshard_after_forward=False)
        if dit.config.depth_channels:
            split(dit.depth_final_layer, mp_policy=exact, reshard_after_forward=False)
        split(dit, mp_policy=policy)
        if weights is not None:
            fill(dit, weights, torch.device("cpu") if self.offload else self.root_device)

    def shard_frozen(self, dit: ThreeStreamDiT, weights: Mapping[str, Tensor]) -> None:
        """Split a network on the meta device that never learns; it computes in its own dtype."""
        split = partial(fully_shard, mesh=self.mesh, reshard_after_forward=True)
        for block in blocks_of(dit):
            split(block)
        split(dit)
        fill(dit, weights, self.root_device)


def blocks_of(dit: ThreeStreamDiT) -> list[nn.Module]:
    """The blocks, in the order in which they are due."""
    return [block for name in BLOCKS for block in getattr(dit, name, ())]


def compute_in(dit: ThreeStreamDiT, dtype: torch.dtype) -> None:
    """Let a network that is not sharded compute in `dtype`, except for its depth head."""
    for block in blocks_of(dit):
        _cast(block, dtype)
    _cast(dit, dtype, without=(*BLOCKS, "depth_final_layer"))


def _cast(module: nn.Module, dtype: torch.dtype, without: tuple[str, ...] = ()) -> None:
    plain = _Plain(module)

    def forward(*inputs: Any, **options: Any) -> Any:
        weights = {
            name: weight.to(dtype)
            for name, weight in plain.named_parameters()
            if name.split(".")[1] not in without
        }
        return functional_call(plain, weights, inputs, options)

    module.forward = forward


class _Plain(nn.Module):
    """A module as it is before its `forward` is replaced: what `functional_call` can call."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.call = module, module.forward

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.call(*inputs, **options)


def recompute(dit: ThreeStreamDiT) -> None:
    """Keep only what enters each block; its backward pass begins with a second forward pass."""
    for block in blocks_of(dit):
        _recompute(block)


def _recompute(block: nn.Module) -> None:
    plain = block.forward

    # Unlike a module around the block, this leaves the names of its weights as they are; and not
    # functools.partial, with which torch.compile would compile nothing, in silence.
    def forward(*inputs: Any) -> Any:
        # Nothing in a block is random, so there is no state of a generator to go back to.
        return checkpoint(plain, *inputs, use_reentrant=False, preserve_rng_state=False)

    block.forward = forward


def compile_blocks(dit: ThreeStreamDiT, backend: str | Callable[..., Any] = "inductor") -> None:
    """In place, so that names stay; blocks of one kind share what was compiled."""
    for block in blocks_of(dit):
        block.compile(backend=backend)


@torch.no_grad()
def fill(module: nn.Module, weights: Mapping[str, Tensor], device: torch.device) -> None:
    """Give weights to a sharded module on the meta device: each rank copies its own rows.

    Tensors that are mapped from files are read in these rows alone, and converted after that.
    """
    assert not any(True for _ in module.buffers())  # `to_empty` would leave them undefined
    module.to_empty(device=device)
    for name, parameter in module.named_parameters():
        rows = own_rows(parameter, weights[name])
        assert rows.shape == local(parameter).shape
        local(parameter).copy_(rows)


def own_rows(parameter: Tensor, whole: Tensor) -> Tensor:
    """The part of `whole` that this rank keeps of `parameter`, as a view."""
    if not isinstance(parameter, DTensor):
        return whole
    mesh = parameter.device_mesh
    for axis, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            parts = whole.chunk(mesh.size(axis), dim=placement.dim)
            index = mesh.get_local_rank(axis)
            empty = whole.narrow(placement.dim, 0, 0)
            whole = parts[index] if index < len(parts) else empty
    return whole


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; a whole tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor, gathered on every rank; a whole tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def full_state(source: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors in the memory of rank 0's host, one after the other; {} on other ranks.

    All ranks call it together. What is whole and there already is not copied.
    """
    state = source if isinstance(source, Mapping) else source.state_dict()
    first = not dist.is_initialized() or dist.get_rank() == 0
    full: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if first or isinstance(tensor, DTensor):
            gathered = whole(tensor.detach())
            if first:
                full[name] = gathered.cpu()
    return full


def hold_gradients(dit: ThreeStreamDiT, strategy: Any, *, last: bool) -> None:
    """Before a micro-batch of a sharded network: only the `last` of a step need communicate."""
    if isinstance(dit, FSDPModule) and isinstance(strategy, Sharded):
        dit.set_requires_gradient_sync(last or not strategy.hold_gradients)
        dit.set_requires_all_reduce(last)


def reshard(dit: ThreeStreamDiT) -> None:
    """Forget what was gathered, as must be done before weights change outside the optimiser.

    After a forward pass without a backward pass the outermost weights stay gathered.
    """
    for module in dit.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather(value: T) -> list[T]:
    """`value` of every rank, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def leave() -> None:
    """Leave all process groups, if there are any: last of all, when nothing else refers to them.

    Gloo's threads hold what was exchanged for a moment after the caller goes on. If the interpreter
    ends meanwhile, they abort the process (pytorch/pytorch#179291) and a finished run counts as
    dead. Freeing a group waits for its threads, and those in reference cycles have to be found.
    Only for ranks that end together: one that failed would wait for others.
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
        gc.collect()
