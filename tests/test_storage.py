"""Slow, failing and far storage: tried again, copied within bounds, named when it stays away."""

import errno
import fcntl
import functools
import http.server
import io
import json
import logging
import os
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pictures import picture

from mofo.data import shards as shards_module
from mofo.data import storage
from mofo.data.shards import DamagedSample, Shards
from mofo.data.storage import Cache, atomic, lock, patiently, within
from mofo.data.write import write

KEYS = [picture(number).key for number in range(20)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """20 pictures in shards of 4."""
    write(map(picture, range(20)), tmp_path / "set", "pictures", samples_per_shard=4)
    return tmp_path / "set"


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four attempts as ever, in a fraction of the time."""
    monkeypatch.setattr(storage, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(storage, "PAUSES_S", (0.01, 0.02, 0.03))


class Sick(MemoryFileSystem):
    """A store that fails as often as it is told."""

    protocol = "sick"
    store, pseudo_dirs = {}, [""]
    failures: list = []
    opened: Counter = Counter()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("sick://").strip("/")

    def _open(self, path: str, mode: str = "rb", **options):
        file = super()._open(path, mode=mode, **options)
        if mode != "rb":
            return file
        Sick.opened[Path(path).name] += 1
        failure = Sick.failures.pop() if Sick.failures and path.endswith(".tar") else None
        if isinstance(failure, Exception):
            raise failure
        return io.BytesIO(file.getvalue()[:failure])


@pytest.fixture
def url(folder: Path) -> str:
    """The set in a store, and no more on the disk."""
    fsspec.register_implementation("sick", Sick, clobber=True)
    Sick.store.clear()
    Sick.opened.clear()
    Sick.failures.clear()
    store = fsspec.filesystem("sick")
    for path in folder.iterdir():
        store.pipe(f"/bucket/set/{path.name}", path.read_bytes())
        path.unlink()
    return "sick://bucket/set"


def keys(shards: Shards) -> list[str]:
    return [shards.read(index).key for index in range(len(shards))]


def taken(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.iterdir())


# Patience.


def test_a_call_that_hangs_is_given_up_and_others_are_passed_on() -> None:
    assert within(5.0, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(5.0, lambda: 1 / 0)
    started = time.perf_counter()
    with pytest.raises(TimeoutError, match=r"no answer within 0.1 s"):
        within(0.1, threading.Event().wait)
    assert time.perf_counter() - started < 5


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(("code", "attempts"), [(errno.EIO, 4), (errno.ESTALE, 4), (13, 1), (2, 1)])
def test_only_what_may_pass_is_tried_again(code: int, attempts: int) -> None:
    asked = []

    def fail() -> None:
        asked.append(1)
        raise OSError(code, os.strerror(code))

    with pytest.raises(OSError, match=os.strerror(code)):
        patiently(fail, "a file")
    assert len(asked) == attempts


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("failure", ["hang", errno.EIO, errno.ESTALE])
def test_a_read_that_hangs_or_fails_for_the_moment_is_tried_again_on_a_new_file(
    folder: Path, failure: object, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shards = Shards(folder)
    shards.read(0)
    released, asked, opened = threading.Event(), [], []
    pread = os.pread

    def sick(*arguments) -> bytes:
        asked.append(1)
        if len(asked) <= 2:
            if failure == "hang":
                released.wait()
            else:
                raise OSError(failure, os.strerror(failure))
        return pread(*arguments)

    def spy(*arguments):
        opened.append(arguments[0])
        return open(*arguments)

    monkeypatch.setattr(os, "pread", sick)
    monkeypatch.setattr(shards_module, "open", spy, raising=False)
    with caplog.at_level(logging.WARNING):
        assert shards.read(1).key == KEYS[1]
    released.set()
    assert len(caplog.records) == 2
    assert all("pictures-000000.tar" in line and "trying again" in line for line in caplog.messages)
    # The file that was open is not trusted again.
    assert opened == [str(folder / "pictures-000000.tar")] * 2


@pytest.mark.usefixtures("hurried")
def test_a_read_that_never_answers_is_a_named_fault(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, released = Shards(folder), threading.Event()
    monkeypatch.setattr(os, "pread", lambda *_: released.wait())
    with pytest.raises(DamagedSample, match=r"pictures-000001.tar: picture-0005: TimeoutError: no"):
        shards.read(5)
    released.set()


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic(tmp_path / "a") as file:
        file.write(b"half" * (1 // 0))
    assert not list(tmp_path.iterdir())
    with atomic(tmp_path / "a") as file:
        file.write(b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_system_without_locks_is_used_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock(tmp_path / ".lock"):
        assert "let only one process write there" in caplog.text


# Far.


def test_the_cache_goes_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOFO_CACHE", "/scratch")
    assert Cache().folder == "/scratch/shards"
    monkeypatch.delenv("MOFO_CACHE")
    assert Cache().folder == "~/.cache/mofo/shards"


def test_a_remote_set_is_read_like_a_local_one_and_fetched_once(url: str, tmp_path: Path) -> None:
    cache = Cache(folder=str(tmp_path / "cache"))
    assert keys(Shards(url, cache)) == KEYS
    assert keys(Shards(url + "/", cache)) == KEYS
    tars = {name: count for name, count in Sick.opened.items() if name.endswith(".tar")}
    assert tars == {f"pictures-{number:06d}.tar": 1 for number in range(5)}


def test_the_cache_stays_within_its_bounds_and_keeps_what_is_used(url: str, tmp_path: Path) -> None:
    one = Shards(url).manifest["shards"][0]["bytes"]
    cache = Cache(folder=str(tmp_path / "cache"), max_bytes=int(2.5 * one))
    shards = Shards(url, cache)
    for index in range(0, 20, 4):
        # Shard 0 is used all the time, so that it stays.
        for number in (index, 0):
            assert shards.read(number).key == KEYS[number]
            assert taken(tmp_path / "cache") <= cache.max_bytes
            # Times of files have the grain of the kernel's clock.
            time.sleep(0.01)
    assert Sick.opened["pictures-000000.tar"] == 1
    shards.read(5)
    assert Sick.opened["pictures-000001.tar"] == 2


def test_a_shard_that_the_cache_cannot_hold_is_refused(url: str, tmp_path: Path) -> None:
    shards = Shards(url, Cache(folder=str(tmp_path / "cache"), max_bytes=1000))
    with pytest.raises(DamagedSample, match="but the cache holds 1000; allow it more"):
        shards.read(0)


def test_no_manifest_writes_outside_the_cache(url: str, tmp_path: Path) -> None:
    store = fsspec.filesystem("sick")
    manifest = Shards(url).manifest
    for name in ("../escaped", "/tmp/escaped", ".lock-00"):
        manifest["shards"][0]["sha256"] = name
        store.pipe("/bucket/set/manifest.json", json.dumps(manifest).encode())
        with pytest.raises(DamagedSample, match="leaves the cache"):
            Shards(url, Cache(folder=str(tmp_path / "cache"))).read(0)
    assert not (tmp_path / "cache").exists()


def test_what_is_wanted_at_once_is_fetched_once(url: str, tmp_path: Path) -> None:
    one = Shards(url).manifest["shards"][0]["bytes"]
    cache = Cache(folder=str(tmp_path / "cache"), max_bytes=int(5.5 * one))
    readers = [Shards(url, cache) for _ in range(8)]
    with ThreadPoolExecutor(len(readers)) as pool:
        assert list(pool.map(keys, readers)) == [KEYS] * 8
    assert all(count == 1 for name, count in Sick.opened.items() if name.endswith(".tar"))


def test_readers_that_take_the_room_from_one_another_still_read(url: str, tmp_path: Path) -> None:
    one = Shards(url).manifest["shards"][0]["bytes"]
    cache = Cache(folder=str(tmp_path / "cache"), max_bytes=int(1.5 * one))
    readers = [Shards(url, cache) for _ in range(3)]
    with ThreadPoolExecutor(len(readers)) as pool:
        assert list(pool.map(keys, readers)) == [KEYS] * 3


def test_what_a_killed_download_left_is_replaced_and_goes_first(url: str, tmp_path: Path) -> None:
    entries = Shards(url).manifest["shards"]
    cache = Cache(folder=str(tmp_path), max_bytes=int(1.5 * entries[0]["bytes"]))
    mine = tmp_path / f"{entries[0]['sha256']}.tar.partial"
    other = tmp_path / f"{entries[1]['sha256']}.tar.partial"
    for path in (mine, other):
        path.write_bytes(bytes(entries[0]["bytes"]))
        os.utime(path, (0, 0))
    assert Shards(url, cache).read(0).key == KEYS[0]
    assert not mine.exists()
    assert not other.exists()


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(
    "failure", [RuntimeError("503 slow down"), OSError(errno.ECONNRESET, "reset"), 100]
)
def test_a_download_that_fails_or_is_cut_short_is_tried_again(
    url: str, tmp_path: Path, failure: object, caplog: pytest.LogCaptureFixture
) -> None:
    shards = Shards(url, Cache(folder=str(tmp_path / "cache")))
    Sick.failures[:] = [failure] * 3
    assert shards.read(0).key == KEYS[0]
    assert len(caplog.records) == 3
    Sick.failures[:] = [failure] * 4
    with pytest.raises(DamagedSample, match=r"pictures-000001.tar.*(503|reset|100 bytes came of)"):
        shards.read(5)
    Sick.failures.clear()
    assert shards.read(5).key == KEYS[5]


def test_a_remote_shard_that_is_gone_is_a_named_fault(url: str, tmp_path: Path) -> None:
    shards = Shards(url, Cache(folder=str(tmp_path / "cache")))
    fsspec.filesystem("sick").rm("/bucket/set/pictures-000003.tar")
    with pytest.raises(DamagedSample, match=r"^pictures-000003.tar: picture-0012: FileNotFound"):
        shards.read(12)
    assert shards.read(11).key == KEYS[11]


def test_a_remote_index_that_is_not_the_shards_own_is_not_believed(
    url: str, tmp_path: Path
) -> None:
    store = fsspec.filesystem("sick")
    store.pipe("/bucket/set/pictures-000003.idx.json", b'{"samples": []}')
    assert keys(Shards(url, Cache(folder=str(tmp_path / "cache")))) == KEYS


def test_a_url_without_a_set_or_without_its_package_is_refused() -> None:
    with pytest.raises(ValueError, match="holds no finished set"):
        Shards("memory://nothing")
    fsspec.register_implementation(
        "absent", "absent.Store", errtxt="install absentfs", clobber=True
    )
    with pytest.raises(ValueError, match="absent://x/manifest.json needs.*install absentfs"):
        Shards("absent://x")


def test_a_plain_web_server_serves_a_set(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp", reason="fsspec reads http through aiohttp")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    serve = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert keys(Shards(address, Cache(folder=str(tmp_path / "cache")))) == KEYS
        (folder / "pictures-000002.tar").unlink()
        with pytest.raises(DamagedSample, match=r"pictures-000002.tar.*FileNotFoundError"):
            Shards(address, Cache(folder=str(tmp_path / "other"))).read(8)
        server.shutdown()
