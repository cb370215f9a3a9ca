"""Sets of our own shards, made on first use where the row says how."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mofo.data.make import make
from mofo.data.sample import Sample
from mofo.data.shards import Shards
from mofo.data.transforms import centre_box, crop_resize
from mofo.evaluation.benchmark import Listed, Row
from mofo.evaluation.sets.truth import sha256


def open_set(row: Row) -> Listed:
    """The samples in their order on disk, or those that the file `keys` names."""
    if row.make is not None:
        make(row.shards, **row.make)
    shards = Shards(row.shards)
    keys = [shards.key(index) for index in range(len(shards))]
    wanted = set(keys) if row.keys is None else set(Path(row.keys).read_text().split())
    if missing := sorted(wanted - set(keys)):
        named = ", ".join(missing[:10])
        raise ValueError(f"{row.shards} lacks {len(missing)} images of {row.keys}: {named}")
    chosen = [index for index, key in enumerate(keys) if key in wanted]
    keys = [keys[index] for index in chosen]
    return Listed(
        keys=keys,
        parts=[None] * len(keys),
        list_sha256=sha256("\n".join(keys).encode()),
        read=partial(_read, row, shards, chosen),
    )


def _read(row: Row, shards: Shards, chosen: Sequence[int], index: int) -> Sample:
    sample = shards.read(chosen[index])
    if row.size is not None:
        size = (row.size[0], row.size[1])
        sample = crop_resize(sample, centre_box(sample.shape, size), size)
    return sample
