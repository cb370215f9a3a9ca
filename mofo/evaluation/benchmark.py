"""A benchmark is a `Row`: data, never code. Here it is also read."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from mofo.data.make import make
from mofo.data.sample import Sample
from mofo.data.shards import Shards
from mofo.data.transforms import centre_box, crop_resize
from mofo.metrics import ALIGNMENTS

# What may change between two starts of a run without changing a line of it.
_FREE = ("about", "limit")
# What a training set does not take over from its benchmark.
_WHOLE_SET = {"keys": None, "limit": None, "make": None, "training": None}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One benchmark: which images, brought to which size, under which protocol.

    `shards` is a folder or pattern, made on first use if `make` says how; `keys` a text file naming
    the images to take, one a line. `size` (height, width) is a centre crop, resized; None scores
    images as they are. Aligned depth is clipped to [`low`, `high`]. `training` has the fields that
    differ (`shards`, `make`, ...) for the training set that trivial baselines may look at.
    """

    name: str
    shards: str = ""
    about: str = ""
    make: dict[str, Any] | None = None
    keys: str | None = None
    size: list[int] | None = None
    limit: int | None = None
    alignment: str = "affine"
    low: float | int | None = None
    high: float | int | None = None
    training: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.alignment not in ALIGNMENTS:
            accepted = ", ".join(ALIGNMENTS)
            raise ValueError(
                f"{self.name}: alignment is {self.alignment!r}, but must be one of: {accepted}"
            )

    def protocol(self) -> dict[str, Any]:
        """All that a number depends on; `about` and `limit` may change between two starts."""
        plain = json.loads(json.dumps(asdict(self)))
        return {name: value for name, value in plain.items() if name not in _FREE}


def read_samples(row: Row) -> Iterator[Sample]:
    """The samples of a row in their order on disk, cropped and resized as it says."""
    if row.make is not None:
        make(row.shards, **row.make)
    wanted = None if row.keys is None else set(Path(row.keys).read_text().split())
    shards, missing = Shards(row.shards), set(wanted or ())
    samples = (shards.read(index) for index in range(len(shards)))
    chosen = (sample for sample in samples if wanted is None or sample.key in wanted)
    for sample in islice(chosen, row.limit):
        missing.discard(sample.key)
        if row.size is not None:
            size = (row.size[0], row.size[1])
            sample = crop_resize(sample, centre_box(sample.image.shape[:2], size), size)
        yield sample
    if missing and row.limit is None:
        named = ", ".join(sorted(missing)[:10])
        raise ValueError(f"{row.shards} lacks {len(missing)} images of {row.keys}: {named}")


def training_row(row: Row) -> Row | None:
    """The training set beside a benchmark, brought to the same size."""
    return None if row.training is None else replace(row, **{**_WHOLE_SET, **row.training})
