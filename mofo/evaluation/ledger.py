"""What is to be done and what is done: tasks, and the lines that any process wrote of them."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mofo.evaluation.benchmark import Images, Row
from mofo.evaluation.lines import Line, Reader
from mofo.evaluation.pictures import main_metric
from mofo.evaluation.predictors import Predictor

CHANGED = (
    "in a folder of predictions= a file was then added, removed or changed, and retry=true does "
    "not mix the old with the new; "
)
TALLIED = ("lines", "scored", "absrel", "delta1")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One set and who is judged on it; `order` is the set's place in the protocol's list."""

    row: Row
    images: Images
    predictors: Sequence[Predictor]
    order: int = 0

    @cached_property
    def rules(self) -> dict[str, Any]:
        """What lines of one set must share."""
        return {"row": self.row.protocol(), "list_sha256": self.images.list_sha256}


class Ledger:
    """What is done, by whichever process, and how it went so far."""

    def __init__(
        self,
        tasks: Sequence[Task],
        folder: Path,
        protocol_id: str,
        settings: dict[str, Any],
        retry: bool,
    ) -> None:
        self.folder, self.reader = folder, Reader(folder)
        self.tallies: dict[tuple[str, str], dict[str, float]] = defaultdict(
            lambda: dict.fromkeys(TALLIED, 0.0)
        )
        self._scored: dict[tuple[str, str, str], bool] = {}
        self._shared = {"protocol": protocol_id, "settings": settings}
        self._of_set = {task.row.name: task.rules for task in tasks}
        self._of_predictor = {
            (task.row.name, one.name): plain(
                {"kind": one.kind, "weights": one.weights, "predictor_settings": one.settings}
            )
            for task in tasks
            for one in task.predictors
        }
        self.refresh(forgive=retry)

    def refresh(self, forgive: bool = False) -> None:
        """Read what was written since; `forgive` leaves out images that failed."""
        for line in self.reader.new():
            self._refuse_other(line)
            if not (forgive and line["failed"] is not None):
                self._enter(line)

    def missing(self, task: Task, indices: range) -> list[tuple[int, str]]:
        """Index and predictor of lines that are not written."""
        row, keys = task.row.name, task.images.keys
        names = [predictor.name for predictor in task.predictors]
        pairs = ((index, name) for index in indices for name in names)
        return [(k, name) for k, name in pairs if (row, name, keys[k]) not in self._scored]

    def _enter(self, line: Line) -> None:
        of_set, predictor, key = line["set"], line["predictor"], line["key"]
        name, scored = (of_set, predictor, key), line["failed"] is None
        tally, before = self.tallies[of_set, predictor], self._scored.get(name)
        tally["lines"] += before is None
        if scored and not before:
            tally["scored"] += 1
            for metric in ("absrel", "delta1"):
                tally[metric] += main_metric(line, metric)
        self._scored[name] = scored or bool(before)

    def _refuse_other(self, line: Line) -> None:
        of_set = self._of_set.get(line["set"], {})
        of_predictor = self._of_predictor.get((line["set"], line["predictor"]), {})
        now = {**self._shared, **of_set, **of_predictor}
        if found := next(_differences({name: line[name] for name in now}, now), None):
            name, old, new = found
            raise ValueError(
                f"{self.folder} has lines of {line['predictor']} on {line['set']} where {name} is "
                f"{old}, but now it is {new}; {CHANGED if name == 'weights' else ''}"
                "choose another folder (name=...), or delete it"
            )


def _differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two values differ: as deep inside as both have names, and only where `new` has any."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key, value in new.items():
            yield from _differences(old.get(key), value, f"{name}.{key}".removeprefix("."))
    elif old != new:
        yield name, old, new


def plain(value: Any) -> Any:
    """As it is read back from a line."""
    return json.loads(json.dumps(value, default=dict))
