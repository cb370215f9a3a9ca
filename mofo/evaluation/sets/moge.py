"""MoGe's benchmarks in its prepared layout, as Ruicheng/monocular-geometry-evaluation has them.

    .index.txt                one instance folder a line
    INSTANCE/image.jpg
    INSTANCE/depth.png        as `mofo.data.logdepth` says
    INSTANCE/meta.json        "intrinsics": 3x3, in units of image width and height

Images are re-projected to the row's `size` (`view`). Pixels farther than `drop` times the 1 %
quantile of depth do not count. The reference scores an image without truth against 1 everywhere;
here it is an error. Segments and points are not read.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float64

from mofo.data.logdepth import decode_log_depth
from mofo.data.sample import Sample
from mofo.evaluation.benchmark import Listed, Row
from mofo.evaluation.sets.archive import Archive
from mofo.evaluation.sets.decode import image
from mofo.evaluation.sets.truth import cut_and_mask, key_of, sha256
from mofo.evaluation.sets.view import reproject

FILES = ("image.jpg", "depth.png", "meta.json")
QUANTILE = 0.01


@dataclass(frozen=True, kw_only=True)
class Layout:
    """`unit` is metres per unit of depth; `under` the folder of the archive that has the index."""

    unit: float | int = 1
    drop: float | int = 1000
    index: str = ".index.txt"
    under: str = ""


def open_set(row: Row) -> Listed:
    """The instances of the index; `source` is the set's folder, or its zip."""
    try:
        layout = Layout(**row.options)
    except TypeError as error:
        raise ValueError(f"{row.name}: options are not those of a moge reader: {error}") from error
    if row.size is None:
        raise ValueError(f"{row.name}: size is null, but MoGe's view needs a height and a width")
    archive = Archive(row.source, under=layout.under)
    archive.require([layout.index], row.download)
    data = archive.read(layout.index)
    if row.list_sha256 not in (None, sha256(data)):
        raise ValueError(
            f"{row.name}: {layout.index} has the sha256 {sha256(data)}, but the published one has "
            f"{row.list_sha256}; {row.download}, or use this one with "
            f"'list_sha256={{{row.name}: null}}'"
        )
    names = [line.strip() for line in data.decode().splitlines() if line.strip()]
    archive.require((f"{name}/{file}" for name in names for file in FILES), row.download)
    return Listed(
        keys=[key_of(f"{name}/image.jpg") for name in names],
        parts=[None] * len(names),
        list_sha256=sha256(data),
        read=partial(_read, row, layout, archive, names),
    )


def _read(row: Row, layout: Layout, archive: Archive, names: Sequence[str], index: int) -> Sample:
    assert row.size is not None  # open_set has seen it
    picture, depth, meta = (f"{names[index]}/{file}" for file in FILES)
    (h, w), key = row.size, key_of(picture)
    coded = archive.decode(depth, decode_log_depth)
    view = reproject(
        archive.decode(picture, image),
        coded.depth,
        coded.valid,
        archive.decode(meta, _intrinsics),
        (h, w),
    )
    if not view.valid.any():
        raise ValueError(f"{depth}: no pixel has known depth, so there is nothing to score")
    farthest = np.quantile(view.depth[view.valid], QUANTILE) * layout.drop
    measured = view.valid & (view.depth <= farthest)
    metres = view.depth * np.float32(layout.unit)
    intrinsics = np.diag([w, h, 1.0]) @ view.intrinsics
    return cut_and_mask(row, key, view.image, metres, measured, intrinsics)


def _intrinsics(data: bytes) -> Float64[np.ndarray, "3 3"]:
    intrinsics = np.array(json.loads(data)["intrinsics"], np.float64)
    if intrinsics.shape != (3, 3) or not (intrinsics[[0, 1], [0, 1]] > 0).all():
        raise ValueError(f"intrinsics are {intrinsics.tolist()}, but must be 3x3, focals positive")
    return intrinsics
