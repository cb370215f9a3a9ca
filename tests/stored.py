"""Checkpoints that tell their step, and processes that may die, for tests of the disk."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mofo.training import store

FILE = "rank_00000.safetensors"


def state(step: int) -> dict[str, Tensor]:
    """Tensors of every kind, of which each number tells the step."""
    return {
        "network/matrix": torch.arange(35.0).view(7, 5) + step,
        "network/scale": torch.full((3,), step, dtype=torch.bfloat16),
        "average/matrix": torch.arange(35.0).view(7, 5) - step,
        "optimizer/matrix/step": torch.tensor(float(step)),
        "optimizer/empty/exp_avg": torch.zeros(0, 4),
    }


def save(folder: Path, *steps: int, **options) -> None:
    for step in steps:
        saving = store.save(folder, step, state(step), {"seen": 8 * step}, **options)
        saving.wait()
        saving.settle()


def assert_whole(path: Path, step: int) -> None:
    """The checkpoint, read by this process, is that of `step`."""
    tensors = {name: torch.full_like(tensor, 99) for name, tensor in state(step).items()}
    there = store.load(path, tensors)
    assert (there.step, there.facts) == (step, {"seen": 8 * step})
    for name, tensor in state(step).items():
        assert torch.equal(tensors[name], tensor), name


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def forked(function: Callable[..., object], *arguments: object) -> multiprocessing.Process:
    """A process that has torch already: it starts in milliseconds."""

    def run() -> None:
        try:
            function(*arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process
