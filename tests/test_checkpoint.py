"""`Checkpoint` in runs: where they go on from, what they refuse, and disks that are full."""

import errno
import importlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from stored import forked
from test_training import Train, configs, copied, shards, start, trace  # noqa: F401

from mofo.training import store
from mofo.training.attempts import Attempt, FencedOff, Refused
from mofo.training.checkpoint import Checkpoint
from mofo.training.dcp import Whole
from mofo.training.manifest import Manifest
from mofo.training.store import LATEST, by_step

SIX = ("trainer.max_steps=6", "callbacks.checkpoint.every_n_steps=2", "callbacks.checkpoint.keep=9")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, start: Train) -> Path:  # noqa: F811
    """A run of six steps with a checkpoint every two."""
    return start(tmp_path_factory.mktemp("whole"), *SIX)


def tensors_at(run: Path, step: int) -> dict[str, torch.Tensor]:
    path = run / "checkpoints" / f"step_{step:08d}"
    assert store.verify(path) == []
    return dict(Whole(path, Manifest.read(path).tensors, ""))


def facts_at(run: Path, step: int) -> dict[str, Any]:
    return Manifest.read(run / "checkpoints" / f"step_{step:08d}").facts


def assert_same_at(step: int, run: Path, whole: Path) -> None:  # noqa: F811
    ours, theirs = tensors_at(run, step), tensors_at(whole, step)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def assert_close_at(step: int, run: Path, whole: Path) -> None:  # noqa: F811
    ours, theirs = tensors_at(run, step), tensors_at(whole, step)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)
    assert [row["train/loss"] for row in trace(run)[:step]] == pytest.approx(
        [row["train/loss"] for row in trace(whole)[:step]], rel=1e-5
    )


def steps(run: Path) -> list[int]:
    return [store.step_of(path) for path in by_step(run / "checkpoints")]


def test_a_checkpoint_says_what_it_is_of(whole: Path) -> None:
    facts = facts_at(whole, 4)
    assert facts["data"]["samples_seen"] == 16
    assert facts["config"]["optimizer.lr"] == 1e-3
    assert not any(key.startswith("trainer") for key in facts["config"])
    assert len(facts["config_hash"]) == 16
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["num_updates"] == 4
    assert facts["origin"] is None
    names = tensors_at(whole, 4)
    parts = {name.split("/")[0] for name in names}
    assert parts == {"network", "average", "optimizer"}


def test_copies_written_beside_training_are_the_same(
    tmp_path: Path,
    start: Train,  # noqa: F811
    whole: Path,
) -> None:
    run = start(tmp_path, *SIX, "callbacks.checkpoint.asynchronous=true")
    for step in (2, 4, 6):
        assert_same_at(step, run, whole)
    assert (run / "checkpoints" / LATEST).read_text() == "step_00000006\n"


def test_a_run_goes_back_to_an_older_checkpoint_once(
    tmp_path: Path,
    start: Train,  # noqa: F811
    whole: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    run = copied(whole, tmp_path)
    resume = f"resume={run / 'checkpoints' / 'step_00000002'}"
    with pytest.raises(RuntimeError, match="killed"):
        start(tmp_path, *SIX, resume, kill_at=5)
    assert "going on from step 2" in capsys.readouterr().out
    assert steps(run) == [4, 2]
    assert (run / "checkpoints" / "step_00000006.superseded").exists()
    start(tmp_path, *SIX, resume)  # the same command does not start over
    assert "going on from step 2" not in capsys.readouterr().out
    assert steps(run) == [6, 4, 2]
    assert_same_at(6, run, whole)
    assert trace(run) == trace(whole)
    assert facts_at(run, 6)["origin"] == resume.removeprefix("resume=")


def test_a_run_goes_on_from_another_ones_checkpoint(
    tmp_path: Path,
    start: Train,  # noqa: F811
    whole: Path,
) -> None:
    start(tmp_path, *SIX, f"resume={whole / 'checkpoints' / 'step_00000004'}", "name=fork")
    assert steps(tmp_path / "fork") == [6]
    assert_same_at(6, tmp_path / "fork", whole)


def test_null_begins_anew_once_and_whatever_is_there(
    tmp_path: Path,
    start: Train,  # noqa: F811
    whole: Path,
) -> None:
    run = copied(whole, tmp_path)
    for path in by_step(run / "checkpoints"):
        damage(path)
    start(tmp_path, *SIX, "resume=null", "trainer.max_steps=2")
    assert steps(run) == [2]
    assert len(list((run / "checkpoints").glob("*.superseded"))) == 3
    start(tmp_path, *SIX, "resume=null", "trainer.max_steps=4")  # once
    assert steps(run) == [4, 2]
    assert_same_at(4, run, whole)


def damage(path: Path) -> Path:
    with next(path.glob("rank_*")).open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)
        file.seek(5000)
        file.write(bytes([byte[0] ^ 4]))
    return path


