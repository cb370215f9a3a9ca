"""Weights on disk: `load` and `save` release folders, `grow` a text-to-image base.

A release folder holds `config.json` and `model.safetensors` (one file, or shards listed in
`model.safetensors.index.json`), every tensor under `dit.`. Loading is strict, builds the network
on the meta device and assigns tensors one by one, so two copies never exist. Only safetensors.
"""

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mofo.depth import DepthCodec
from mofo.model import hub
from mofo.model.dit import DiTConfig, ThreeStreamDiT
from mofo.model.layouts import count_blocks, from_diffusers
from mofo.schedule import Schedule

PREFIX = "dit."
WEIGHTS, CONFIG = "model.safetensors", "config.json"
DEPTH_STEPS = ["unit_mean", "contract"]  # the one normalisation that the codec implements
SMALL = Path(__file__).parent.parent / "small"
SHIPPED = {"small": SMALL, "small_base": SMALL / "base"}
RELEASE = hub.Wanted(
    patterns=(CONFIG, "model*.safetensors", "ae_*.safetensors"),
    files=f"{CONFIG}, {WEIGHTS}, ae_encoder.safetensors and ae_decoder.safetensors",
    option="--model",
)
# The official releases carry no sizes, only a name; recipe section 3 gives what it stands for.
VARIANTS = {
    "flux_rgbd_9b_v1": DiTConfig(cross_stream_timestep_mixing=False),
    "flux_rgbd_9b_v2": DiTConfig(),
}


@dataclass(frozen=True, kw_only=True)
class Release:
    """A network with what is needed to use it.

    `use` says how the weights were trained: `image_size` [h, w] and `text` (an encoder's name or
    folder); empty in the official releases, which are 512x512 with Qwen3-8B.
    """

    dit: ThreeStreamDiT
    codec: DepthCodec
    schedule: Schedule
    use: dict[str, Any] = field(default_factory=dict)


def load(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dtype: torch.dtype = torch.float32,
) -> Release:
    """A release: a folder, a hub id, or "small" or "small_base" for the shipped ones.

    The depth head gets its own dtype.
    """
    folder = fetch(path)
    release = outline(folder)
    dit, tensors = release.dit, read_tensors(folder / WEIGHTS)
    assign(dit, tensors, folder, prefix=PREFIX, device=device, dtype=dtype, head_dtype=head_dtype)
    return release


def outline(path: str | Path) -> Release:
    """A release as its `config.json` describes it: the network is on the meta device, empty."""
    folder = fetch(path)
    config = _read_config(folder)
    dit_config, codec, schedule = _parse(config, folder)
    with torch.device("meta"):
        dit = ThreeStreamDiT(dit_config).eval()
    return Release(dit=dit, codec=codec, schedule=schedule, use=config.get("use", {}))


