"""Sets of image files with depth files, as a list names them: most of what is published.

The options of such a row are a `Layout`. Marigold's archives, DIODE, iBims-1 and Sintel are rows of
this reader.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from mofo.data.sample import Sample
from mofo.evaluation.benchmark import Listed, Row
from mofo.evaluation.sets.archive import Archive
from mofo.evaluation.sets.decode import DEPTH, image, mask
from mofo.evaluation.sets.truth import cut_and_mask, key_of, sha256

NO_TRUTH = "None"  # in a list, in place of the depth file of an image that has none


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the columns of the list are, and how the files are coded.

    `columns` are patterns of paths, image first, then depth: "rgb/{scene}/{name}.png". With them
    a list is derived from the names in the archive. `depth` names the decoder (`format`) and its
    options. `masks` are columns, counted from 0, of files that say what was measured. `parts` maps
    values of the field {part} to names. `under` is the folder of the archive that paths are
    relative to.
    """

    columns: Sequence[str]
    depth: Mapping[str, Any]
    masks: Sequence[int] = ()
    parts: Mapping[str, str] = field(default_factory=dict)
    under: str = ""

    def __post_init__(self) -> None:
        if len(self.columns) < 2 or not all(1 < at < len(self.columns) for at in self.masks):
            raise ValueError(
                f"columns are {list(self.columns)} and masks {list(self.masks)}, but the first two "
                "columns are image and depth, and masks are numbers of later ones"
            )
        if self.depth.get("format") not in DEPTH:
            raise ValueError(f"depth is {self.depth}, but its format must be one of {list(DEPTH)}")

    def line(self, name: str) -> list[str] | None:
        """The line of the list for an image of that name, if it is one."""
        found = _pattern(self.columns[0]).fullmatch(name)
        return None if found is None else [c.format(**found.groupdict()) for c in self.columns]

    def part(self, name: str) -> str | None:
        found = _pattern(self.columns[0]).fullmatch(name)
        return self.parts.get(found["part"]) if self.parts and found is not None else None


def open_set(row: Row) -> Listed:
    """The images of the list that the row names, or that its archive holds."""
    try:
        layout = Layout(**row.options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{row.name}: options are not those of a pairs reader: {error}") from error
    archive = Archive(row.source, under=layout.under)
    archive.require([], row.download)
    lines, digest = _derived(row, layout, archive) if row.list is None else _published(row)
    lines = [line for line in lines if line[1] != NO_TRUTH]
    archive.require((line[at] for line in lines for at in (0, 1, *layout.masks)), row.download)
    return Listed(
        keys=[key_of(line[0]) for line in lines],
        parts=[layout.part(line[0]) for line in lines],
        list_sha256=digest,
        read=partial(_read, row, layout, archive, lines),
    )


def _read(
    row: Row, layout: Layout, archive: Archive, lines: Sequence[Sequence[str]], index: int
) -> Sample:
    line = lines[index]
    pixels = archive.decode(line[0], image)
    options = dict(layout.depth)
    metres = archive.decode(line[1], DEPTH[options.pop("format")], **options)
    measured = None
    for at in layout.masks:
        one = archive.decode(line[at], mask)
        measured = one if measured is None else measured & one
    return cut_and_mask(row, key_of(line[0]), pixels, metres, measured)


def _published(row: Row) -> tuple[list[list[str]], str]:
    """The lines of the list that came with the set, and its hash, which must be the known one."""
    path = Path(row.list or "")
    if not path.is_file():
        raise ValueError(f"{row.name}: the list {path} does not exist; {row.download}")
    data = path.read_bytes()
    digest = sha256(data)
    if row.list_sha256 not in (None, digest):
        raise ValueError(
            f"{row.name}: {path} has the sha256 {digest}, but the published list has "
            f"{row.list_sha256}; fetch it again, or use this one with "
            f"'list_sha256={{{row.name}: null}}'"
        )
    lines = [line.split() for line in data.decode().splitlines() if line.strip()]
    if short := [line for line in lines if len(line) < 2]:
        raise ValueError(f"{row.name}: {path} has the line {short[0]}, but needs image and depth")
    return lines, digest


def _derived(row: Row, layout: Layout, archive: Archive) -> tuple[list[list[str]], str]:
    """The lines of all images in the archive, in the order of the published list if that is known.

    Published lists are sorted by file name, or as their files lay on the author's disk, which the
    archive may have kept. Another order changes no mean; the hash then says that it is another.
    """
    found = [line for name in archive.names() if (line := layout.line(name)) is not None]
    by_name = sorted(found, key=lambda line: (PurePosixPath(line[0]).name, line[0]))
    digests = {_digest(lines): lines for lines in (found, by_name)}
    digest = row.list_sha256 if row.list_sha256 in digests else _digest(by_name)
    assert digest is not None  # a key of the digests
    return digests[digest], digest


def _digest(lines: Sequence[Sequence[str]]) -> str:
    # As the lists are published: one space, and no line feed at the end.
    return sha256("\n".join(" ".join(line) for line in lines).encode())


def _pattern(column: str) -> re.Pattern[str]:
    """The regular expression of "a/{scene}/{name}.png"; a field that comes again repeats itself."""
    pattern, seen = "", set[str]()
    for at, piece in enumerate(re.split(r"\{(\w+)\}", column)):
        if at % 2 == 0:
            pattern += re.escape(piece)
        else:
            pattern += f"(?P={piece})" if piece in seen else f"(?P<{piece}>[^/]+)"
            seen.add(piece)
    return re.compile(pattern)
