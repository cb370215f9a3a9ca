"""Predictions as files: whoever has them is scored without the model, under any protocol.

    FOLDER/predictor.json           whose they are and of which kind, where a run wrote them
    FOLDER/SET/KEY.npz              `depth`, and `uncertainty` if there is one

Files of others are read too: FOLDER/SET/KEY or FOLDER/KEY as .npz, .npy or 16-bit .png.
"""

import hashlib
import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote
from zipfile import BadZipFile

import numpy as np

from mofo.data.sample import DAMAGE, open_image
from mofo.evaluation.predictors import Prediction, Predictor, check_kind
from mofo.evaluation.sets.decode import load_numpy
from mofo.model import weights

SUFFIXES = (".npz", ".npy", ".png")
ABOUT = "predictor.json"
MIDDLE = 4096  # bytes of a file that tell it from another of the same size


def of_files(
    folder: str | Path,
    *,
    set_name: str,
    keys: Collection[str],
    name: str | None = None,
    kind: str | None = None,
    unit: float | int | None = None,
) -> Predictor:
    """Predictions kept as FOLDER/SET/KEY.npz, .npy or 16-bit .png (also FOLDER/KEY.*).

    A .png holds codes, 0 where there is none; depth is code times `unit`. What a run dumped knows
    its kind; of other files it must be said. An image without a file has no prediction; a folder
    without any file of the set is refused.
    """
    folder = Path(folder)
    kind = kind_of(folder, kind)
    about = stated(folder)
    called = str(name or about.get("name") or folder.name)
    inside = folder / file_name(set_name)
    inside = inside if inside.is_dir() else folder
    have = {path.name: path for path in inside.iterdir()}
    files = {
        key: found
        for key in keys
        if (found := next((have[n] for s in SUFFIXES if (n := file_name(key) + s) in have), None))
    }
    if not files:
        wanted = ", ".join(f"{file_name(key)}.npy" for key in list(keys)[:10])
        raise ValueError(
            f"{inside} has no prediction for {set_name}; expected are {len(keys)} files .npz, .npy "
            f"or .png, the first ten: {wanted}; choose the sets that it has with sets=[...]"
        )
    if unit is None and any(path.suffix == ".png" for path in files.values()):
        raise ValueError(
            f"{inside} holds .png files, whose codes say nothing by themselves; give unit=0.001 "
            "for millimetres, unit=1 for codes that are only relative"
        )

    def predict(images: list[np.ndarray], keys: list[str]) -> list[Prediction]:
        missing = [key for key in keys if key not in files]
        if missing:
            raise ValueError(f"there is no {inside / file_name(missing[0])}.npz, .npy or .png")
        return [_read(files[key], unit) for key in keys]

    hashed = about["weights"] if "weights" in about else _digest(folder)
    settings = about.get("settings", {"unit": unit})
    return Predictor(name=called, kind=kind, predict=predict, weights=hashed, settings=settings)


def kind_of(folder: Path, kind: str | None = None) -> str:
    """The kind of the predictions in a folder, as it says itself or as is said here."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder} with predictions")
    about = stated(folder)
    kind = check_kind(kind or about.get("kind"), f"the predictions in {folder}")
    if about.get("kind", kind) != kind:
        raise ValueError(f"{folder} was written with kind={about['kind']}, but kind is {kind} now")
    return kind


def file_name(text: str) -> str:
    """A name of a set or a key as a file's, on any file system."""
    return quote(text, safe=" ")


def stated(folder: Path) -> dict[str, Any]:
    """What a run wrote of whose predictions it kept in a folder; nothing for other folders."""
    path = folder / ABOUT
    return json.loads(path.read_text()) if path.exists() else {}


def keeping(predictor: Predictor, predictions: Path, set_name: str) -> Predictor:
    """The same, and each prediction is written below `predictions`, where `of_files` finds it.

    What is scored is what was written, to 11 bits: scored again, it gives the same numbers.
    """
    folder = predictions / file_name(predictor.name)
    inside = folder / file_name(set_name)
    inside.mkdir(parents=True, exist_ok=True)
    settings = {**predictor.settings, "rounded": "float16"}
    about = {name: getattr(predictor, name) for name in ("name", "kind", "weights")}
    with weights.replacing(folder / ABOUT) as partial:
        partial.write_text(json.dumps({**about, "settings": settings}, indent=1))

    def keep(key: str, made: Prediction) -> Prediction:
        arrays = {"depth": made.depth, "uncertainty": made.uncertainty}
        rounded = {name: _halved(array) for name, array in arrays.items() if array is not None}
        path = inside / f"{file_name(key)}.npz"
        with weights.replacing(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **rounded)
        return Prediction(**rounded)

    return replace(predictor, keep=keep, settings=settings)


def _digest(folder: Path) -> str:
    """16 hexadecimal digits of names, sizes and the middle of each file: all would take minutes."""
    sha = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES):
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size // 2 - MIDDLE // 2))
            sha.update(f"{path.relative_to(folder)} {size} ".encode() + file.read(MIDDLE))
    return sha.hexdigest()[:16]


def _halved(values: np.ndarray) -> np.ndarray:
    """float16, or float32 where that would overflow or lose digits of the smallest."""
    size = np.abs(values[np.isfinite(values) & (values != 0)])
    limits = np.finfo(np.float16)
    fits = not size.size or (size.max() <= limits.max and size.min() >= limits.smallest_normal)
    return values.astype(np.float16 if fits else np.float32)


def _read(path: Path, unit: float | int | None) -> Prediction:
    try:
        return _of_png(path, unit) if path.suffix == ".png" else _of_numpy(path)
    except (*DAMAGE, BadZipFile) as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(f"{path} cannot be read ({kind}{error}); write it again") from error


def _of_png(path: Path, unit: float | int | None) -> Prediction:
    with open_image(path.read_bytes()) as image:
        if not image.mode.startswith("I"):
            raise ValueError(f"its mode is {image.mode}, but must be that of a 16-bit grey PNG")
        codes = np.array(image)
    return Prediction(depth=np.where(codes > 0, codes * np.float64(unit or 1), np.nan))


def _of_numpy(path: Path) -> Prediction:
    loaded = load_numpy(path.read_bytes())
    if isinstance(loaded, np.ndarray):
        return Prediction(depth=loaded.squeeze() if loaded.ndim == 3 else loaded)
    with loaded as archive:
        if "depth" not in archive:
            raise ValueError(f"it holds {', '.join(archive.files)}, but must hold 'depth'")
        return Prediction(depth=archive["depth"], uncertainty=archive.get("uncertainty"))
