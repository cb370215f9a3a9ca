"""Who is to be scored, as a config says it: a model or a folder of predictions, and how to ask."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mofo.evaluation.benchmark import Images, Row, check_counts
from mofo.evaluation.kept import kind_of, of_files
from mofo.evaluation.predictors import (
    Predictor,
    check_kind,
    model_type,
    of_release,
    of_transformers,
    shown_at,
)
from mofo.pipeline import Mofo

# What one contender does not take over from another: it is about that model alone.
_OWN: dict[str, Any] = {"predictions": None, "kind": None, "unit": None, "label": None}


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A mofo release or a depth model of transformers, or `predictions`; see configs/evaluate.yaml.

    Nothing is loaded before it is needed.
    """

    model: str
    predictions: str | None = None
    kind: str | None = None
    unit: float | int | None = None
    num_steps: int = 1
    ensemble: int = 1
    seed: int = 0
    fit: str = "native"
    size: Sequence[int] | None = None
    label: str | None = None
    device: str | None = None
    batch_size: int = 1

    def __post_init__(self) -> None:
        counts = ("num_steps", "ensemble", "batch_size")
        check_counts(**{name: getattr(self, name) for name in counts})

    def another(self, label: str, given: str | Mapping[str, Any]) -> "Contender":
        """A second one for the same tables: a model's name, or what differs."""
        changes = {"model": given} if isinstance(given, str) else dict(given)
        accepted = [field.name for field in fields(self)]
        if strangers := sorted(set(changes) - set(accepted)):
            raise ValueError(
                f"also={{{label}: ...}} has {', '.join(strangers)}, but accepted are: "
                f"{', '.join(accepted)}"
            )
        if not {"model", "predictions"} & set(changes):
            raise ValueError(f"also={{{label}: ...}} needs a model or predictions")
        return replace(self, **{**_OWN, **changes, "label": label})

    @cached_property
    def predicts(self) -> str:
        """The kind of its predictions, known before anything is loaded."""
        if self.predictions is not None:
            return kind_of(Path(self.predictions), self.kind)
        if model_type(self.model) is not None:
            return check_kind(self.kind, f"the predictions of {self.model}")
        if self.kind not in (None, "scale"):
            raise ValueError(
                f"kind is {self.kind}, but {self.model} is a mofo release, whose depth is known up "
                "to its scale; leave kind out"
            )
        return "scale"

    @cached_property
    def mofo(self) -> Mofo | None:
        """The pipeline of a mofo release; None for other contenders."""
        if self.predictions is not None or model_type(self.model) is not None:
            return None
        size = None if self.size is None else (self.size[0], self.size[1])
        load = {"device": self.device, "num_samples": self.batch_size, "size": size}
        return Mofo.load(self.model, **load, cfg_scale=1.0)

    def predictor(self, row: Row, images: Images) -> Predictor:
        """For one set, whose rule says how large the pictures are that a model is shown."""
        if self.predictions is not None:
            declared = {"name": self.label, "kind": self.predicts, "unit": self.unit}
            return of_files(self.predictions, set_name=row.name, keys=images.keys, **declared)
        return shown_at(self._model, row.input_side)

    @cached_property
    def _model(self) -> Predictor:
        kind = self.predicts
        if self.mofo is None:
            name = self.label or Path(self.model).name
            return of_transformers(self.model, name=name, kind=kind, device=self.device)
        asked = {name: getattr(self, name) for name in ("num_steps", "ensemble", "seed", "fit")}
        return of_release(self.mofo, name=self.label or "mofo", size=self.size, **asked)
