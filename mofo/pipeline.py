"""`Mofo`: pictures and depth maps in, pictures with depth out.

    mofo = Mofo.load("small")                  # the shipped model, or a release folder
    mofo.joint("a kitchen").save("kitchen")
    mofo.image_to_depth("photo.jpg")           # a path, a uint8 array or a PIL image
    mofo.depth_to_image(depth, "a kitchen")    # an array or a path; metres or relative

A list in gives a list out, made in one batch; sample k depends on its own seed alone. The network
works at the size it was trained at (or `size`): what is given is stretched to it and what is
generated is stretched back, pictures filtered, depth by nearest pixel. Depth is relative, its mean
about 1; it is 0 where it is not valid.
"""

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, UInt8
from PIL import Image
from torch import Tensor

from mofo import __version__
from mofo.data.inputs import (
    DepthMap,
    DepthSource,
    Picture,
    PictureSource,
    read_depth,
    read_picture,
)
from mofo.data.transforms import nearest_measured
from mofo.depth import fill_nearest
from mofo.frozen import Encoders
from mofo.geometry import FIELD_OF_VIEW, intrinsics_from_fov, point_cloud, save_cloud
from mofo.model import weights
from mofo.model.weights import Release, replacing
from mofo.picture import depth_picture
from mofo.sampler import sample

# What an official release's config.json does not say (recipe sections 2 and 5).
OFFICIAL_SIZE = (512, 512)
OFFICIAL_TEXT = "Qwen3-8B"
CLOUDS = ("cloud.glb", "cloud.ply")

Seeds = int | Sequence[int] | None
Size = tuple[int, int] | None


