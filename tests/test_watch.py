"""What watches a run: hangs end it, spikes and full disks are told, watching changes nothing."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import initialize_config_dir
from watched import CONFIGS, FSDP, HANGS_AFTER, STEPS, tiny, write_shards

from mofo.training import plan, watch
from mofo.training.attempts import TRY_AGAIN
from mofo.training.watch import DiskAlarm, LossAlarm, Watchdog

ROOT = Path(__file__).parents[1]


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two ranks under FSDP2; the exit status of the first is in `status`."""
    folder = tmp_path_factory.mktemp("ranks")
    write_shards(folder / "shards")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [launch(folder, rank, port) for rank in range(2)]
    try:
        started[0].wait(timeout=300)
        (folder / "status").write_text(str(started[0].returncode))
        yield folder
    finally:
        for process in started:
            process.kill()
            process.wait()


def launch(folder: Path, rank: int, port: int) -> subprocess.Popen:
    environ = {
        "TORCHELASTIC_RUN_ID": "test",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    with (folder / f"output_{rank}.txt").open("w") as output:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "watched.py"), str(folder)],
            env=os.environ | environ,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def test_a_rank_that_stops_ends_the_others_with_their_stacks(ranks: Path) -> None:
    output = (ranks / "output_0.txt").read_text()
    assert (ranks / "status").read_text() == str(TRY_AGAIN), output[-3000:]
    stacks = (ranks / "hanging" / "stacks" / "rank_00000.txt").read_text()
    assert f"rank 0 on {os.uname().nodename}" in stacks
    assert f"after step {HANGS_AFTER}" in stacks
    assert "most recent call first" in stacks
    assert "training_epoch_loop.py" in stacks
    assert output.count("nothing done for too long") == 1
    assert [row["step"] for row in rows(ranks / "hanging")] == list(range(1, HANGS_AFTER + 1))


def test_validation_and_previews_change_no_step_of_a_sharded_training(ranks: Path) -> None:
    plain, watched = rows(ranks / "plain"), rows(ranks / "watched")
    assert len(plain) == len(watched) == STEPS
    for one, other in zip(plain, watched, strict=True):
        added = {name for name in other if name.startswith("valid/")}
        expected = {"valid/held/absrel", "valid/held/delta1"} if not one["step"] % 2 else set()
        assert added == expected
        assert {name: other[name] for name in other if name not in added} == one


def test_validation_on_two_ranks_agrees_with_one(ranks: Path, tmp_path: Path) -> None:
    import train

    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = tiny(tmp_path, ranks / "shards", "callbacks.validation.every_n_steps=2")
    train.train(cfg)
    for one, other in zip(rows(tmp_path / "run"), rows(ranks / "watched"), strict=True):
        assert other == pytest.approx(one, rel=2e-4)


def test_sharded_bytes_are_those_of_the_plan(ranks: Path) -> None:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        work = plan.read(tiny(ranks, ranks / "shards", *FSDP))
    weighed = json.loads((ranks / "plain" / "bytes_0.json").read_text())
    planned = plan.state(work, 2)
    for name, size in weighed.items():
        assert planned[name] == pytest.approx(size, rel=0.05), name
    [checkpoint] = (ranks / "plain" / "checkpoints").glob("step_*")
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    assert plan.checkpoint(work) == pytest.approx(size, rel=0.05)


def trainer_of(*callbacks: Any, step: int = 0, **values: Any) -> Any:
    metrics = {name: torch.tensor(value) for name, value in values.items()}
    return SimpleNamespace(
        callbacks=list(callbacks),
        global_step=step,
        global_rank=0,
        is_global_zero=True,
        callback_metrics=metrics,
        loggers=[],
    )


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    statuses: list[int] = []
    monkeypatch.setattr(watch.os, "_exit", statuses.append)
    return statuses


def dog(folder: Path, limit: float) -> Watchdog:
    return Watchdog(folder=str(folder), minutes=limit / 60, first_minutes=limit / 60, patience_s=0)


def test_a_watchdog_that_nobody_answers_shows_where_the_process_is(
    tmp_path: Path, exits: list[int]
) -> None:
    one = dog(tmp_path, 0.1)
    one.setup(trainer_of(one), None, "fit")
    deadline = time.monotonic() + 20
    while not exits and time.monotonic() < deadline:
        time.sleep(0.02)
    one.on_exception(trainer_of(one), None, KeyboardInterrupt())
    assert set(exits) == {TRY_AGAIN}
    stacks = (tmp_path / "stacks" / "rank_00000.txt").read_text()
    assert "test_a_watchdog_that_nobody_answers" in stacks