def old_file(path: Path) -> Path:
    file = path.parent / "step_00000002.ckpt"
    file.touch()
    return file


@pytest.mark.parametrize(
    ("spoil", "overrides", "said"),
    [
        (lambda path: path / "none", [], "which is no folder of a checkpoint"),
        (old_file, [], "which is no folder of a checkpoint"),
        (damage, [], "is damaged (rank_00000.safetensors is not as it was written"),
        (lambda path: path, ["optimizer.lr=2e-3"], "optimizer.lr: 0.001 there, 0.002 here"),
        (lambda path: path, ["model=s"], "model.hidden_size: 64 there, 256 here"),
    ],
)
def test_what_it_cannot_go_on_from_is_refused_by_name(
    tmp_path: Path,
    start: Train,  # noqa: F811
    whole: Path,
    spoil: Callable[[Path], Path],
    overrides: list[str],
    said: str,
) -> None:
    run = copied(whole, tmp_path / "other")
    path = spoil(run / "checkpoints" / "step_00000004")
    before = sorted(run.rglob("*"))
    with pytest.raises(Refused) as caught:
        start(tmp_path, f"resume={path}", "name=fork", *overrides)
    assert said in str(caught.value)
    assert not list((tmp_path / "fork").rglob("step_*"))
    assert sorted(run.rglob("*")) == before


def test_another_network_under_the_same_config_is_refused(
    tmp_path: Path,
    start: Train,  # noqa: F811
    whole: Path,
) -> None:
    run = copied(whole, tmp_path)
    for path in by_step(run / "checkpoints"):
        manifest = Manifest.read(path)
        manifest.tensors["network/old.weight"] = manifest.tensors.pop("network/img_in.weight")
        manifest.write(path)
    with pytest.raises(ValueError, match="1 are not in it: network/img_in.weight\n"):
        start(tmp_path, *SIX)


def test_without_an_average_one_begins(
    tmp_path: Path,
    start: Train,  # noqa: F811
    whole: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    run = copied(whole, tmp_path)
    start(tmp_path, *SIX, "~callbacks.ema", "~callbacks.export", "trainer.max_steps=8")
    assert not any(name.startswith("average/") for name in tensors_at(run, 8))
    start(tmp_path, *SIX, "trainer.max_steps=10")
    assert "has no average of the weights: one begins at step 8" in capsys.readouterr().out
    assert facts_at(run, 10)["num_updates"] == 2


def full_at(monkeypatch: pytest.MonkeyPatch, *full: int) -> None:
    """Let the disk be full during some of the steps."""
    save = store.save

    def save_some(folder: Path, step: int, *parts: Any, **options: Any) -> store.Saving:
        def check(*_: object) -> None:
            if step in full:
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(store, "_check_space", check)
        return save(folder, step, *parts, **options)

    monkeypatch.setattr(store, "save", save_some)


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    tmp_path: Path,
    start: Train,  # noqa: F811
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    asynchronous: str,
) -> None:
    full_at(monkeypatch, 4)
    run = start(tmp_path, *SIX, f"callbacks.checkpoint.asynchronous={asynchronous}")
    assert "no checkpoint of step 4: [Errno 28] No space left" in capsys.readouterr().out
    assert steps(run) == [6, 2]
    assert_same_at(6, run, whole)
    assert not list((run / "checkpoints").glob("*.partial"))


