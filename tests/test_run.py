"""The run folder: one live attempt holds it, stale ones are fenced off, poison is not retried."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from mofo.data.module import DataModule
from mofo.data.sample import Sample
from mofo.data.write import write
from mofo.training import attempts, run
from mofo.training.attempts import Attempt, FencedOff, Refused, judge, take
from mofo.training.launch import Launch

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NTASKS_PER_NODE": "4",
}


def job(number: int, restart: int = 0) -> dict[str, str]:
    return {"SLURM_JOB_ID": str(number), "SLURM_RESTART_COUNT": str(restart)}


def rewrite(attempt: Attempt, **facts: object) -> None:
    """Make its file say something else of its holder."""
    first, *rest = attempt.path.read_text().splitlines()
    lines = [json.dumps(json.loads(first) | facts), *rest]
    attempt.path.write_text("".join(line + "\n" for line in lines))


def die(folder: Path, attempt: Attempt, step: int, *, checkpoint: int = 0, status: int = 137):
    """What a death in `step` leaves, and the verdict on it."""
    for rank in range(2):
        samples = [f"zod_{step}_{rank} (position {rank})"]
        attempts.fly(folder, rank, attempt.number, step, samples)
    if checkpoint:
        (folder / "checkpoints" / f"step_{checkpoint:08d}").mkdir(parents=True, exist_ok=True)
    return judge(folder, status, job(7))


def test_a_run_in_use_is_refused_and_says_by_whom(tmp_path: Path) -> None:
    holder = take(tmp_path, job(7))
    with pytest.raises(Refused, match=f"in use by process {os.getpid()} on .*SLURM job 7") as error:
        take(tmp_path, job(8))
    assert "name=" in str(error.value)
    assert holder.still_ours()


def test_a_run_that_ended_is_free(tmp_path: Path) -> None:
    take(tmp_path, {}).end("finished")
    assert take(tmp_path, {}).number == 2


def test_a_dead_process_holds_nothing_even_if_its_pid_was_given_out_again(tmp_path: Path) -> None:
    rewrite(take(tmp_path, {}), born="1")
    assert take(tmp_path, {}).number == 2
    rewrite(Attempt(tmp_path / "attempts" / "0002.jsonl"), pid=2**22 + 1)
    assert take(tmp_path, {}).number == 3


def test_on_another_machine_the_heartbeat_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "BEAT_S", 0.05)
    monkeypatch.setattr(attempts, "PATIENCE_S", 0.5)
    holder = take(tmp_path, {})
    rewrite(holder, host="elsewhere")
    with pytest.raises(Refused, match="on elsewhere"):
        take(tmp_path, {})
    holder._over.set()  # its machine is gone
    assert take(tmp_path, {}).number == 2


def test_a_requeued_job_fences_its_earlier_attempt_off(tmp_path: Path) -> None:
    """That one may still run, on a node whose daemon died."""
    stale = take(tmp_path, job(7))
    stale.check()
    fresh = take(tmp_path, job(7, restart=1))
    assert not stale.still_ours()
    with pytest.raises(FencedOff, match="number 1 .*writes nothing more"):
        stale.check()
    fresh.check()


def test_of_two_that_start_at_once_one_gets_the_folder(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from mofo.training import attempts\n"
        "try: attempts.take(Path(sys.argv[1])); print('got it', flush=True); sys.stdin.read()\n"
        "except attempts.Refused: print('refused', flush=True)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    answers = [one.stdout.readline().strip() for one in both]
    for one in both:
        one.communicate()
    assert sorted(answers) == ["got it", "refused"]


def test_a_death_is_retried_once_and_the_second_names_step_and_samples(tmp_path: Path) -> None:
    again, reason = die(tmp_path, take(tmp_path, job(7)), 17, checkpoint=10)
    assert again
    assert "going on from checkpoint 10" in reason
    again, reason = die(tmp_path, take(tmp_path, job(7, restart=1)), 17)
    assert not again
    assert "step 17 killed it twice, with no checkpoint newer than step 10" in reason
    assert "rank 1, step 17: zod_17_1 (position 1)" in reason


def test_deaths_with_progress_in_between_are_retried(tmp_path: Path) -> None:
    for restart, (step, checkpoint) in enumerate([(17, 10), (29, 20), (34, 30)]):
        attempt = take(tmp_path, job(7, restart))
        assert die(tmp_path, attempt, step, checkpoint=checkpoint)[0]


def test_a_preemption_in_between_is_no_death(tmp_path: Path) -> None:
    assert die(tmp_path, take(tmp_path, job(7)), 5)[0]
    take(tmp_path, job(7, restart=1)).end("was preempted")
    assert die(tmp_path, take(tmp_path, job(7, restart=2)), 5)[0]


def test_deaths_of_another_job_do_not_count(tmp_path: Path) -> None:
    take(tmp_path, job(6)).die("cancelled")
    assert die(tmp_path, take(tmp_path, job(7)), 5)[0]


def test_what_is_wrong_with_the_command_or_the_data_is_not_retried(tmp_path: Path) -> None:
    attempt = take(tmp_path, job(7))
    attempts.fly(tmp_path, 0, attempt.number, 3, ["zod"])
    attempt.end("ended in an error")
    assert judge(tmp_path, 143, job(7)) == (False, "the attempt ended in an error")


@pytest.mark.parametrize(("status", "again"), [(1, False), (137, True), (75, True)])
def test_an_error_before_the_first_step_is_not_retried_but_a_kill_is(
    tmp_path: Path, status: int, again: bool
) -> None:
    take(tmp_path, job(7))
    assert judge(tmp_path, status, job(7))[0] is again


def test_a_job_that_never_had_the_folder_is_not_retried(tmp_path: Path) -> None:
    assert not judge(tmp_path, 1, job(7))[0]
    take(tmp_path, job(6))
    assert not judge(tmp_path, 1, job(7))[0]


def test_the_verdict_needs_no_installed_library(tmp_path: Path) -> None:
    attempt = take(tmp_path, job(7))
    attempts.fly(tmp_path, 0, attempt.number, 3, ["zod (position 0)"])
    command = [sys.executable, "-S", "-m", "mofo.training.attempts", str(tmp_path), "137"]
    done = subprocess.run(command, env=os.environ | job(7), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "requeued: attempt 0001 died; going on from the beginning" in done.stdout


def config(**changes: object) -> DictConfig:
    plain = {"seed": 0, "trainer": {"max_steps": 4}, "data": {"size": [8, 8], "num_workers": 0}}
    return OmegaConf.create(plain | changes)


def test_what_shapes_the_numbers_is_frozen_and_the_rest_follows_the_command(tmp_path: Path) -> None:
    with run.opened(tmp_path, config(seed=2), 0):
        pass
    with run.opened(tmp_path, config(), 0):  # nothing was trained with the other seed
        (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    with (
        pytest.raises(Refused, match="seed: 0 there, 1 here"),
        run.opened(tmp_path, config(seed=1), 0),
    ):
        pass
    with run.opened(tmp_path, config(trainer={"max_steps": 8}), 0):
        pass
    assert OmegaConf.load(tmp_path / "config.yaml").trainer.max_steps == 8


def test_a_requeued_job_reads_what_it_froze(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "jobs" / "7"
    monkeypatch.setenv("MOFO_RUN_LINK", str(link))
    assert run.of_job(os.environ | job(7, restart=1)) is None  # it came to nothing at first
    with run.opened(tmp_path / "one", config(seed=5), 0):
        assert link.resolve() == tmp_path / "one"
    assert run.of_job(os.environ | job(7)) is None
    frozen = run.of_job(os.environ | job(7, restart=1))
    assert frozen is not None
    assert frozen.seed == 5


def test_how_an_attempt_ended_stands_in_its_file(tmp_path: Path) -> None:
    with pytest.raises(SystemExit), run.opened(tmp_path, config(), 0):
        sys.exit(75)
    with pytest.raises(RuntimeError), run.opened(tmp_path, config(), 0):
        raise RuntimeError("no memory")
    with pytest.raises(Refused), run.opened(tmp_path, config(), 0):
        raise Refused("shards are missing")
    ends = [path.read_text() for path in sorted((tmp_path / "attempts").iterdir())]
    assert '"end": "was preempted"' in ends[0]
    assert '"end": "died"' in ends[1]
    assert "RuntimeError: no memory" in ends[1]
    assert '"end": "ended in an error that does not go away by itself"' in ends[2]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (SLURM, ("SLURM", 3, 2, 4)),
        (
            {"TORCHELASTIC_RUN_ID": "x", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"},
            ("torchrun", 5, 2, 4),
        ),
        ({}, ("nobody", 0, None, None)),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, ("nobody", 0, None, None)),  # in salloc
    ],
)
def test_nodes_and_ranks_come_from_the_launcher(environ: dict, expected: tuple) -> None:
    launch = Launch.read(environ)
    assert (launch.by, launch.rank, launch.nodes, launch.devices) == expected


def test_a_task_for_each_gpu_must_be_asked_for_per_node() -> None:
    environ = {key: value for key, value in SLURM.items() if "PER_NODE" not in key}
    with pytest.raises(Refused, match="--ntasks-per-node is not given"):
        Launch.read(environ)


def test_overrides_that_contradict_the_launcher_are_refused() -> None:
    launch = Launch.read(SLURM)
    cfg = OmegaConf.create({"trainer": {"num_nodes": "auto", "devices": 4}})
    assert launch.trainer(cfg)["num_nodes"] == 2
    cfg.trainer.num_nodes = 4
    with pytest.raises(Refused, match="num_nodes is 4, but SLURM started 2 nodes of 4"):
        launch.trainer(cfg)


def frames(folder: Path, *, first: int = 0) -> DataModule:
    def sample(number: int) -> Sample:
        return Sample(
            key=f"frame-{number}",
            picture=Image.fromarray(np.full((8, 8, 3), number, np.uint8)),
            metres=np.ones((8, 8), np.float32),
            valid=np.ones((8, 8), bool),
            intrinsics=None,
            captions=("a road",),
            metric=True,
            source="test",
            licence="CC0",
        )

    write(map(sample, range(first, first + 4)), folder, "frames", samples_per_shard=2)
    return DataModule(
        sources={"road": {"shards": str(folder)}},
        batch_size=2,
        size=(8, 8),
        patch=8,
        caption_dropout=0.0,
        seed=0,
    )


def test_missing_and_cut_shards_are_named(tmp_path: Path) -> None:
    data = frames(tmp_path / "road")
    sums = data.fingerprint(files=True)
    first, second = sorted((tmp_path / "road").glob("*.tar"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-512])
    with pytest.raises(ValueError, match="'road': 2 of 2 shards .*000.tar .missing.*001.tar"):
        data.fingerprint(files=True)
    assert data.fingerprint() == sums


def test_a_set_that_changed_since_the_checkpoint_is_refused(tmp_path: Path) -> None:
    data = frames(tmp_path / "road")
    data.advance(6)
    state = data.state_dict()
    frames(tmp_path / "again").load_state_dict(state)
    changed = frames(tmp_path / "other", first=1)
    with pytest.raises(ValueError, match="captions of road are not those .* for 6 samples"):
        changed.load_state_dict(state)


def test_a_killed_process_that_nobody_reaped_holds_no_folder() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert Path(f"/proc/{child.pid}/stat").exists()
    assert attempts._born(child.pid) is None
    assert attempts._born(os.getpid()) is not None
    child.wait()
