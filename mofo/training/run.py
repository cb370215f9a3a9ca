"""A run's folder: its frozen configuration, and where it continues from."""

import logging
import os
import warnings
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from mofo.model.weights import replacing
from mofo.training.checkpoint import newest

# May differ when a run goes on: how long, on what, and what is written about it.
FREE = ("trainer", "callbacks", "logger", "resume", "paths", "run_dir", "name")
FREE_DATA = ("num_workers", "accumulate", "max_bad_fraction")


def quieten() -> None:
    """Silence what Lightning says of itself; warnings about the run still show."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")


def open_folder(folder: Path, cfg: DictConfig) -> Path | None:
    """Freeze `cfg` in the folder at first start; return the checkpoint to go on from, if any.

    ValueError if the folder holds a run whose configuration differs in what shapes its numbers.
    """
    frozen = folder / "config.yaml"
    checkpoint = newest(folder / "checkpoints") if cfg.resume == "last" else cfg.resume
    if frozen.exists():
        differences = _differences(OmegaConf.load(frozen), cfg)
        if differences:
            listed = "\n  ".join(differences[:10])
            raise ValueError(
                f"{folder} holds a run with another configuration:\n  {listed}\n"
                f"give this one its own name (name=...), or remove {folder}"
            )
    elif os.environ.get("LOCAL_RANK", "0") == "0":
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(frozen) as partial:
            OmegaConf.save(cfg, partial, resolve=True)
    return checkpoint


def _differences(old, new) -> list[str]:
    olds, news = _flat(old), _flat(new)
    names = sorted(set(olds) | set(news))
    return [
        f"{name}: {olds.get(name, 'absent')} there, {news.get(name, 'absent')} here"
        for name in names
        if olds.get(name) != news.get(name)
    ]


def _flat(cfg) -> dict[str, object]:
    values = OmegaConf.to_container(cfg, resolve=True)
    free = {(key,) for key in FREE} | {("data", key) for key in FREE_DATA}
    out: dict[str, object] = {}

    def walk(value, path: tuple[str, ...]) -> None:
        if path in free:
            return
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, (*path, str(key)))
        else:
            out[".".join(path)] = value

    walk(values, ())
    return out
