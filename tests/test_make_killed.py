"""Making sets, cut off: what is whole is kept, and the same call makes the rest."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from made_sets import contents, plant, start, write_source
from packed import full_disk

from mofo.data import storage

ROOT = Path(__file__).parents[1]


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    with plant(tmp_path / "converters", monkeypatch) as converter:
        yield converter


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source")


def test_what_is_complete_is_kept_and_what_is_not_is_written_again(
    planted, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    start(source, out)
    whole = contents(out)
    (out / "manifest.json").unlink()
    # As kills leave them: a tar without index, half a file under another name, a disk's damage.
    (out / "planted-000001.idx.json").unlink()
    (out / ".planted-000001.tar.4711.partial").write_bytes(b"half")
    os.truncate(out / "planted-000004.tar", 100)
    (out / "planted-000005.idx.json").write_text("{")
    asked = set()
    read = planted.read
    planted.read = lambda item: asked.add(item[0].stem) or read(item)
    assert start(source, out)
    assert contents(out) == whole
    items = [path.stem for path in sorted(source.iterdir())]
    assert asked == {*items[4:8], *items[16:20], *items[20:]}


def test_a_source_that_grew_is_read_where_it_differs(planted, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    start(source, out)
    (out / "manifest.json").unlink()
    shutil.copy(source / "image-22.png", source / "image-99.png")
    start(source, tmp_path / "afresh")
    kept = (out / "planted-000000.tar").stat().st_mtime_ns
    assert start(source, out)
    assert contents(out) == contents(tmp_path / "afresh")
    assert (out / "planted-000000.tar").stat().st_mtime_ns == kept
    # And one that shrank leaves no shard behind.
    (out / "manifest.json").unlink()
    for path in sorted(source.iterdir())[10:]:
        path.unlink()
    assert start(source, out)
    left = [f"planted-{number:06d}.{kind}" for number in range(3) for kind in ("idx.json", "tar")]
    assert sorted(contents(out)) == ["manifest.json", *left]


@pytest.mark.parametrize("moment", [0.0, 0.5])
def test_a_killed_run_leaves_whole_shards_and_its_processes_end(
    planted, source: Path, tmp_path: Path, moment: float
) -> None:
    out = tmp_path / "out"
    program = f"""
import sys
import mofo.data.convert
sys.path.insert(0, {str(tmp_path / "converters")!r})
mofo.data.convert.__path__.append({str(tmp_path / "converters")!r})
from mofo.data.make import make
if __name__ == "__main__":
    make({str(out)!r}, converter="planted", source={str(source)!r}, samples_per_shard=8,
         processes=2)
"""
    script = tmp_path / "script.py"
    script.write_text(program)
    environment = os.environ | {"PLANTED_PAUSE": "0.2", "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen([sys.executable, str(script)], env=environment, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(out.glob("*.tar")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(moment)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (out / "manifest.json").exists()
    tars = list(out.glob("*.tar"))
    assert tars
    while _members_of_session(run.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _members_of_session(run.pid)
    assert start(source, out)
    start(source, tmp_path / "uninterrupted")
    assert contents(out) == contents(tmp_path / "uninterrupted")


def _members_of_session(session: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, member_of = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(member_of) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.parametrize("after", [0, 3_000, 9_000])
def test_a_full_disk_leaves_whole_shards_and_the_same_call_finishes(
    planted, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as disk:
        disk.setattr(storage, "open", full_disk(after), raising=False)
        with pytest.raises(OSError, match="No space left"):
            start(source, out)
    names = {path.name for path in out.iterdir()} - {".lock"}
    assert not [name for name in names if "partial" in name or name == "manifest.json"]
    start(source, tmp_path / "afresh")
    whole = contents(tmp_path / "afresh")
    assert all((out / name).read_bytes() == whole[name] for name in names)
    assert start(source, out)
    assert contents(out) == whole
