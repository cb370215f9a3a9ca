"""Faults of clusters, on a real scheduler: each run ends as if nothing had happened.

`make test-slurm`. Equal means the checksums of weights, optimiser and averages, metrics.jsonl byte
by byte, and every sample trained on once.
"""

import json
import shutil
import signal
from pathlib import Path

import pytest

from mofo.training.store import Manifest, by_step
from tests.slurm.cluster import Cluster, Job, wait_for
from tests.slurm.verdict import BATCH, EVERY, NUM_STEPS, Submit, assert_same, checksums, finished

pytestmark = pytest.mark.slurm

PACED = "pace_s: 0.3"  # so that a signal meets a run, and not its end
SLOW = "pace_s: 4"  # SLURM takes half a minute to notice that a node is lost


@pytest.mark.ci
def test_usr1_before_the_limit(submit: Submit, whole: Job, record) -> None:
    job = submit("usr1", fault=PACED)
    job.wait_step(13)
    job.send("USR1")
    finished(job)
    assert job.attempts == 2
    assert job.show("Restarts") == "1"
    assert_same(job, whole)
    record(job, "saved, requeued; equal")


@pytest.mark.ci
def test_kill_of_one_rank(submit: Submit, whole: Job, record) -> None:
    job = submit("kill", fault=PACED)
    job.wait_step(14)
    job.kill(rank=1)
    finished(job)
    assert job.attempts == 2
    assert_same(job, whole)
    record(job, "requeued from step 10; equal")


def test_sharded_usr1_and_kill(submit: Submit, whole_sharded: Job, record) -> None:
    job = submit("sharded", "trainer=fsdp", fault=f"{PACED}, restarts: 1")
    job.wait_step(13)
    job.send("USR1")
    job.wait_attempt(2)
    job.wait_step(24)
    job.kill(rank=0)
    finished(job)
    assert job.attempts == 3
    assert_same(job, whole_sharded)
    record(job, "FSDP2, requeued twice; equal")


def test_sigterm(submit: Submit, whole: Job, record) -> None:
    job = submit("term", fault=PACED)
    job.wait_step(17)
    job.send("TERM")
    finished(job)
    assert job.attempts == 2
    assert_same(job, whole)
    record(job, "saved, requeued; equal")


def test_real_time_limit(submit: Submit, whole: Job, record) -> None:
    job = submit("limit", fault="pace_s: 2, restarts: 99", options=("--time=2", "--signal=USR1@60"))
    assert job.wait(patience=600) == "COMPLETED"
    assert job.attempts > 1
    assert_same(job, whole)
    record(job, "each attempt saved before its limit; equal")


def test_cancelled_job_stays_cancelled(submit: Submit, record) -> None:
    job = submit("cancelled", fault=PACED)
    job.wait_step(12)
    job.cancel()
    assert job.show("JobState") == "CANCELLED"
    assert job.attempts == 1
    assert job.show("Restarts") == "0"
    steps = [int(path.name.removeprefix("step_")) for path in by_step(job.run / "checkpoints")]
    saved = steps[0] > EVERY
    assert ("SIGTERM: saved; SLURM ends this job" in job.said()) == saved
    record(job, f"{'saved' if saved else 'killed before it could save'}, not requeued")


def test_node_failure(cluster: Cluster, submit: Submit, whole: Job, record) -> None:
    """The daemon of rank 0's node dies; what it started lives on."""
    job = submit("node", fault=SLOW)
    job.wait_step(14)
    node = job.show("NodeList").removeprefix("n[").partition("-")[0].partition(",")[0]
    cluster.run("slurm/local.sh", "kill-node", node)
    try:
        job.wait_attempt(2)
        finished(job)
    finally:
        cluster.run("slurm/local.sh", "start-node", node)
    assert_same(job, whole)
    record(job, "requeued by SLURM on another node; equal")


def test_stale_rank_on_a_lost_node_is_fenced_off(cluster: Cluster, submit: Submit, record) -> None:
    """One rank needs no other, so it would train on, and write, while its successor does."""
    alone = submit("alone", options=("--nodes=1",))
    finished(alone)
    job = submit("stale", fault=SLOW, options=("--nodes=1",))
    job.wait_step(12)
    stale, node = job.pid(0), job.show("NodeList").removeprefix("n")
    cluster.run("slurm/local.sh", "kill-node", node)
    try:
        job.wait_attempt(2)
        wait_for(lambda: not Path(f"/proc/{stale}").exists(), "the end of the stale rank")
        finished(job)
    finally:
        cluster.run("slurm/local.sh", "start-node", node)
    first = (job.run / "attempts" / "0001.jsonl").read_text()
    assert '"fenced": 2' in first
    assert "finished" not in first
    assert (job.run / "metrics.jsonl").read_bytes() == (alone.run / "metrics.jsonl").read_bytes()
    assert checksums(job.run) == checksums(alone.run)
    record(job, "the stale attempt stopped, wrote nothing; equal")


