"""Weights on disk: `load` and `save` release folders.

A release folder holds `config.json` and `model.safetensors` (one file, or shards listed in
`model.safetensors.index.json`), every tensor under `dit.`. Loading is strict, builds the network
on the meta device and assigns tensors one by one, so two copies never exist. Only safetensors.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mofo.depth import DepthCodec
from mofo.model import hub
from mofo.model.dit import DiTConfig, ThreeStreamDiT
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
SECTIONS = ("dit", "depth", "schedule", "use")  # of a config.json; the rest are plain values
# The official releases carry no sizes, only a name; the sizes are those of their tensors.
VARIANTS = {
    "flux_rgbd_9b_v1": DiTConfig(cross_stream_timestep_mixing=False),
    "flux_rgbd_9b_v2": DiTConfig(),
}


@dataclass(frozen=True, kw_only=True)
class Release:
    """A network with what is needed to use it.

    `use` says how the weights were trained: `image_size` [h, w] and `text` (an encoder's name or
    folder), and with which `cfg_scale` they draw best; empty in the official releases, which are
    512x512 with Qwen3-8B and 4.
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
    config = read_config(folder)
    dit_config, codec, schedule = parse(config, folder)
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
    compare(wanted, shapes_of(tensors), path)
    for name in wanted:
        target = name.removeprefix(prefix)
        kind = head_dtype if target.startswith("depth_final_layer.") else dtype
        # copy=True: a tensor straight from the file is a view of it and would change with it
        value = tensors[name].to(device=device, dtype=kind, copy=True)
        network.load_state_dict({target: value}, strict=False, assign=True)


def digest(path: str | Path) -> str:
    """16 hexadecimal digits of the sha256 of a release's network, all its shards in order."""
    folder = folder_of(path)
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


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a release folder."""
    try:
        config = json.loads((folder / CONFIG).read_text())
    except OSError as error:
        raise ValueError(
            f"{folder} is no release folder: {CONFIG} cannot be read ({error}); expected "
            f"{CONFIG} and {WEIGHTS} in it, or the name 'small'"
        ) from error
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is not valid JSON: {error}") from error
    for name, part in [("it", config), *(config.items() if isinstance(config, dict) else ())]:
        if not isinstance(part, dict) and name in ("it", *SECTIONS):
            raise ValueError(f"{folder / CONFIG}: {name} is {part!r}, but must be an object")
    return config


def parse(config: dict[str, Any], folder: Path) -> tuple[DiTConfig, DepthCodec, Schedule]:
    """What a `config.json` describes; unknown keys and variants are refused."""
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
    try:
        return kind(**values)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{folder / CONFIG} cannot be used: {values}: {error}") from error


def compare(wanted: Mapping[str, Any], found: Mapping[str, Any], path: str | Path) -> None:
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


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """As plain numbers, which compare and print."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def folder_of(path: str | Path) -> Path:
    """A path, or that of a model inside this package by its name."""
    return SHIPPED.get(str(path), Path(path))


def exists(path: Path) -> bool:
    """Whether tensors lie there, in one file or in shards."""
    return path.exists() or path.with_name(path.name + ".index.json").exists()
