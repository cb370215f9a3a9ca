"""Checkpoints on the disk: whole or set aside, whatever breaks or is full."""

import errno
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from stored import FILE, assert_whole, flip, names, save, state

from mofo.training import dcp, manifest, store
from mofo.training.attempts import Refused
from mofo.training.manifest import MANIFEST, Manifest
from mofo.training.store import LATEST


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    save(tmp_path, 3)
    path = tmp_path / "step_00000003"
    assert names(tmp_path) == [LATEST, path.name]
    assert (tmp_path / LATEST).read_text() == "step_00000003\n"
    assert names(path) == [MANIFEST, FILE]
    assert store.verify(path) == []
    assert_whole(path, 3)


def test_a_file_is_an_ordinary_one_of_safetensors(tmp_path: Path) -> None:
    save(tmp_path, 3)
    found = load_file(tmp_path / "step_00000003" / FILE)
    for name, tensor in state(3).items():
        assert torch.equal(found[name], tensor)


def test_a_part_is_read_tensor_by_tensor(tmp_path: Path) -> None:
    save(tmp_path, 3)
    path = tmp_path / "step_00000003"
    part = store.read_part(path, Manifest.read(path), "network")
    assert sorted(part) == ["matrix", "scale"]
    assert torch.equal(part["matrix"], state(3)["network/matrix"])
    part["matrix"].fill_(0)  # what is mapped is a copy
    assert store.verify(path) == []


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 3)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a checkpoint must not run code")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert store.newest(tmp_path) is not None
    assert_whole(tmp_path / "step_00000003", 3)


DAMAGES: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "a bit": (lambda path, _: flip(path / FILE, 8 * 700 + 3), f"{FILE} is not as it was written"),
    "the end": (lambda path, _: os.truncate(path / FILE, 700), f"{FILE} has 700 bytes, not"),
    "a file": (lambda path, _: (path / FILE).unlink(), f"{FILE} is missing"),
    "another step's file": (
        lambda path, older: shutil.copy(older / FILE, path / FILE),
        f"{FILE} is not as it was written",
    ),
    "a fact": (lambda path, _: flip(path / MANIFEST, 8 * 40), f"{MANIFEST} "),
    "the manifest": (lambda path, _: (path / MANIFEST).unlink(), f"{MANIFEST} cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_older_one_taken(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture
) -> None:
    save(tmp_path, 3, 6)
    older, path = tmp_path / "step_00000003", tmp_path / "step_00000006"
    spoil, said = DAMAGES[damage]
    spoil(path, older)
    assert store.newest(tmp_path, read_only=True) == older
    assert path.exists()
    assert store.newest(tmp_path) == older
    assert f"{path} is damaged, set aside as step_00000006.damaged: {said}" in (
        capsys.readouterr().out
    )
    assert names(tmp_path) == [LATEST, "step_00000003", "step_00000006.damaged"]
    assert (tmp_path / LATEST).read_text() == "step_00000003\n"
    assert_whole(older, 3)
    save(tmp_path, 6)
    spoil(path, older)
    assert store.newest(tmp_path) == older
    assert "step_00000006.damaged-2" in names(tmp_path)


def test_no_flipped_bit_goes_unseen(tmp_path: Path) -> None:
    save(tmp_path, 3)
    path = tmp_path / "step_00000003"
    rng = random.Random(0)
    for name in (FILE, MANIFEST):
        whole = (path / name).read_bytes()
        for byte in range(0, len(whole), 3):
            flip(path / name, 8 * byte + rng.randrange(8))
            assert any(name in fault for fault in store.verify(path)), (name, byte)
            (path / name).write_bytes(whole)


def test_of_another_model_nothing_is_read(tmp_path: Path) -> None:
    save(tmp_path, 3)
    path = tmp_path / "step_00000003"
    tensors = {
        f"network/{name}": torch.ones(2) for name in ("matrix", "a", "b", "c", "d", "e", "f")
    }
    with pytest.raises(ValueError, match="is a checkpoint of another model") as caught:
        store.load(path, tensors)
    for said in (
        "6 are not in it: network/a, network/b, network/c, network/d, network/e\n",
        "1 are not in this run: network/scale",
        "1 have another shape: network/matrix is [7, 5] there, [2] here",
    ):
        assert said in str(caught.value)
    assert "average" not in str(caught.value)
    assert all(torch.equal(tensor, torch.ones(2)) for tensor in tensors.values())


def test_files_of_an_older_version_are_no_fresh_start(tmp_path: Path) -> None:
    assert store.newest(tmp_path) is None
    assert store.newest(tmp_path / "none") is None
    (tmp_path / "step_00000250.ckpt").touch()
    with pytest.raises(ValueError, match=r"step_00000250.ckpt was written by an older version"):
        store.newest(tmp_path)


