"""Sets of WebDataset tar shards: written atomically, read by index.

A set is a folder: `NAME-000000.tar` with `KEY.png|jpg|webp`, `KEY.depth.png`, `KEY.json`; beside
each tar its `NAME-000000.idx.json` (offset, size, crc32 of every member); and `manifest.json`,
written last: a folder without it is not finished. `data/README.md` has the format in full.
"""

import hashlib
import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from glob import glob
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from mofo.data.order import Recent
from mofo.data.sample import Sample, choose_depth_scale, decode_depth, decode_image, encode_depth

FORMAT = 1
MANIFEST = "manifest.json"
IMAGE_EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
MAX_OPEN = 64  # shards a process holds open
# What decoders raise when they are given damaged bytes.
DAMAGE = (OSError, ValueError, KeyError, TypeError, SyntaxError, EOFError, struct.error, zlib.error)

# Of each sample its key and {extension: [offset, size, crc32]}, lists because JSON has no tuples;
# without crc32 where it was read off the tar itself.
Index = list[list[str | dict[str, list[int]]]]


class DamagedSample(ValueError):
    """A sample that cannot be read; `shard`, `key` and `reason` say which and why."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(f"{shard}: {key}: {reason}")
        self.shard, self.key, self.reason = shard, key, reason


def write(
    samples: Iterable[Sample],
    folder: str | Path,
    name: str,
    *,
    samples_per_shard: int = 1000,
    made_from: dict[str, Any] | None = None,
    total: int | None = None,
) -> bool:
    """Write `samples` as the set `name` in `folder`; False, and nothing touched, if it is finished.

    `made_from` is stored: a finished set made from something else raises, and is never replaced.
    Equal samples give equal bytes. `total` only serves the progress bar.
    """
    folder = Path(folder)
    made_from = json.loads(json.dumps(made_from))
    if (folder / MANIFEST).exists():
        old = json.loads((folder / MANIFEST).read_text())
        if old["name"] == name and old["made_from"] == made_from:
            return False
        raise ValueError(
            f"{folder} holds the finished set {old['name']!r} made from {old['made_from']}, not "
            f"{name!r} from {made_from}; delete that folder, or choose another"
        )
    folder.mkdir(parents=True, exist_ok=True)
    keys: set[str] = set()
    shards, described = [], []
    stream = iter(tqdm(samples, desc=f"writing {folder}", total=total, disable=None))
    while chunk := list(islice(stream, 1)):
        path = folder / f"{name}-{len(shards):06d}.tar"
        rows = _write_shard(path, islice(chain(chunk, stream), samples_per_shard), keys)
        described += rows
        shards.append(
            {
                "name": path.name,
                "samples": len(rows),
                "bytes": path.stat().st_size,
                "sha256": _sha256(path),
            }
        )
    if not shards:
        raise ValueError(f"no samples to write to {folder}; check what they are made from")
    manifest = _manifest(name, shards, described, made_from)
    _write_text(folder / MANIFEST, json.dumps(manifest, indent=1))
    return True


def _manifest(
    name: str, shards: list[dict], described: list[dict], made_from: dict | None
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "name": name,
        "made_from": made_from,
        "samples": len(described),
        "with_depth": sum(row["depth_scale"] is not None for row in described),
        "metric": sum(row["metric"] for row in described),
        "sources": sorted({row["source"] for row in described}),
        "licences": sorted({row["licence"] for row in described}),
        "hash": hashlib.sha256("".join(s["sha256"] for s in shards).encode()).hexdigest(),
        "shards": shards,
    }


def _write_shard(path: Path, samples: Iterable[Sample], keys: set[str]) -> list[dict[str, Any]]:
    """Write one tar and its index; returns the json of each sample. `keys` grows."""
    # Only writing needs it, and it takes seconds to import.
    from webdataset.writer import TarWriter

    described = []
    # A fixed time makes equal samples equal bytes, so that two writers cannot disagree.
    with _atomic(path) as file, TarWriter(file, encoder=False, mtime=0.0) as tar:
        for sample in samples:
            sample.check()
            if sample.key in keys:
                raise ValueError(f"key {sample.key!r} occurs twice; keys name samples in a set")
            keys.add(sample.key)
            members = _encode(sample)
            described.append(json.loads(members["json"]))
            tar.write({"__key__": sample.key, **members})
    index = {"bytes": path.stat().st_size, "samples": _scan(path)}
    with open(path, "rb") as file:
        for _, members in index["samples"]:
            for span in members.values():
                span.append(zlib.crc32(os.pread(file.fileno(), span[1], span[0])))
    _write_text(_index_path(path), json.dumps(index))
    return described


def _encode(sample: Sample) -> dict[str, bytes]:
    """The members of one sample, by extension."""
    image = sample.image_bytes
    if image is None:
        buffer = io.BytesIO()
        Image.fromarray(sample.image).save(buffer, format="PNG")
        image = buffer.getvalue()
    with Image.open(io.BytesIO(image)) as opened:
        kind = opened.format
    if kind not in IMAGE_EXTENSIONS:
        raise ValueError(
            f"{sample.key}: image_bytes hold {kind}, but shards hold {sorted(IMAGE_EXTENSIONS)}; "
            "leave image_bytes out to have the pixels stored as PNG"
        )
    members = {IMAGE_EXTENSIONS[kind]: image}
    scale = None
    if sample.depth is not None:
        scale = sample.depth_scale or choose_depth_scale(*sample.depth)
        try:
            members["depth.png"] = encode_depth(*sample.depth, scale)
        except ValueError as error:
            raise ValueError(f"{sample.key}: {error}") from error
    row = {
        "format": FORMAT,
        "caption": sample.caption,
        "intrinsics": None if sample.intrinsics is None else sample.intrinsics.tolist(),
        "metric": sample.metric,
        "depth_scale": scale,
        "source": sample.source,
        "licence": sample.licence,
    }
    return {**members, "json": json.dumps(row, ensure_ascii=False).encode()}


class Shards:
    """Map-style reading of a finished set (a folder), or of any tars of this layout (a pattern).

    How many samples there are, and their order, comes from the manifest, so damage found later
    moves no other sample. Safe to use after a fork, and to pickle.
    """

    def __init__(self, source: str | Path) -> None:
        self.source = str(source)
        folder = Path(source)
        if folder.is_dir() or not any(mark in self.source for mark in "*?["):
            if not (folder / MANIFEST).exists():
                raise ValueError(
                    f"{folder} holds no finished set of shards ({MANIFEST} is missing); make it "
                    f"with `mofo convert NAME --out {folder}`, or give its row in the data config "
                    "a `make:`"
                )
            self.manifest = json.loads((folder / MANIFEST).read_text())
            if self.manifest["format"] > FORMAT:
                raise ValueError(
                    f"{folder} has format {self.manifest['format']}, but this version reads up to "
                    f"{FORMAT}; update mofo, or convert again"
                )
            self.paths = [folder / shard["name"] for shard in self.manifest["shards"]]
            counts = [shard["samples"] for shard in self.manifest["shards"]]
        else:
            self.manifest = None
            self.paths = [Path(path) for path in sorted(glob(self.source))]
            counts = [len(_load_index(path)) for path in self.paths]
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        if not len(self):
            raise ValueError(f"no samples in {source}; check the path")
        # Files that are dropped from here close themselves.
        self._files = Recent(self._open, size=MAX_OPEN)
        self._indices = Recent(self._index, size=MAX_OPEN)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __reduce__(self) -> tuple:
        return Shards, (self.source,)

    def _open(self, process: int, shard: int) -> BinaryIO:
        return open(self.paths[shard], "rb")

    def _index(self, shard: int) -> Index:
        return _load_index(self.paths[shard])

    def read(self, index: int) -> Sample:
        """Sample `index` of the set; raises DamagedSample if it cannot be had as it was written."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.source}")
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        row = index - int(self.starts[shard])
        key = f"#{row}"
        try:
            samples = self._indices[shard,]
            if row >= len(samples):
                raise ValueError(f"the shard ends after {len(samples)} samples")
            key, members = samples[row]
            # A file that was open before a fork is opened again: its first owner may close it.
            file = self._files[os.getpid(), shard]
            return _decode(key, {ext: _pread(file, *span) for ext, span in members.items()})
        except DAMAGE as error:
            reason = f"{type(error).__name__}: {error}"
            raise DamagedSample(self.paths[shard].name, key, reason) from error


