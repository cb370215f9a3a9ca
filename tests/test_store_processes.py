"""Checkpoints of processes that die at any moment, and of any number of ranks."""

import importlib
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from stored import assert_whole, flip, forked, names, save, state
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mofo.training import store
from mofo.training.manifest import Manifest
from mofo.training.store import LATEST


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    def save_on(first: int) -> None:
        save(tmp_path, *range(first, first + 1000))

    rng, seen = random.Random(0), set()
    save(tmp_path, 1)
    for _ in range(15):
        store.clean(tmp_path)
        path = store.newest(tmp_path)
        assert path is not None
        step = store.step_of(path)
        assert_whole(path, step)
        process = forked(save_on, step + 1)
        time.sleep(0.05 + 0.1 * rng.random())
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        seen.add(tuple(name.split(".")[-1] for name in names(tmp_path) if "." in name))
    assert not list(tmp_path.glob("*.damaged"))
    assert any("partial" in kinds for kinds in seen)  # some were hit in the middle


def test_a_kill_between_any_two_steps_of_the_protocol_leaves_a_whole_checkpoint(
    tmp_path: Path,
) -> None:
    save(tmp_path / "model", 3, 6)

    def die_at(call: int, folder: Path) -> None:
        calls = 0

        def counted(function: Callable) -> Callable:
            def counting(*arguments: object, **options: object) -> object:
                nonlocal calls
                calls += 1
                if calls == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return counting

        for name in ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        save(folder, 9, keep=2)

    for call in range(1, 40):
        folder = tmp_path / str(call)
        shutil.copytree(tmp_path / "model", folder)
        process = forked(die_at, call, folder)
        process.join()
        store.clean(folder)
        path = store.newest(folder)
        assert path is not None
        assert_whole(path, store.step_of(path))
        assert not list(folder.glob("*.damaged"))
        if process.exitcode == 0:
            break
    assert process.exitcode == 0
    assert call > 8
    assert names(folder) == [LATEST, "step_00000006", "step_00000009"]


def on_ranks(world: int, function: Callable[[int], object], folder: Path) -> None:
    """Run `function(rank)` in that many processes of one group."""
    importlib.import_module("torch._dynamo")  # or each of them does, for seconds
    meeting = folder / f"meeting-{time.monotonic_ns()}"

    def join(rank: int) -> None:
        dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=world)
        function(rank)
        dist.barrier()
        dist.destroy_process_group()

    processes = [forked(join, rank) for rank in range(world)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * world


def sharded(step: int, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """`state`, split by rows over the last axis of a mesh of this shape, as FSDP2 does it."""
    mesh = init_device_mesh("cpu", shape)
    placements = [Replicate()] * (len(shape) - 1) + [Shard(0)]
    return {
        name: distribute_tensor(tensor, mesh, placements) if tensor.ndim else tensor
        for name, tensor in state(step).items()
    }


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def load_on_ranks(path: Path, step: int, shape: tuple[int, ...]) -> None:
    expected, tensors = sharded(step, shape), sharded(99, shape)
    store.load(path, tensors)
    for name, tensor in expected.items():
        assert torch.equal(local(tensors[name]), local(tensor)), name


@pytest.mark.parametrize(("world", "shape"), [(2, (2,)), (4, (4,)), (4, (2, 2))])
def test_any_number_of_ranks_goes_on_from_any(
    tmp_path: Path, world: int, shape: tuple[int, ...]
) -> None:
    folder = tmp_path / "checkpoints"

    def first(rank: int) -> None:
        group = dist.new_group(backend="gloo")
        for step, options in ((3, {}), (6, {"asynchronous": True, "group": group})):
            saving = store.save(folder, step, sharded(step, shape), {"seen": 8 * step}, **options)
            saving.wait()
            load_on_ranks(folder / f"step_{step:08d}", step, shape)
            saving.settle()

    def other(rank: int) -> None:
        path = store.newest(folder)
        assert path == folder / "step_00000006"
        load_on_ranks(path, 6, (2,) if world == 4 else (3,))

    on_ranks(world, first, tmp_path)
    for step in (3, 6):
        path = folder / f"step_{step:08d}"
        assert_whole(path, step)
        whole = store.read_part(path, Manifest.read(path), "network")
        assert torch.equal(whole["matrix"], state(step)["network/matrix"])
    files = Manifest.read(path).files
    assert len(files) == world if len(shape) == 1 else 2 <= len(files) <= world
    stored = sum(row["size"] for row in files.values())
    assert stored < 2 * 4 * 35 * 1.1 + world * 1000  # replicas are written once
    on_ranks(2 if world == 4 else 3, other, tmp_path)
    save(tmp_path / "one", 6)
    one = tmp_path / "one" / "step_00000006"
    on_ranks(world, lambda rank: load_on_ranks(one, 6, shape), tmp_path)


def test_all_ranks_agree_on_what_is_damaged_and_what_failed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"

    def first(rank: int) -> None:
        for step in (3, 6):
            store.save(folder, step, sharded(step, (2,)), {"seen": 8 * step}).wait()
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match="File too large"):
            store.save(folder, 9, sharded(9, (2,)), {}).wait()

    def second(rank: int) -> None:
        assert store.newest(folder) == folder / "step_00000003"

    on_ranks(2, first, tmp_path)
    assert names(folder) == [LATEST, "step_00000003", "step_00000006"]
    flip(folder / "step_00000006" / "rank_00001.safetensors", 4000)
    on_ranks(2, second, tmp_path)
    assert names(folder) == [LATEST, "step_00000003", "step_00000006.damaged"]
