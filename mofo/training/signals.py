"""What the scheduler says by signal: noted here, acted on by the guard between two steps.

`train.py` installs this before the imports that take seconds: until then a signal would end the
process, which lies on the way to a checkpoint. A handler that did more than take a note would run
in the middle of a collective of one rank while the others wait in another.
"""

import os
import signal
from types import FrameType

LIMIT = signal.SIGUSR1  # the time limit is near: slurm/train.sbatch asks for it
END = signal.SIGTERM  # preempted, cancelled, or stopped by torchrun or by hand

_noted: set[int] = set()
_owner = 0


def install() -> None:
    """Note both signals from now on."""
    global _owner
    _owner = os.getpid()
    for number in (LIMIT, END):
        signal.signal(number, _note)


def keep() -> None:
    """Install again, if this process did: a library may have taken the signals since."""
    if _owner == os.getpid():
        install()


def name(number: int) -> str:
    return signal.Signals(number).name


def noted() -> signal.Signals | None:
    """The signal that came, if any; of both, LIMIT, which leaves no doubt what is wanted."""
    return next((number for number in (LIMIT, END) if number in _noted), None)


def forget() -> None:
    _noted.clear()


def _note(number: int, frame: FrameType | None) -> None:
    # SLURM signals every process of a job, and children of this one inherit the handler.
    if os.getpid() == _owner:
        _noted.add(number)
