"""Shards as they are written here and as any program writes them, for tests of what reads them."""

import errno
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from pictures import encoded, picture, sparse
from PIL import Image

from mofo.data.sample import Sample, decode_picture
from mofo.data.write import write

SHARD, INDEX = "pictures-000002.tar", "pictures-000002.idx.json"


def forty(folder: Path) -> Path:
    """40 pictures in shards of 6."""
    write(map(picture, range(40)), folder, "pictures", samples_per_shard=6)
    return folder


def full_disk(after: int) -> Callable:
    """`open` on a disk that is full once that many bytes are written."""

    class Full(io.FileIO):
        def write(self, data) -> int:
            nonlocal after
            after -= len(data)
            if after < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    return lambda path, mode: Full(path, mode) if "w" in mode else open(path, mode)


def wide(number: int) -> Sample:
    """A picture of which the nearest pixel is at a millimetre, the farthest at 7.68 m."""
    sample = picture(number)
    metres = sample.metres.copy()
    metres[tuple(np.argwhere(sample.valid)[0])] = 0.001
    return replace(sample, key=f"wide-{number}", metres=metres)


def kinds() -> list[Sample]:
    """One sample of each kind that a shard can hold."""
    data = encoded(Image.fromarray(picture(5).image), "JPEG", quality=90)
    masked = picture(4)
    return [
        picture(0),
        sparse(1),
        picture(2, depth=False),
        replace(picture(3), captions=(), intrinsics=None, metric=False),
        replace(masked, sky=~masked.valid),
        replace(picture(5), picture=decode_picture(data), image_bytes=data),
        wide(6),
    ]


def archive(path: Path, members: dict[str, bytes]) -> Path:
    """A tar as any program writes it."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def row(**changes) -> bytes:
    plain = {"format": 2, "captions": [], "intrinsics": None, "metric": True, "depth": None}
    return json.dumps({**plain, "source": "test", "licence": "CC0", **changes}).encode()