def fetch(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a release: a shipped one's, one on this machine, or a hub id's snapshot."""
    return hub.fetch(SHIPPED.get(str(name), name), RELEASE, revision)


def save(release: Release, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors`: released names, the tensors' own dtypes."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {PREFIX + k: v.detach().cpu() for k, v in release.dit.state_dict().items()}
    variant = [name for name, config in VARIANTS.items() if config == release.dit.config]
    codec = asdict(release.codec)
    config = {
        "variant": variant[0] if variant else "mofo",
        "dit": asdict(release.dit.config),
        "depth": {"depth_normalize_mode": DEPTH_STEPS, **codec},
        "schedule": asdict(release.schedule),
    }
    if release.use:
        config["use"] = release.use
    write_tensors(state, folder / WEIGHTS)
    with replacing(folder / CONFIG) as partial:
        partial.write_text(json.dumps(config, indent=2) + "\n")


def grow(path: str | Path, config: DiTConfig) -> ThreeStreamDiT:
    """Three streams from a FLUX.2 text-to-image base (recipe section 8).

    `path` is the base's single file or a diffusers folder. The depth stream starts as a copy of
    the image stream, decoder blocks as the last single blocks; `depth_in`, the depth head and the
    cross-time MLPs are fresh, the cross alphas 0. Without depth the output is exactly the base's.
    """
    tensors = read_base(path)
    stated = _stated(path)
    if stated is not None:
        # What no tensor's shape shows; the rest is compared below.
        _agree(stated, config, path, names=("num_heads", "axes_dim", "theta"))
    with torch.device("meta"):
        dit = ThreeStreamDiT(config)
    wanted = dit.state_dict()
    shared = set(wanted) & set(base_names(config))
    _compare({k: wanted[k].shape for k in shared}, _shapes(tensors), path)
    state = {}
    for name, blank in wanted.items():
        source = _origin(name, config)
        if name in tensors:
            state[name] = tensors[name].to(torch.float32, copy=True)
        elif source in tensors:
            state[name] = tensors[source].to(torch.float32, copy=True)
        else:
            state[name] = _fresh(name, blank.shape)
    dit.load_state_dict(state, assign=True)
    return dit


def start(path: str | Path, config: DiTConfig) -> ThreeStreamDiT:
    """The network that training begins with: a release of the same dimensions, or a grown base."""
    if not _is_release(path):
        return grow(path, config)
    dit = load(path).dit
    _agree(dit.config, config, path)
    return dit


def text_to_image(path: str | Path) -> ThreeStreamDiT:
    """The text-to-image network of a base; a three-stream release is one when given no depth."""
    if _is_release(path):
        return load(path).dit
    config = _stated(path) or base_config(path)
    with torch.device("meta"):
        dit = ThreeStreamDiT(config)
    assign(dit, read_base(path), path)
    return dit.eval()


def base_config(path: str | Path) -> DiTConfig:
    """The dimensions of a text-to-image base, read off its tensors: the file carries no config.

    Head size from `query_norm.scale`, axes are four quarters of it, theta 2000 (recipe section 3).
    """
    shapes = _shapes(read_base(path))
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


def assign(
    network: nn.Module,
    tensors: Mapping[str, Tensor],
    path: str | Path,
    *,
    prefix: str = "",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dtype: torch.dtype = torch.float32,
) -> None:
    """Put tensors into a network built on the meta device, strictly, converting one at a time."""
    wanted = {prefix + k: v.shape for k, v in network.state_dict().items()}
    _compare(wanted, _shapes(tensors), path)
    for name in wanted:
        target = name.removeprefix(prefix)
        kind = head_dtype if target.startswith("depth_final_layer.") else dtype
        # copy=True: a tensor straight from the file is a view of it and would change with it
        value = tensors[name].to(device=device, dtype=kind, copy=True)
        network.load_state_dict({target: value}, strict=False, assign=True)


def digest(path: str | Path) -> str:
    """16 hexadecimal digits of the sha256 of a release's network, all its shards in order."""
    folder = _folder(path)
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no model*.safetensors; give a release folder, or 'small'")
    sha = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while block := opened.read(1 << 24):
                sha.update(block)
    return sha.hexdigest()[:16]


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, or of the shards in its `.index.json`; memory-mapped."""
    path = Path(path)
    index = path.with_name(path.name + ".index.json")
    if not path.exists() and index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [path.parent / Path(name).name for name in names]
    else:
        files = [path]
    tensors: dict[str, Tensor] = {}
    for file in files:
        with _opened(file) as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def count_elements(file: str | Path) -> int:
    """How many numbers a safetensors file holds, from its header alone."""
    with _opened(Path(file)) as opened:
        return sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    if not file.exists():
        raise ValueError(f"{file} does not exist; expected a safetensors file there")
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is not a complete safetensors file ({error}); copy or download it again"
        ) from error


def write_tensors(
    tensors: Mapping[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None
) -> None:
    """Write one safetensors file; it appears under its name only when complete."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with replacing(Path(path)) as partial:
        save_file(contiguous, partial, metadata=metadata)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A sibling to write to; it replaces `path` if the block ends well, and vanishes otherwise."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.chmod(0o644)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_base(path: str | Path) -> dict[str, Tensor]:
    """A text-to-image base in the names of its own single file, whichever layout it comes in."""
    folder = file = _folder(path)
    if folder.is_dir():
        inside = [folder / "transformer", folder]
        names = ["diffusion_pytorch_model.safetensors", WEIGHTS]
        found = [d / n for d in inside for n in names if _exists(d / n)]
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


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / CONFIG).read_text())
    except OSError as error:
        raise ValueError(
            f"{folder} is no release folder: {CONFIG} cannot be read ({error}); expected "
            f"{CONFIG} and {WEIGHTS} in it, or the name 'small'"
        ) from error
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is not valid JSON: {error}") from error


