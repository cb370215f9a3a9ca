"""The FLUX.2 autoencoder: pixels in [-1, 1] <-> normalised tokens, one per square of `stride`.

    ae = load("small")                  # or a release folder, ae.safetensors, a diffusers folder
    tokens = ae.encode(images)          # (b, 3, h, w) -> (b, l, c): the posterior's mean
    images = ae.decode(tokens, grid=(h, w))

A token is a 2x2 patch of latents, (patch - bn mean) / sqrt(bn variance + 1e-4). The network is
diffusers' `AutoencoderKLFlux2`; files hold the original tensor names, and every dimension of the
network follows from their shapes. Tokens, and the normalisation, are float32 in any `dtype`.
"""

import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from mofo.model import basis
from mofo.model.basis import LappedBasis
from mofo.model.weights import read_tensors, write_tensors

NORM_GROUPS = 32  # the FLUX.2 autoencoder's; no shape shows it, so other numbers go into metadata
PATCH = 2
ENCODER_FILE, DECODER_FILE = "ae_encoder.safetensors", "ae_decoder.safetensors"
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"

# (diffusers' name, original name); the original counts the decoder's levels from the pixels.
RENAMES = (
    (r"^quant_conv", r"encoder.quant_conv"),
    (r"^post_quant_conv", r"decoder.post_quant_conv"),
    (r"mid_block\.resnets\.0", r"mid.block_1"),
    (r"mid_block\.resnets\.1", r"mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", r"mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", r"mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"(down|up)_blocks\.(\d+)\.resnets", r"\1.\2.block"),
    (r"(down|up)_blocks\.(\d+)\.\1samplers\.0", r"\1.\2.\1sample"),
    (r"conv_norm_out", r"norm_out"),
    (r"conv_shortcut", r"nin_shortcut"),
)


class Autoencoder(nn.Module):
    """A FLUX.2 autoencoder of any size."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        # Channels last makes these convolutions three times as fast on a CPU.
        self.network = network.to(memory_format=torch.channels_last)
        self.channels: int = network.config.latent_channels * PATCH**2
        self.stride: int = PATCH * 2 ** (len(network.config.block_out_channels) - 1)

    def encode(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b l c"]:
        """Encode pictures whose sides are multiples of `stride`; tokens are row-major."""
        basis.check_sides(images, self.stride)
        images = images.to(self.network.dtype, memory_format=torch.channels_last)
        patches = fold(self.network.encode(images).latent_dist.mode().float())
        mean, std = self._normalisation()
        return rearrange((patches - mean) / std, "b c i j -> b (i j) c")

    def decode(
        self, tokens: Float[Tensor, "b l c"], grid: tuple[int, int]
    ) -> Float[Tensor, "b 3 h w"]:
        """Decode tokens of a grid of (rows, columns); the result may leave [-1, 1] a little."""
        basis.check_tokens(tokens, grid, self.channels)
        mean, std = self._normalisation()
        patches = rearrange(tokens.float(), "b (i j) c -> b c i j", i=grid[0]) * std + mean
        latents = rearrange(patches, "b (c pi pj) i j -> b c (i pi) (j pj)", pi=PATCH, pj=PATCH)
        latents = latents.to(self.network.dtype, memory_format=torch.channels_last)
        return self.network.decode(latents).sample.float()

    def _normalisation(self) -> tuple[Float[Tensor, "c 1 1"], Float[Tensor, "c 1 1"]]:
        bn = self.network.bn
        std = (bn.running_var.float() + bn.eps).sqrt()
        return bn.running_mean.float()[:, None, None], std[:, None, None]


def fold(latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c4 i j"]:
    """Fold every 2x2 patch of latents into channels."""
    return rearrange(latents, "b c (i pi) (j pj) -> b (c pi pj) i j", pi=PATCH, pj=PATCH)


def create(
    widths: tuple[int, ...],
    blocks: int,
    latent_channels: int,
    decoder_widths: tuple[int, ...] | None = None,
    norm_groups: int = NORM_GROUPS,
) -> Autoencoder:
    """A new autoencoder; `widths` from the pixels down, `blocks` residual blocks per level.

    A group should hold several channels: normalised alone, a channel forgets how bright it was.
    """
    from diffusers import AutoencoderKLFlux2  # seconds to import, so only where it is needed

    for width in {*widths, *(decoder_widths or ())}:
        if width % norm_groups:
            raise ValueError(
                f"autoencoder width {width} is not a multiple of its {norm_groups} norm groups"
            )
    network = AutoencoderKLFlux2(
        block_out_channels=widths,
        decoder_block_out_channels=decoder_widths,
        layers_per_block=blocks,
        latent_channels=latent_channels,
        norm_num_groups=norm_groups,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
    )
    return Autoencoder(network)


def load(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> "Autoencoder | LappedBasis":
    """Load a frozen autoencoder: release folder, `ae.safetensors`, diffusers folder, or "small"."""
    path = Path(str(resources.files("mofo") / "small")) if str(path) == "small" else Path(path)
    if (path / basis.FILE).exists():
        return basis.load(path, device)
    tensors, norm_groups = _read(path)
    with torch.device("meta"):
        ae = create(**_dimensions(tensors, path), norm_groups=norm_groups)
    state = ae.network.state_dict()
    names = dict(zip(state, original(state), strict=True))
    _check(tensors, original(state), path)
    for key, entry in state.items():
        tensor = tensors.pop(names[key]).reshape(entry.shape)
        # The statistics keep their precision: rounding them would move every token.
        target = tensor.dtype if key.startswith("bn.") else dtype
        # copy=True: a tensor straight from the file is a view of it and would change with it.
        state[key] = tensor.to(device, target, copy=True)
    ae.network.load_state_dict(state, assign=True)
    return Autoencoder(ae.network).eval().requires_grad_(False)


def save(ae: Autoencoder, folder: str | Path) -> None:
    """Write the release's two files, tensors in the dtypes they have."""
    halves: dict[str, dict[str, Tensor]] = {"encoder": {}, "decoder": {}}
    for name, tensor in original(ae.network.state_dict()).items():
        half, _, rest = name.partition(".")
        if half == "bn":  # both files hold the statistics
            halves["encoder"][name] = halves["decoder"][name] = tensor
        else:
            halves[half][rest] = tensor
    Path(folder).mkdir(parents=True, exist_ok=True)
    norm_groups = ae.network.config.norm_num_groups
    metadata = None if norm_groups == NORM_GROUPS else {"norm_groups": str(norm_groups)}
    write_tensors(halves["encoder"], Path(folder) / ENCODER_FILE, metadata)
    write_tensors(halves["decoder"], Path(folder) / DECODER_FILE, metadata)


def original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the network under the names and shapes of the original combined file."""
    levels = 1 + max(
        (int(m[1]) for m in (re.match(r"decoder\.up_blocks\.(\d+)", key) for key in state) if m),
        default=0,
    )
    renamed = {}
    for key, tensor in state.items():
        name = key
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"\bup\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
        is_map = ".mid.attn_1." in name and tensor.ndim == 2  # a 1x1 convolution in the original
        renamed[name] = tensor[:, :, None, None] if is_map else tensor
    return renamed


def _read(path: Path) -> tuple[dict[str, Tensor], int]:
    """Tensors under the names of the original combined file, and the number of norm groups."""
    if (path / ENCODER_FILE).exists() or (path / DECODER_FILE).exists():
        halves = read_tensors(path / ENCODER_FILE), read_tensors(path / DECODER_FILE)
        return _join(*halves, path), _norm_groups(path / ENCODER_FILE)
    for folder in (path, path / "vae"):
        if (folder / DIFFUSERS_FILE).exists():
            config = json.loads((folder / "config.json").read_text())
            tensors = original(read_tensors(folder / DIFFUSERS_FILE))
            return tensors, config.get("norm_num_groups", NORM_GROUPS)
    if path.is_file():
        return read_tensors(path), _norm_groups(path)
    raise ValueError(
        f'{path} holds no autoencoder; give "small", a folder with {ENCODER_FILE} and '
        f"{DECODER_FILE}, a combined ae.safetensors, or a diffusers folder with {DIFFUSERS_FILE}"
    )


def _norm_groups(file: Path) -> int:
    """What the header of a safetensors file (its length in 8 bytes, then JSON) says of them."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return int(header.get("__metadata__", {}).get("norm_groups", NORM_GROUPS))


def _join(
    encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor], path: Path
) -> dict[str, Tensor]:
    tensors = {}
    for half, part in (("encoder", encoder), ("decoder", decoder)):
        for name, tensor in part.items():
            shared = name.startswith("bn.")
            if shared and name in tensors and not torch.equal(tensors[name], tensor):
                raise ValueError(
                    f"{path}: {name} differs between {ENCODER_FILE} and {DECODER_FILE}; "
                    "take both files from the same release"
                )
            tensors[name if shared else f"{half}.{name}"] = tensor
    return tensors


