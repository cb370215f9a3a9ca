"""The lines of a run: one JSON object per (protocol, set, predictor, image), in `RUN/lines/`.

Each process appends to a file of its own, so a kill can cost only the end of a last line, which is
no line then. Readers see the same whichever processes wrote them: one line per image, in the order
of the sets, the predictors and the list.
"""

import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

LINES = "lines"

Line = dict[str, Any]


class Reader:
    """The lines of a folder as they grow."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder) / LINES
        self._read: dict[str, tuple[int, int]] = {}  # of each file: bytes and lines

    def new(self) -> list[Line]:
        """Whole lines that were written since the last call, file by file."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return [line for name in sorted(names) for line in self._new_of(name)]

    def _new_of(self, name: str) -> list[Line]:
        if not name.endswith(".jsonl"):
            return []
        start, number = self._read.get(name, (0, 0))
        path = self.folder / name
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == start:
                return []
            file.seek(start)
            data = file.read()
        data = data[: data.rfind(b"\n") + 1]
        found: list[Line] = []
        for text in data.splitlines():
            number += 1
            try:
                line = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{path}:{number} is no JSON line ({error}); delete it") from error
            # Most of a line is what the line before says too: a run of many images stays small.
            before = found[-1] if found else {}
            same = {k: before[k] for k, value in line.items() if k in before and before[k] == value}
            found.append(line | same)
        self._read[name] = (start + len(data), number)
        return found


class Writer:
    """Appends to a file of this process alone, made when the first line is there."""

    def __init__(self, folder: str | Path) -> None:
        name = f"{platform.node()}-{os.getpid()}-{uuid4().hex[:8]}.jsonl"
        self.path = Path(folder) / LINES / name

    def append(self, lines: Iterable[Line]) -> None:
        """All of them, on the disk when this returns."""
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())


def read_lines(folder: str | Path) -> list[Line]:
    """Every image once, in an order that does not depend on who wrote which line when."""
    return merged(Reader(folder).new())


def merged(lines: Iterable[Line]) -> list[Line]:
    """One line per image, a scored one if there is one; `order` has the set's and predictor's."""
    kept: dict[tuple, Line] = {}
    for line in lines:
        name = identity(line)
        if name not in kept or (kept[name]["failed"] is not None and line["failed"] is None):
            kept[name] = line
    return sorted(kept.values(), key=_place)


def _place(line: Line) -> tuple:
    of_set, of_predictor = line["order"]
    name = (line["protocol"], of_set, line["set"], of_predictor, line["predictor"])
    return (*name, line["index"], line["key"])


def identity(line: Line) -> tuple[str, str, str, str]:
    """What there is one line of."""
    return line["protocol"], line["set"], line["predictor"], line["key"]