def test_a_full_disk_at_the_last_chance_is_an_error(
    tmp_path: Path,
    start: Train,  # noqa: F811
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        full_at(patch, 6)
        with pytest.raises(OSError, match="No space left"):
            start(tmp_path, *SIX)
    run = tmp_path / "run"
    assert steps(run) == [4, 2]
    start(tmp_path, *SIX)
    assert_same_at(6, run, whole)


def test_who_asks_twice_gets_one_checkpoint_and_all_of_it(
    tmp_path: Path,
    start: Train,  # noqa: F811
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_end, asked = Checkpoint.on_train_batch_end, []

    def ask_as_well(self: Checkpoint, trainer: L.Trainer, *parts: Any) -> None:
        on_end(self, trainer, *parts)
        if trainer.global_step in (3, 4):
            self.save(trainer, wait=True)
            asked.append(by_step(self.folder)[0].name)

    monkeypatch.setattr(Checkpoint, "on_train_batch_end", ask_as_well)
    run = start(tmp_path, *SIX, "callbacks.checkpoint.asynchronous=true")
    assert asked == ["step_00000003", "step_00000004"]
    assert steps(run) == [6, 4, 3, 2]
    assert_same_at(4, run, whole)


def test_a_fenced_off_run_commits_nothing_more(
    tmp_path: Path,
    start: Train,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: object) -> None:
        raise FencedOff("another attempt has taken over")

    monkeypatch.setattr(Attempt, "check", refuse)
    with pytest.raises(FencedOff, match="another attempt has taken over"):
        start(tmp_path, *SIX)
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))


def on_ranks(world: int, start: Train, *arguments: Any, **options: Any) -> None:  # noqa: F811
    """`start`, as torchrun starts it."""
    importlib.import_module("torch._dynamo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(rank: int) -> None:
        os.environ |= {
            "TORCHELASTIC_RUN_ID": "test",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
        }
        start(*arguments, **options)

    processes = [forked(run, rank) for rank in range(world)]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * world


def test_shards_of_any_number_of_ranks_are_gone_on_from(
    tmp_path: Path,
    start: Train,  # noqa: F811
    whole: Path,
) -> None:
    sharded = (*SIX, "trainer=fsdp", "trainer.accelerator=cpu")
    on_ranks(2, start, tmp_path / "two", *sharded)
    two = tmp_path / "two" / "run"
    assert len(Manifest.read(two / "checkpoints" / "step_00000006").files) == 2
    assert_close_at(6, two, whole)
    for world, overrides in ((2, sharded), (1, SIX)):
        shutil.copytree(two, tmp_path / str(world) / "run")
        run = tmp_path / str(world) / "run"
        for step in (4, 6):
            shutil.rmtree(run / "checkpoints" / f"step_{step:08d}")
        on_ranks(world, start, tmp_path / str(world), *overrides)
        assert steps(run) == [6, 4, 2]
    assert_same_at(6, tmp_path / "2" / "run", two)
    assert_close_at(6, tmp_path / "1" / "run", two)
    run = copied(whole, tmp_path / "split")
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    on_ranks(2, start, tmp_path / "split", *sharded)
    assert_close_at(6, run, whole)


@pytest.mark.parametrize(
    "setting", [{"every_n_steps": 0}, {"keep": 0}, {"keep_every": -1}], ids=json.dumps
)
def test_settings_that_make_no_sense_are_refused(setting: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"every_n_steps is \d+, keep \d+, keep_every -?\d+"):
        Checkpoint(**({"folder": "none", "every_n_steps": 1} | setting))
