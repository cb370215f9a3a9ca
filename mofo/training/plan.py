"""What a run would take: `python train.py experiment=... plan=true` prints it and trains nothing.

Bytes of weights, gradients, optimiser and checkpoint follow from the shapes of the network, and are
what a run has; activations and gathered blocks are estimates of the most there is at once. Nothing
is allocated, and no weights need be there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate

from mofo.frozen import DTYPES, Encoders
from mofo.model import growth, weights
from mofo.model.dit import DiTConfig, ThreeStreamDiT
from mofo.model.text import QWEN_LENGTH
from mofo.training import cost
from mofo.training.cost import Shape
from mofo.training.parallel import blocks_of

RANKS = (8, 16, 32, 64)
MFU = 0.4  # of large transformers under FSDP; a run prints its own
PEAK_TFLOPS = 989.0  # of an H100 or H200, unless callbacks.progress says otherwise
LINK = 50e9  # bytes a second into each device from other nodes: a 400 Gbit/s port for each
EXACT = 4  # bytes of a float32
# Parameters of text encoders that may not be there yet, by the width of what they say: Qwen3-4B and
# Qwen3-8B up to the last layer that is read; and of FLUX.2's autoencoder.
TEXT_PARAMETERS = {7680: 3_114_000_000, 12288: 5_830_000_000}
AUTOENCODER_PARAMETERS = 84_000_000


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a config asks for, on however many ranks.

    A network that is not `sharded` is whole on every rank (DDP); the settings after that are those
    of `mofo.training.parallel.Sharded`. `encoders` in bytes.
    """

    model: DiTConfig
    teacher: DiTConfig | None
    shape: Shape
    batch_size: int
    accumulate: int = 1
    dtype: torch.dtype = torch.float32
    recompute: bool = False
    averaged: bool = True
    sharded: bool = False
    replicas: int = 1
    hold_gradients: bool = True
    shard_teacher: bool = True
    offload: bool = False
    encoders: int = 0
    text_parameters: int = 0

    @cached_property
    def network(self) -> ThreeStreamDiT:
        with torch.device("meta"):
            return ThreeStreamDiT(self.model)

    @cached_property
    def kept(self) -> int:
        """Bytes of the activations of a sample."""
        kept = cost.kept_activations(self.model, self.shape, self.dtype)
        return kept.recomputed if self.recompute else kept.whole

    @cached_property
    def operations(self) -> dict[str, float]:
        """Of a step, over all ranks."""
        forward = cost.forward_flops(self.model, self.shape)
        teacher = self.teacher and cost.forward_flops(self.teacher, self.shape, depth=False)
        per_sample = {
            "forward": forward,
            "backward": 2 * forward,
            "recomputed": forward * self.recompute,
            "teacher": teacher or 0,
            "text encoder": 2 * self.text_parameters * self.shape.num_text,
        }
        return {name: float(self.batch_size * count) for name, count in per_sample.items()}

    def shards(self, ranks: int) -> int:
        """Over how many ranks one copy is split."""
        return ranks // self.replicas if self.sharded else 1

    def samples(self, ranks: int) -> int:
        """Of a micro-batch, on the rank that has most."""
        return -(-self.batch_size // (ranks * self.accumulate))


def read(cfg: Any) -> Work:
    """The work of a composed train config."""
    model: DiTConfig = _build(cfg.model)
    strategy = cfg.trainer.strategy
    sharded = "Sharded" in str(strategy)
    split = {} if isinstance(strategy, str) else dict(strategy)
    encoders, text_parameters, num_text = _encoders(cfg, model)
    dtype = getattr(torch, cfg.body_dtype)
    h, w = (side // cfg.data.patch for side in cfg.data.size)
    has_teacher = cfg.objective.teacher_weight_noisy or cfg.objective.teacher_weight_clean
    return Work(
        model=model,
        teacher=_teacher(cfg.init_from, model) if has_teacher else None,
        shape=Shape((h, w), num_text),
        batch_size=cfg.data.batch_size,
        accumulate=cfg.trainer.accumulate_grad_batches,
        dtype=dtype,
        recompute=bool(cfg.get("recompute", False)),
        averaged="ema" in cfg.callbacks and cfg.callbacks.ema.decay > 0,
        sharded=sharded,
        replicas=split.get("replicas", 1),
        hold_gradients=split.get("hold_gradients", True),
        shard_teacher=split.get("shard_teacher", True),
        offload=split.get("offload", False),
        encoders=encoders,
        text_parameters=text_parameters,
    )


def describe(cfg: Any, ranks: Sequence[int] = RANKS) -> str:
    """A table for a composed train config; `cfg.plan` may be a list of numbers of ranks."""
    work = read(cfg)
    ranks = ranks if isinstance(cfg.get("plan", True), bool) else tuple(cfg.plan)
    tflops = float(cfg.callbacks.progress.get("peak_tflops") or PEAK_TFLOPS)
    for count in ranks:
        if count < 1 or count % work.replicas:
            raise ValueError(
                f"{count} ranks cannot hold {work.replicas} copies of equal shards; change plan or "
                "trainer.strategy.replicas"
            )
    return "\n".join([_head(cfg.name, work), "", *_table(work, ranks, tflops)])


def state(work: Work, ranks: int) -> dict[str, int]:
    """Bytes of what is trained, on the rank that has most (the first), exactly."""
    rows = EXACT * held(work.network, work.shards(ranks))
    parts = {"weights": rows, "gradients": rows, "optimiser": 2 * rows}
    return parts | ({"average (EMA)": rows} if work.averaged else {})


def memory(work: Work, ranks: int) -> dict[str, int]:
    """Bytes of a rank's device, part by part: the state, and the most there is beside it."""
    whole, block = held(work.network, 1), _largest(work.network)
    small = work.dtype.itemsize
    parts = {} if work.offload else state(work, ranks)
    if not work.sharded:
        parts["buckets of DDP"] = EXACT * whole * (ranks > 1)
        if small < EXACT:  # casts are kept for the backward pass, unless that makes them again
            parts["weights, cast"] = small * (block if work.recompute else whole)
    else:
        # The heads and what is around the blocks stay gathered from the forward to the backward
        # pass; two blocks are there at a time, and the gradients of one before they are reduced.
        around = whole - sum(held(one, 1) for one in blocks_of(work.network))
        parts["gathered weights"] = small * (around + 2 * block)
        parts["gradients to reduce"] = (small + EXACT) * block
        if work.accumulate > 1 and work.hold_gradients:
            parts["gradients, held whole"] = EXACT * whole
    parts["activations"] = work.samples(ranks) * work.kept
    if work.teacher is not None:
        parts["teacher"] = _teacher_bytes(work, ranks)
    parts["encoders"] = work.encoders
    return parts


def traffic(work: Work, ranks: int) -> dict[str, float]:
    """Bytes that a rank receives in a step, by operation, as rings of ranks send them."""
    whole, shards = held(work.network, 1), work.shards(ranks)
    others = (shards - 1) / shards
    if not work.sharded:
        return {"all-reduce of gradients": 2 * (ranks - 1) / ranks * EXACT * whole}
    inside = sum(held(one, 1) for one in blocks_of(work.network))
    # Blocks are given away after the forward pass and gathered again for the backward pass.
    gathered = work.dtype.itemsize * (whole + inside) * work.accumulate
    reduced = EXACT * whole * (1 if work.hold_gradients else work.accumulate)
    out = {"all-gather of weights": others * gathered}
    if work.teacher is not None and work.shard_teacher:
        size = work.dtype.itemsize * held(_outline(work.teacher), 1)
        out["all-gather of the teacher"] = others * size * work.accumulate
    out["reduce-scatter of gradients"] = others * reduced
    if work.replicas > 1:
        share = 2 * (work.replicas - 1) / work.replicas
        out["all-reduce between copies"] = share * EXACT * held(work.network, shards)
    return out


def checkpoint(work: Work) -> int:
    """Bytes of a checkpoint: weights, two moments, average."""
    return EXACT * (4 if work.averaged else 3) * held(work.network, 1)


def held(network: torch.nn.Module, shards: int) -> int:
    """Numbers of the first rank, which has most when rows do not divide evenly."""
    return sum(-(-p.shape[0] // shards) * (p.numel() // p.shape[0]) for p in network.parameters())


def _largest(network: ThreeStreamDiT) -> int:
    return max((held(block, 1) for block in blocks_of(network)), default=0)


def _teacher_bytes(work: Work, ranks: int) -> int:
    assert work.teacher is not None
    network = _outline(work.teacher)
    if not (work.sharded and work.shard_teacher):
        return work.dtype.itemsize * held(network, 1)
    around = held(network, 1) - sum(held(one, 1) for one in blocks_of(network))
    gathered = around + 2 * _largest(network)
    return work.dtype.itemsize * (held(network, work.shards(ranks)) + gathered)


def _outline(config: DiTConfig) -> ThreeStreamDiT:
    with torch.device("meta"):
        return ThreeStreamDiT(config)


def _teacher(init_from: str | None, model: DiTConfig) -> DiTConfig | None:
    """The base's dimensions if it is here, else those of the network without depth."""
    if init_from is None or not model.depth_channels:
        return None
    if str(init_from) in weights.SHIPPED or Path(init_from).exists():
        return growth.teaching(init_from)[0]
    return replace(
        model, depth_channels=0, depth_decoder_num_layers=0, cross_stream_timestep_mixing=False
    )


def _encoders(cfg: Any, model: DiTConfig) -> tuple[int, int, int]:
    """Bytes of both encoders, parameters of the text encoder, and the length of its captions."""
    names = [str(cfg.encoders.text), str(cfg.encoders.autoencoder)]
    size = DTYPES[cfg.encoders.get("text_dtype") or "float32"].itemsize
    missing = [name for name in names if name != "small" and not Path(name).exists()]
    if not missing:
        encoders: Encoders = _build(cfg.encoders)
        text, network = encoders.text_encoder, getattr(encoders.autoencoder, "network", None)
        pictures = sum(p.nbytes for p in network.parameters()) if network else 0
        return text.num_bytes + pictures, text.num_bytes // size, text.length
    if model.context_in_dim not in TEXT_PARAMETERS:
        raise ValueError(
            f"{' and '.join(missing)}: not here, and no text encoder is known that says "
            f"{model.context_in_dim} channels; give encoders.text and encoders.autoencoder"
        )
    parameters = TEXT_PARAMETERS[model.context_in_dim]
    return size * parameters + EXACT * AUTOENCODER_PARAMETERS, parameters, QWEN_LENGTH


def _head(name: str, work: Work) -> str:
    (h, w), num_text = work.shape
    depth = 2 if work.model.depth_channels else 1
    kind = "split over all ranks (FSDP2)" if work.sharded else "whole on every rank"
    if work.replicas > 1:
        kind = f"{work.replicas} copies, each split over its ranks (HSDP)"
    dtype = str(work.dtype).removeprefix("torch.")
    return (
        f"{name}: {held(work.network, 1) / 1e9:.3g} B parameters, {kind}; computes in {dtype}, "
        f"{'activations recomputed' if work.recompute else 'activations kept'}\n"
        f"a step: {work.batch_size} samples of {num_text} + {depth} x {h}x{w} tokens, "
        f"{work.accumulate} micro-batch{'es' if work.accumulate > 1 else ''} a rank"
    )


def _table(work: Work, ranks: Sequence[int], tflops: float) -> list[str]:
    memories = [memory(work, count) for count in ranks]
    hosts = [sum(state(work, count).values()) * work.offload for count in ranks]
    volumes = [traffic(work, count) for count in ranks]
    operations = sum(work.operations.values())
    seconds = [operations / (count * 1e12 * tflops * MFU) for count in ranks]
    received = [sum(volume.values()) for volume in volumes]
    size = checkpoint(work)

    def row(name: str, values: Sequence[Any], write: Callable[[Any], str]) -> str:
        return f"{name:<34}" + "".join(f"{write(value):>12}" for value in values)

    def rows(columns: Sequence[Mapping[str, float | int]]) -> list[str]:
        return [row(f"  {n}", [column[n] for column in columns], _size) for n in columns[0]]

    return [
        row("ranks", ranks, str),
        row("samples of a micro-batch", [work.samples(count) for count in ranks], str),
        row("memory of a rank", [sum(one.values()) for one in memories], _size),
        *rows(memories),
        *([row("beside it, of the host", hosts, _size)] if any(hosts) else []),
        row("received by a rank in a step", received, _size),
        *rows(volumes),
        row(f"  at {LINK / 1e9:.0f} GB/s", [volume / LINK for volume in received], _time),
        row("operations of a step", [operations] * len(ranks), _operations),
        *(
            row(f"  {name}", [count] * len(ranks), _operations)
            for name, count in work.operations.items()
            if count
        ),
        row(f"  at {MFU:.0%} of {tflops:.0f} TFLOP/s", seconds, _time),
        row("samples a second, at that", [work.batch_size / one for one in seconds], _rate),
        row("checkpoint", [size] * len(ranks), _size),
        row("  of a rank", [size / work.shards(count) for count in ranks], _size),
    ]


def _build(config: Any) -> Any:
    return instantiate(config, _convert_="all")


def _size(num_bytes: float | int) -> str:
    unit, name = (2**30, "GiB") if num_bytes >= 2**30 else (2**20, "MiB")
    return f"{num_bytes / unit:.1f} {name}" if num_bytes else "-"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.2f} ms"


def _operations(count: float) -> str:
    return f"{count / 1e15:.2f} PFLOP" if count >= 1e15 else f"{count / 1e12:.2f} TFLOP"


def _rate(per_second: float) -> str:
    return f"{per_second:.3g}" if per_second < 1000 else f"{per_second:.0f}"