def _dimensions(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Arguments of `create`, from the shapes of the tensors."""

    def widths(pattern: str) -> tuple[int, ...]:
        found = {int(m[1]): len(t) for k, t in tensors.items() if (m := re.fullmatch(pattern, k))}
        return tuple(found[level] for level in sorted(found))

    encoder_widths = widths(r"encoder\.down\.(\d+)\.block\.0\.conv1\.weight")
    decoder_widths = widths(r"decoder\.up\.(\d+)\.block\.0\.conv1\.weight")
    blocks = widths(r"encoder\.down\.0\.block\.(\d+)\.conv1\.weight")
    latents = tensors.get("decoder.post_quant_conv.weight")
    if latents is None or not blocks or len(encoder_widths) != len(decoder_widths):
        some = ", ".join(sorted(tensors)[:5]) or "nothing"
        raise ValueError(
            f"{path} is not a FLUX.2 autoencoder: encoder.down.*, decoder.up.* (as many levels) "
            f"and decoder.post_quant_conv.weight are needed; it holds {some}"
        )
    return {
        "widths": encoder_widths,
        "blocks": len(blocks),
        "latent_channels": len(latents),
        "decoder_widths": None if decoder_widths == encoder_widths else decoder_widths,
    }


def _check(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    """Every wanted tensor is there in its shape, and no other."""
    problems = {
        "missing": sorted(wanted.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - wanted.keys()),
        "mis-shaped": [
            f"{name} is {list(tensors[name].shape)}, expected {list(wanted[name].shape)}"
            for name in sorted(wanted.keys() & tensors.keys())
            if tensors[name].shape != wanted[name].shape
        ],
    }
    if any(problems.values()):
        lines = [f"{len(v)} {kind}: {', '.join(v[:5])}" for kind, v in problems.items() if v]
        raise ValueError(
            f"the tensors in {path} are not those of a FLUX.2 autoencoder: " + "; ".join(lines)
        )