def _pread(file: BinaryIO, offset: int, size: int, crc: int | None = None) -> bytes:
    data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        raise ValueError(f"truncated: {len(data)} of {size} bytes at {offset}")
    if crc is not None and zlib.crc32(data) != crc:
        raise ValueError(f"checksum of {size} bytes at {offset} is wrong")
    return data


def _decode(key: str, members: dict[str, bytes]) -> Sample:
    row = json.loads(members["json"])
    image = next(members[ext] for ext in IMAGE_EXTENSIONS.values() if ext in members)
    depth = row["depth_scale"]
    metres, valid = (None, None) if depth is None else decode_depth(members["depth.png"], depth)
    intrinsics = row["intrinsics"]
    return Sample(
        key=key,
        image=decode_image(image),
        metres=metres,
        valid=valid,
        intrinsics=None if intrinsics is None else np.array(intrinsics, np.float64),
        caption=row["caption"],
        metric=row["metric"],
        source=row["source"],
        licence=row["licence"],
        image_bytes=image,
        depth_scale=depth,
    )


def _index_path(path: Path) -> Path:
    return path.with_suffix(".idx.json")


def _load_index(path: Path) -> Index:
    """The sidecar if it is there and whole, else what the tar's headers say."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        samples = json.loads(_index_path(path).read_text())["samples"]
        if isinstance(samples, list):
            return samples
    return _scan(path)


def _scan(path: Path) -> Index:
    """Keys and spans off the tar's own headers, as far as they are intact."""
    samples = []
    with suppress(tarfile.TarError), tarfile.open(path, "r:") as tar:
        for member in tar:
            if not member.isreg():
                continue
            folder, file = os.path.split(member.name)
            stem, _, extension = file.partition(".")
            key = os.path.join(folder, stem)
            if not samples or samples[-1][0] != key:
                samples.append([key, {}])
            samples[-1][1][extension] = [member.offset_data, member.size]
    return samples


@contextmanager
def _atomic(path: Path) -> Iterator[BinaryIO]:
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


def _write_text(path: Path, text: str) -> None:
    with _atomic(path) as file:
        file.write(text.encode())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
