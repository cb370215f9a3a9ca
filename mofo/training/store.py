"""The checkpoints of a run on the disk. Each is complete, or has another name.

    checkpoints/LATEST                        the name of the newest
    checkpoints/step_00000250/                one checkpoint
        rank_00000.safetensors ...            what each rank had of the tensors
        manifest.json                         all else: `Manifest`

A checkpoint is written as `step_N.*.partial`: every rank its file, flushed to the disk; then the
manifest, with the size and checksum of each file and its own checksum; then the folder gets its
name; and only then LATEST points to it. Whatever is damaged later is found when it is read,
renamed `step_N.damaged`, and the next older one is taken.

Functions that are called "together" are collective where there is a process group: all ranks call
them, get the same, and raise the same.
"""

import errno
import os
import re
import secrets
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from mofo.model.weights import replacing
from mofo.training.attempts import Refused
from mofo.training.dcp import File, Reader, Whole, Writer
from mofo.training.manifest import Manifest, faults

LATEST = "LATEST"

T = TypeVar("T")


class Saving:
    """A checkpoint on its way to the disk, and the older ones that it makes superfluous."""

    def __init__(self, partial: Path, upload: Future, tidy: Callable[[], None]) -> None:
        self.partial, self.upload = partial, upload
        # Reading back what was written takes time, but nobody waits for it: not even an exit.
        self.after = threading.Thread(target=self._tidy, args=(tidy,), daemon=True)
        self.after.start()

    def wait(self) -> None:
        """Until it is committed, together. OSError if the disk did not take it: nothing is left."""
        try:
            self.upload.result()
        except CheckpointException as error:
            if _rank() == 0:
                shutil.rmtree(self.partial, ignore_errors=True)
            raise _cause(error) from error

    def settle(self) -> None:
        """Until it is verified as well, and the older ones are gone."""
        self.after.join()

    def _tidy(self, tidy: Callable[[], None]) -> None:
        try:
            self.upload.result()
        except BaseException:  # `wait` tells
            return
        if _rank() == 0:
            tidy()


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    *,
    keep: int = 2,
    keep_every: int = 0,
    asynchronous: bool = False,
    fence: Callable[[], None] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Saving:
    """Save what each rank has of `tensors`, together. `wait` for it, to learn whether it did.

    `asynchronous` copies the tensors to the host's memory, and writes while training goes on; it
    needs a gloo `group` of its own. `fence` is called before the checkpoint gets its name, and
    raises if that must not be. Older ones go as in `prune`.
    """
    path = folder / f"step_{step:08d}"
    partial = _partial(path)  # that of rank 0 counts

    def admit(num_bytes: int) -> None:
        if path.exists():
            raise ValueError(f"{path} exists already; a checkpoint is never written over")
        partial.mkdir(parents=True)
        _check_space(folder, num_bytes)

    def commit(index: dict[str, Any], files: list[File]) -> None:
        stated = {file.name: {"size": file.size, "xxh3": file.xxh3} for file in files}
        manifest = Manifest(
            step=step, world=_world(), facts=dict(facts), files=stated, tensors=index
        )
        manifest.write(partial)
        _flush(partial)
        if fence is not None:
            fence()
        partial.rename(path)
        _flush(folder)
        _point(folder, path)

    options: dict[str, Any] = {
        "storage_writer": Writer(partial, admit=admit, commit=commit),
        "planner": dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        "process_group": group,
    }
    _quieten()
    upload: Any = Future()
    if asynchronous:
        upload = dcp.async_save(dict(tensors), **options)
    else:
        try:
            upload.set_result(dcp.save(dict(tensors), **options))
        except CheckpointException as error:
            upload.set_exception(error)
    return Saving(partial, upload, lambda: prune(folder, keep=keep, keep_every=keep_every))


def newest(folder: str | Path, *, read_only: bool = False) -> Path | None:
    """The newest checkpoint that is whole, together; damaged newer ones are named and set aside.

    None if there is none at all; Refused if there is none that is whole. `read_only`, for a folder
    that a run may be busy with, renames nothing.
    """
    folder = Path(folder)
    paths = _from_first(lambda: by_step(folder))
    if not paths and (old := sorted(folder.glob("step_*.ckpt"))):
        raise Refused(
            f"{old[-1]} was written by an older version of mofo, and cannot be read by this one; "
            "go on with that version, or give the run another name (name=...)"
        )
    damaged: dict[Path, str] = {}
    for path in paths:
        if not (wrong := verify(path)):
            if _rank() == 0:
                _tell(damaged, read_only)
            if _rank() == 0 and not read_only:
                _point(folder, path)
            return path
        damaged[path] = "; ".join(wrong)
    if damaged:
        listed = "".join(f"\n  {path.name}: {wrong}" for path, wrong in damaged.items())
        raise Refused(
            f"{folder} has no checkpoint that is whole:{listed}\nto begin anew, say resume=null"
        )
    return None


