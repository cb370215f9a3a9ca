"""Where numbers come from: the command, the commit of the code and the machine."""

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where numbers come from."""

    command: str
    commit: str
    machine: str


def origin() -> Origin:
    """This process's command, commit and machine."""
    return Origin(
        command=" ".join(["python", *sys.argv]),
        commit=commit(),
        machine=torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
    )


@cache
def commit() -> str:
    """HEAD of the checkout this package lies in, "+" if it is modified; "" outside of one."""
    ask = ["git", "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=12"]
    here = Path(__file__).parent
    try:
        done = subprocess.run(ask, cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _processor() -> str:
    return f"{platform.machine()} CPU, {len(os.sched_getaffinity(0))} cores"
