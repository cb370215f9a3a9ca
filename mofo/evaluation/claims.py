"""Who works on what, so that several processes on one folder do each piece of work once.

    with Claims(folder).claim("NYUv2/000016") as ours:
        ...  # if ours, nobody else has the piece until the block ends

A claim is a file `PIECE.N` that its owner created: only one process can create a file, on network
file systems too, where locks cannot be relied on. It holds the owner's host and process, and is
touched while the owner lives; at the end it says that it is released. Whoever finds the newest
claim released, or its owner dead, may create `PIECE.N+1`, which again only one can. Claims say
only who works now; what is done is told by the lines that were written.
"""

import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

RELEASED = "released"
HEARTBEAT = 10.0  # seconds between the touches of a claim
PATIENCE = 60.0  # seconds without one after which an owner is taken for dead, on any host


class Claims:
    """The claims under a folder, as one process sees them."""

    def __init__(self, folder: str | Path, patience: float = PATIENCE) -> None:
        self.folder, self.patience = Path(folder), patience
        # Clocks of hosts differ, so a claim is watched: its last touch, and since when it stands.
        self._watched: dict[Path, tuple[int, float]] = {}

    @contextmanager
    def claim(self, piece: str) -> Iterator[bool]:
        """Whether the piece is ours until the block ends; False while another has it."""
        path = self._create(self.folder / piece)
        if path is None:
            yield False
            return
        with _kept_alive(path):
            try:
                yield True
            finally:
                path.write_text(RELEASED)

    def _create(self, piece: Path) -> Path | None:
        piece.parent.mkdir(parents=True, exist_ok=True)
        numbers = [
            int(number)
            for stem, _, number in (name.rpartition(".") for name in os.listdir(piece.parent))
            if stem == piece.name
        ]
        newest = max(numbers, default=-1)
        if numbers and not self._is_free(piece.with_name(f"{piece.name}.{newest}")):
            return None
        path = piece.with_name(f"{piece.name}.{newest + 1}")
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return None
        with open(handle, "w") as file:
            json.dump({"host": _host(), "pid": os.getpid(), "started": _started(os.getpid())}, file)
        return path

    def _is_free(self, path: Path) -> bool:
        try:
            text, touched = path.read_text(), path.stat().st_mtime_ns
        except OSError:
            return False
        if text == RELEASED:
            return True
        with suppress(ValueError):  # a file that is still being written, or never was to its end
            owner = json.loads(text)
            if owner["host"] == _host() and _started(owner["pid"]) != owner["started"]:
                return True
        before, since = self._watched.get(path, (None, 0.0))
        if before != touched:
            self._watched[path] = (touched, time.monotonic())
            return False
        return time.monotonic() - since > self.patience


@contextmanager
def _kept_alive(path: Path) -> Iterator[None]:
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(HEARTBEAT):
            with suppress(OSError):  # a server that is away for a while
                os.utime(path)

    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _host() -> str:
    """This machine, and the space in which its process numbers are unique (containers have own)."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{platform.node()} {space}"


def _started(pid: int) -> str | None:
    """When a process of this host started, None if it is gone: numbers are used again."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    state, started = after_name[0], after_name[19]
    return None if state in "ZX" else started
