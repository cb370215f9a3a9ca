"""The cluster of a session, real road frames to train on, and the runs that nothing disturbs."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mofo.data.make import make
from tests.slurm.cluster import ROOT, Cluster, Job
from tests.slurm.verdict import BATCH, EVERY, NUM_STEPS, Submit, finished

NODES = 3  # one to spare: a run on two goes on after one of these was lost
PORT = 28817
TABLE = ROOT / "runs" / "test-slurm.md"

_rows: list[str] = []


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if os.getuid():
        pytest.skip("a local SLURM needs root")
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), PORT)
    try:
        cluster.start(NODES)
    except RuntimeError as error:
        if shutil.which("slurmctld"):
            raise
        pytest.skip(f"SLURM cannot be installed: {error}")
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve road frames with sparse LiDAR depth, in three shards."""
    folder = tmp_path_factory.mktemp("data")
    keys = (ROOT / "data" / "splits" / "real_train.txt").read_text().split()
    (folder / "keys.txt").write_text("\n".join([k for k in keys if k.startswith("zod_")][:12]))
    make(
        folder / "road",
        converter="samples",
        keys=str(folder / "keys.txt"),
        samples_per_shard=4,
        processes=1,
    )
    return folder / "road"


@pytest.fixture(scope="session")
def submit(cluster: Cluster, road: Path) -> Submit:
    """A small model on these frames; `fault` are the arguments of faults.Fault."""

    def run(name: str, *overrides: str, fault: str = "", **rest) -> Job:
        folder = cluster.folder / "runs" / name / "faults"
        hook = f"_target_: tests.slurm.faults.Fault, folder: {folder}"
        hook = f"+callbacks.fault={{{hook}{', ' if fault else ''}{fault}}}"
        return cluster.submit(
            name,
            "model=xs",
            "~data.sources.real",
            f"data.sources.scenes.shards={road}",
            "data.sources.scenes.make=null",
            "data.size=[32,32]",
            f"data.batch_size={BATCH}",
            "optimizer.warmup_steps=4",
            "callbacks.ema.decay=0.9",
            f"callbacks.checkpoint.every_n_steps={EVERY}",
            "callbacks.progress.every_n_steps=5",
            f"trainer.max_steps={NUM_STEPS}",
            hook,
            *overrides,
            **rest,
        )

    return run


@pytest.fixture(scope="session")
def whole(submit: Submit) -> Job:
    """Two nodes, DDP, undisturbed."""
    return finished(submit("whole"))


@pytest.fixture(scope="session")
def whole_sharded(submit: Submit) -> Job:
    """Two nodes, FSDP2, undisturbed."""
    return finished(submit("whole_sharded", "trainer=fsdp"))


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Iterator[Callable[[Job, str], None]]:
    """Call it with what was seen: a row of the table."""
    began = time.monotonic()
    name = request.node.name.removeprefix("test_").replace("_", " ")
    noted: list[str] = []

    def note(job: Job, seen: str) -> None:
        noted.append(f"{job.attempts} | {seen}")

    yield note
    took = time.monotonic() - began
    _rows.append(f"| {name} | {noted[0] if noted else '- | failed'} | {took:.0f} s |")


def pytest_terminal_summary(terminalreporter) -> None:
    if _rows:
        lines = ["| what happened | attempts | seen | took |", "|---|---|---|---|", *_rows]
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text("\n".join(lines) + "\n")
        terminalreporter.write_line("\n".join(lines))