class Tokens(NamedTuple):
    """What the network generated or was given, float32 on the CPU."""

    image: Float[Tensor, "l ci"]
    depth: Float[Tensor, "l cd"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """A picture and its relative depth; `metadata` holds what makes the same again."""

    image: UInt8[np.ndarray, "h w 3"]
    depth: Float32[np.ndarray, "h w"]
    valid: Bool[np.ndarray, "h w"]
    tokens: Tokens
    metadata: dict[str, Any]

    def save(
        self, folder: str | Path, *, fov_deg: float = FIELD_OF_VIEW, drop_outliers: bool = False
    ) -> None:
        """Write rgb.png, depth_raw.npy, depth_magma.png, the clouds and, last, metadata.json.

        A file appears under its name only when complete. Depth that is all edges has no cloud:
        metadata.json then says so.
        """
        folder = Path(folder)
        height, width = self.depth.shape
        intrinsics = intrinsics_from_fov(height, width, fov_deg)
        about: dict[str, Any] = {"fov_deg": fov_deg, "drop_outliers": drop_outliers}
        cloud = None
        try:
            cloud = point_cloud(
                self.depth, self.image, intrinsics, self.valid, drop_outliers=drop_outliers
            )
            about["num_points"] = len(cloud.points)
        except ValueError as reason:
            about |= {"num_points": 0, "reason": str(reason)}
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "depth_raw.npy") as partial, partial.open("wb") as file:
            np.save(file, self.depth)
        pictures = {"rgb.png": self.image, "depth_magma.png": depth_picture(self.depth, self.valid)}
        for name, pixels in pictures.items():
            with replacing(folder / name) as partial:
                Image.fromarray(pixels).save(partial, format="PNG")
        for name in CLOUDS:
            if cloud is None:  # an earlier result's would not belong to this one
                (folder / name).unlink(missing_ok=True)
            else:
                save_cloud(*cloud, folder / name)
        with replacing(folder / "metadata.json") as partial:
            partial.write_text(json.dumps({**self.metadata, "cloud": about}, indent=2) + "\n")


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One batch, checked: `prompts` and `seeds` have an entry per sample."""

    mode: str
    prompts: list[str]
    seeds: list[int]
    size: tuple[int, int]
    grid: tuple[int, int]
    num_steps: int
    cfg_scale: float
    log2_alpha: float | None


class Mofo:
    """A released network with its encoders. Make one with `Mofo.load`."""

    def __init__(self, *, release: Release, encoders: Encoders, folder: Path) -> None:
        self.release, self.encoders, self.folder = release, encoders, folder
        self.device = release.dit.img_in.weight.device
        height, width = release.use.get("image_size", OFFICIAL_SIZE)
        self.size = (int(height), int(width))
        config = release.dit.config
        if not config.depth_channels:
            raise ValueError(
                f"{folder} is a text-to-image base without depth; post-train it first "
                "(train.py, init_from=...), or load a release with three streams"
            )
        for part, found, needed in (
            ("text encoder", encoders.text_encoder.channels, config.context_in_dim),
            ("autoencoder", encoders.autoencoder.channels, config.in_channels),
            ("autoencoder's stride", encoders.autoencoder.stride, release.codec.patch_size),
        ):
            if found != needed:
                raise ValueError(
                    f"the network in {folder} was trained with another {part}: it needs {needed} "
                    f"{'pixels' if 'stride' in part else 'channels'}, this one has {found}; "
                    "pass the one it was trained with"
                )

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        text_encoder: str | Path | None = None,
    ) -> "Mofo":
        """Load a release folder, or "small".

        `device` None takes a GPU if there is one; `dtype` None is bfloat16 there, else float32
        (the depth head is float32 always). `text_encoder` replaces the release's own: "small", or
        a Qwen3 folder, which the official releases need.
        """
        folder = weights.SMALL if str(path) == "small" else Path(path)
        if not folder.is_dir():
            raise ValueError(
                f"there is no folder {path}; accepted are a release folder and 'small'. A release "
                "on a hub must be downloaded first: give the folder it was downloaded to"
            )
        device = _device(device)
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        release = weights.load(folder, device=device, dtype=dtype)
        text = str(text_encoder or release.use.get("text", OFFICIAL_TEXT))
        if text != "small" and not Path(text).is_dir():
            raise ValueError(
                f"{path} needs the text encoder {text}, and there is no such folder; pass "
                "text_encoder= (--text-encoder on the command line): the folder with its "
                "config.json, weights and tokenizer"
            )
        encoders = Encoders(text=text, autoencoder=str(folder), device=device, dtype=dtype)
        return cls(release=release, encoders=encoders, folder=folder)

    def joint(
        self,
        prompt: str | list[str],
        *,
        seeds: Seeds = None,
        num_steps: int = 50,
        cfg_scale: float = 4.0,
        log2_alpha: float | None = 5.0,
        size: Size = None,
    ) -> Any:
        """A picture with its depth: a `Result`, or a list of them for a list of prompts.

        `seeds`: one per sample, 0, 1, 2, ... if left out. `log2_alpha` > 0 resolves the picture
        before the depth; None walks both together.
        """
        prompts, single = _listed(prompt)
        call = self._call(
            "joint", prompts, len(prompts), seeds, size, num_steps, cfg_scale, log2_alpha
        )
        image, depth = self._sample(call)
        pictures, maps = self._pictures(image, call), self._maps(depth, call)
        return _unlisted(self._results(call, pictures, maps, image, depth), single)

    def image_to_depth(
        self,
        picture: PictureSource | list[Any],
        prompt: str | list[str] = "",
        *,
        seeds: Seeds = None,
        num_steps: int = 50,
        cfg_scale: float = 1.0,
        size: Size = None,
    ) -> Any:
        """Depth of a picture, at its size: a `Result`, or a list of them for a list of pictures."""
        sources, single = _listed(picture)
        call = self._call("i2d", prompt, len(sources), seeds, size, num_steps, cfg_scale, None)
        pictures = [read_picture(source) for source in sources]
        stretched = np.stack([_stretch(one, call.size) for one in pictures])
        pixels = torch.from_numpy(stretched).permute(0, 3, 1, 2).to(self.device) / 127.5 - 1
        image, depth = self._sample(call, image=self.encoders.image(pixels))
        maps = [
            _nearest(*made, size=one.shape[:2])
            for made, one in zip(self._maps(depth, call), pictures, strict=True)
        ]
        return _unlisted(self._results(call, pictures, maps, image, depth), single)

    def depth_to_image(
        self,
        depth: DepthSource | list[Any],
        prompt: str | list[str],
        *,
        valid: np.ndarray | list[Any] | None = None,
        seeds: Seeds = None,
        num_steps: int = 50,
        cfg_scale: float = 4.0,
        log2_alpha: float | None = None,
        size: Size = None,
    ) -> Any:
        """A picture for a depth map, at its size: a `Result`, or a list for a list of maps.

        Depth is in any unit. Where it is not `valid` (without `valid`: not finite, or not
        positive) it is filled from the nearest pixel. `log2_alpha` conditions softly, from -5
        (weakest) to -15; None keeps the given depth exactly.
        """
        sources, single = _listed(depth)
        masks: list[Any] = [None] * len(sources) if valid is None else list(valid)
        masks = [valid] if single else masks
        if len(masks) != len(sources):
            raise ValueError(f"{len(masks)} valid masks for {len(sources)} depth maps; one each")
        call = self._call(
            "d2i", prompt, len(sources), seeds, size, num_steps, cfg_scale, log2_alpha
        )
        pairs = zip(sources, masks, strict=True)
        maps = [read_depth(source, mask) for source, mask in pairs]
        filled, measured = zip(*(_fit_depth(*one, size=call.size) for one in maps), strict=True)
        tokens, _ = self.release.codec.encode(
            torch.from_numpy(np.stack(filled)), torch.from_numpy(np.stack(measured))
        )
        image, tokens = self._sample(call, depth=tokens.to(self.device))
        pictures = [
            _stretch(made, one[0].shape)
            for made, one in zip(self._pictures(image, call), maps, strict=True)
        ]
        relative = [_unit_mean(*one) for one in maps]
        extra = [{"num_filled": int((~one).sum()), "filled_with": "nearest"} for one in measured]
        return _unlisted(self._results(call, pictures, relative, image, tokens, extra), single)

    @cached_property
    def weights_hash(self) -> str:
        """Names the weights in metadata."""
        return weights.digest(self.folder)

    def _call(self, mode, prompt, count, seeds, size, num_steps, cfg_scale, log2_alpha) -> _Call:
        if not count:
            raise ValueError(f"{mode} was given an empty list; give it at least one input")
        prompts = [prompt] * count if isinstance(prompt, str) else list(prompt)
        if len(prompts) != count:
            raise ValueError(f"{len(prompts)} prompts for {count} inputs; give one, or one each")
        height, width = size or self.size
        stride = self.release.codec.patch_size
        if min(height, width) < stride or height % stride or width % stride:
            raise ValueError(
                f"image is {height}x{width}, but both sides must be multiples of {stride}; "
                f"leave size out for the {self.size[0]}x{self.size[1]} of the training"
            )
        return _Call(
            mode=mode,
            prompts=prompts,
            seeds=_seeds(seeds, count),
            size=(height, width),
            grid=(height // stride, width // stride),
            num_steps=num_steps,
            cfg_scale=cfg_scale,
            log2_alpha=log2_alpha,
        )

    def _sample(
        self, call: _Call, image: Tensor | None = None, depth: Tensor | None = None
    ) -> tuple[Float[Tensor, "b l ci"], Float[Tensor, "b l cd"]]:
        made = sample(
            self.release.dit,
            self.release.schedule,
            self.encoders.text(call.prompts),
            grid=call.grid,
            image=image,
            depth=depth,
            null_text=self.encoders.text([""]) if call.cfg_scale > 1 else None,
            num_steps=call.num_steps,
            cfg_scale=call.cfg_scale,
            log2_alpha=call.log2_alpha,
            seeds=call.seeds,
        )
        assert made[1] is not None  # the network has a depth stream
        return made[0], made[1]

    def _pictures(self, tokens: Tensor, call: _Call) -> list[Picture]:
        pixels = self.encoders.pixels(tokens, call.grid).float().cpu()
        pixels = ((pixels + 1) * 127.5).round().to(torch.uint8)
        return list(pixels.permute(0, 2, 3, 1).contiguous().numpy())

    def _maps(self, tokens: Tensor, call: _Call) -> list[DepthMap]:
        depth, valid = self.release.codec.decode(tokens, call.grid)
        return list(zip(depth.cpu().numpy(), valid.cpu().numpy(), strict=True))

    def _results(self, call, pictures, maps, image, depth, extra=None) -> list[Result]:
        return [
            Result(
                image=pictures[k],
                depth=maps[k][0],
                valid=maps[k][1],
                tokens=Tokens(image[k].float().cpu(), depth[k].float().cpu()),
                metadata=self._metadata(call, k) | (extra[k] if extra else {}),
            )
            for k in range(len(call.prompts))
        ]

    def _metadata(self, call: _Call, k: int) -> dict[str, Any]:
        return {
            "mode": call.mode,
            "prompt": call.prompts[k],
            "seed": call.seeds[k],
            "num_steps": call.num_steps,
            "cfg_scale": call.cfg_scale,
            "log2_alpha": call.log2_alpha,
            "size": list(call.size),
            "fit": "stretch",
            "weights": self.weights_hash,
            "text_encoder": self.encoders.name,
            "device": self.device.type,
            "dtype": str(self.release.dit.dtype).removeprefix("torch."),
            "versions": {
                "mofo": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }


def _stretch(picture: Picture, size: tuple[int, ...]) -> UInt8[np.ndarray, "h2 w2 3"]:
    if picture.shape[:2] == size:
        return picture
    resized = Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return np.array(resized)


def _nearest(metres: np.ndarray, valid: np.ndarray, *, size: tuple[int, ...]) -> DepthMap:
    """The pixel under the centre of each new one: depth is not blended across edges."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64)
        for old, new in zip(metres.shape, size, strict=True)
    )
    at = np.ix_(rows, columns)
    return metres[at], valid[at]


