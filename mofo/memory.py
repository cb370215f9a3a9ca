"""What a run needs, what the device has, and three plans to make the one fit the other.

    needs = measure(weights.outline(folder), text=encoder.num_bytes,
                    autoencoder=autoencoder_bytes(folder, dtype), dtype=dtype, size=(512, 512))
    plan = choose(needs, available(device))
    print(summary(needs, available(device), plan))

"resident": all on the device. "turns": the text encoder is loaded, used and freed before the
network comes. "offload": as turns, and the network's blocks come one at a time from the host's
memory (`stream_blocks`). Weights are counted from configurations and file headers, nothing is
loaded; activations are estimated from what was measured at other sizes.
"""

import os
import re
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from mofo.model import weights
from mofo.model.dit import ThreeStreamDiT
from mofo.model.text import QWEN_LENGTH
from mofo.model.weights import Release

Plan = Literal["resident", "turns", "offload"]
PLANS: tuple[Plan, ...] = get_args(Plan)  # the fastest first

# Profiled on a CPU: a forward holds 22.3 to 22.6 numbers for each token and channel at its peak
# (widths 256 and 512, 576 to 2112 tokens, float32 and bfloat16), and the FLUX.2 autoencoder 770 for
# each pixel when it decodes.
NUMBERS_PER_TOKEN_CHANNEL, NUMBERS_PER_PIXEL = 24, 800
SLACK = 1.05  # the allocator's gaps, workspaces, hidden states of the text encoder: an estimate
ALIGNMENT = 256  # bytes; CUDA's own for a tensor's first element
PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device
MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes of each part; `blocks` and `largest_block` are of the network's."""

    network: int
    blocks: int
    largest_block: int
    text: int
    autoencoder: int
    activations: int
    about: str  # size and batch that the activations are for

    def peak(self, plan: Plan) -> int:
        """Bytes on the device when most is there."""
        match plan:
            case "resident":
                most = self.network + self.text + self.activations
            case "turns":
                most = max(self.network + self.activations, self.text)
            case "offload":  # what is not streamed stays while the text encoder has its turn
                staying = self.network - self.blocks + 2 * self.largest_block
                most = staying + max(self.activations, self.text)
        return round(SLACK * (self.autoencoder + most))


class Available(NamedTuple):
    """Free bytes: on the device, and in the host's memory beside it (a CPU has none beside)."""

    device: int
    host: int


def measure(
    release: Release,
    *,
    text: int,
    autoencoder: int,
    dtype: torch.dtype,
    size: tuple[int, int],
    num_samples: int = 1,
    cfg_scale: float = 1.0,
) -> Needs:
    """Needs of a release (an outline will do) at a picture's (height, width); `text` in bytes."""
    blocks = [_bytes(block, dtype) for block in _blocks(release.dit)]
    height, width = size
    batch = num_samples * (2 if cfg_scale > 1 else 1)
    length = QWEN_LENGTH + 2 * (height * width // release.codec.patch_size**2)
    forward = NUMBERS_PER_TOKEN_CHANNEL * batch * length * release.dit.config.hidden_size
    decode = NUMBERS_PER_PIXEL * num_samples * height * width
    return Needs(
        network=_bytes(release.dit, dtype),
        blocks=sum(blocks),
        largest_block=max(blocks),
        text=text,
        autoencoder=autoencoder,
        activations=dtype.itemsize * max(forward, decode),
        about=f"{height}x{width}, batch {batch}",
    )


def autoencoder_bytes(folder: str | Path, dtype: torch.dtype) -> int:
    """Bytes of a release's autoencoder, whichever it is, from the headers of its files."""
    files = weights.fetch(folder).glob("ae*.safetensors")
    return dtype.itemsize * sum(weights.count_elements(file) for file in files)


def available(device: torch.device | str) -> Available:
    """What is free now."""
    device = torch.device(device)
    if device.type == "cuda":
        return Available(torch.cuda.mem_get_info(device)[0], _free_ram())
    return Available(_free_ram(), 0)


def choose(needs: Needs, free: Available, plan: str | None = None) -> Plan:
    """The first plan that fits; or the one asked for, unchecked: the estimate may be too high."""
    if plan is not None:
        if plan not in PLANS:
            raise ValueError(f"plan is {plan!r}; accepted: {', '.join(PLANS)}, or none to choose")
        return plan
    for fitting in PLANS:
        beside = needs.blocks if fitting == "offload" else 0
        if needs.peak(fitting) <= free.device and beside <= free.host:
            return fitting
    least = min(needs.peak(one) for one in PLANS if free.host or one != "offload")
    beside = f", {_size(free.host)} beside it ({_size(needs.blocks)} needed)" if free.host else ""
    raise ValueError(
        f"no plan fits: {_size(least)} are needed, {_size(free.device)} are free on the device"
        f"{beside}; {_parts(needs)}. Reduce the size, the batch, or cfg_scale to 1 (guidance "
        "doubles the batch), take bfloat16, or name a plan to try it all the same"
    )


def summary(needs: Needs, free: Available, plan: Plan) -> str:
    """Two lines to print before anything is loaded."""
    return (
        f"needs: {_parts(needs)}\n"
        f'has:   {_size(free.device)} free; plan "{plan}" takes {_size(needs.peak(plan))}'
    )


def compile_blocks(dit: ThreeStreamDiT) -> None:
    """`torch.compile` for each block, in place; blocks of one kind share the compiled code.

    A new batch size or picture size compiles again, for tens of seconds; after 8 versions of one
    kind torch says so and runs the rest eagerly.
    """
    blocks = _blocks(dit)
    if any(block._forward_pre_hooks for block in blocks):
        raise ValueError(CLASH)
    for block in blocks:
        block.compile()


CLASH = (
    "blocks cannot be both compiled and streamed from the host: compiled code expects weights that "
    'stay where they are. Leave out compile (--compile), or choose the plan "resident" or "turns"'
)


def stream_blocks(dit: ThreeStreamDiT, device: torch.device | str) -> None:
    """Keep the blocks in the host's memory, and bring each to the device when its turn comes.

    Everything else moves to the device. On CUDA the next block is copied while one runs. The
    weights can no longer learn; the outputs are those of the resident network bit for bit,
    if that is frozen, too (torch may multiply by weights that learn in another way).
    """
    blocks = _blocks(dit)
    if any(block._compiled_call_impl for block in blocks):
        raise ValueError(CLASH)
    assert not any(block._forward_pre_hooks for block in blocks), "streamed already"
    dit.requires_grad_(False)
    streamed = {parameter for block in blocks for parameter in block.parameters()}
    for parameter in set(dit.parameters()) - streamed:
        parameter.data = parameter.data.to(device)
    turns = _Turns(blocks, torch.device(device))
    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(partial(turns.begin, i))


class _Turns:
    """Blocks in the host's memory and two places on the device, each for the largest of them.

    When block i runs, i + 1 is copied to the place that i - 1 has left: there are never more than
    two. A block that is not expected (a forward without depth skips the last ones) is copied then.
    """

    def __init__(self, blocks: list[nn.Module], device: torch.device) -> None:
        self.blocks = blocks
        self.host = [_flatten(block, pin=device.type == "cuda") for block in blocks]
        largest = max(len(flat) for flat in self.host)
        self.places = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(2)]
        self.holds: list[int | None] = [None, None]
        self.copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.copying:
            for place in self.places:  # not to be reused while a copy is still on its way
                place.record_stream(self.copying)

    def begin(self, i: int, *_: Any) -> None:
        """Called before block i runs."""
        self._bring(i)
        if self.copying:
            torch.cuda.current_stream(self.copying.device).wait_stream(self.copying)
        self._bring((i + 1) % len(self.blocks), keep=i)

    def _bring(self, i: int, keep: int | None = None) -> None:
        if i in self.holds:
            return
        at = 1 if self.holds[0] == keep else 0
        left = self.holds[at]
        if left is not None:
            _point(self.blocks[left], self.host[left])
        if self.copying:  # the block that was there may still be running
            self.copying.wait_stream(torch.cuda.current_stream(self.copying.device))
        place = self.places[at][: len(self.host[i])]
        with torch.cuda.stream(self.copying) if self.copying else nullcontext():
            place.copy_(self.host[i], non_blocking=True)
        _point(self.blocks[i], place)
        self.holds[at] = i


