"""What a run tells of itself: rows that follow from the training, lines, a pace, a mirror."""

import io
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import initialize_config_dir
from watched import CONFIGS, STEPS, tiny, write_shards

import train
from mofo.training import progress as progresses
from mofo.training.mirror import Mirror
from mofo.training.progress import Clock, Pace, Progress, Rows, told


@pytest.fixture(scope="module", autouse=True)
def configs() -> Iterator[None]:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shards"
    write_shards(folder)
    return folder


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(row) for row in path.read_text().splitlines()]


def test_a_run_writes_what_it_trained_and_beside_it_how_that_went(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture
) -> None:
    every = ["callbacks.progress.every_n_steps=2", "callbacks.progress.peak_tflops=1"]
    first = tiny(tmp_path, shards, *every, "callbacks.checkpoint.every_n_steps=4")
    first.trainer.max_steps = 4
    train.train(first)
    train.train(tiny(tmp_path, shards, *every))
    run = tmp_path / "run"
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == list(range(1, STEPS + 1))
    system = rows(run / "system.jsonl")
    assert [row["attempt"] for row in system] == [1, 1, 1, 2, 2]
    assert [row["step"] for row in system] == [0, 2, 4, 4, 6]
    for row in (row for row in system if "started" not in row):
        assert 0 <= row["data_wait"] < 1
        assert row["seconds_per_step"] > 0
        assert row["samples_per_second"] == pytest.approx(4 / row["seconds_per_step"], rel=1e-3)
        assert row["memory"] > 2**20
        assert 0 < row["mfu"] < 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["2/4", "4/4", "6/6"]
    assert all("samples/s" in line and "MFU" in line and "GiB" in line for line in lines)
    assert ["attempt" in line for line in lines] == [False, False, True]


def test_the_mirror_has_one_run_for_all_attempts_and_needs_no_network(
    tmp_path: Path, shards: Path
) -> None:
    wandb = pytest.importorskip("wandb")
    overrides = ["logger=wandb", "callbacks.progress.every_n_steps=2"]
    for steps in (2, 3):
        cfg = tiny(tmp_path, shards, *overrides, "callbacks.checkpoint.every_n_steps=2")
        cfg.trainer.max_steps = steps
        train.train(cfg)
        wandb.finish()
    run = tmp_path / "run"
    name = (run / "wandb_id").read_text()
    files = sorted(run.glob(f"wandb/offline-run-*-{name}/run-{name}.wandb"))
    assert len(files) == 2
    assert len(list(run.glob("wandb/offline-run-*"))) == 2
    written = b"".join(file.read_bytes() for file in files)
    for word in (b"train/loss", b"trainer/global_step", b"system/seconds_per_step"):
        assert word in written


@pytest.mark.parametrize(
    ("environ", "offline"),
    [
        ({}, True),
        ({"WANDB_API_KEY": "key"}, False),
        ({"WANDB_MODE": "offline"}, False),  # which wandb itself follows
        ({"NETRC": "netrc"}, False),
        ({"NETRC": "netrc", "WANDB_BASE_URL": "https://other.example"}, True),
    ],
)
def test_without_a_login_the_mirror_stays_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], offline: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("netrc").write_text("machine api.wandb.ai login user password key\n")
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert Mirror(folder="run", project="p", name="n")._offline is offline


class SmallDisk(io.FileIO):
    """A file on a disk with `room` bytes left."""

    room = 0

    def write(self, data: Any) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        part = bytes(data)[: self.room]
        self.room -= len(part)
        return super().write(part)


def test_rows_wait_for_room_on_a_full_disk_and_none_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "rows.jsonl"
    file = Rows(path)
    file.append({"step": 1})
    file.file = SmallDisk(path, "ab")
    file.append({"step": 2})
    file.file.room = 5  # bytes: half a row
    file.append({"step": 3})
    assert rows(path) == [{"step": 1}]
    file.file.room = 1000
    file.append({"step": 4})
    file.close()
    assert rows(path) == [{"step": step} for step in (1, 2, 3, 4)]
    out = capsys.readouterr().out
    assert out.count("wait until there is room") == 1
    assert "no room for the last" not in out


def test_rows_that_never_found_room_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = Rows(tmp_path / "rows.jsonl")
    file.file = SmallDisk(tmp_path / "rows.jsonl", "ab")
    file.append({"step": 1})
    file.append({"step": 2})
    file.close()
    assert "no room for the last 2 rows" in capsys.readouterr().out


