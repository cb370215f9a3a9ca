"""Lines of evaluation runs that never ran, for tests of what is made from lines."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mofo.evaluation.merge import merge
from mofo.evaluation.tables import tables

HASHES = {
    "NYUv2": "d9a47a1568b7d70a737a4bc75a49e66827b8e354219e9eee332676dbaee34a69",
    "KITTI": "8d0499af9ab4c0d1cd7944d572b0e0e4412feab1e73f4003038426fde699b53a",
}
FIT = {
    "alignment": "affine", "predicts": ["metric", "scale", "affine"], "grid": None,
    "max_resolution": {}, "floor": None, "positive_only": False, "metric_truth": False,
}  # fmt: skip
MARIGOLD = {
    "id": "marigold@1", "about": "Scale and shift by least squares.", "clip": True, "least": 1e-6,
    "eps": 0.0, "negatives_pass": False, "aggregation": "mean over images",
    "fits": {
        "affine": FIT,
        "disparity": FIT | {"alignment": "disparity", "predicts": ["disparity"], "floor": 1e-3},
    },
}  # fmt: skip
MOGE = MARIGOLD | {
    "id": "moge@1",
    "clip": False,
    "fits": {
        "scale": FIT | {"alignment": "scale_l1", "predicts": ["metric", "scale"], "grid": 64},
        "affine": FIT | {"alignment": "affine_l1", "grid": 64},
        "disparity": FIT | {"alignment": "disparity", "predicts": ["metric", "scale", "disparity"]},
    },
}
ROW = {
    "about": "Made up.", "low": 1e-3, "high": 10.0, "source": "/data", "limit": None,
    "reader": "pairs", "region": "nyu_eigen", "crop": None, "size": None, "metric": True,
}  # fmt: skip
MOGE_ROW = ROW | {
    "low": None, "high": None, "reader": "moge", "region": None, "size": [480, 640],
}  # fmt: skip
FAILED = {2: "no pixel has measured depth", 5: "the image cannot be read: <broken> & cut"}


def lines_of(
    predictor: str = "mofo",
    *,
    num: int = 20,
    error: float = 0.1,
    seed: int = 0,
    set_name: str = "NYUv2",
    settings: Mapping[str, Any] = MARIGOLD,
    kind: str = "scale",
    weights: str | None = "f00d" * 16,
    parts: Sequence[str | None] = (None,),
    failed: Mapping[int, str] | None = None,
    fits: Sequence[str] | None = None,
    uncertain: bool = False,
    order: tuple[int, int] = (0, 0),
    **changes: Any,
) -> list[dict[str, Any]]:
    """One predictor on one set: errors that share what is hard about an image (from its number)."""
    rng, made = np.random.default_rng(seed), []
    hardness = np.random.default_rng(77).gamma(4, 0.25, num)
    suiting = [name for name, fit in settings["fits"].items() if kind in fit["predicts"]]
    for index in range(num):
        absrel = [error * hardness[index] * rng.uniform(0.9, 1.1) for _ in suiting]
        why = (failed or {}).get(index)
        scores = {f: _metrics(a) for f, a in zip(suiting, absrel, strict=True)}
        scores = {name: scores[name] for name in fits or suiting}
        line = {
            "protocol": settings["id"], "set": set_name, "part": parts[index % len(parts)],
            "predictor": predictor, "kind": kind, "key": f"image_{index:04d}", "index": index,
            "order": list(order), "seconds": 0.25, "fits": None if why else scores,
            "num_valid": 0 if why else 1000 + index, "num_nonfinite": 0, "num_nonpositive": 0,
            "failed": why, "uncertainty": _spread(absrel[0]) if uncertain else None,
            "credit": "made for a test, none", "licence": "none", "weights": weights,
            "metric": True,
            "predictor_settings": {}, "list_sha256": HASHES.get(set_name, "ab" * 32),
            "list_count": num, "row": ROW, "settings": settings,
            "command": "python evaluate.py", "commit": "abc", "machine": "one core",
        }  # fmt: skip
        made.append(line | changes)
    return made


def write_run(folder: Path, *groups: Sequence[Mapping[str, Any]]) -> Path:
    (folder / "lines").mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for group in groups for line in group)
    (folder / "lines" / "one.jsonl").write_text(text)
    return folder


def tables_of(*groups: list[dict]) -> list:
    return tables(merge({"run": [line for group in groups for line in group]}))


def absrel_of(lines: list[dict], fit: str = "affine") -> np.ndarray:
    return np.array([line["fits"][fit]["absrel"] for line in lines if line["fits"]])


def _metrics(absrel: float) -> dict[str, float]:
    return {
        "absrel": absrel, "delta1": float(np.exp(-3 * absrel)), "delta2": float(np.exp(-absrel)),
        "delta3": 1.0, "rmse": 4 * absrel, "rmse_log": absrel, "log10": absrel / 2.3,
        "sqrel": absrel / 2, "silog": 100 * absrel, "i_rmse": absrel, "scale": 3.0, "shift": 0.1,
    }  # fmt: skip


def _spread(absrel: float) -> dict[str, Any]:
    bins = np.linspace(0.3, 2, 10)
    return {
        "uncertainty": list(0.8 * absrel * bins), "error": list(absrel * bins**0.8),
        "correlation": 0.5, "ause": 0.2,
    }  # fmt: skip
