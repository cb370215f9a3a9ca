"""From a training run to a release folder: `mofo export runs/NAME --out DIR`.

A release folder stands alone: network, configuration and autoencoder (and the name of the text
encoder). An export adds a model card, its sample pictures and the run's configuration. A finished
run writes the first part of it to `runs/NAME/export`.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mofo.depth import DepthCodec
from mofo.model import autoencoder as autoencoders
from mofo.model import basis, weights
from mofo.model.autoencoder import Autoencoder
from mofo.model.basis import LappedBasis
from mofo.model.dit import ThreeStreamDiT
from mofo.model.weights import Release
from mofo.schedule import LogitNormal, Schedule, Uniform
from mofo.training import store
from mofo.training.card import Training, write_card
from mofo.training.manifest import Manifest

RUN_CONFIG = "config.yaml"  # as train.py froze it
# Keys of a run's frozen config that a release is made from.
NEEDED = (
    "model",
    "encoders.text",
    "encoders.autoencoder",
    "objective.image_schedule",
    "objective.depth_schedule",
    "data.size",
)


def export(
    run: str | Path,
    folder: str | Path,
    *,
    averaged: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    num_samples: int = 4,
) -> None:
    """Write the newest checkpoint of a run as a release folder with a model card.

    `averaged` takes the EMA, else the weights as they were trained. The depth head stays float32.
    The card shows `num_samples` pictures. The folder, which must be new or empty, appears under
    its name only when complete.
    """
    run, folder = Path(run), Path(folder).resolve()
    if num_samples < 0:
        raise ValueError(f"{num_samples} samples cannot be drawn; give 0 or more")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        what = "holds a release already" if (folder / weights.CONFIG).exists() else "is not empty"
        raise ValueError(f"{folder} {what}; choose another folder, or remove it")
    config = read_config(run)
    checkpoint = store.newest(run / "checkpoints", read_only=True)
    if checkpoint is None:
        raise ValueError(f"{run} has no checkpoint in checkpoints/; train it further")
    manifest = Manifest.read(checkpoint)
    training = Training(
        run=run,
        config=config,
        num_steps=manifest.step,
        num_seen=manifest.facts["data"]["samples_seen"],
        commit=manifest.facts.get("commit"),
        averaged=averaged,
    )
    release = _release(training, manifest, checkpoint, dtype)
    autoencoder = autoencoders.load(config["encoders"]["autoencoder"])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
        unfinished = Path(beside) / folder.name
        write(release, autoencoder, unfinished)
        del release  # samples are drawn from what was written, which is loaded again
        shutil.copyfile(run / RUN_CONFIG, unfinished / RUN_CONFIG)
        write_card(unfinished, training, num_samples=num_samples)
        unfinished.replace(folder)


def assemble(
    dit: ThreeStreamDiT,
    *,
    image_schedule: Uniform | LogitNormal,
    depth_schedule: Uniform | LogitNormal,
    size: Sequence[int],
    text: str,
) -> Release:
    """A network with how it was trained; `size` is (h, w) in pixels, `text` an encoder."""
    return Release(
        dit=dit,
        codec=DepthCodec(patch_size=round(dit.config.depth_channels**0.5) or 1),
        schedule=Schedule(
            rgb_shift_mu=image_schedule.mu,
            rgb_shift_sigma=image_schedule.sigma,
            depth_shift_mu=depth_schedule.mu,
            depth_shift_sigma=depth_schedule.sigma,
        ),
        use={"image_size": [int(side) for side in size], "text": str(text)},
    )


def write(release: Release, autoencoder: Autoencoder | LappedBasis, folder: str | Path) -> None:
    """Write a self-contained release folder; `config.json` comes last, when all else is there."""
    if isinstance(autoencoder, LappedBasis):
        basis.save(autoencoder, folder)
    else:
        autoencoders.save(autoencoder, folder)
    weights.save(release, folder)


def read_config(run: Path) -> dict[str, Any]:
    """A run's frozen config, with every key that an export needs."""
    path = run / RUN_CONFIG
    if not path.exists():
        raise ValueError(f"{run} is no training run: it has no {RUN_CONFIG}; give runs/NAME")
    cfg = OmegaConf.load(path)
    missing = [key for key in NEEDED if OmegaConf.select(cfg, key) is None]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; it is not as train.py froze it")
    config = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(config, dict)  # train.py writes nothing else
    return {str(key): value for key, value in config.items()}


def _release(
    training: Training, manifest: Manifest, checkpoint: Path, dtype: torch.dtype
) -> Release:
    """The network of a run's config with the tensors of a checkpoint, converted one by one."""
    config = training.config
    schedules = [config["objective"][f"{name}_schedule"] for name in ("image", "depth")]
    try:
        with torch.device("meta"):
            dit = ThreeStreamDiT(_build(config["model"]))
        image_schedule, depth_schedule = map(_build, schedules)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"{training.run / RUN_CONFIG} cannot be used: {error}") from error
    part = "average" if training.averaged else "network"
    tensors = store.read_part(checkpoint, manifest, part)
    if not tensors:
        raise ValueError(f"{checkpoint} holds no EMA; export the raw weights (--weights raw)")
    weights.assign(dit, tensors, checkpoint, dtype=dtype)
    release = assemble(
        dit,
        image_schedule=image_schedule,
        depth_schedule=depth_schedule,
        size=config["data"]["size"],
        text=config["encoders"]["text"],
    )
    recommended = ((config.get("callbacks") or {}).get("export") or {}).get("cfg_scale")
    if recommended is not None:
        release.use["cfg_scale"] = float(recommended)
    return release


def _build(config: dict[str, Any]) -> Any:
    return instantiate(config, _convert_="all")