def test_the_half_row_of_a_killed_process_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1}\n{"ste')
    file = Rows(path)
    file.append({"step": 2})
    file.close()
    assert rows(path) == [{"step": 1}, {"step": 2}]


def test_what_is_not_finite_is_null_because_json_has_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    file = Rows(path)
    file.append({"step": 1, "loss": float("nan"), "norm": float("inf"), "skipped": ["a"]})
    file.close()
    assert rows(path) == [{"step": 1, "loss": None, "norm": None, "skipped": ["a"]}]


def begun(folder: Path, step: int) -> Progress:
    one = Progress(folder=str(folder), every_n_steps=1)
    one.last_step = step
    one._open(SimpleNamespace(world_size=1))
    return one


def test_what_a_fenced_off_attempt_still_appends_is_not_in_the_file(tmp_path: Path) -> None:
    stale = begun(tmp_path, 0)
    assert stale.metrics is not None
    for step in (1, 2, 3):
        stale.metrics.append({"step": step, "by": "stale"})
    fresh = begun(tmp_path, 2)
    stale.metrics.append({"step": 4, "by": "stale"})
    assert fresh.metrics is not None
    fresh.metrics.append({"step": 3, "by": "fresh"})
    found = [(row["step"], row["by"]) for row in rows(tmp_path / "metrics.jsonl")]
    assert found == [(1, "stale"), (2, "stale"), (3, "fresh")]


def test_rows_that_a_dead_machine_took_along_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    begun(tmp_path, 4)
    assert "lacks 3 steps before 4" in capsys.readouterr().out


def fake_run(step: int) -> tuple[Any, Any]:
    skipped = SimpleNamespace(in_a_row=0, total=0, last=[])
    module = SimpleNamespace(device=torch.device("cpu"), skipped=skipped)
    trainer = SimpleNamespace(
        global_step=step,
        max_steps=100,
        is_global_zero=True,
        callback_metrics={"train/loss": torch.tensor(0.5)},
        optimizers=[SimpleNamespace(param_groups=[{"lr": 0.1}])],
        loggers=[],
        lightning_module=module,
    )
    return trainer, module


def running(folder: Path) -> Progress:
    one = begun(folder, 0)
    one.first_step, one.started, one.drawn = 0, time.monotonic(), 0.0
    speed = {
        "seconds_per_step": 0.1,
        "samples_per_second": 40.0,
        "data_wait": 0.25,
        "memory": 2**30,
    }
    one.pace = SimpleNamespace(measure=lambda *_: speed)
    return one


def test_a_skipped_step_has_a_row_that_names_its_samples(tmp_path: Path) -> None:
    one = running(tmp_path)
    trainer, module = fake_run(1)
    trainer.callback_metrics["train/loss"] = torch.tensor(torch.nan)
    module.skipped.in_a_row = module.skipped.total = 1
    module.skipped.last = [{"step": 0, "keys": ["a", "b"], "positions": [0, 1]}]
    one.on_train_batch_end(trainer, module)
    row = rows(tmp_path / "metrics.jsonl")[0]
    assert row == {"step": 1, "train/loss": None, "lr": 0.1, "skipped": ["a", "b"]}
    assert rows(tmp_path / "system.jsonl")[-1]["skipped"] == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_a_live_line_and_a_file_one_line_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progresses, "REDRAW_S", 0.0)
    for screen in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stdout", screen)
        one = running(tmp_path)
        one.every_n_steps = 3
        for step in range(1, 7):
            one.on_train_batch_end(*fake_run(step))
        text = screen.getvalue()
        assert text.count("\n") == 2
        assert text.count("\r") == (6 if isinstance(screen, Terminal) else 0)
        assert text.count("step 3/100  loss 0.5000  100 ms/step  40 samples/s  data 25 %") == 1


def test_values_of_other_callbacks_stand_in_the_row_of_their_step_alone(tmp_path: Path) -> None:
    one = running(tmp_path)
    one.extra["valid/absrel"] = 0.25
    one.on_train_batch_end(*fake_run(1))
    one.on_train_batch_end(*fake_run(2))
    found = rows(tmp_path / "metrics.jsonl")
    assert ["valid/absrel" in row for row in found] == [True, False]


def test_the_pace_leaves_pauses_out_and_counts_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progresses.time, "perf_counter", lambda: now[0])
    clock = Clock()
    for action, seconds in {
        "[_TrainingEpochLoop].train_dataloader_next": 2.0,
        "run_training_batch": 5.0,
        "[Callback]Progress.on_train_batch_end": 1.0,
        "[Callback]Validation.on_train_batch_end": 100.0,
    }.items():
        clock.start(action)
        now[0] += seconds
        clock.stop(action)
    pace = Pace.__new__(Pace)
    pace.batch_size, pace.flops, pace.peak = 16, 10, 200.0
    speed = pace.measure(clock, 4, torch.device("cpu"))
    assert speed["seconds_per_step"] == 2.0  # (2 + 5 + 1) / 4
    assert speed["data_wait"] == 0.25
    assert speed["samples_per_second"] == 8.0
    assert speed["mfu"] == 0.4  # 16 x 10 operations in 2 of 200 a second
    assert (clock.step, clock.waited, clock.paused) == (4, 0.0, 0.0)


def test_slow_steps_are_told_in_seconds_and_an_unknown_device_has_no_mfu() -> None:
    speed = {"seconds_per_step": 4.0, "samples_per_second": 0.5, "data_wait": 0.0, "memory": 0}
    assert told(speed) == ["4.00 s/step", "0.5 samples/s", "data 0 %", "0.0 GiB"]
    assert told(speed | {"mfu": 0.414})[-1] == "MFU 41 %"
    assert told({}) == []