def test_a_later_format_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 3)
    monkeypatch.setattr(manifest, "FORMAT", 0)
    with pytest.raises(Refused, match="has format 1, but this version of mofo reads 0"):
        store.newest(tmp_path)
    assert (tmp_path / "step_00000003").exists()


def test_where_nothing_is_whole_nothing_begins_by_itself(tmp_path: Path) -> None:
    save(tmp_path, 3, 6)
    for path in store.by_step(tmp_path):
        (path / FILE).unlink()
    with pytest.raises(Refused, match="has no checkpoint that is whole") as caught:
        store.newest(tmp_path)
    assert f"step_00000003: {FILE} is missing" in str(caught.value)
    assert "resume=null" in str(caught.value)
    assert len(store.by_step(tmp_path)) == 2


def test_the_last_ones_stay_and_those_of_every_so_many_steps(tmp_path: Path) -> None:
    save(tmp_path, *range(2, 16, 2), keep=2, keep_every=4)
    kept = [store.step_of(path) for path in store.by_step(tmp_path)]
    assert kept == [14, 12, 8, 4]
    assert_whole(store.by_step(tmp_path)[-1], 4)


def test_nothing_older_goes_before_the_newest_is_read_back(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    save(tmp_path, 1, 2, 3, keep=9)
    flip(tmp_path / "step_00000003" / FILE, 5600)
    store.prune(tmp_path, keep=1)
    assert "step_00000003 cannot be read back, so older ones stay" in capsys.readouterr().out
    assert len(store.by_step(tmp_path)) == 3
    save(tmp_path, 4, keep=1)
    assert names(tmp_path) == [LATEST, "step_00000004"]


def test_one_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    save(tmp_path, 3)
    with pytest.raises(ValueError, match="step_00000003 exists already"):
        store.save(tmp_path, 3, state(4), {}).wait()
    assert_whole(tmp_path / "step_00000003", 3)


def test_a_fence_keeps_the_name_from_being_given(tmp_path: Path) -> None:
    save(tmp_path, 3)

    def fence() -> None:
        raise RuntimeError("another attempt has this folder")

    with pytest.raises(RuntimeError, match="another attempt"):
        store.save(tmp_path, 6, state(6), {}, fence=fence).wait()
    assert names(tmp_path) == [LATEST, "step_00000003"]


def test_training_goes_on_while_a_copy_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 3)
    write, go_on = dcp.write, threading.Event()

    def slowly(*parts: object) -> dcp.File:
        assert go_on.wait(10)
        return write(*parts)

    monkeypatch.setattr(dcp, "write", slowly)
    tensors = state(6)
    saving = store.save(tmp_path, 6, tensors, {"seen": 48}, asynchronous=True)
    for tensor in tensors.values():
        tensor.zero_()
    assert store.newest(tmp_path) == tmp_path / "step_00000003"
    assert (tmp_path / LATEST).read_text() == "step_00000003\n"
    go_on.set()
    saving.wait()
    assert (tmp_path / LATEST).read_text() == "step_00000006\n"
    assert_whole(tmp_path / "step_00000006", 6)


def test_what_does_not_fit_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 3)
    with monkeypatch.context() as patch:
        patch.setattr(store.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
        with pytest.raises(OSError, match="has 2.9e-07 GB, but .* has 0.001 GB free") as caught:
            save(tmp_path, 6)
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == [LATEST, "step_00000003"]
    save(tmp_path, 6)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_write_that_fails_midway_leaves_nothing(tmp_path: Path, asynchronous: bool) -> None:
    save(tmp_path, 3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, hard))
    try:
        saving = store.save(tmp_path, 6, state(6), {}, asynchronous=asynchronous)
        with pytest.raises(OSError, match="File too large"):
            saving.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    saving.settle()
    assert names(tmp_path) == [LATEST, "step_00000003"]
    assert store.newest(tmp_path) == tmp_path / "step_00000003"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root only")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_keeps_the_older_one(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(small_disk, 3)
    monkeypatch.setattr(store, "_check_space", lambda *_: None)
    with pytest.raises(OSError, match="No space left on device"):
        store.save(small_disk, 6, {"network/a": torch.zeros(1 << 20)}, {}).wait()
    assert names(small_disk) == [LATEST, "step_00000003"]
    save(small_disk, 9)
    assert store.newest(small_disk) == small_disk / "step_00000009"


def test_a_manifest_says_what_was_written_by_whom(tmp_path: Path) -> None:
    save(tmp_path, 3)
    values = json.loads((tmp_path / "step_00000003" / MANIFEST).read_text())
    assert values["world"] == 1
    assert values["files"][FILE]["size"] == (tmp_path / "step_00000003" / FILE).stat().st_size
    assert values["tensors"]["network/matrix"]["parts"] == [[FILE, [0, 0], [7, 5]]]
