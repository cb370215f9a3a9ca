"""`manifest.json` of a checkpoint: what it holds, and whether that is still so."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from xxhash import xxh3_64

from mofo.training.attempts import Refused
from mofo.training.dcp import checksum

MANIFEST = "manifest.json"
FORMAT = 1
NUM_NAMED = 5  # of each kind of difference, in a message


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint says of itself. `facts` are the run's own: numbers, texts, lists of them.

    `tensors` has for each name its dtype, shape and parts: [file, offsets, sizes].
    """

    step: int
    world: int
    facts: dict[str, Any]
    files: dict[str, dict[str, Any]]
    tensors: dict[str, Any]
    format: int = FORMAT

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """ValueError if it is not as it was written; Refused if by another version."""
        try:
            values = json.loads((path / MANIFEST).read_bytes())
            stated = values.pop("xxh3")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{MANIFEST} cannot be read ({error})") from error
        if stated != _hash(values):
            raise ValueError(f"{MANIFEST} is not as it was written: its checksum differs")
        if values["format"] != FORMAT:
            raise Refused(
                f"{path} has format {values['format']}, but this version of mofo reads {FORMAT}; "
                "go on with the version that wrote it"
            )
        return cls(**values)

    def write(self, path: Path) -> None:
        values = asdict(self)
        rows = (values | {"xxh3": _hash(values)}).items()
        text = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in rows)
        with (path / MANIFEST).open("w") as file:
            file.write(f"{{\n{text}\n}}\n")
            file.flush()
            os.fsync(file.fileno())

    def compare(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Refused, naming what differs, if it does not hold these tensors.

        Names are compared by the part before their first slash: a part that `tensors` has must be
        the same here; other parts are left.
        """
        parts = {name.split("/")[0] for name in tensors}
        wanted = {name: list(tensor.shape) for name, tensor in tensors.items()}
        there = {
            name: one["shape"] for name, one in self.tensors.items() if name.split("/")[0] in parts
        }
        shapes = [
            f"{name} is {there[name]} there, {wanted[name]} here"
            for name in sorted(wanted.keys() & there.keys())
            if there[name] != wanted[name]
        ]
        differences = {
            "are not in it": sorted(wanted.keys() - there.keys()),
            "are not in this run": sorted(there.keys() - wanted.keys()),
            "have another shape": shapes,
        }
        if any(differences.values()):
            lines = [
                f"  {len(names)} {what}: {', '.join(names[:NUM_NAMED])}"
                for what, names in differences.items()
                if names
            ]
            raise Refused(
                f"{path} is a checkpoint of another model, and nothing was read from it:\n"
                + "\n".join(lines)
                + "\n  resume from one of this run, or give the run another name (name=...)"
            )


def faults(path: Path, rank: int = 0, world: int = 1) -> list[str]:
    """What is wrong with the manifest, or with this rank's part of the files."""
    try:
        manifest = Manifest.read(path)
    except Refused:
        raise
    except ValueError as error:
        return [str(error)]
    found = []
    for name, stated in list(sorted(manifest.files.items()))[rank::world]:
        file = path / name
        try:
            size = file.stat().st_size
            if size != stated["size"]:
                found.append(f"{name} has {size} bytes, not {stated['size']}")
            elif checksum(file) != stated["xxh3"]:
                found.append(f"{name} is not as it was written: its checksum differs")
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except OSError as error:
            found.append(f"{name} cannot be read ({error})")
    return found


def _hash(values: Mapping[str, Any]) -> str:
    return xxh3_64(json.dumps(values, sort_keys=True).encode()).hexdigest()
