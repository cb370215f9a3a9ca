"""From a training run to a release folder: `mofo export runs/NAME --out DIR`.

A release folder stands alone: network, configuration and autoencoder (and the name of the text
encoder). A finished run writes the same to `runs/NAME/export`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from mofo.depth import DepthCodec
from mofo.model import autoencoder as autoencoders
from mofo.model import basis, weights
from mofo.model.autoencoder import Autoencoder
from mofo.model.basis import LappedBasis
from mofo.model.dit import ThreeStreamDiT
from mofo.model.weights import Release
from mofo.schedule import LogitNormal, Schedule, Uniform
from mofo.training.checkpoint import newest

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
) -> None:
    """Write the newest checkpoint of a run as a release folder, which must not hold one yet.

    `averaged` takes the EMA, else the weights as they were trained. The depth head stays float32.
    """
    run, folder = Path(run), Path(folder)
    if (folder / weights.CONFIG).exists():
        raise ValueError(f"{folder} holds a release already; choose another folder, or remove it")
    cfg = read_config(run)
    checkpoint = newest(run / "checkpoints")
    if checkpoint is None:
        raise ValueError(f"{run} has no readable checkpoint in checkpoints/; train it further")
    state = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
    try:
        with torch.device("meta"):
            dit = ThreeStreamDiT(_build(cfg.model))
        image_schedule = _build(cfg.objective.image_schedule)
        depth_schedule = _build(cfg.objective.depth_schedule)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"{run / 'config.yaml'} cannot be used: {error}") from error
    tensors, prefix = _trained(state, averaged, checkpoint)
    weights.assign(dit, tensors, checkpoint, prefix=prefix, dtype=dtype)
    release = assemble(
        dit,
        image_schedule=image_schedule,
        depth_schedule=depth_schedule,
        size=cfg.data.size,
        text=cfg.encoders.text,
    )
    write(release, autoencoders.load(cfg.encoders.autoencoder), folder)


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


def read_config(run: Path) -> DictConfig:
    """A run's frozen config, with every key that an export needs."""
    path = run / "config.yaml"
    if not path.exists():
        raise ValueError(f"{run} is no training run: it has no config.yaml; give runs/NAME")
    cfg = OmegaConf.load(path)
    assert isinstance(cfg, DictConfig)  # train.py writes nothing else
    missing = [key for key in NEEDED if OmegaConf.select(cfg, key) is None]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; it is not as train.py froze it")
    return cfg


def _trained(
    state: Mapping[str, Any], averaged: bool, checkpoint: Path
) -> tuple[dict[str, Tensor], str]:
    """The network's tensors in a checkpoint, and the prefix of their names."""
    if not averaged:
        return state["state_dict"], "dit."
    average = state["callbacks"].get("EMA", {}).get("average")
    if not average:
        raise ValueError(f"{checkpoint} holds no EMA; export the raw weights (--weights raw)")
    return average, ""


def _build(cfg: DictConfig) -> Any:
    return instantiate(cfg, _convert_="all")
