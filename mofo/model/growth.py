"""What training starts from: a text-to-image base, grown into three streams, or a release.

A base comes as a single file, a diffusers folder, or what stage 1 of our own training exported.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mofo.model.dit import DiTConfig, ThreeStreamDiT
from mofo.model.layouts import count_blocks, from_diffusers
from mofo.model.weights import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    assign,
    compare,
    exists,
    fetch,
    folder_of,
    outline,
    parse,
    read_config,
    read_tensors,
    shapes_of,
)


def start(path: str | Path, config: DiTConfig) -> ThreeStreamDiT:
    """The network that training begins with: a release of the same dimensions, or a grown base."""
    return _filled(config, starting(path, config))


def starting(path: str | Path, config: DiTConfig) -> dict[str, Tensor]:
    """The tensors of `start`, mapped from their files in the dtype that they have there."""
    if not _is_release(path):
        return _grown(path, config)
    stated = outline(path).dit
    _agree(stated.config, config, path)
    return _stripped(stated, path)


def grow(path: str | Path, config: DiTConfig) -> ThreeStreamDiT:
    """Three streams from a FLUX.2 text-to-image base: how depth starts is our choice.

    `path` is the base's single file or a diffusers folder. The depth stream starts as a copy of
    the image stream, decoder blocks as the last single blocks; `depth_in`, the depth head and the
    cross-time MLPs are fresh, the cross alphas 0. Without depth the output is exactly the base's.
    """
    return _filled(config, _grown(path, config))


def text_to_image(path: str | Path, dtype: torch.dtype = torch.float32) -> ThreeStreamDiT:
    """The text-to-image network of a base; a three-stream release is one when given no depth."""
    config, tensors = teaching(path)
    with torch.device("meta"):
        dit = ThreeStreamDiT(config)
    assign(dit, tensors, path, dtype=dtype)
    return dit.eval()


def teaching(path: str | Path) -> tuple[DiTConfig, dict[str, Tensor]]:
    """Dimensions and tensors of `text_to_image`, the latter mapped from their files."""
    if _is_release(path):
        stated = outline(path).dit
        return stated.config, _stripped(stated, path)
    config, tensors = _stated(path) or base_config(path), read_base(path)
    with torch.device("meta"):
        compare(shapes_of(ThreeStreamDiT(config).state_dict()), shapes_of(tensors), path)
    return config, tensors


def base_config(path: str | Path) -> DiTConfig:
    """The dimensions of a text-to-image base, read off its tensors: the file carries no config.

    Head size from `query_norm.scale`, axes are four quarters of it, theta 2000: FLUX.2's.
    """
    shapes = shapes_of(read_base(path))
    hidden, channels = shapes["img_in.weight"]
    head_size = shapes["single_blocks.0.norm.query_norm.scale"][0]
    wide = shapes["single_blocks.0.linear2.weight"][1] - hidden
    return DiTConfig(
        in_channels=channels,
        depth_channels=0,
        context_in_dim=shapes["txt_in.weight"][1],
        hidden_size=hidden,
        num_heads=hidden // head_size,
        depth_double=count_blocks(shapes, "double_blocks"),
        depth_single=count_blocks(shapes, "single_blocks"),
        depth_decoder_num_layers=0,
        axes_dim=[head_size // 4] * 4,
        mlp_ratio=wide / hidden,
        use_guidance_embed="guidance_in.in_layer.weight" in shapes,
        cross_stream_timestep_mixing=False,
    )


def base_names(config: DiTConfig) -> list[str]:
    """The tensors of the text-to-image part of a network."""
    with torch.device("meta"):
        names = ThreeStreamDiT(
            replace(config, depth_channels=0, cross_stream_timestep_mixing=False)
        ).state_dict()
    return list(names)


def read_base(path: str | Path) -> dict[str, Tensor]:
    """A text-to-image base in the names of its own single file, whichever layout it comes in."""
    folder = file = folder_of(path)
    if not folder.exists() and not exists(folder):
        raise ValueError(
            f"there is no {folder} (in {Path.cwd()}); a base is a safetensors file, a diffusers "
            "folder or a release folder, or one of the shipped: small, small_base"
        )
    if folder.is_dir():
        inside = [folder / "transformer", folder]
        names = ["diffusion_pytorch_model.safetensors", WEIGHTS]
        found = [d / n for d in inside for n in names if exists(d / n)]
        if not found:
            raise ValueError(f"{folder} holds none of {names}, in it or in its transformer/ folder")
        file = found[0]
    tensors = read_tensors(file)
    if "x_embedder.weight" in tensors:
        tensors = from_diffusers(tensors)
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    if "img_in.weight" not in tensors:
        raise ValueError(
            f"{file} is no FLUX.2 text-to-image base: it has no tensor img_in.weight; its first "
            f"tensors are {sorted(tensors)[:5]}"
        )
    return tensors


def _grown(path: str | Path, config: DiTConfig) -> dict[str, Tensor]:
    """The tensors of `grow`; those of the depth stream are the image stream's own."""
    tensors = read_base(path)
    stated = _stated(path)
    if stated is not None:
        # What no tensor's shape shows; the rest is compared below.
        _agree(stated, config, path, names=("num_heads", "axes_dim", "theta"))
    with torch.device("meta"):
        wanted = ThreeStreamDiT(config).state_dict()
    shared = set(wanted) & set(base_names(config))
    compare({k: wanted[k].shape for k in shared}, shapes_of(tensors), path)
    state = {}
    for name, blank in wanted.items():
        source = name if name in tensors else _origin(name, config)
        state[name] = tensors[source] if source in tensors else _fresh(name, blank.shape)
    return state