def _parse(config: dict[str, Any], folder: Path) -> tuple[DiTConfig, DepthCodec, Schedule]:
    if "dit" in config:
        dit = _section(DiTConfig, config["dit"], folder)
    elif config.get("variant") in VARIANTS:
        dit = VARIANTS[config["variant"]]
    else:
        raise ValueError(
            f"{folder / CONFIG} has variant {config.get('variant')!r} and no `dit` section; "
            f"accepted variants: {', '.join(VARIANTS)}"
        )
    depth = dict(config.get("depth", {}))
    steps = depth.pop("depth_normalize_mode", DEPTH_STEPS)
    if list(steps) != DEPTH_STEPS:
        raise ValueError(f"{folder / CONFIG} normalises depth by {steps}; accepted: {DEPTH_STEPS}")
    codec = _section(DepthCodec, depth, folder)
    if dit.depth_channels not in (0, codec.patch_size**2):
        raise ValueError(
            f"{folder / CONFIG}: depth_channels is {dit.depth_channels}, but patches of "
            f"{codec.patch_size} have {codec.patch_size**2} pixels"
        )
    return dit, codec, _section(Schedule, config.get("schedule", {}), folder)


T = TypeVar("T")


def _section(kind: type[T], values: dict[str, Any], folder: Path) -> T:
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{folder / CONFIG} has unknown keys {unknown}; accepted: {known}")
    return kind(**values)


def _compare(wanted: Mapping[str, Any], found: Mapping[str, Any], path: str | Path) -> None:
    """Same names, same shapes, or a message with the first five of each kind of difference."""
    missing = sorted(set(wanted) - set(found))
    unexpected = sorted(set(found) - set(wanted))
    differing = [
        f"{name} is {list(found[name])}, expected {list(wanted[name])}"
        for name in sorted(set(wanted) & set(found))
        if tuple(wanted[name]) != tuple(found[name])
    ]
    if missing or unexpected or differing:
        listed = {"missing": missing, "unexpected": unexpected, "of another shape": differing}
        lines = [f"  {len(v)} {k}: {', '.join(v[:5])}" for k, v in listed.items() if v]
        raise ValueError(
            f"the tensors in {path} do not fit the configuration:\n"
            + "\n".join(lines)
            + "\n  check that config.json and the weights belong together"
        )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


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
    folder = _folder(path)
    if not (folder / CONFIG).exists():
        return None
    config = _read_config(folder)
    ours = "dit" in config or "variant" in config  # diffusers writes a config.json as well
    return _parse(config, folder)[0] if ours else None


def _is_release(path: str | Path) -> bool:
    """Whether a folder holds three streams (or is the shipped model), not a text-to-image base."""
    stated = _stated(path)
    return stated is not None and stated.depth_channels > 0


def _folder(path: str | Path) -> Path:
    return SHIPPED.get(str(path), Path(path))


def _exists(path: Path) -> bool:
    return path.exists() or path.with_name(path.name + ".index.json").exists()
