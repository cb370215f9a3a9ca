"""The real photographs with measured depth of `data/samples`, as samples.

    mofo convert samples --keys data/splits/real_train.txt --out data/made/real

Published layout: `NAME.png|jpg`, `NAME_depth.png` (16 bit, 0 = not measured), `NAME.json`, and one
`captions.json` for all (`data/samples/README.md`).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mofo.data.sample import Sample, decode_depth, decode_picture

VERSION = 1
LICENCE = "of each photograph its own: data/samples/LICENSES.md"
OPTIONS = {
    "keys": "text file of the photographs' names, one a line, relative to the current directory",
}


class Photograph(NamedTuple):
    source: Path
    name: str


def find(source: Path = Path("data/samples"), *, keys: str) -> list[Photograph]:
    """The photographs named in the file `keys`, one name a line."""
    names = Path(keys).read_text().split()
    for name in names:
        if not (source / f"{name}.json").exists():
            raise ValueError(f"{keys} names {name!r}, which is not in {source}; correct the list")
    return [Photograph(source, name) for name in names]


def read(item: Photograph) -> Iterator[Sample]:
    source, name = item
    row = json.loads((source / f"{name}.json").read_text())
    caption = json.loads((source / "captions.json").read_text())[name]
    metres, valid = decode_depth(source / row["depth"], row["depth_scale"])
    image_bytes = (source / row["image"]).read_bytes()
    # Notices and citations must travel with every copy (LICENSES.md).
    terms = [row[name] for name in ("licence", "notice", "cite") if name in row]
    yield Sample(
        key=row["name"],
        picture=decode_picture(image_bytes),
        metres=metres,
        valid=valid,
        intrinsics=_intrinsics(row["intrinsics"]),
        captions=(caption,),
        metric=row["metric"],
        source=row["source"],
        licence=". ".join(terms),
        image_bytes=image_bytes,
        depth_scale=row["depth_scale"],
    )


def _intrinsics(row: dict | None) -> np.ndarray | None:
    if row is None:
        return None
    # Calibrations count pixel centres from 0, ours lie at half-integers.
    return np.array(
        [[row["fx"], 0, row["cx"] + 0.5], [0, row["fy"], row["cy"] + 0.5], [0, 0, 1]], np.float64
    )
