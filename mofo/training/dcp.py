"""How `torch.distributed.checkpoint` (DCP) writes and reads our files.

DCP plans: who writes which part of a tensor, each part once, and which parts another number of
ranks must read. Its own storage pickles an index and knows no checksums; ours puts the parts of a
rank into one safetensors file, summed up while they are written, and the index into JSON. So
nothing in a checkpoint can run code, and every reader of safetensors can look into it.
"""

import json
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from xxhash import xxh3_64

DTYPES = {  # as safetensors names them
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
BLOCK = 1 << 22  # bytes that are summed up by one thread while another writes them
MOST_BEHIND = 16  # blocks that the first may be late; so long they are held


class File(NamedTuple):
    """A file of a checkpoint as it was written."""

    name: str
    size: int
    xxh3: str


class Writer(StorageWriter):
    """Writes into the `folder` of the coordinator, the first rank.

    It alone calls `admit` with the number of bytes, before, and `commit` with an index of the
    tensors and the files, after. What they raise is raised on all ranks.
    """

    def __init__(
        self,
        folder: Path,
        *,
        admit: Callable[[int], None],
        commit: Callable[[dict[str, Any], list[File]], None],
    ) -> None:
        self.folder, self.admit, self.commit = folder, admit, commit

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self.admit(sum(_num_bytes(item) for plan in plans for item in plan.items))
        paths = [self.folder / f"rank_{rank:05d}.safetensors" for rank in range(len(plans))]
        return [replace(plan, storage_data=path) for plan, path in zip(plans, paths, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        # Wide elements first: then each tensor stands at a multiple of its element's size.
        items = sorted(plan.items, key=lambda item: (-_dtype(item).itemsize, item.index.fqn))
        results = []
        if items:
            path: Path = plan.storage_data
            path.parent.mkdir(exist_ok=True)  # a network file system may show it late
            parts = [(item.index.fqn, _dtype(item), _chunk(item).sizes) for item in items]
            tensors = (cast(Tensor, planner.resolve_data(item)) for item in items)
            file = write(path, parts, tensors)
            results = [
                WriteResult(item.index, _num_bytes(item), (file, _chunk(item).sizes))
                for item in items
            ]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        index: dict[str, Any] = {
            name: {"dtype": NAMES[one.properties.dtype], "shape": list(one.size), "parts": []}
            for name, one in metadata.state_dict_metadata.items()
            if isinstance(one, TensorStorageMetadata)
        }
        files = set()
        for one in chain.from_iterable(results):
            file, sizes = one.storage_data
            files.add(file)
            if 0 not in sizes:  # of a tensor with fewer rows than ranks, some have nothing
                part = [file.name, list(one.index.offset or ()), list(sizes)]
                index[one.index.fqn]["parts"].append(part)
        self.commit(index, sorted(files))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def write(
    path: Path, parts: Iterable[tuple[str, torch.dtype, torch.Size]], tensors: Iterable[Tensor]
) -> File:
    """Write one safetensors file, tensor by tensor, and flush it to the disk.

    The checksum is taken beside; nothing is held twice but what is just being copied from a device.
    """
    header, end = {}, 0
    for name, dtype, shape in parts:
        assert name not in header, f"two parts of {name} on one rank"
        start, end = end, end + shape.numel() * dtype.itemsize
        kind = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        header[name] = kind
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start_of_file = len(text).to_bytes(8, "little") + text
    summed, behind = xxh3_64(), deque[futures.Future]()
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as beside:
        for data in chain([start_of_file], map(_bytes, tensors)):
            for start in range(0, len(data), BLOCK):
                block = memoryview(data)[start : start + BLOCK]
                behind.append(beside.submit(summed.update, block))
                if len(behind) > MOST_BEHIND:
                    behind.popleft().result()
                _write_all(file, block)
        os.fsync(file.fileno())
    return File(path.name, len(start_of_file) + end, summed.hexdigest())


def checksum(path: Path) -> str:
    """The checksum of a file, as in `File`."""
    summed = xxh3_64()
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            summed.update(block)
    return summed.hexdigest()


def _write_all(file: BinaryIO, block: memoryview) -> None:
    # A raw write may be cut short, by a signal or by the end of the disk: the next one raises.
    while len(block):
        block = block[file.write(block) :]


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data


def _chunk(item: WriteItem) -> ChunkStorageMetadata:
    assert item.tensor_data is not None, f"{item.index.fqn} is no tensor"
    return item.tensor_data.chunk


def _dtype(item: WriteItem) -> torch.dtype:
    assert item.tensor_data is not None, f"{item.index.fqn} is no tensor"
    return item.tensor_data.properties.dtype


def _num_bytes(item: WriteItem) -> int:
    return _chunk(item).sizes.numel() * _dtype(item).itemsize


class Reader(StorageReader):
    """Reads from `folder` what `index`, as given to `commit`, says is there."""

    def __init__(self, folder: Path, index: Mapping[str, Any]) -> None:
        self.folder, self.index = folder, index

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors, where = {}, {}
        for name, one in self.index.items():
            chunks = []
            for file, offsets, sizes in one["parts"]:
                chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                where[MetadataIndex(name, offsets)] = file
            properties = TensorProperties(dtype=DTYPES[one["dtype"]])
            tensors[name] = TensorStorageMetadata(properties, torch.Size(one["shape"]), chunks)
        return Metadata(tensors, storage_data=where)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        self.where = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        files = Files(self.folder)
        for item in plan.items:
            index = item.storage_index
            part = files.part(self.where[index], index.fqn)
            target = planner.resolve_tensor(item).detach()
            target.copy_(_region(part, item.storage_offsets, item.lengths))
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class Files:
    """The files of a checkpoint, of which a part is in memory only as long as it is used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.headers: dict[str, tuple[int, dict[str, Any]]] = {}

    def part(self, name: str, tensor: str) -> Tensor:
        """One tensor of a file, mapped; it is not empty."""
        with (self.folder / name).open("rb") as file:
            if name not in self.headers:
                length = int.from_bytes(file.read(8), "little")
                self.headers[name] = 8 + length, json.loads(file.read(length))
            start, header = self.headers[name]
            one = header[tensor]
            begin, end = (start + offset for offset in one["data_offsets"])
            page = begin - begin % mmap.ALLOCATIONGRANULARITY
            # Copied when written to, which nobody does: torch warns of memory that is read-only.
            data = mmap.mmap(file.fileno(), end - page, access=mmap.ACCESS_COPY, offset=page)
        flat = torch.frombuffer(data, dtype=DTYPES[one["dtype"]], offset=begin - page)
        return flat.view(one["shape"])


class Whole(Mapping[str, Tensor]):
    """The tensors of a checkpoint whose names begin with `prefix`, without it.

    Each is put together when it is asked for; one that is in a single part is mapped.
    """

    def __init__(self, folder: Path, index: Mapping[str, Any], prefix: str) -> None:
        self.files, self.prefix = Files(folder), prefix
        self.index = {
            name.removeprefix(prefix): one for name, one in index.items() if name.startswith(prefix)
        }

    def __getitem__(self, name: str) -> Tensor:
        one = self.index[name]
        if [sizes for _, _, sizes in one["parts"]] == [one["shape"]]:
            return self.files.part(one["parts"][0][0], self.prefix + name)
        whole = torch.empty(one["shape"], dtype=DTYPES[one["dtype"]])
        for file, offsets, sizes in one["parts"]:
            part = self.files.part(file, self.prefix + name)
            _region(whole, offsets, sizes).copy_(part)
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self.index)

    def __len__(self) -> int:
        return len(self.index)


def _region(tensor: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    return tensor[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
