"""The local cluster and the jobs on it, as the tests drive them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOCAL = ROOT / "slurm" / "local.sh"
PATIENCE_S = 240.0  # for anything that should happen soon; imports alone take a minute when busy


def wait_for(happened: Callable[[], bool], what: str, patience: float = PATIENCE_S) -> None:
    end = time.monotonic() + patience
    while not happened():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not happen within {patience:.0f} s")
        time.sleep(0.1)


@dataclass
class Cluster:
    """Nodes that all are this machine. `folder` holds logs and runs."""

    folder: Path
    port: int
    environ: dict[str, str] = field(default_factory=dict)

    def start(self, nodes: int) -> None:
        # munge wants to be found by everybody, and pytest's folders are its own.
        self.daemons = Path(tempfile.mkdtemp(prefix="mofo-slurm-"))
        self.daemons.chmod(0o755)
        self.environ = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("SLURM", "SBATCH"))
        }
        self.environ |= {
            "MOFO_SLURM_DIR": str(self.daemons / "slurm"),
            "MOFO_SLURM_PORT": str(self.port),
            "SLURM_CONF": str(self.daemons / "slurm" / "slurm.conf"),
            "MOFO_RUNS": str(self.folder / "runs"),
            "MOFO_PYTHON": sys.executable,
            # The nodes' names resolve nowhere, and all of them are this machine.
            "MASTER_ADDR": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
        self.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        self.run(str(LOCAL), "start", str(nodes))

    def stop(self) -> None:
        self.run(str(LOCAL), "stop")
        shutil.rmtree(self.daemons)

    def run(self, *command: str, **environ: str) -> str:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self.environ | environ,
            text=True,
            capture_output=True,
            timeout=PATIENCE_S,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def submit(
        self, name: str, *overrides: str, options: tuple[str, ...] = (), **environ: str
    ) -> "Job":
        """`slurm/train.sbatch` on two nodes with one CPU rank each, unless `options` say else."""
        log = self.folder / f"{name}.log"
        fit = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0")
        fit += ("--time=10", "--signal=USR1@60", f"--output={log}")
        script = ("slurm/train.sbatch", f"name={name}", *overrides)
        number = self.run("sbatch", "--parsable", *fit, *options, *script, **environ).strip()
        return Job(self, number, log, self.folder / "runs" / name)


@dataclass
class Job:
    cluster: Cluster
    number: str
    log: Path
    run: Path

    def show(self, name: str) -> str:
        text = self.cluster.run("scontrol", "show", "job", "-o", self.number)
        return re.search(rf"\b{name}=(\S*)", text)[1]

    def send(self, name: str) -> None:
        self.cluster.run("scancel", "-s", name, self.number)

    def cancel(self) -> None:
        self.cluster.run("scancel", self.number)
        self.wait()

    def wait(self, patience: float = PATIENCE_S) -> str:
        """The state in which it ended."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}
        self._until(lambda: self.show("JobState") in ended, "its end", patience)
        return self.show("JobState")

    def _until(self, happened: Callable[[], bool], what: str, patience: float) -> None:
        try:
            wait_for(happened, f"{self.run.name}: {what}", patience)
        except TimeoutError as error:
            raise TimeoutError(f"{error}; its log ends with\n{self.said()[-3000:]}") from None

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    @property
    def attempts(self) -> int:
        return len(list((self.run / "attempts").glob("[0-9]*.jsonl")))

    def pid(self, rank: int) -> int:
        return int((self.run / "faults" / f"rank_{rank}.pid").read_text())

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid(rank), number)

    def steps(self) -> int:
        path = self.run / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def wait_step(self, step: int) -> None:
        self._until(lambda: self.steps() >= step, f"step {step}", PATIENCE_S)

    def wait_attempt(self, number: int) -> None:
        self._until(lambda: self.attempts >= number, f"attempt {number}", PATIENCE_S)

    def trained_on(self) -> dict[int, list[int]]:
        """For each step the positions of all ranks, as they were last trained on."""
        out: dict[int, list[int]] = {}
        for path in sorted((self.run / "faults").glob("samples_*.jsonl")):
            rows = map(json.loads, path.read_text().splitlines())
            last = {row["step"]: row["positions"] for row in rows}
            for step, positions in last.items():
                out.setdefault(step, []).extend(positions)
        return out