def _flatten(block: nn.Module, *, pin: bool) -> Tensor:
    """A block's weights side by side in the host's memory, where the block then has them."""
    flat = torch.empty(sum(length for _, _, length in _spans(block)), dtype=torch.uint8)
    if pin:
        # In place: torch's allocator of pinned memory rounds up to powers of two (9B: 23 to 32 GB).
        runtime: Any = torch.cuda.cudart()
        torch.cuda.check_error(runtime.cudaHostRegister(flat.data_ptr(), len(flat), PORTABLE))
        released = weakref.finalize(flat, runtime.cudaHostUnregister, flat.data_ptr())
        released.atexit = False  # the driver is gone before it could be asked
    given = [parameter.data for parameter in block.parameters()]
    _point(block, flat)
    for parameter, value in zip(block.parameters(), given, strict=True):
        parameter.data.copy_(value)
    return flat


def _point(block: nn.Module, flat: Tensor) -> None:
    """Let a block have its weights in this memory."""
    for parameter, start, _ in _spans(block):
        raw = flat[start : start + parameter.nbytes]
        parameter.data = raw.view(parameter.dtype).view(parameter.shape)


def _spans(block: nn.Module) -> Iterator[tuple[nn.Parameter, int, int]]:
    """Each weight with its start and length in the block's memory, in bytes."""
    start = 0
    for parameter in block.parameters():
        length = -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT
        yield parameter, start, length
        start += length


def _blocks(dit: ThreeStreamDiT) -> list[nn.Module]:
    """In the order in which a forward runs them."""
    stacks = [dit.double_blocks, dit.single_blocks, getattr(dit, "depth_decoder_blocks", ())]
    return [block for stack in stacks for block in stack]


def _bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """Of the weights once loaded; the depth head stays float32."""
    return sum(
        parameter.numel() * (4 if name.startswith("depth_final_layer.") else dtype.itemsize)
        for name, parameter in module.named_parameters()
    )


def _free_ram() -> int:
    if MEMINFO.exists():
        found = re.search(r"MemAvailable: +(\d+) kB", MEMINFO.read_text())
        assert found, f"{MEMINFO} has no MemAvailable; Linux has it since 3.14"
        return 1024 * int(found[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # all of it: none says free


def _parts(needs: Needs) -> str:
    return (
        f"network {_size(needs.network)} (largest block {_size(needs.largest_block)}), "
        f"text encoder {_size(needs.text)}, autoencoder {_size(needs.autoencoder)}, "
        f"activations {_size(needs.activations)} (estimated for {needs.about})"
    )


def _size(num_bytes: int) -> str:
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.1f} GiB"
    return f"{num_bytes / 2**20:.0f} MiB"
