"""A folder of images, without depth; captions from text files beside them, from one table, or none.

    mofo convert images --source DIR --out OUT
    mofo convert images --source DIR --out OUT --captions captions.parquet --caption-column text

Accepted layouts:

    DIR/**/NAME.jpg             also .jpeg, .png, .webp, kept as they are; .bmp, .tif, .tiff
    DIR/**/NAME.txt             its captions, one a line, if there is no table
    TABLE.json                  {"sub/NAME.jpg": "a caption", "other.jpg": ["one", "another"]}
    TABLE.csv, TABLE.parquet    a row per caption: the columns file_name and caption

A table may lie anywhere. It names images relative to DIR, as the metadata.csv of Hugging Face's
ImageFolder does.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from mofo.data.sample import Sample, decode_picture

VERSION = 1
LICENCE = "unknown"
KEPT = {".jpg", ".jpeg", ".png", ".webp"}  # what shards hold; others become PNG
DECODED = {".bmp", ".tif", ".tiff"}
OPTIONS = {
    "captions": (
        "table of captions (.json, .csv, .parquet), relative to the current directory; "
        "without one, NAME.txt beside each image"
    ),
    "image_column": "column of the table that names the image, relative to the source",
    "caption_column": "column of the table that holds the caption",
    "dataset": "name of the data set, the source of each sample",
    "licence": "its terms, kept with each sample",
}


class Item(NamedTuple):
    key: str
    image: Path
    captions: tuple[str, ...] | None  # None: look beside the image
    dataset: str
    licence: str


def find(
    source: Path,
    *,
    captions: str | None = None,
    image_column: str = "file_name",
    caption_column: str = "caption",
    dataset: str = "images",
    licence: str = LICENCE,
) -> list[Item]:
    """Every image below `source`, with its captions of the table `captions` if one is given."""
    paths = sorted(path for path in source.rglob("*") if path.suffix.lower() in KEPT | DECODED)
    if not paths:
        raise ValueError(
            f"{source} holds no image; expected {', '.join(sorted(KEPT | DECODED))} in it or below"
        )
    table: dict[str, list[str]] = {}
    if captions is not None:
        for name, caption in _rows(Path(captions), image_column, caption_column):
            if caption.strip():
                table.setdefault(Path(name).as_posix(), []).append(caption.strip())
    items, named = [], 0
    for path in paths:
        name = path.relative_to(source).as_posix()
        own = None if captions is None else tuple(table.get(name, ()))
        named += bool(own)
        items.append(Item(re.sub(r"[./\\]", "_", name), path, own, dataset, licence))
    if captions is not None and not named:
        raise ValueError(
            f"{captions} names {sorted(table)[:3]}, none of the {len(paths)} images, which are "
            f"{[path.relative_to(source).as_posix() for path in paths[:3]]}; "
            "its names must be relative to the source"
        )
    return items


def read(item: Item) -> Iterator[Sample]:
    """The image and its captions."""
    image_bytes = item.image.read_bytes()
    captions = item.captions
    if captions is None:
        beside = item.image.with_suffix(".txt")
        lines = beside.read_text("utf-8").splitlines() if beside.is_file() else []
        captions = tuple(line.strip() for line in lines if line.strip())
    yield Sample(
        key=item.key,
        picture=decode_picture(image_bytes),
        captions=captions,
        metric=False,
        source=item.dataset,
        licence=item.licence,
        image_bytes=image_bytes if item.image.suffix.lower() in KEPT else None,
    )


def _rows(path: Path, image_column: str, caption_column: str) -> Iterator[tuple[str, str]]:
    """Image name and caption, as often as the table has one."""
    match path.suffix.lower():
        case ".json":
            yield from _json_rows(path)
        case ".csv":
            with open(path, encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file)
                _check_columns(path, reader.fieldnames or (), image_column, caption_column)
                for row in reader:
                    yield row[image_column] or "", row[caption_column] or ""
        case ".parquet":
            from pyarrow.parquet import ParquetFile  # slow to import, and only tables need it

            with ParquetFile(path) as file:
                columns = [image_column, caption_column]
                _check_columns(path, file.schema_arrow.names, *columns)
                for batch in file.iter_batches(columns=columns):
                    for row in batch.to_pylist():
                        yield str(row[image_column] or ""), str(row[caption_column] or "")
        case _:
            raise ValueError(
                f"{path} is no table of captions; accepted: .json, .csv, .parquet, or leave "
                "captions out to have NAME.txt read beside NAME.jpg"
            )


def _json_rows(path: Path) -> Iterator[tuple[str, str]]:
    table = json.loads(path.read_text("utf-8"))
    if not isinstance(table, dict):
        raise ValueError(
            f"{path} holds a {type(table).__name__}, but must be an object of file name: caption, "
            "or file name: [captions]"
        )
    for name, found in table.items():
        captions = [found] if isinstance(found, str) else found
        if not (isinstance(captions, list) and all(isinstance(text, str) for text in captions)):
            raise ValueError(
                f"{path} has {found!r} for {name!r}, but captions must be a text or a list of texts"
            )
        for caption in captions:
            yield name, caption


def _check_columns(path: Path, columns: Iterable[str], image: str, caption: str) -> None:
    if missing := {image, caption} - set(columns):
        raise ValueError(
            f"{path} has the columns {list(columns)}, but not {sorted(missing)}; name those that "
            "hold file name and caption with image_column, caption_column"
        )
