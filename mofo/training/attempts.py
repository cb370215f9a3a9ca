"""The attempts at a run: who has its folder, how earlier ones ended, and whether another helps.

`attempts/0003.jsonl` in the run folder is the third. Its first line says who made it, later ones
what became of it: {"fenced": 4} by its successor, {"end": ...} by itself or by whoever found it
dead. The holder touches the file every BEAT_S seconds. An attempt is over once its process is gone
or its file is no longer touched; what lives on regardless, on a node whose daemon died, finds
itself fenced off by the attempt of its restarted job, and writes nothing more.

Each rank keeps in `in_flight/` which samples it works on. A batch script asks after a death

    python -m mofo.training.attempts RUN_FOLDER STATUS

and requeues if that exits with 0: unless the last two attempts both died with no newer checkpoint
between them. Standard library only: it answers at once, on nodes without the environment too.
"""

import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BEAT_S = 10.0
PATIENCE_S = 3.5 * BEAT_S  # without a touch, a holder on another machine is taken for dead
TRY_AGAIN = 75  # exit status (EX_TEMPFAIL): the same command goes on from the last checkpoint
MOST_SAMPLES = 16  # of each rank, in a message


class Refused(ValueError):
    """A start that cannot go well; its message is for whoever typed the command."""


class FencedOff(RuntimeError):
    """Another attempt has taken this run over."""


class Attempt:
    """The hold on a run folder by this process."""

    def __init__(self, path: Path) -> None:
        self.path, self.number = path, int(path.stem)
        self._over = threading.Event()
        # A thread, because a step may take longer than another attempt waits.
        threading.Thread(target=self._beat, name="attempt", daemon=True).start()

    def still_ours(self) -> bool:
        """Whether no later attempt has taken the folder over; asked before anything is written."""
        # Opened each time: that is when a network file system looks whether a file has changed.
        return not any("fenced" in line for line in _lines(self.path))

    def check(self) -> None:
        if not self.still_ours():
            raise FencedOff(
                f"another attempt has taken over {self.path.parents[1]}; this one, number "
                f"{self.number} on {socket.gethostname()}, writes nothing more"
            )

    def end(self, how: str, **facts: Any) -> None:
        """Give the folder back."""
        self._over.set()
        _append(self.path, {"end": how, **facts})

    def die(self, reason: str) -> None:
        """The same, after a failure."""
        self._over.set()
        bury(self.path.parents[1], self.path, reason=reason)

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            try:
                os.utime(self.path)
            except OSError:  # a file system that stalls must not end the run
                continue


def take(folder: Path, environ: Mapping[str, str] = os.environ) -> Attempt:
    """Become the holder of `folder`; Refused if a live process is."""
    (folder / "attempts").mkdir(parents=True, exist_ok=True)
    paths = _paths(folder)
    me = _myself(environ)
    if paths:
        before = paths[-1]
        if not _supersedes(me, before):
            _refuse_if_alive(before, folder)
        bury(folder, before)
        _append(before, {"fenced": len(paths) + 1})
    path = folder / "attempts" / f"{len(paths) + 1:04d}.jsonl"
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    _append(partial, me)
    try:
        # Unlike a rename this fails if another process made the same attempt in the meantime.
        os.link(partial, path)
    except FileExistsError:
        raise Refused(f"{folder} was just taken by another process; {_remedy()}") from None
    finally:
        partial.unlink()
    return Attempt(path)


def count(folder: Path) -> int:
    """How many attempts there were."""
    return len(_paths(folder))


def bury(folder: Path, path: Path, **facts: Any) -> None:
    """Write down how an attempt died, unless it or another process did."""
    lines = _lines(path)
    if any("end" in line for line in lines):
        return
    died = {"checkpoint": committed(folder), "in_flight": _in_flight(folder, int(path.stem))}
    _append(path, {"end": "died", **died, **facts})


def committed(folder: Path) -> int:
    """Step of the newest checkpoint that stands under its final name; 0 if there is none."""
    names = [path.name for path in (folder / "checkpoints").glob("step_*")]
    found = [re.fullmatch(r"step_(\d+)", name) for name in names]
    return max((int(match[1]) for match in found if match), default=0)


def judge(folder: Path, status: int, environ: Mapping[str, str] = os.environ) -> tuple[bool, str]:
    """Whether another attempt is worth it after one ended with `status`, and why (not)."""
    job, everyones = environ.get("SLURM_JOB_ID"), _paths(folder)
    paths = [path for path in everyones if _lines(path)[0]["job"] == job]
    if not paths or paths[-1] != everyones[-1]:
        return False, "it ended before it had its run folder"
    bury(folder, paths[-1], status=status)
    last = _ending(paths[-1])
    if last["end"] != "died":
        return status == TRY_AGAIN, f"the attempt {last['end']}"
    if not last["in_flight"] and status < 128 and status != TRY_AGAIN:
        return False, "it ended before its first step"
    before = _ending(paths[-2]) if len(paths) > 1 else {"end": "none"}
    if before["end"] != "died" or last["checkpoint"] > before["checkpoint"]:
        where = f"checkpoint {last['checkpoint']}" if last["checkpoint"] else "the beginning"
        return True, f"attempt {paths[-1].stem} died; going on from {where}"
    return False, _twice(before, last)


