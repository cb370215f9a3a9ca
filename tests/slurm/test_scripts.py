"""The job scripts on a real scheduler: accepted, arguments untouched, bad starts refused."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, Job
from tests.slurm.verdict import Submit, finished

pytestmark = pytest.mark.slurm

# What a shell, Hydra or YAML could stumble over.
ODD = [
    "experiment=small",
    "data.size=[32, 32]",
    "also={a b: 'c', d: \"e\"}",
    "name=it's $HOME * `date`",
    'callbacks.preview.captions=["a red, round table"]',
    "",
    "~data.sources.real",
]


@pytest.fixture
def echo(tmp_path: Path) -> Path:
    """Stands in for Python: writes down its arguments and its environment."""
    script = tmp_path / "python"
    script.write_text(
        "#!/usr/bin/env python3\nimport json, os, sys\n"
        "if '-m' in sys.argv: sys.exit(1)\n"
        f"path = '{tmp_path}/' + os.environ['SLURM_JOB_ID'] + '.' + os.environ['SLURM_PROCID']\n"
        "json.dump([sys.argv[1:], dict(os.environ)], open(path, 'w'))\n"
    )
    script.chmod(0o755)
    return script


def run(cluster: Cluster, echo: Path, *command: str) -> list[tuple[list[str], dict[str, str]]]:
    """Arguments and variables of each rank that a script started."""
    log = str(echo.with_name("log"))
    number = cluster.run(
        "sbatch", "--parsable", "--wait", "-o", log, *command, MOFO_PYTHON=str(echo)
    )
    assert number.strip(), Path(log).read_text()
    paths = sorted(path for path in echo.parent.glob("*.*") if path.suffix[1:].isdigit())
    return [tuple(json.loads(path.read_text())) for path in paths]


@pytest.mark.ci
@pytest.mark.parametrize(
    "command",
    [
        ["--nodes=3", "slurm/train.sbatch", "experiment=klein_9b_sparse"],
        ["--nodes=2", "--array=1-3", "slurm/sweep.sbatch", "rates.txt"],
        ["--array=1-5", "slurm/evaluate.sbatch", "a,b,c,d,e"],
    ],
    ids=lambda command: next(Path(word).stem for word in command if ".sbatch" in word),
)
def test_the_scheduler_accepts_each_script_as_it_is(cluster: Cluster, command: list[str]) -> None:
    said = cluster.run("sbatch", "--test-only", *command)
    assert "to start at" in said
    with pytest.raises(RuntimeError, match="node configuration is not available"):
        cluster.run("sbatch", "--test-only", "--gpus-per-node=9", *command)


@pytest.mark.ci
def test_arguments_reach_every_rank_untouched(cluster: Cluster, echo: Path) -> None:
    small = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1"]
    ranks = run(cluster, echo, *small, "slurm/train.sbatch", *ODD)
    assert len(ranks) == 4
    for arguments, environ in ranks:
        assert arguments == ["train.py", *ODD]
        assert environ["SLURM_NTASKS_PER_NODE"] == "2"
        assert environ["MASTER_ADDR"] == "127.0.0.1"
    assert len({environ["MASTER_PORT"] for _, environ in ranks}) == 1


def test_a_sweep_takes_a_line_each(cluster: Cluster, echo: Path, tmp_path: Path) -> None:
    lines = tmp_path / "rates.txt"
    lines.write_text('optimizer.lr=1e-4 "data.size=[32, 32]"\n\nseed=2 name=mine\n')
    one = ["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]
    array = ["--array=1-2", *one, "slurm/sweep.sbatch", str(lines), "experiment=small"]
    given = sorted(arguments[1:] for arguments, _ in run(cluster, echo, *array))
    assert given == [
        ["experiment=small", "optimizer.lr=1e-4", "data.size=[32, 32]", "name=rates_1"],
        ["experiment=small", "seed=2", "name=mine"],
    ]


def test_an_evaluation_takes_a_set_each(cluster: Cluster, echo: Path) -> None:
    array = [
        "--array=1-2",
        "--cpus-per-task=1",
        "slurm/evaluate.sbatch",
        "NYUv2,KITTI",
        "model=a b",
    ]
    given = sorted(arguments for arguments, _ in run(cluster, echo, *array))
    assert given == [
        ["evaluate.py", "sets=[KITTI]", "model=a b"],
        ["evaluate.py", "sets=[NYUv2]", "model=a b"],
    ]


def refused(job: Job, *words: str) -> None:
    """It failed at once, said why in one place, and was not tried again."""
    assert job.wait() == "FAILED"
    said = job.said()
    for word in words:
        assert word in said
    assert "stopped, not requeued" in said
    assert "Traceback" not in said
    assert said.count(words[0]) == 1
    assert job.show("Restarts") == "0"


def test_bad_overrides_are_refused(submit: Submit) -> None:
    refused(submit("contradicting", "trainer.num_nodes=4"), "num_nodes is 4, but SLURM started 2")
    refused(submit("misspelt", "optimizer.lrr=1"), "Could not override 'optimizer.lrr'")


def test_a_run_in_use_is_refused_and_not_disturbed(submit: Submit) -> None:
    holder = submit("held", fault="pace_s: 0.5", options=("--nodes=1",))
    holder.wait_step(2)
    intruder = submit("held", options=("--nodes=1", f"--output={holder.log}.second"))
    intruder.log = Path(f"{holder.log}.second")
    refused(intruder, "is in use by process", f"SLURM job {holder.number}")
    finished(holder)
    assert holder.attempts == 1


@pytest.fixture
def nodes(tmp_path: Path) -> str:
    """What each node runs its ranks under: its own disk at `tmp_path`/local."""
    (tmp_path / "local").mkdir()
    for node in ("n1", "n2", "n3"):
        (tmp_path / node).mkdir()
    script = tmp_path / "launch"
    script.write_text(
        "#!/bin/sh\nexport DISK=" + str(tmp_path) + "\n"
        "exec unshare -m sh -c 'mount --bind $DISK/$SLURMD_NODENAME $DISK/local && exec \"$@\"' sh "
        '"$@"\n'
    )
    script.chmod(0o755)
    return str(script)


def test_a_run_folder_that_is_not_shared_is_refused(
    submit: Submit, nodes: str, tmp_path: Path
) -> None:
    job = submit("apart", f"paths.runs={tmp_path}/local", MOFO_LAUNCH=nodes)
    refused(job, "is not shared", "which these do not see: n2")


def test_shards_that_one_node_lacks_are_named(
    submit: Submit, nodes: str, road: Path, tmp_path: Path
) -> None:
    for node in ("n1", "n2", "n3"):
        shutil.copytree(road, tmp_path / node / "road")
    os.unlink(tmp_path / "n2" / "road" / "samples-000001.tar")
    local = f"data.sources.scenes.shards={tmp_path}/local/road"
    job = submit("lacking", local, MOFO_LAUNCH=nodes)
    refused(job, "n2: source 'scenes': 1 of 3 shards", "samples-000001.tar (missing)")
