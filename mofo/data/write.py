"""Writing of sets of shards: samples to tars, with an index and statistics beside each.

Equal samples give equal bytes. A file stands under its name whole or not at all, the sidecar of a
tar is written after it, the manifest last. `data/README.md` has the format in full.
"""

import hashlib
import io
import json
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from mofo.data.sample import Log, Sample, choose_coding, encode_depth, encode_mask
from mofo.data.shards import FORMAT, IMAGE_EXTENSIONS, MANIFEST, read_manifest, sidecar_path
from mofo.data.storage import atomic, write_text
from mofo.data.summary import Tally, add, describe, tally

NUM_NAMED = 100  # items left out for one of two reasons, of which the manifest has the names


class Packed(NamedTuple):
    """A sample as a shard holds it: members by extension, size of the image, what it counts for."""

    key: str
    members: dict[str, bytes]
    size: tuple[int, int]
    tally: Tally


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

    `made_from` is stored: a set made from something else raises, and is never replaced. `total`
    only serves the progress bar. (`mofo.data.make` does this in parallel, and resumes.)
    """
    folder = Path(folder)
    ledger = Ledger(folder, name, made_from)
    if ledger.is_finished():
        return False
    folder.mkdir(parents=True, exist_ok=True)
    stream = map(pack, tqdm(samples, desc=f"writing {folder}", total=total, disable=None))
    while chunk := list(islice(stream, 1)):
        path = folder / f"{name}-{len(ledger.shards):06d}.tar"
        write_shard(path, islice(chain(chunk, stream), samples_per_shard), made_from=made_from)
        ledger.add(path)
    ledger.finish()
    return True


def pack(sample: Sample) -> Packed:
    """Check a sample and encode it; raises a ValueError that names it if it cannot be stored."""
    sample.check()
    members = _encode_image(sample)
    depth = None
    if sample.points is not None:
        depth = {"coding": "points", "count": len(sample.points), "dtype": "<f4"}
        members["points.bin"] = np.ascontiguousarray(sample.points, "<f4").tobytes()
    elif sample.metres is not None and sample.valid is not None:
        coding = sample.depth_scale
        if coding is None:
            coding = choose_coding(sample.metres, sample.valid)
        try:
            members["depth.png"] = encode_depth(sample.metres, sample.valid, coding)
        except ValueError as error:
            raise ValueError(f"{sample.key}: {error}") from error
        is_log = isinstance(coding, Log)
        depth = {"coding": "log", **coding._asdict()} if is_log else {"step": coding}
        depth = {"coding": "linear", **depth}
    if sample.sky is not None:
        members["sky.png"] = encode_mask(sample.sky)
    row = {
        "format": FORMAT,
        "captions": list(sample.captions),
        "intrinsics": None if sample.intrinsics is None else sample.intrinsics.tolist(),
        "metric": sample.metric,
        "depth": depth,
        "source": sample.source,
        "licence": sample.licence,
    }
    members["json"] = json.dumps(row, ensure_ascii=False).encode()
    h, w = sample.shape
    return Packed(sample.key, members, (h, w), tally(sample))


def _encode_image(sample: Sample) -> dict[str, bytes]:
    data = sample.image_bytes
    if data is None:
        buffer = io.BytesIO()
        Image.fromarray(sample.image).save(buffer, format="PNG")
        data = buffer.getvalue()
    with Image.open(io.BytesIO(data)) as opened:
        kind, size = opened.format, opened.size
    if kind not in IMAGE_EXTENSIONS:
        raise ValueError(
            f"{sample.key}: image_bytes hold {kind}, but shards hold {sorted(IMAGE_EXTENSIONS)}; "
            "leave image_bytes out to have the pixels stored as PNG"
        )
    # An EXIF rotation may exchange the sides.
    if sorted(size) != sorted(sample.shape):
        raise ValueError(
            f"{sample.key}: image_bytes hold {size[1]}x{size[0]} pixels, but picture is "
            f"{'x'.join(map(str, sample.shape))}; give the file it was decoded from"
        )
    return {IMAGE_EXTENSIONS[kind]: data}


def write_shard(
    path: Path,
    samples: Iterable[Packed],
    *,
    made_from: dict[str, Any] | None,
    job: str | None = None,
    bad: list[list[str]] | None = None,
    empty: list[str] | None = None,
) -> None:
    """Write one tar, if there is any sample, and then its sidecar.

    `job` names what the shard is made of; `bad` lists the items that cannot be converted, with the
    reason, `empty` those in which nothing is measured: both may grow while `samples` are taken.
    """
    samples = iter(samples)
    rows, total, digest, size = [], {}, hashlib.sha256(), 0
    if first := next(samples, None):
        with atomic(path) as file:
            for one in chain([first], samples):
                spans = {}
                for extension, data in one.members.items():
                    # Without owner, mode and time of its own: equal samples are equal bytes.
                    entry = tarfile.TarInfo(f"{one.key}.{extension}")
                    entry.size = len(data)
                    header = entry.tobuf()
                    spans[extension] = [size + len(header), len(data), zlib.crc32(data)]
                    block = header + data + bytes(-len(data) % tarfile.BLOCKSIZE)
                    file.write(block)
                    digest.update(block)
                    size += len(block)
                rows.append([one.key, spans, one.size])
                add(total, one.tally)
            end = bytes(2 * tarfile.BLOCKSIZE)
            file.write(end)
            digest.update(end)
            size += len(end)
    else:
        path.unlink(missing_ok=True)
    sidecar = {
        "format": FORMAT,
        "made_from": made_from,
        "job": job,
        "bytes": size,
        "sha256": digest.hexdigest(),
        "samples": rows,
        "tally": total,
        "bad": bad or [],
        "empty": empty or [],
    }
    write_text(Path(sidecar_path(str(path))), json.dumps(sidecar))


class Ledger:
    """What the shards of a set hold that are written so far, in any order; it becomes the manifest.

    It reads what stands on the disk, so a set that is continued counts like one made at once.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        made_from: Mapping[str, Any] | None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        """`defaults` are those of options that an older set may not have stored."""
        self.folder, self.name = folder, name
        self.made_from = _plain(made_from)
        self.defaults = _plain(defaults or {})
        self.shards: dict[str, dict[str, Any]] = {}
        self.bad: dict[str, list[list[str]]] = {}
        self.empty: dict[str, list[str]] = {}
        self.num_samples = self.num_bad = 0
        self._keys: dict[str, str] = {}
        self._tally: Tally = {}

    def is_finished(self) -> bool:
        """Whether the folder holds this set as a whole; raises if it holds any of another."""
        if (self.folder / MANIFEST).exists():
            old = read_manifest(str(self.folder))
            self._refuse_other("the finished set", old["name"], old["made_from"])
            return True
        for path in self.folder.glob("*.idx.json"):
            if (sidecar := read_sidecar(path)) is not None:
                name = path.name.rpartition("-")[0]
                self._refuse_other("parts of the set", name, sidecar.get("made_from"))
                break
        return False

    def _refuse_other(self, what: str, name: str, made_from: Mapping[str, Any] | None) -> None:
        whole = None if made_from is None else {**self.defaults, **made_from}
        if (name, whole) != (self.name, self.made_from):
            there, here = {"name": name, **(whole or {})}, {"name": self.name}
            here |= self.made_from or {}
            differ = [
                f"{key}: {there.get(key)} there, {here.get(key)} here"
                for key in {**there, **here}
                if there.get(key) != here.get(key)
            ]
            raise ValueError(
                f"{self.folder} holds {what} {name!r}, made otherwise ({'; '.join(differ)}); "
                "delete that folder, or choose another"
            )

    def add(self, path: Path) -> None:
        """Count the finished shard at `path`; a key that another shard holds raises."""
        text = Path(sidecar_path(str(path))).read_bytes()
        sidecar = json.loads(text)
        for key, *_ in sidecar["samples"]:
            if key in self._keys:
                both = " and ".join(sorted({self._keys[key], path.name}))
                raise ValueError(
                    f"key {key!r} occurs twice, in {both}; keys name the samples of a set: correct "
                    "the converter, or what it is given"
                )
            self._keys[key] = path.name
        self.num_samples += len(sidecar["samples"])
        self.num_bad += len(sidecar["bad"])
        self.bad[path.name] = sidecar["bad"]
        self.empty[path.name] = sidecar.get("empty", [])  # older sidecars did not count them
        if not sidecar["samples"]:
            return
        add(self._tally, sidecar["tally"])
        self.shards[path.name] = {
            "name": path.name,
            "samples": len(sidecar["samples"]),
            "bytes": sidecar["bytes"],
            "sha256": sidecar["sha256"],
            "index": hashlib.sha256(text).hexdigest(),
        }

    def why(self) -> Counter[str]:
        """How many items could not be converted, by reason; numbers in reasons are masked."""
        bad = chain.from_iterable(self.bad.values())
        return Counter(re.sub(r"\d+", "#", reason) for _, reason in bad)

    def finish(self) -> None:
        """Delete shards of an earlier beginning that are no part of the set; write the manifest."""
        if not self.shards:
            raise ValueError(f"no samples to write to {self.folder}; check what they are made from")
        for suffix in (".tar", ".idx.json"):
            for path in self.folder.glob(f"{self.name}-*{suffix}"):
                if path.name.replace(suffix, ".tar") not in self.bad:
                    path.unlink()
        shards = [self.shards[name] for name in sorted(self.shards)]
        hashes = "".join(shard["sha256"] for shard in shards)
        named = [row for name in sorted(self.bad) for row in self.bad[name]]
        empty = [item for name in sorted(self.empty) for item in self.empty[name]]
        manifest = {
            "format": FORMAT,
            "name": self.name,
            "made_from": self.made_from,
            **describe(self._tally),
            "bytes": sum(shard["bytes"] for shard in shards),
            "bad": {"items": self.num_bad, "reasons": self.why(), "first": named[:NUM_NAMED]},
            "empty": {"items": len(empty), "first": empty[:NUM_NAMED]},
            "hash": hashlib.sha256(hashes.encode()).hexdigest(),
            "shards": shards,
        }
        write_text(self.folder / MANIFEST, json.dumps(manifest, indent=1))


def _plain(options: Mapping[str, Any] | None) -> Any:
    """As it comes back from JSON; paths as text."""
    return json.loads(json.dumps(options, default=str))


def read_sidecar(path: Path) -> dict[str, Any] | None:
    """The sidecar at `path`; None where there is none that can be read."""
    try:
        sidecar = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return sidecar if isinstance(sidecar, dict) else None
