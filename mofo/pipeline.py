"""`Mofo`: pictures and depth maps in, pictures with depth out.

    mofo = Mofo.load("small")                  # the shipped model, a release folder, or a hub id
    mofo.joint("a kitchen").save("kitchen")
    mofo.image_to_depth("photo.jpg")           # a path, a uint8 array or a PIL image
    mofo.depth_to_image(depth, "a kitchen")    # an array or a path; metres or relative

A list in gives a list out; what has one size is made in one batch, and sample k depends on its own
seed alone. What is given reaches the network as `fit` says (`mofo.data.fit`), about as large as the
pictures of the training (or `size`), and what is made comes back at its size. Depth is relative,
its mean about 1; it is 0 where it is not valid.
"""

import platform
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mofo import __version__
from mofo.data import fit as fits
from mofo.data.fit import Fit
from mofo.data.inputs import (
    DepthMap,
    DepthSource,
    Picture,
    PictureSource,
    read_depth,
    read_picture,
)
from mofo.depth import merge
from mofo.frozen import Encoders
from mofo.model import weights
from mofo.model.weights import Release
from mofo.result import Result, Tokens
from mofo.sampler import sample

# The method's own release, and what its config.json does not say (recipe sections 2 and 5).
OFFICIAL = "bartduis/modality_forcing"
OFFICIAL_SIZE = (512, 512)
OFFICIAL_TEXT = "Qwen/Qwen3-8B"
NUM_SEEDS = 2**32  # torch's CPU generator reads 32 bits of a seed and ignores the others