def fly(folder: Path, rank: int, attempt: int, step: int, samples: Sequence[str]) -> None:
    """Note what a rank works on: one small write a step, on disk once its process is gone."""
    (folder / "in_flight").mkdir(exist_ok=True)
    record = {"attempt": attempt, "rank": rank, "step": step, "samples": list(samples)}
    (folder / "in_flight" / f"{rank:05d}.json").write_text(json.dumps(record))


def _twice(before: dict[str, Any], last: dict[str, Any]) -> str:
    steps = [max((row["step"] for row in end["in_flight"]), default=0) for end in (before, last)]
    step = f"step {steps[1]}" if steps[0] == steps[1] else f"step {steps[0]}, then {steps[1]},"
    point = f"no checkpoint newer than step {last['checkpoint']}"
    lines = [f"{step} killed it twice, with {point} in between. In flight were"]
    for row in last["in_flight"]:
        shown = row["samples"][:MOST_SAMPLES]
        more = len(row["samples"]) - len(shown)
        rest = f" and {more} more" if more else ""
        lines.append(f"  rank {row['rank']}, step {row['step']}: {', '.join(shown)}{rest}")
    return "\n".join(lines)


def _in_flight(folder: Path, attempt: int) -> list[dict[str, Any]]:
    found = [
        line for path in sorted((folder / "in_flight").glob("*.json")) for line in _lines(path)
    ]
    return [line for line in found if line["attempt"] == attempt]


def _ending(path: Path) -> dict[str, Any]:
    return next((line for line in _lines(path) if "end" in line), {"end": "still runs"})


def _paths(folder: Path) -> list[Path]:
    return sorted((folder / "attempts").glob("[0-9]*.jsonl"))


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:  # half a line of a killed process
            continue
    return lines


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _myself(environ: Mapping[str, str]) -> dict[str, Any]:
    return {
        "host": _host(),
        "pid": os.getpid(),
        "born": _born(os.getpid()),
        "job": environ.get("SLURM_JOB_ID"),
        "restart": int(environ.get("SLURM_RESTART_COUNT", "0")),
        "since": time.time(),
    }


def _host() -> str:
    """This machine and, in a container, this container: where a pid means something."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{socket.gethostname()} {space}".strip()


def _born(pid: int) -> str | None:
    """When a process that runs was started, in ticks since boot: pids are given out again."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state[0] in "ZX" else state[19]  # killed, and waiting for somebody to notice


def _supersedes(me: dict[str, Any], path: Path) -> bool:
    """Whether SLURM started us in the place of that attempt, so that it has no claim left."""
    other = _lines(path)[0]
    return (
        other["job"] is not None and other["job"] == me["job"] and other["restart"] < me["restart"]
    )


def _refuse_if_alive(path: Path, folder: Path) -> None:
    lines = _lines(path)
    who, ended = lines[0], any("end" in line for line in lines)
    if ended:
        return
    here = who["host"] == _host()
    if _born(who["pid"]) == who["born"] is not None if here else _beats(path):
        job = f", SLURM job {who['job']}" if who["job"] else ""
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(who["since"]))
        raise Refused(
            f"{folder} is in use by process {who['pid']} on {who['host'].split()[0]}{job}, since "
            f"{since}; {_remedy()}"
        )


def _beats(path: Path) -> bool:
    """Whether its holder touches it; seen as a change, because clocks of machines differ."""
    first, waited = path.stat().st_mtime_ns, 0.0
    if time.time() - first / 1e9 > 10 * PATIENCE_S:
        return False
    print(f"waiting for {PATIENCE_S:.0f} s to see whether {path.stem} is alive", flush=True)
    while waited < PATIENCE_S:
        time.sleep(BEAT_S / 10)
        waited += BEAT_S / 10
        with path.open() as file:
            if os.fstat(file.fileno()).st_mtime_ns != first:
                return True
    return False


def _remedy() -> str:
    return "end that one, or give this run a name of its own (name=...)"


if __name__ == "__main__":
    again, reason = judge(Path(sys.argv[1]), int(sys.argv[2]))
    print(f"mofo: {'requeued' if again else 'stopped, not requeued'}: {reason}", flush=True)
    sys.exit(0 if again else 1)
