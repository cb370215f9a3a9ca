"""Files that stand on slow, far or failing storage: written whole, read with patience, cached.

A path with `://` (s3, gs, https, ...) is remote and goes through fsspec; all others, NFS and Lustre
among them, are local. An operation that hangs or fails for the moment is tried again for about two
minutes; what is not there, or not allowed, fails at once.
"""

import errno
import fcntl
import hashlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

log = logging.getLogger(__name__)

TIMEOUT_S = 20.0  # of one attempt; a file server that is restarted is back within three of them
PAUSES_S = (1.0, 4.0, 16.0)  # before the second attempt, the third, ...
CHUNK = 8 * 2**20  # bytes of a remote file that are asked for at once, each within TIMEOUT_S
NUM_LOCKS = 64  # files that downloads lock; two shards of one lock wait for one another
ABANDONED_S = 3600.0  # a download whose file has not grown for so long was killed
# What a file server says while it is unwell. All else is final: it would be said again.
TRANSIENT = {
    *(errno.EIO, errno.EAGAIN, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN),
    *(errno.ECONNRESET, errno.ECONNABORTED, errno.ENETDOWN, errno.ENETUNREACH),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH),
}
FULL = (errno.ENOSPC, errno.EDQUOT)  # what it says when no more can be written
T = TypeVar("T")


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under `path` whole and on the disk, or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    with atomic(path) as file:
        file.write(text.encode())


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold `path` alone among the processes of this machine, and of others that share its locks."""
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            # Lustre and some others have locks only if they were mounted so.
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            log.warning("%s cannot be locked (%s); let only one process write there", path, error)
        yield


class _Caller(threading.Thread):
    """A thread that makes one call after another, until it is given None."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.calls: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run(self) -> None:
        while (call := self.calls.get()) is not None:
            try:
                self.answers.put((call(), None))
            except BaseException as error:
                self.answers.put((None, error))
            # It holds files, which close when nothing does.
            del call


# Threads without a call: to begin one for each read would cost more than a cached read.
_idle: list[_Caller] = []
os.register_at_fork(after_in_child=_idle.clear)


def within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns or raises, or a TimeoutError.

    A call that hangs cannot be ended: its thread is left behind, with all it holds.
    """
    try:
        caller = _idle.pop()
    except IndexError:
        caller = _Caller()
        caller.start()
    caller.calls.put(call)
    try:
        value, error = caller.answers.get(timeout=seconds)
    except queue.Empty:
        caller.calls.put(None)
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    _idle.append(caller)
    if error is not None:
        raise error
    return value


def patiently(call: Callable[[], T], name: str) -> T:
    """What `call` returns, each attempt within TIMEOUT_S; `name` is for the log."""
    return _repeat(lambda: within(TIMEOUT_S, call), name)


def _repeat(call: Callable[[], T], name: str) -> T:
    for pause in PAUSES_S:
        try:
            return call()
        except OSError as error:
            if not isinstance(error, TimeoutError) and error.errno not in TRANSIENT:
                raise
            log.warning("%s: %s; trying again in %g s", name, error or type(error).__name__, pause)
            time.sleep(pause)
    return call()


def is_remote(path: str | Path) -> bool:
    return "://" in str(path)


def read_bytes(path: str | Path) -> bytes:
    """A small file, local or remote, as a whole."""
    if not is_remote(path):
        return patiently(Path(path).read_bytes, str(path))
    return _repeat(lambda: b"".join(_chunks(str(path))), str(path))


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Copies of remote files in a local folder, of at most `max_bytes` together.

    The folder is `shards` in $MOFO_CACHE, or in ~/.cache/mofo.

    Files go out by when they were last opened. Processes may share a folder (on a disk of their
    own machine); one of them downloads what all want.
    """

    folder: str = field(
        default_factory=lambda: f"{os.environ.get('MOFO_CACHE') or '~/.cache/mofo'}/shards"
    )
    max_bytes: int = 100 * 2**30

    def open(self, url: str, name: str, size: int) -> BufferedReader:
        """The copy, kept under `name`, of `url`, which has `size` bytes; downloaded if missing."""
        # Names come from manifests, which anyone may have written.
        if os.path.basename(name) != name or name.startswith("."):
            raise ValueError(f"{name!r} leaves the cache; convert the set of {url} again")
        path = Path(self.folder).expanduser() / name
        while True:
            # Between a look and the opening another process may have needed the room.
            with suppress(FileNotFoundError):
                os.utime(path)
                return open(path, "rb")
            if size > self.max_bytes:
                raise ValueError(
                    f"{url} has {size} bytes, but the cache holds {self.max_bytes}; allow it more"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            slot = int(hashlib.sha256(name.encode()).hexdigest(), 16) % NUM_LOCKS
            with lock(path.with_name(f".lock-{slot:02d}")):
                if not path.exists():
                    _repeat(lambda: self._download(url, path, size), url)

    def _download(self, url: str, path: Path, size: int) -> None:
        partial = path.with_name(f"{path.name}.partial")
        with lock(path.with_name(".lock-room")):
            self._make_room(path.parent, size)
            # At its full size from the start, so that others count with it.
            with open(partial, "wb") as file:
                file.truncate(size)
        with open(partial, "r+b") as file:
            for chunk in _chunks(url):
                file.write(chunk)
            got = file.tell()
        if got != size:
            raise OSError(errno.EIO, f"{got} bytes came of {size}")
        os.replace(partial, path)

    def _make_room(self, folder: Path, size: int) -> None:
        files = []
        for entry in os.scandir(folder):
            with suppress(FileNotFoundError):
                files.append((entry.stat().st_mtime, entry.stat().st_size, Path(entry.path)))
        free = self.max_bytes - sum(taken for _, taken, _ in files)
        for used, taken, path in sorted(files):
            growing = path.suffix == ".partial" and used > time.time() - ABANDONED_S
            if free < size and taken and not growing:
                path.unlink(missing_ok=True)
                free += taken


def _chunks(url: str) -> Iterator[bytes]:
    """The bytes of a remote file in order."""
    # Imported late: most sets are local.
    import fsspec

    try:
        files, path = within(TIMEOUT_S, lambda: fsspec.url_to_fs(url))
        file = within(TIMEOUT_S, lambda: files.open(path, "rb"))
        try:
            while chunk := within(TIMEOUT_S, lambda: file.read(CHUNK)):
                yield chunk
        finally:
            # Not waited for: closing may hang as well.
            threading.Thread(target=file.close, daemon=True).start()
    except ImportError as error:
        raise ValueError(f"{url} needs another package: {error}") from error
    except (FileNotFoundError, PermissionError, TimeoutError, ValueError):
        raise
    except Exception as error:
        # Each kind of store has exceptions of its own; none is known to be final.
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error
