"""Reading of sets of shards by index, local or remote; `mofo.data.write` makes them.

A set is a folder: `NAME-000000.tar` with the members of each sample, beside it its sidecar
`NAME-000000.idx.json` (offset, size, crc32 of every member), and `manifest.json`. The manifest has
the hash of each sidecar, the sidecar the checksum of each member: what is read is what was written,
or it is a DamagedSample. `data/README.md` has the format in full.
"""

import hashlib
import json
import logging
import os
import tarfile
import zlib
from collections.abc import Mapping
from glob import glob
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mofo.data.order import Recent
from mofo.data.sample import DAMAGE, Log, Sample, decode_depth, decode_mask, decode_picture, is_key
from mofo.data.storage import Cache, is_remote, patiently, read_bytes

log = logging.getLogger(__name__)

FORMAT = 2
MANIFEST = "manifest.json"
IMAGE_EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
MAX_OPEN = 64  # shards a process holds open

# What a manifest raises that is JSON, and no manifest.
SHAPELESS = (LookupError, TypeError, RecursionError)

# Of each sample its key, {extension: [offset, size, crc32]}, and height and width of the image;
# lists because JSON has no tuples. Without crc32, height and width where read off the tar itself.
Rows = list[list[Any]]


class Index(NamedTuple):
    """What a shard holds; `damage` says why nothing of it can be trusted, if so."""

    rows: Rows
    damage: str | None = None


