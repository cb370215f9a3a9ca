"""A benchmark is a `Row`, which is data: one set of images under one protocol, and how to read it.

    images = open_row(row)
    sample = images.read(0)     # truth with the row's crop and masks already applied

Readers are modules of `mofo.evaluation.sets`; each takes a row's `source` as it is published.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

from mofo.data.sample import Sample
from mofo.evaluation.sets.regions import REGIONS

READERS = ("shards", "pairs", "nyu_mat", "moge", "spring")
# What not every reader takes.
_TAKEN_BY = {
    "list": ("pairs",),
    "size": ("shards", "moge"),
    "crop": ("pairs", "nyu_mat", "moge", "spring"),
    "region": ("pairs", "nyu_mat", "moge", "spring"),
    "keys": ("shards",),
    "make": ("shards",),
}
# What may change between two starts of a run without changing a line of it: words, and where the
# same files lie.
_FREE = ("about", "download", "source", "list", "limit")
# What a training set does not take over from its benchmark.
_WHOLE_SET = {"keys": None, "limit": None, "make": None, "training": None, "count": None}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One set: where it lies, which images it must have, what of them is looked at.

    `source` is an archive or folder for the `reader`, which has `options`; `download` says where to
    get it. There must be `count` images. `list` is the published list, a file, which must have the
    hash `list_sha256` (null: any); without one the list is derived from the archive, and has that
    hash if it equals the published one.

    `crop` and `region` are names of `sets.regions.REGIONS`: image and truth are cut to the first,
    truth is masked to the second. Truth counts strictly between `low` and `high`, to which aligned
    depth is clipped where the protocol says so; where the set has masks these alone say what was
    measured. `metric`: depth is in metres. `sharp`: edges are exact to the pixel. `input_side`
    is the longer side of the image that the model is given, resized bilinearly, larger or smaller;
    null gives it the image as it is. `size` (height, width) is what images are brought to: by
    MoGe's re-projection, or a centre crop of shards.

    `shards` is a folder or pattern of our own shards, made on first use if `make` says how; `keys`
    a text file naming the images to take, one a line. `training` has the fields that differ
    (`shards`, `make`, ...) for the training set that trivial baselines may look at. `limit` takes
    the first images only.
    """

    name: str
    reader: str = "shards"
    source: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    about: str = ""
    download: str = ""
    licence: str = ""
    count: int | None = None
    list: str | None = None
    list_sha256: str | None = None
    crop: str | None = None
    region: str | None = None
    low: float | int | None = None
    high: float | int | None = None
    metric: bool = True
    sharp: bool = False
    input_side: int | None = None
    shards: str = ""
    make: dict[str, Any] | None = None
    keys: str | None = None
    size: Sequence[int] | None = None
    limit: int | None = None
    training: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self._check("reader", self.reader, READERS)
        for name, readers in _TAKEN_BY.items():
            if getattr(self, name) is not None and self.reader not in readers:
                raise ValueError(
                    f"{self.name}: {name} is {getattr(self, name)!r}, but the reader "
                    f"{self.reader} takes none; set it to null"
                )
        for name in ("crop", "region"):
            self._check(name, getattr(self, name), (None, *REGIONS))
        if self.limit is not None:
            check_counts(limit=self.limit)

    def _check(self, field: str, value: str | None, accepted: Sequence[str | None]) -> None:
        if value not in accepted:
            names = ", ".join(map(str, accepted))
            raise ValueError(f"{self.name}: {field} is {value!r}, but must be one of: {names}")

    def protocol(self) -> dict[str, Any]:
        """All that a number depends on; the rest may change between two starts of a run."""
        plain = json.loads(json.dumps(asdict(self)))
        return {name: value for name, value in plain.items() if name not in _FREE}


@runtime_checkable
class Images(Protocol):
    """The images of a row in the order of its list: keys are unique, parts such as "indoor"."""

    @property
    def keys(self) -> Sequence[str]: ...

    @property
    def parts(self) -> Sequence[str | None]: ...

    @property
    def list_sha256(self) -> str:
        """Of the list as it was used, all of it, whatever `limit` says."""
        ...

    def read(self, index: int, /) -> Sample:
        """One image with its truth; a ValueError says why there is none."""
        ...


@dataclass(frozen=True, kw_only=True)
class Listed:
    """Images as the readers give them."""

    keys: Sequence[str]
    parts: Sequence[str | None]
    list_sha256: str
    read: Callable[[int], Sample]


def open_row(row: Row) -> Images:
    """The images of a row; missing files, a wrong count or a wrong list are refused here."""
    images: Listed = import_module(f"mofo.evaluation.sets.{row.reader}").open_set(row)
    count = len(images.keys)
    if not count or row.count not in (None, count):
        raise ValueError(
            f"{row.name}: {row.source or row.shards} has {count} images, but the set has "
            f"{row.count or 'some'}; {row.download or 'check the path'}"
            + (f", or take what is there with 'count={{{row.name}: {count}}}'" if count else "")
        )
    if len(set(images.keys)) != count:
        twice = next(key for at, key in enumerate(images.keys) if key in images.keys[:at])
        raise ValueError(f"{row.name}: key {twice!r} occurs twice; each image needs its own")
    return replace(images, keys=images.keys[: row.limit], parts=images.parts[: row.limit])


def open_rows(rows: Sequence[Row]) -> list[Images]:
    """The images of each row; all that is wrong with any of them is said at once."""
    opened, wrong = [], []
    for row in rows:
        try:
            opened.append(open_row(row))
        except ValueError as error:
            wrong.append(f"  {row.name}: {str(error).removeprefix(f'{row.name}: ')}\n")
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(rows)} sets cannot be opened:\n{''.join(wrong)}"
            "A set that lies elsewhere is named with 'source={SET: PATH}', fewer sets with "
            "sets=[SET,SET]"
        )
    return opened


def check_counts(**counts: object) -> None:
    """Refuse what cannot be a number of something."""
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"{name} is {count!r}, but must be a whole number, 1 or more")


def read_samples(row: Row) -> Iterator[Sample]:
    """The samples of a row one after another."""
    images = open_row(row)
    yield from map(images.read, range(len(images.keys)))


def training_row(row: Row) -> Row | None:
    """The training set beside a benchmark, brought to the same size."""
    return None if row.training is None else replace(row, **{**_WHOLE_SET, **row.training})


def choose(rows: Sequence[Row], names: Sequence[str] | None, protocol: str) -> Sequence[Row]:
    """The rows of these names, in the protocol's order; all of them without names."""
    known: Mapping[str, Row] = {row.name: row for row in rows}
    strangers = [name for name in names or () if name not in known]
    if strangers:
        raise ValueError(
            f"{protocol} does not define the sets {', '.join(strangers)}; it defines: "
            f"{', '.join(known)}"
        )
    return [row for row in rows if names is None or row.name in names]
