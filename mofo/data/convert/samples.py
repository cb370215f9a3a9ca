"""The real photographs with measured depth of `data/samples`, as samples.

Published layout: `NAME.png|jpg`, `NAME_depth.png` (16 bit, 0 = not measured), `NAME.json`, and one
`captions.json` for all. To make the training part of them:

    make("data/made/real", converter="samples", keys="data/splits/real_train.txt")
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mofo.data.sample import Sample, decode_depth, decode_image

VERSION = 1


def convert(*, keys: str, folder: str = "data/samples") -> Iterator[Sample]:
    """Yield the photographs named in the file `keys`, one name a line."""
    root = Path(folder)
    captions = json.loads((root / "captions.json").read_text())
    for name in Path(keys).read_text().split():
        if not (root / f"{name}.json").exists():
            raise ValueError(f"{keys} names {name!r}, which is not in {root}; correct the list")
        yield _read(root, json.loads((root / f"{name}.json").read_text()), captions[name])


def _read(root: Path, row: dict, caption: str) -> Sample:
    metres, valid = decode_depth(root / row["depth"], row["depth_scale"])
    image_bytes = (root / row["image"]).read_bytes()
    # Notices and citations must travel with every copy (LICENSES.md).
    terms = [row[name] for name in ("licence", "notice", "cite") if name in row]
    return Sample(
        key=row["name"],
        image=decode_image(image_bytes),
        metres=metres,
        valid=valid,
        intrinsics=_intrinsics(row["intrinsics"]),
        caption=caption,
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