class DamagedSample(ValueError):
    """A sample that cannot be read; `shard`, `key` and `reason` say which and why."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(f"{shard}: {key}: {reason}")
        self.shard, self.key, self.reason = shard, key, reason


class Shards:
    """Map-style reading of a finished set (a folder or URL), or of any such tars (a pattern).

    How many samples there are, and their order, comes from the manifest, so damage found later
    moves no other sample. Shards of a URL are copied into `cache` one by one as they are needed.
    Safe to use after a fork, and to pickle.
    """

    def __init__(self, source: str | Path, cache: Cache | None = None) -> None:
        self.source, self.cache = str(source).rstrip("/"), cache or Cache()
        self.is_remote = is_remote(self.source)
        self.manifest = None
        is_pattern = any(mark in self.source for mark in "*?[") and not os.path.isdir(self.source)
        if self.is_remote or not is_pattern:
            self.manifest = read_manifest(self.source)
            names = [shard["name"] for shard in self.manifest["shards"]]
            counts = [shard["samples"] for shard in self.manifest["shards"]]
            self.paths = [f"{self.source}/{name}" for name in names]
        else:
            self.paths = sorted(glob(self.source))
            counts = [len(self._load_index(shard).rows) for shard in range(len(self.paths))]
            for path in (path for path, count in zip(self.paths, counts, strict=True) if not count):
                log.warning("%s holds no sample that can be read", path)
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        if not len(self):
            raise ValueError(f"no samples in {source}; check the path")
        self._indices = Recent(self._load_index, size=MAX_OPEN)
        self._files: dict[tuple[int, int], BufferedReader] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __reduce__(self) -> tuple:
        return Shards, (self.source, self.cache)

    def read(self, index: int) -> Sample:
        """Sample `index` of the set; raises DamagedSample if it cannot be had as it was written."""
        shard, row = self._place(index)
        key = f"#{row}"
        try:
            rows, damage = self._indices[shard,]
            if damage is not None:
                raise ValueError(damage)
            if row >= len(rows):
                raise ValueError(f"the shard ends after {len(rows)} samples")
            key, spans = rows[row][:2]
            if not is_key(key):
                raise ValueError(f"key {key!r} names files: use no '.', '/' or '\\' in it")
            return _decode(key, self._members(shard, spans))
        except DAMAGE as error:
            reason = f"{type(error).__name__}: {error}"
            raise DamagedSample(os.path.basename(self.paths[shard]), str(key), reason) from error

    def key(self, index: int) -> str:
        """The key of a sample that is not read; shard and number where its index is damaged."""
        shard, row = self._place(index)
        try:
            return str(self._indices[shard,].rows[row][0])
        except DAMAGE:
            return f"{os.path.basename(self.paths[shard])}#{row}"

    def shape(self, index: int) -> tuple[int, int] | None:
        """Height and width, upright, of an image that is not read; None if no sidecar says so."""
        shard, row = self._place(index)
        try:
            h, w = self._indices[shard,].rows[row][2]
        except DAMAGE:
            return None
        return h, w

    def _place(self, index: int) -> tuple[int, int]:
        """The shard of a sample, and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.source}")
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return shard, index - int(self.starts[shard])

    def _members(self, shard: int, spans: Mapping[str, list[int]]) -> dict[str, bytes]:
        if self.is_remote:
            # The cache has patience of its own, and keeps track of what is used.
            return self._attempt(shard, spans)[1]
        file, members = patiently(lambda: self._attempt(shard, spans), self.paths[shard])
        if len(self._files) >= MAX_OPEN:
            del self._files[next(iter(self._files))]  # closes itself
        self._files[os.getpid(), shard] = file
        return members

    def _attempt(
        self, shard: int, spans: Mapping[str, list[int]]
    ) -> tuple[BufferedReader, dict[str, bytes]]:
        # A file that was open before a fork is opened again: its first owner may close it. It is
        # taken out, so that an attempt that hangs keeps its file and the next opens another.
        file = self._files.pop((os.getpid(), shard), None) or self._open(shard)
        return file, {extension: _pread(file, *span) for extension, span in spans.items()}

    def _open(self, shard: int) -> BufferedReader:
        if not self.is_remote:
            return open(self.paths[shard], "rb")
        entry = self._entry(shard)
        return self.cache.open(self.paths[shard], f"{entry['sha256']}.tar", entry["bytes"])

    def _entry(self, shard: int) -> dict[str, Any]:
        return {} if self.manifest is None else self.manifest["shards"][shard]

    def _load_index(self, shard: int) -> Index:
        """The sidecar if it is the shard's own, else what the tar's headers say."""
        path, entry = self.paths[shard], self._entry(shard)
        try:
            text = read_bytes(sidecar_path(path))
            sidecar = json.loads(text)
            # Format 1 kept no hash of the sidecar, and without a manifest there is none.
            if "index" in entry:
                fits = hashlib.sha256(text).hexdigest() == entry["index"]
            else:
                fits = sidecar["bytes"] == (entry["bytes"] if entry else os.path.getsize(path))
            if fits and isinstance(sidecar["samples"], list):
                return Index(sidecar["samples"])
            reason = "its index is that of another file"
        except DAMAGE as error:
            reason = f"its index cannot be read ({type(error).__name__}: {error})"
        with patiently(lambda: self._open(shard), path) as file:
            if entry and hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                return Index([], f"{reason}, and its sha256 is not that of the manifest")
            file.seek(0)
            return Index(_scan(file))


def read_manifest(source: str) -> dict[str, Any]:
    """The manifest of the set in a folder or at a URL."""
    path = f"{source}/{MANIFEST}"
    try:
        manifest = json.loads(read_bytes(path))
        newest, shards = manifest["format"], manifest["shards"]
        if newest > FORMAT:
            raise ValueError(
                f"{source} has format {newest}, but this version reads up to {FORMAT}; update "
                "mofo, or convert again"
            )
        for shard in shards:
            if os.path.basename(shard["name"]) != shard["name"]:
                raise ValueError(f"{path} names the shard {shard['name']}; convert the set again")
            if not (isinstance(shard["samples"], int) and 0 <= shard["samples"] < 2**31):
                raise TypeError(f"{shard['samples']!r} samples in {shard['name']}")
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{source} holds no finished set of shards ({MANIFEST} is missing); make it "
            f"with `mofo convert NAME --out {source}`, or give its row in the data config "
            "a `make:`"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, *SHAPELESS) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}); convert the set again"
        ) from error
    return manifest