def _fit_depth(metres: np.ndarray, valid: np.ndarray, *, size: tuple[int, int]) -> DepthMap:
    """Depth at the network's size, holes filled, and which of its cells were measured."""
    larger = max(metres.shape[0], size[0]), max(metres.shape[1], size[1])
    metres, valid = nearest_measured(*_nearest(metres, valid, size=larger), size)
    return fill_nearest(metres, valid), valid


def _unit_mean(metres: np.ndarray, valid: np.ndarray) -> DepthMap:
    mean = metres[valid].mean(dtype=np.float64)
    return (metres / mean).astype(np.float32), valid


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}; accepted: cpu, cuda, cuda:0, ...") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device}, but no CUDA device is found here; use cpu")
    return chosen


def _seeds(seeds: Seeds, count: int) -> list[int]:
    chosen = range(count) if seeds is None else [seeds] if isinstance(seeds, int) else seeds
    chosen = [int(seed) for seed in chosen]
    if len(chosen) != count:
        raise ValueError(f"{len(chosen)} seeds for {count} samples; give one seed per sample")
    if bad := [seed for seed in chosen if not 0 <= seed < 2**63]:
        raise ValueError(f"seed is {bad[0]}; accepted: 0 up to 2^63 - 1")
    return chosen


def _listed(given: Any) -> tuple[list[Any], bool]:
    """The inputs as a list, and whether there was one that is no list."""
    return (list(given), False) if isinstance(given, list | tuple) else ([given], True)


def _unlisted(results: list[Result], single: bool) -> Result | list[Result]:
    return results[0] if single else results
