"""A tiny random network in a release folder with the shipped encoders, and inputs for it."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from mofo.depth import DepthCodec
from mofo.model import autoencoder
from mofo.model.dit import DiTConfig, ThreeStreamDiT
from mofo.model.weights import Release
from mofo.schedule import Schedule
from mofo.training.export import write

CONFIG = {
    "in_channels": 24,
    "depth_channels": 64,
    "context_in_dim": 64,
    "hidden_size": 32,
    "num_heads": 4,
    "depth_double": 1,
    "depth_single": 1,
    "depth_decoder_num_layers": 1,
    "axes_dim": [2, 2, 2, 2],
}
SIZE = (16, 24)


def network(seed: int = 0, **changes) -> ThreeStreamDiT:
    """Every weight random, so that nothing is hidden behind a zero gate; depth near the mean."""
    rng = torch.Generator().manual_seed(seed)
    dit = ThreeStreamDiT(DiTConfig(**CONFIG | changes)).eval()
    for parameter in dit.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng) * 0.1
    return dit


def release(seed: int = 0, **changes) -> Release:
    return Release(
        dit=network(seed, **changes),
        codec=DepthCodec(patch_size=8),
        schedule=Schedule(),
        use={"image_size": list(SIZE), "text": "small"},
    )


def save_release(folder: Path) -> Path:
    write(release(), autoencoder.load("small"), folder)
    return folder


def picture(height: int = 20, width: int = 30) -> np.ndarray:
    rng = np.random.default_rng(height * width)
    coarse = rng.integers(0, 256, (4, 4, 3), np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height)))


def slope(height: int = 20, width: int = 30) -> np.ndarray:
    row = np.linspace(2.0, 2.3, height, dtype=np.float32)
    return np.repeat(row[:, None], width, axis=1)


def diffusers_network(*, has_guidance: bool) -> nn.Module:
    """diffusers' transformer with the dimensions of tests/golden/t2i_tiny."""
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=48,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=has_guidance,
    )