def sidecar_path(path: str) -> str:
    """The index beside a tar."""
    return path.removesuffix(".tar") + ".idx.json"


def _pread(file: BufferedReader, offset: int, size: int, crc: int | None = None) -> bytes:
    room = os.fstat(file.fileno()).st_size
    # Also what keeps a damaged index from asking for more memory than there is.
    if offset < 0 or size < 0 or offset + size > room:
        raise ValueError(f"truncated: {size} bytes at {offset}, but the file ends at {room}")
    data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        raise ValueError(f"truncated: {len(data)} of {size} bytes at {offset}")
    if crc is not None and zlib.crc32(data) != crc:
        raise ValueError(f"checksum of {size} bytes at {offset} is wrong")
    return data


def _scan(file: BufferedReader) -> Rows:
    """Keys and spans off a tar's own headers, as far as they are intact; nothing is extracted."""
    rows: Rows = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                folder, name = os.path.split(member.name.removeprefix("./"))
                stem, _, extension = name.partition(".")
                # A key that leaves its folder is kept as it is: no Sample takes it.
                key = os.path.join(folder, stem)
                if not rows or rows[-1][0] != key:
                    rows.append([key, {}])
                rows[-1][1][extension] = [member.offset_data, member.size]
    except (tarfile.TarError, ArithmeticError, EOFError, LookupError, ValueError) as error:
        log.warning("%s is damaged after %d samples: %s", file.name, len(rows), error)
    return rows


def _decode(key: str, members: Mapping[str, bytes]) -> Sample:
    row = json.loads(members["json"])
    if row["format"] > FORMAT:
        raise ValueError(f"format {row['format']} is newer than {FORMAT}; update mofo")
    if row["format"] == 1:
        step, caption = row["depth_scale"], row["caption"]
        row["depth"] = None if step is None else {"coding": "linear", "step": step}
        row["captions"] = [caption] if caption else []
    image = next((members[ext] for ext in IMAGE_EXTENSIONS.values() if ext in members), None)
    if image is None:
        raise ValueError(f"there is no image among {sorted(members)}")
    if not isinstance(row["captions"], list) or not isinstance(row["metric"], bool):
        raise ValueError("captions must be a list, and metric true or false")
    intrinsics, sky = row["intrinsics"], None
    if "sky.png" in members:
        sky = decode_mask(members["sky.png"])
    sample = Sample(
        key=key,
        picture=decode_picture(image),
        **_decode_depth(row["depth"], members),
        sky=sky,
        intrinsics=None if intrinsics is None else np.array(intrinsics, np.float64),
        captions=tuple(row["captions"]),
        metric=row["metric"],
        source=row["source"],
        licence=row["licence"],
        image_bytes=image,
    )
    # A map holds codes, which are depths whatever they are; points could be anything.
    if sample.points is not None:
        sample.check()
    return sample


def _decode_depth(row: dict[str, Any] | None, members: Mapping[str, bytes]) -> dict[str, Any]:
    """The fields of a Sample that hold its depth."""
    match row:
        case None:
            return {}
        case {"coding": "linear", "step": float() | int() as step}:
            metres, valid = decode_depth(members["depth.png"], float(step))
            return {"metres": metres, "valid": valid, "depth_scale": float(step)}
        case {"coding": "log", "near": float() | int() as near, "far": float() | int() as far}:
            metres, valid = decode_depth(members["depth.png"], Log(float(near), float(far)))
            return {"metres": metres, "valid": valid}
        case {"coding": "points", "count": int() as count, "dtype": "<f4"}:
            values = np.frombuffer(members["points.bin"], "<f4")
            if values.size != 3 * count:
                raise ValueError(f"{values.size} numbers are not {count} points of 3")
            return {"points": values.reshape(-1, 3).astype(np.float32)}
    raise ValueError(f"depth is {row}, but this version reads linear, log and points")