def test_a_watchdog_is_quiet_while_there_is_work_and_after_the_end(
    tmp_path: Path, exits: list[int]
) -> None:
    one = dog(tmp_path, 0.3)
    trainer = trainer_of(one, step=1)
    one.setup(trainer, None, "fit")
    for _ in range(6):
        time.sleep(0.1)
        watch.still_busy(trainer)
    one.teardown(trainer, None, "fit")
    time.sleep(0.2)
    assert not exits
    assert not (tmp_path / "stacks").exists()


def test_a_process_that_was_suspended_as_a_whole_may_go_on(
    tmp_path: Path, exits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, now = dog(tmp_path, 60), iter([0.0, 1000.0, 1000.0, 1001.0])
    monkeypatch.setattr(watch.time, "monotonic", lambda: next(now, 1001.0))
    one.deadline = 60.0
    over = SimpleNamespace(wait=iter([False, False, True]).__next__)
    one._watch(SimpleNamespace(wait=lambda _: over.wait()))
    assert not exits
    assert one.deadline == 1060.0


@pytest.mark.parametrize(("minutes", "first"), [(0, 10), (20, 10)])
def test_a_watchdog_with_impossible_times_is_refused(minutes: int, first: int) -> None:
    with pytest.raises(ValueError, match=f"{minutes} minutes for a step and {first}"):
        Watchdog(folder=".", minutes=minutes, first_minutes=first)


def batch(step: int) -> Any:
    return SimpleNamespace(key=[f"key-{step}-a", f"key-{step}-b"])


def feed(alarm: LossAlarm, losses: list[float], start: int = 0) -> None:
    for step, loss in enumerate(losses, start + 1):
        trainer = trainer_of(step=step, **{"train/loss": loss})
        alarm.on_train_batch_end(trainer, None, None, batch(step), 0)


CALM = [1 + 0.01 * (i % 7) for i in range(40)]


def alarm_of(folder: Path, **changes: Any) -> LossAlarm:
    alarm = LossAlarm(**{"folder": str(folder), "window": 50, "threshold": 10, **changes})
    alarm.on_train_start(trainer_of(), None)
    return alarm


def test_a_spike_is_told_with_its_step_and_samples_and_hides_none_after_it(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    feed(alarm_of(tmp_path), [*CALM, 5.0, 1.02, 4.0, 1.01])
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2
    assert "loss of step 41 is 5" in told[0]
    assert "key-41-a, key-41-b" in told[0]
    assert "step 43" in told[1]


def test_a_fall_noise_and_losses_that_are_no_numbers_are_no_spikes(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    feed(alarm_of(tmp_path), [30.0, 20.0, *CALM, 0.2, 1.05, float("nan"), float("inf"), 1.0])
    assert not capsys.readouterr().out


def test_an_alarm_may_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"step 41 .*key-41-a.*stop=false"):
        feed(alarm_of(tmp_path, stop=True), [*CALM, 5.0])


def test_a_resumed_alarm_knows_what_was_before(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lines = [json.dumps({"step": i + 1, "train/loss": loss}) for i, loss in enumerate(CALM)]
    lines[3] = json.dumps({"step": 4, "train/loss": None})  # a step that was skipped
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    feed(alarm_of(tmp_path), [5.0], start=40)
    assert "loss of step 41" in capsys.readouterr().out


def test_micro_batches_of_a_spike_are_all_named(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    alarm = alarm_of(tmp_path)
    feed(alarm, CALM)
    trainer = trainer_of(step=40, **{"train/loss": 9.0})
    alarm.on_train_batch_end(trainer, None, None, batch(1), 0)
    trainer.global_step = 41
    alarm.on_train_batch_end(trainer, None, None, batch(2), 1)
    assert "key-1-a, key-1-b, key-2-a, key-2-b" in capsys.readouterr().out


def test_a_window_too_short_to_judge_by_is_refused() -> None:
    with pytest.raises(ValueError, match="window of 5 steps"):
        LossAlarm(folder=".", window=5, threshold=10)


def test_a_nearly_full_disk_is_told_once_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    alarm = DiskAlarm(folder=str(tmp_path), every_n_steps=1, least_gib=5)
    for free in (9, 4, 3, 9, 2):
        usage = SimpleNamespace(free=free * 2**30)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        alarm.on_train_batch_end(trainer_of(step=1), None)
    told = capsys.readouterr().out.splitlines()
    assert ["4.0 GiB left" in told[0], "2.0 GiB left" in told[1], len(told)] == [True, True, 2]
