"""A run's folder: who holds it, and the configuration that is frozen in it."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mofo.data.gates import Unusable
from mofo.model import growth
from mofo.model.dit import DiTConfig
from mofo.model.weights import replacing
from mofo.training import attempts
from mofo.training.attempts import Attempt, Refused

FROZEN = "config.yaml"
TRAINED = ("checkpoints/step_*", "export/*")  # what would be lost
# May differ when a run goes on: how long, on what, and what is written about it.
FREE = (
    "trainer",
    "callbacks",
    "logger",
    "resume",
    "recompute",
    "max_skipped",
    "paths",
    "run_dir",
    "name",
    "plan",
)
FREE_DATA = ("num_workers", "accumulate", "max_bad_fraction")
# What a user can cause: the message says what to do, and no traceback is needed.
FOR_USERS = (Refused, Unusable, HydraException, OmegaConfBaseException)


def quieten() -> None:
    """Silence what Lightning says of itself; warnings about the run still show."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")


def show_log() -> None:
    """On rank 0, also what is logged as information: what gates reject, which sets were made."""
    if _is_first():
        log = logging.getLogger("mofo")
        log.setLevel(logging.INFO)
        log.addHandler(logging.StreamHandler())


def say_briefly(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """For `sys.excepthook`: what is wrong with a command or a config, once, and no traceback.

    Unusable data are named by every rank that meets them: they may be in the part of one alone.
    """
    if not isinstance(error, FOR_USERS):
        sys.__excepthook__(kind, error, trace)  # pyright: ignore[reportArgumentType]
    elif _is_first() or isinstance(error, Unusable):
        if isinstance(error, InstantiationException) and isinstance(error.__cause__, Unusable):
            error = error.__cause__
        print(f"mofo: {error}", file=sys.stderr, flush=True)


def _is_first(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this is rank 0, whoever started it."""
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    return next((environ[name] for name in names if name in environ), "0") == "0"


def of_job(environ: Mapping[str, str] = os.environ) -> DictConfig | None:
    """What this SLURM job froze when it first started: once requeued, it composes nothing anew.

    The configs of the working tree may have changed since, and its command line is in there.
    """
    frozen = Path(environ.get("MOFO_RUN_LINK", "")) / FROZEN
    if environ.get("SLURM_RESTART_COUNT", "0") == "0" or "MOFO_RUN_LINK" not in environ:
        return None
    if not frozen.exists():  # the first start did not come that far
        return None
    cfg = OmegaConf.load(frozen)
    assert isinstance(cfg, DictConfig)
    return cfg


def check_start(init_from: str | None, model: DiTConfig) -> None:
    """Refused, before anything is written, unless training can begin from there."""
    if init_from is None:
        return
    try:
        growth.starting(init_from, model)
    except ValueError as error:
        raise Refused(
            f"training cannot begin from init_from={init_from}: {error}\n"
            "Give a base or a release that fits model=..., or init_from=null for random weights"
        ) from error


@contextmanager
def opened(folder: Path, cfg: DictConfig, rank: int) -> Iterator[Attempt | None]:
    """The run folder with `cfg` frozen in it, held by rank 0, which gets its attempt.

    Refused if it holds a run whose configuration differs in what shapes its numbers, or if a
    live process holds it. A run that left nothing trained is begun anew with any configuration.
    """
    frozen = folder / FROZEN
    trained = any(any(folder.glob(made)) for made in TRAINED)
    if trained and frozen.exists() and (differing := differences(shaping(folder), _flat(cfg))):
        listed = "\n  ".join(differing[:10])
        raise Refused(
            f"{folder} holds a run with another configuration:\n  {listed}\n"
            f"give this one its own name (name=...), or remove {folder}"
        )
    if rank:
        yield None
        return
    attempt = attempts.take(folder)
    try:
        with replacing(frozen) as partial:
            OmegaConf.save(cfg, partial, resolve=True)
        _link(folder)
        yield attempt
    except SystemExit:
        attempt.end("was preempted")
        raise
    except (ValueError, FloatingPointError):  # another attempt would end in the same
        attempt.end("ended in an error that does not go away by itself")
        raise
    except BaseException as error:
        attempt.die(f"{type(error).__name__}: {error}")
        raise
    attempt.end("finished")


def _link(folder: Path, environ: Mapping[str, str] = os.environ) -> None:
    """Tell the batch script which folder its job runs in."""
    if link := environ.get("MOFO_RUN_LINK"):
        partial = Path(f"{link}.partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        partial.symlink_to(folder.absolute())
        partial.replace(link)


def shaping(folder: Path) -> dict[str, Any]:
    """What shapes the numbers of a run, key by key, as frozen in its folder; {} before it is."""
    frozen = folder / FROZEN
    return _flat(OmegaConf.load(frozen)) if frozen.exists() else {}


def differences(olds: Mapping[str, Any], news: Mapping[str, Any]) -> list[str]:
    """The keys in which two such configurations differ, and how."""
    names = sorted(set(olds) | set(news))
    return [
        f"{name}: {olds.get(name, 'absent')} there, {news.get(name, 'absent')} here"
        for name in names
        if olds.get(name) != news.get(name)
    ]


def _flat(cfg) -> dict[str, Any]:
    values = OmegaConf.to_container(cfg, resolve=True)
    free = {(key,) for key in FREE} | {("data", key) for key in FREE_DATA}
    out: dict[str, Any] = {}

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
