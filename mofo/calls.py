"""What a user asked the pipeline for, checked, and cut into batches whose samples have one size."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mofo.data import fit as fits
from mofo.data.fit import Fit
from mofo.result import Result

NUM_SEEDS = 2**32  # torch's CPU generator reads 32 bits of a seed and ignores the others
MAX_CFG_SCALE = 1000.0  # far above what still makes pictures
MAX_TILT = 60.0  # of log2_alpha: beyond it float32 times are 0 and 1 anyway

Seeds = int | Sequence[int] | None
OnStep = Callable[[int, int], None] | None


@dataclass(frozen=True, kw_only=True)
class Call:
    """One batch of one size; a list has an entry per sample."""

    mode: str
    members: list[int]  # places in what the user gave
    prompts: list[str]
    seeds: list[int]
    fits: list[Fit]
    fit: str
    grid: tuple[int, int]
    num_steps: int
    cfg_scale: float
    log2_alpha: float | None


def cut(
    mode: str,
    prompt: str | list[str],
    sizes: Sequence[tuple[int, ...]],
    *,
    seeds: Seeds,
    fit: str,
    size: tuple[int, int],
    stride: int,
    num_steps: int,
    cfg_scale: float,
    log2_alpha: float | None,
) -> list[Call]:
    """Calls in the order of their first members; `sizes` are those of the inputs, `size` of the
    canvas that fits are made for."""
    if not (count := len(sizes)):
        raise ValueError(f"{mode} was given an empty list; give it at least one input")
    prompts = [prompt] * count if isinstance(prompt, str) else list(prompt)
    if len(prompts) != count:
        raise ValueError(f"{len(prompts)} prompts for {count} inputs; give one, or one each")
    height, width = size
    if min(size) < stride or height % stride or width % stride:
        raise ValueError(
            f"image is {height}x{width}, but both sides must be multiples of {stride}; "
            "leave size out for that of the training"
        )
    for name, value, most in (
        ("cfg_scale", cfg_scale, MAX_CFG_SCALE),
        ("log2_alpha", log2_alpha, MAX_TILT),
    ):
        if value is not None and not abs(value) <= most:  # False for NaN
            raise ValueError(f"{name} is {value}; accepted: -{most:g} to {most:g}")
    numbers = _numbers(seeds, count)
    chosen = [fits.choose(fit, (one[0], one[1]), size, stride) for one in sizes]
    groups: dict[tuple[int, int], list[int]] = {}
    for k, one in enumerate(chosen):
        groups.setdefault(one.size, []).append(k)
    return [
        Call(
            mode=mode,
            members=members,
            prompts=[prompts[k] for k in members],
            seeds=[numbers[k] for k in members],
            fits=[chosen[k] for k in members],
            fit=fit,
            grid=(height // stride, width // stride),
            num_steps=num_steps,
            cfg_scale=cfg_scale,
            log2_alpha=log2_alpha,
        )
        for (height, width), members in groups.items()
    ]


def in_order(calls: list[Call], make: Callable[[Call], list[Result]], single: bool) -> Any:
    """Results of all calls, in the order of what the user gave; not in a list if that was none."""
    results: dict[int, Result] = {}
    for call in calls:
        results |= zip(call.members, make(call), strict=True)
    return results[0] if single else [results[k] for k in sorted(results)]


def listed(given: Any) -> tuple[list[Any], bool]:
    """The inputs as a list, and whether there was one that is no list."""
    return (list(given), False) if isinstance(given, list | tuple) else ([given], True)


def counter(on_step: OnStep, total: int) -> Callable[[], None]:
    """To be called at every step; it tells `on_step` (steps done, steps in all)."""
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if on_step is not None:
            on_step(done, total)

    return step


def member_seed(seed: int, k: int) -> int:
    """Seed of member k of an ensemble: hashed, because seed + k is the next sample's own."""
    return seed if k == 0 else zlib.crc32(f"{seed}/{k}".encode())


def _numbers(seeds: Seeds, count: int) -> list[int]:
    chosen = range(count) if seeds is None else [seeds] if isinstance(seeds, int) else seeds
    chosen = [int(seed) for seed in chosen]
    if len(chosen) != count:
        raise ValueError(f"{len(chosen)} seeds for {count} samples; give one seed per sample")
    if bad := [seed for seed in chosen if not 0 <= seed < NUM_SEEDS]:
        raise ValueError(f"seed is {bad[0]}; accepted: 0 to {NUM_SEEDS - 1}")
    return chosen
