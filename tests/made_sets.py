"""A converter that only tests know, pictures for it, and sets made of them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

import mofo.data.convert
from mofo.data.make import load, make

PLANTED = '''
import os
import time
from pathlib import Path

import numpy as np
from PIL import Image

from mofo.data.sample import Sample, decode_picture

VERSION = 1
SAMPLES_PER_ITEM = 2


def find(source, *, last=None):
    found = sorted(source.glob("*.png"))
    if not found:
        raise ValueError(f"{source} holds no picture; expected {source}/NAME.png")
    return [(path, 0.5) for path in found[:last]]


def read(item):
    """Two samples of one picture; one whose name begins with "empty" has no depth, so none."""
    path, step = item
    time.sleep(float(os.environ.get("PLANTED_PAUSE", 0)))
    if path.stem.startswith("empty"):
        return
    image_bytes = path.read_bytes()
    picture = decode_picture(image_bytes)
    metres = np.array(picture)[..., 0].astype(np.float32) * np.float32(step)
    for part in range(2):
        yield Sample(
            key=f"{path.stem.rstrip('_')}_{part}", picture=picture, image_bytes=image_bytes,
            metres=metres, valid=metres > 0, depth_scale=step, metric=True, source="planted",
            licence="CC0",
        )
'''


@contextmanager
def plant(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A converter beside those that are shipped, so that only tests know it."""
    folder.mkdir()
    (folder / "planted.py").write_text(PLANTED)
    path = [*mofo.data.convert.__path__, str(folder)]
    monkeypatch.setattr(mofo.data.convert, "__path__", path)
    yield load("planted")
    del sys.modules["mofo.data.convert.planted"]
    del mofo.data.convert.planted


def write_source(folder: Path) -> Path:
    """23 pictures, the sixth to eighth without depth."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(23):
        name = f"{'empty' if 5 <= number < 8 else 'image'}-{number:02d}.png"
        pixels = rng.integers(1, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
        # `glob` sorts what is empty first.
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def start(source: Path, out: Path, **options) -> bool:
    """In this process, shards of 4 items."""
    settings = {"samples_per_shard": 8, "processes": 1} | options
    return make(out, converter="planted", source=source, **settings)