def test_preempted_while_it_saves(cluster: Cluster, submit: Submit, whole: Job, record) -> None:
    job = submit("preempted", fault="pace_s: 0.2, fsync_s: 2.5")
    checkpoints = job.run / "checkpoints"
    job.wait_step(2 * EVERY)
    wait_for(lambda: any(checkpoints.glob("*.partial")), "the second save")
    urgent = cluster.run(
        "sbatch", "--parsable", "-p", "urgent", "--nodes=3", "--exclusive", "-o", "/dev/null",
        "--wrap", "sleep 1",
    ).strip()  # fmt: skip
    wait_for(lambda: job.show("Restarts") == "1", "the preemption")
    assert not (checkpoints / f"step_{2 * EVERY:08d}").exists()
    finished(job)
    assert job.attempts == 2
    assert f"resuming at step {EVERY}:" in job.said()
    assert_same(job, whole)
    record(job, f"job {urgent} took its nodes; the save was lost, step 10 was not; equal")


def test_disk_full(cluster: Cluster, submit: Submit, whole: Job, record) -> None:
    job_run = cluster.folder / "runs" / "full"
    checkpoints = job_run / "checkpoints"
    checkpoints.mkdir(parents=True)
    cluster.run("mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(checkpoints))
    try:
        job = submit("full", fault=PACED)
        job.wait_step(EVERY + 2)
        free = shutil.disk_usage(checkpoints).free
        (checkpoints / "filler").write_bytes(bytes(free - (1 << 20)))
        job.wait_step(2 * EVERY + 2)
        steps = sorted(path.name for path in checkpoints.glob("step_*"))
        assert steps == [f"step_{EVERY:08d}"]
        job.kill(rank=1)
        (checkpoints / "filler").unlink()
        finished(job)
        assert_same(job, whole)
        assert f"no checkpoint of step {2 * EVERY}: " in job.said()
        assert "training goes on" in job.said()
        record(job, "trained on without that checkpoint, said so; equal")
    finally:
        cluster.run("umount", "-l", str(checkpoints))


@pytest.fixture(scope="module")
def halted(submit: Submit) -> Job:
    """A run that was cancelled with checkpoints of steps 10 and 20 on the disk."""
    job = submit("halted", "callbacks.checkpoint.keep=4", fault=PACED)
    job.wait_step(2 * EVERY + 2)
    job.kill(rank=1)
    job.kill(rank=0)
    job.cancel()
    return job


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _swap(path: Path) -> None:
    older = path.parents[1] / f"step_{EVERY:08d}" / path.name
    shutil.copyfile(older, path)


@pytest.mark.parametrize(
    "damage",
    [pytest.param(_flip, marks=pytest.mark.ci), _truncate, _swap],
    ids=["flip", "truncate", "swap"],
)
def test_damaged_checkpoint(damage, submit: Submit, halted: Job, whole: Job, record) -> None:
    name = f"damaged{damage.__name__}"
    run = halted.run.with_name(name)
    shutil.copytree(halted.run, run)
    steps = sorted(path.name for path in (run / "checkpoints").glob("step_*"))
    newest = run / "checkpoints" / steps[-1]
    damage(sorted(newest.glob("rank_*.safetensors"))[-1])
    job = finished(submit(name, "callbacks.checkpoint.keep=4"))
    assert newest.with_suffix(".damaged").exists()
    assert "is damaged" in job.said()
    assert_same(job, whole)
    record(job, f"{newest.name} set aside and named; equal")


def test_stopped_rank(submit: Submit, whole: Job, record) -> None:
    job = submit(
        "stopped", "callbacks.watchdog.minutes=0.2", "callbacks.watchdog.patience_s=2", fault=PACED
    )
    job.wait_step(14)
    job.kill(1, signal.SIGSTOP)
    finished(job)
    assert job.attempts == 2
    assert "exit code 75" in job.said()
    # A rank that is stopped can write none; the one that waits for it does.
    assert (job.run / "stacks" / "rank_00000.txt").read_text()
    assert_same(job, whole)
    record(job, "the waiting rank wrote its stacks and ended it, requeued; equal")


@pytest.mark.ci
def test_nan_on_one_rank(submit: Submit, whole: Job, record) -> None:
    """The same picture of rank 1 is not finite in both runs; one of them is killed as well."""
    poisoned = finished(submit("nan", fault="nan_at: 17"))
    job = submit("nan_killed", fault=f"nan_at: 17, {PACED}")
    job.wait_step(23)
    job.kill(rank=0)
    finished(job)
    assert_same(job, poisoned)
    assert checksums(poisoned.run) != checksums(whole.run)
    for one in (poisoned, job):
        skipped = Manifest.read(by_step(one.run / "checkpoints")[0]).facts["skipped"]
        assert skipped["total"] == 1
        # Named are the samples of the rank that was not finite: its half of step 17.
        mine = range(16 * BATCH + BATCH // 2, 17 * BATCH)
        assert skipped["last"][0]["positions"] == list(mine)
    rows = [json.loads(row) for row in (job.run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    record(job, "step 17 skipped on both ranks; equal")


def test_poison_stops_the_job(submit: Submit, record) -> None:
    """A sample that kills whoever meets it: two attempts, and then words instead of a third."""
    job = submit("poison", fault="die_at: 17")
    assert job.wait() == "FAILED"
    log = job.said()
    assert job.attempts == 2
    assert "step 17 killed it twice, with no checkpoint newer than step 10 in between" in log
    assert "rank 1, step 17: zod_" in log
    record(job, "stopped after two attempts; named step and samples")