def verify(path: Path) -> list[str]:
    """What is wrong with a checkpoint, file by file; together, each rank reads a part of them."""
    mine = faults(path, _rank(), _world())
    found = [mine] * _world()
    if _world() > 1:
        dist.all_gather_object(found, mine)
    return sorted({fault for one in found for fault in one})


def load(
    path: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None
) -> Manifest:
    """Read into `tensors`, together, whatever number of ranks wrote them.

    Refused, and nothing read, if the checkpoint has others: see `Manifest.compare`.
    """
    manifest = Manifest.read(path)
    manifest.compare(path, tensors)
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    reader = Reader(path, manifest.tensors)
    _quieten()
    try:
        dcp.load(dict(tensors), storage_reader=reader, planner=planner, process_group=group)
    except CheckpointException as error:
        raise _cause(error) from error
    return manifest


def read_part(path: Path, manifest: Manifest, part: str) -> Whole:
    """The whole tensors of a part, by one process, each when it is asked for."""
    return Whole(path, manifest.tensors, f"{part}/")


def prune(folder: Path, *, keep: int, keep_every: int = 0) -> None:
    """Remove all but the newest `keep`, and those of every `keep_every` steps (0: none).

    Before, the newest is read back: as long as it is not whole, everything older stays.
    """
    paths = by_step(folder)
    old = [path for path in paths[keep:] if not keep_every or step_of(path) % keep_every]
    if not old:
        return
    if wrong := faults(paths[0]):
        print(f"{paths[0]} cannot be read back, so older ones stay: {'; '.join(wrong)}")
        return
    for path in old:
        # Under its own name it would be a checkpoint with files missing.
        shutil.rmtree(path.rename(_partial(path)), ignore_errors=True)


def clean(folder: Path) -> None:
    """Remove what a kill left in the middle of a save."""
    for partial in folder.glob("step_*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
    for pointer in folder.glob(f".{LATEST}.*"):
        pointer.unlink()


def set_aside(path: Path, word: str) -> Path:
    """Rename a checkpoint `step_N.word`, where no run takes it for one."""
    aside, count = path.with_suffix(f".{word}"), 1
    while aside.exists():
        count += 1
        aside = path.with_suffix(f".{word}-{count}")
    return path.rename(aside)


def by_step(folder: Path) -> list[Path]:
    """The checkpoints, newest first."""
    found = [p for p in folder.glob("step_*") if re.fullmatch(r"step_\d+", p.name) and p.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(path.name.removeprefix("step_"))


def _partial(path: Path) -> Path:
    """No two are the same: an attempt that was fenced off may still write."""
    return path.with_suffix(f".{secrets.token_hex(4)}.partial")


def _tell(damaged: Mapping[Path, str], read_only: bool) -> None:
    for path, wrong in damaged.items():
        aside = "" if read_only else f", set aside as {set_aside(path, 'damaged').name}"
        print(f"{path} is damaged{aside}: {wrong}")


def _check_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < 1.01 * num_bytes + (1 << 20):
        raise OSError(
            errno.ENOSPC,
            f"a checkpoint has {num_bytes / 1e9:.3g} GB, but {folder} has {free / 1e9:.3g} GB free",
        )


def _point(folder: Path, path: Path) -> None:
    """Let LATEST name a checkpoint."""
    pointer = folder / LATEST
    if not pointer.exists() or pointer.read_text() != f"{path.name}\n":
        with replacing(pointer) as partial:
            partial.write_text(f"{path.name}\n")
        _flush(folder)


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cause(error: CheckpointException) -> BaseException:
    """What went wrong on the first rank where it did; not the disk, if it was anything else."""
    causes = [cause for cause, _ in error.failures.values()]
    return next((cause for cause in causes if not isinstance(cause, OSError)), causes[0])


def _quieten() -> None:
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _from_first(make: Callable[[], T]) -> T:
    """What rank 0 makes, on all ranks."""
    if _world() == 1:
        return make()
    made: list[Any] = [make() if _rank() == 0 else None]
    dist.broadcast_object_list(made, src=0)
    return made[0]