def _stripped(dit: ThreeStreamDiT, path: str | Path) -> dict[str, Tensor]:
    """The tensors of a release, under the names of its network."""
    folder = fetch(path)
    tensors = read_tensors(folder / WEIGHTS)
    compare({PREFIX + k: v.shape for k, v in dit.state_dict().items()}, shapes_of(tensors), folder)
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def _filled(config: DiTConfig, tensors: Mapping[str, Tensor]) -> ThreeStreamDiT:
    with torch.device("meta"):
        dit = ThreeStreamDiT(config)
    # copy=True: the files stay as they are, and no tensor is trained under two names
    state = {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}
    dit.load_state_dict(state, assign=True)
    return dit


def _origin(name: str, config: DiTConfig) -> str:
    """The image-stream tensor that a depth-stream tensor starts from."""
    decoder = re.match(r"depth_decoder_blocks\.(\d+)\.", name)
    if decoder:
        index = config.depth_single - config.depth_decoder_num_layers + int(decoder[1])
        return f"single_blocks.{max(index, 0)}." + name[decoder.end() :]
    for depth, image in {
        ".depth_attn.": ".img_attn.",
        ".depth_mlp.": ".img_mlp.",
        "double_stream_modulation_depth.": "double_stream_modulation_img.",
        "single_stream_modulation_depth.": "single_stream_modulation.",
        "depth_decoder_modulation.": "single_stream_modulation.",
        "time_in_depth.": "time_in.",
    }.items():
        if depth in name:
            return name.replace(depth, image)
    return ""


def _fresh(name: str, shape: torch.Size) -> Tensor:
    if name.startswith(("cross_alpha", "depth_final_layer.")):
        return torch.zeros(shape)
    return nn.init.xavier_uniform_(torch.empty(shape))


def _agree(
    theirs: DiTConfig, ours: DiTConfig, path: str | Path, names: Iterable[str] | None = None
) -> None:
    """The same dimensions, or a message with those that differ."""
    found, wanted = asdict(theirs), asdict(ours)
    listed = [
        f"{name} is {found[name]}, not {wanted[name]}"
        for name in names or wanted
        if found[name] != wanted[name]
    ]
    if listed:
        raise ValueError(
            f"the network in {path} differs from the model config: {'; '.join(listed)}"
        )


def _stated(path: str | Path) -> DiTConfig | None:
    """The dimensions in a folder's `config.json`; None for a base, whose file has none of ours."""
    folder = folder_of(path)
    if not (folder / CONFIG).exists():
        return None
    config = read_config(folder)
    ours = "dit" in config or "variant" in config  # diffusers writes a config.json as well
    return parse(config, folder)[0] if ours else None


def _is_release(path: str | Path) -> bool:
    """Whether a folder holds three streams (or is the shipped model), not a text-to-image base."""
    stated = _stated(path)
    return stated is not None and stated.depth_channels > 0
