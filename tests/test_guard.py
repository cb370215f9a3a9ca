"""The guard: a signal is noted at once, and acted on between two steps, by all ranks together."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import Callback
from PIL import Image

import train
from mofo.data.sample import Sample
from mofo.data.write import write
from mofo.training import guard, signals

CONFIGS = Path(__file__).parents[1] / "configs"
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "2"}


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    before = [signal.getsignal(number) for number in (signals.LIMIT, signals.END)]
    signals.install()
    yield
    signals.forget()
    for number, handler in zip((signals.LIMIT, signals.END), before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in that writes down what it was asked; `state` is what it says of the job."""
    script = tmp_path / "scontrol"
    script.write_text(
        f"#!/bin/sh\necho $* >> {tmp_path}/asked\n"
        f"[ $1 = show ] && echo JobState=$(cat {tmp_path}/state)\n"
        f"[ $1 = show ] || exit $(cat {tmp_path}/status)\n"
    )
    script.chmod(0o755)
    (tmp_path / "state").write_text("RUNNING")
    (tmp_path / "status").write_text("0")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def test_a_signal_is_noted_and_nothing_else() -> None:
    assert signals.noted() is None
    os.kill(os.getpid(), signals.END)
    assert signals.noted() == signals.END
    os.kill(os.getpid(), signals.LIMIT)
    assert signals.noted() == signals.LIMIT


def test_children_that_inherit_the_handler_do_not_act_on_it() -> None:
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signals.LIMIT)
        os._exit(0 if signals.noted() is None else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_the_handler_is_put_back_where_a_library_took_it() -> None:
    signal.signal(signals.END, signal.SIG_IGN)
    signals.keep()
    os.kill(os.getpid(), signals.END)
    assert signals.noted() == signals.END


def test_near_its_limit_the_job_is_requeued(scontrol: Path) -> None:
    assert guard.requeue(signals.LIMIT, SLURM) == 0
    assert (scontrol / "asked").read_text() == "requeue 7\n"


def test_a_cancelled_job_is_not_requeued(scontrol: Path) -> None:
    (scontrol / "state").write_text("COMPLETING")
    assert guard.requeue(signals.END, SLURM) == 0
    assert "requeue" not in (scontrol / "asked").read_text()


def test_where_requeueing_fails_the_status_says_try_again(scontrol: Path) -> None:
    (scontrol / "status").write_text("1")
    assert guard.requeue(signals.END, SLURM) == 75


def test_without_slurm_the_status_says_try_again(
    scontrol: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guard.requeue(signals.END, {}) == 75
    assert "SIGTERM: saved; the same command goes on from here" in capsys.readouterr().out
    assert not (scontrol / "asked").exists()


def test_without_scontrol_the_batch_script_is_left_to_requeue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert guard.requeue(signals.LIMIT, SLURM) == 75


def test_what_another_node_wrote_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "SHARED_S", 0.0)
    assert not guard._appears(tmp_path / "token", "me")
    (tmp_path / "token").write_text("me\nmore")
    assert guard._appears(tmp_path / "token", "me")
    assert not guard._appears(tmp_path / "token", "you")


class Sender(Callback):
    """Sends this process a signal in the middle of step `step`."""

    def __init__(self, *, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)

    def frame(number: int) -> Sample:
        return Sample(
            key=f"frame-{number}",
            picture=Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)),
            metres=rng.uniform(1, 9, (16, 16)).astype(np.float32),
            valid=np.ones((16, 16), bool),
            intrinsics=None,
            captions=("a road",),
            metric=True,
            source="test",
            licence="CC0",
        )

    folder = tmp_path_factory.mktemp("data") / "frames"
    write(map(frame, range(6)), folder, "frames", samples_per_shard=3)
    return folder


def start(root: Path, frames: Path, *overrides: str) -> Path:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose(
            "train",
            overrides=[
                "model=xs",
                f"paths.runs={root}",
                "~data.sources.real",
                f"data.sources.scenes.shards={frames}",
                "data.sources.scenes.make=null",
                "data.size=[16,16]",
                "data.batch_size=2",
                "callbacks.checkpoint.every_n_steps=4",
                "trainer.max_steps=6",
                *overrides,
            ],
        )
    train.train(cfg)
    return root / "run"


def metrics(run: Path) -> bytes:
    return (run / "metrics.jsonl").read_bytes()


def test_a_run_told_to_end_saves_after_the_step_and_goes_on_bit_for_bit(
    tmp_path: Path, frames: Path
) -> None:
    whole = start(tmp_path / "whole", frames)
    sender = f"+callbacks.sender={{_target_: {__name__}.Sender, step: 3, number: 15}}"
    with pytest.raises(SystemExit) as left:
        start(tmp_path, frames, sender)
    assert left.value.code == 75
    signals.forget()
    run = tmp_path / "run"
    assert len(metrics(run).splitlines()) == 3
    assert (run / "checkpoints" / "step_00000003").exists()
    assert not (run / "export").exists()

    start(tmp_path, frames)
    assert metrics(run) == metrics(whole)
    weights = [path / "export" / "model.safetensors" for path in (run, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_signal_in_the_last_step_does_not_keep_a_run_from_its_end(
    tmp_path: Path, frames: Path
) -> None:
    sender = f"+callbacks.sender={{_target_: {__name__}.Sender, step: 6, number: 10}}"
    assert (start(tmp_path, frames, sender) / "export" / "model.safetensors").exists()


def test_a_signal_before_the_first_step_ends_the_run_at_once(tmp_path: Path, frames: Path) -> None:
    os.kill(os.getpid(), signals.LIMIT)
    with pytest.raises(SystemExit):
        start(tmp_path, frames)
    assert metrics(tmp_path / "run") == b""