Seeds = int | Sequence[int] | None
Size = tuple[int, int] | None
OnStep = Callable[[int, int], None] | None


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One batch of one size, checked; a list has an entry per sample."""

    mode: str
    members: list[int]  # places in what the user gave
    prompts: list[str]
    seeds: list[int]
    fits: list[Fit]
    fit: str
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
        # 24 GB take many seconds to read: meanwhile the first samples are made.
        self._digest = ThreadPoolExecutor(1).submit(weights.digest, folder)

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
        refine: bool = False,
        size: Size = None,
        on_step: OnStep = None,
    ) -> Any:
        """A picture with its depth: a `Result`, or a list of them for a list of prompts.

        `seeds`: one per sample, 0, 1, 2, ... if left out. `log2_alpha` > 0 resolves the picture
        before the depth; None walks both together. `refine` predicts the depth once more, from the
        finished picture's tokens. `on_step` is told (steps done, steps in all).
        """
        prompts, single = _listed(prompt)
        sizes = [size or self.size] * len(prompts)
        calls = self._calls(
            "joint", prompts, seeds, sizes, "native", size, num_steps, cfg_scale, log2_alpha
        )
        step = _counter(on_step, len(calls) * num_steps * (2 if refine else 1))

        def make(call: _Call) -> list[Result]:
            image, depth = self._sample(call, step)
            if refine:
                second = replace(call, cfg_scale=1.0, log2_alpha=None)
                depth = self._sample(second, step, image=image)[1]
            pictures, maps = self._pictures(image, call), self._maps(depth, call)
            extra = [{"refine_depth": refine}] * len(maps)
            return self._results(call, pictures, maps, image, depth, extra)

        return _in_order(calls, make, single)

    def image_to_depth(
        self,
        picture: PictureSource | list[Any],
        prompt: str | list[str] = "",
        *,
        seeds: Seeds = None,
        num_steps: int = 50,
        cfg_scale: float = 1.0,
        fit: str = "native",
        ensemble: int = 1,
        size: Size = None,
        on_step: OnStep = None,
    ) -> Any:
        """Depth of a picture, at its size: a `Result`, or a list of them for a list of pictures.

        An `ensemble` of K is the median of K predictions after scaling them to each other, with
        their spread as `uncertainty`. Member 0 has the sample's own seed, `tokens` are its.
        """
        sources, single = _listed(picture)
        pictures = [read_picture(source) for source in sources]
        if ensemble < 1:
            raise ValueError(f"ensemble is {ensemble}; give 1 (no ensemble) or more")
        sizes = [one.shape[:2] for one in pictures]
        calls = self._calls("i2d", prompt, seeds, sizes, fit, size, num_steps, cfg_scale, None)
        step = _counter(on_step, len(calls) * num_steps * ensemble)

        def make(call: _Call) -> list[Result]:
            given = [pictures[k] for k in call.members]
            seen = [fits.picture_in(*one) for one in zip(given, call.fits, strict=True)]
            pixels = torch.from_numpy(np.stack(seen)).permute(0, 3, 1, 2).to(self.device)
            image = self.encoders.image(pixels / 127.5 - 1)
            members = []
            for k in range(ensemble):
                seeds = [member_seed(seed, k) for seed in call.seeds]
                members.append(self._sample(replace(call, seeds=seeds), step, image=image)[1])
            maps = [self._maps(depth, call) for depth in members]
            merged = [_merged(alike) for alike in zip(*maps, strict=True)]
            restored = [_restored(*one) for one in zip(merged, call.fits, strict=True)]
            out = [(depth, valid) for depth, valid, _ in restored]
            extra = [{"ensemble": ensemble}] * len(out)
            results = self._results(call, given, out, image, members[0], extra)
            pairs = zip(results, restored, strict=True)
            return [replace(result, uncertainty=spread) for result, (_, _, spread) in pairs]

        return _in_order(calls, make, single)

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
        fit: str = "native",
        size: Size = None,
        on_step: OnStep = None,
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
        maps = [read_depth(*one) for one in zip(sources, masks, strict=True)]
        sizes = [metres.shape for metres, _ in maps]
        calls = self._calls(
            "d2i", prompt, seeds, sizes, fit, size, num_steps, cfg_scale, log2_alpha
        )
        step = _counter(on_step, len(calls) * num_steps)

        def make(call: _Call) -> list[Result]:
            given = [maps[k] for k in call.members]
            pairs = [fits.depth_in(*one, fit) for one, fit in zip(given, call.fits, strict=True)]
            filled, measured = map(np.stack, zip(*pairs, strict=True))
            tokens, _ = self.release.codec.encode(
                torch.from_numpy(filled), torch.from_numpy(measured)
            )
            image, tokens = self._sample(call, step, depth=tokens.to(self.device))
            made = zip(self._pictures(image, call), call.fits, strict=True)
            pictures = [fits.picture_out(*one) for one in made]
            extra = [
                {"num_filled": int((~mask).sum()), "filled_with": "nearest"} for _, mask in pairs
            ]
            relative = [_unit_mean(*one) for one in given]
            return self._results(call, pictures, relative, image, tokens, extra)

        return _in_order(calls, make, single)

    @property
    def weights_hash(self) -> str:
        """Names the weights in metadata."""
        return self._digest.result()

    def _calls(
        self, mode, prompt, seeds, sizes, fit, size, num_steps, cfg_scale, log2_alpha
    ) -> list[_Call]:
        """The samples grouped by the network's size, in the order of their first members."""
        if not (count := len(sizes)):
            raise ValueError(f"{mode} was given an empty list; give it at least one input")
        prompts = [prompt] * count if isinstance(prompt, str) else list(prompt)
        if len(prompts) != count:
            raise ValueError(f"{len(prompts)} prompts for {count} inputs; give one, or one each")
        seeds, stride = _seeds(seeds, count), self.release.codec.patch_size
        height, width = size = size or self.size
        if min(size) < stride or height % stride or width % stride:
            raise ValueError(
                f"image is {height}x{width}, but both sides must be multiples of {stride}; "
                f"leave size out for the {self.size[0]}x{self.size[1]} of the training"
            )
        chosen = [fits.choose(fit, source, size, stride) for source in sizes]
        groups: dict[tuple[int, int], list[int]] = {}
        for k, one in enumerate(chosen):
            groups.setdefault(one.size, []).append(k)
        return [
            _Call(
                mode=mode,
                members=members,
                prompts=[prompts[k] for k in members],
                seeds=[seeds[k] for k in members],
                fits=[chosen[k] for k in members],
                fit=fit,
                grid=(height // stride, width // stride),
                num_steps=num_steps,
                cfg_scale=cfg_scale,
                log2_alpha=log2_alpha,
            )
            for (height, width), members in groups.items()
        ]

    def _sample(
        self, call: _Call, step: Callable[[], None], image: Tensor | None = None,
        depth: Tensor | None = None,
    ) -> tuple[Float[Tensor, "b l ci"], Float[Tensor, "b l cd"]]:  # fmt: skip
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
            on_step=step,
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

    def _results(self, call: _Call, pictures, maps, image, depth, extra) -> list[Result]:
        return [
            Result(
                image=pictures[k],
                depth=maps[k][0],
                valid=maps[k][1],
                tokens=Tokens(image[k].float().cpu(), depth[k].float().cpu()),
                metadata=self._metadata(call, k) | extra[k],
            )
            for k in range(len(call.members))
        ]

    def _metadata(self, call: _Call, k: int) -> dict[str, Any]:
        fit = call.fits[k]
        return {
            "mode": call.mode,
            "prompt": call.prompts[k],
            "seed": call.seeds[k],
            "num_steps": call.num_steps,
            "cfg_scale": call.cfg_scale,
            "log2_alpha": call.log2_alpha,
            "size": list(fit.size),
            "fit": call.fit,
            "box": list(fit.box),  # of the input on the network's canvas: top, left, height, width
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


def member_seed(seed: int, k: int) -> int:
    """Seed of member k of an ensemble: hashed, because seed + k is the next sample's own."""
    return seed if k == 0 else zlib.crc32(f"{seed}/{k}".encode())


def _in_order(calls: list[_Call], make: Callable[[_Call], list[Result]], single: bool) -> Any:
    """Results of all calls, in the order of what the user gave."""
    results: dict[int, Result] = {}
    for call in calls:
        results |= zip(call.members, make(call), strict=True)
    return results[0] if single else [results[k] for k in sorted(results)]


def _counter(on_step: OnStep, total: int) -> Callable[[], None]:
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if on_step is not None:
            on_step(done, total)

    return step


def _merged(maps: Sequence[DepthMap]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Depth, validity and, for more than one map, the relative uncertainty."""
    if len(maps) == 1:
        return *maps[0], None
    depths, valids = zip(*maps, strict=True)
    return merge(np.stack(depths), np.stack(valids))


def _restored(
    made: tuple[np.ndarray, np.ndarray, np.ndarray | None], fit: Fit
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    depth, valid, spread = made
    out, out_valid = fits.depth_out(depth, valid, fit)
    if spread is None:
        return out, out_valid, None
    top, left, height, width = fit.box
    inside = Image.fromarray(spread[top : top + height, left : left + width])
    smooth = np.asarray(inside.resize(fit.source[::-1], Image.Resampling.BILINEAR))
    return out, out_valid, np.where(out_valid, smooth, np.float32(0))


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
    if bad := [seed for seed in chosen if not 0 <= seed < NUM_SEEDS]:
        raise ValueError(f"seed is {bad[0]}; accepted: 0 to {NUM_SEEDS - 1}")
    return chosen


def _listed(given: Any) -> tuple[list[Any], bool]:
    """The inputs as a list, and whether there was one that is no list."""
    return (list(given), False) if isinstance(given, list | tuple) else ([given], True)
