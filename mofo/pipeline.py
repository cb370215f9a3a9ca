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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mofo import __version__, memory
from mofo.calls import Call, OnStep, Seeds, counter, cut, in_order, listed, member_seed
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

# The method's own release, and what its config.json does not say but its inference code does.
OFFICIAL = "bartduis/modality_forcing"
OFFICIAL_SIZE = (512, 512)
OFFICIAL_TEXT = "Qwen/Qwen3-8B"
OFFICIAL_CFG_SCALE = 4.0

Size = tuple[int, int] | None


class Mofo:
    """A released network with its encoders. Make one with `Mofo.load`."""

    def __init__(
        self,
        *,
        folder: Path,
        outline: Release,
        encoders: Encoders,
        device: torch.device,
        dtype: torch.dtype,
        plan: memory.Plan = "resident",
        compiled: bool = False,
    ) -> None:
        self.folder, self.outline, self.encoders = folder, outline, encoders
        self.device, self.dtype, self.plan, self.compiled = device, dtype, plan, compiled
        self.size = _size(outline)
        # Weight of the prompt in joint and depth→image, where none is asked for.
        self.cfg_scale = float(outline.use.get("cfg_scale", OFFICIAL_CFG_SCALE))
        config = outline.dit.config
        if not config.depth_channels:
            raise ValueError(
                f"{folder} is a text-to-image base without depth; post-train it first "
                "(train.py, init_from=...), or load a release with three streams"
            )
        for part, found, needed in (
            ("text encoder", encoders.text_encoder.channels, config.context_in_dim),
            ("autoencoder", encoders.autoencoder.channels, config.in_channels),
            ("autoencoder's stride", encoders.autoencoder.stride, outline.codec.patch_size),
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
        revision: str | None = None,
        plan: str | None = None,
        compiled: bool = False,
        size: Size = None,
        num_samples: int = 1,
        cfg_scale: float | None = None,
        announce: Callable[[str], None] | None = None,
    ) -> "Mofo":
        """Load a release: a folder, a hub id (at a `revision`), or "small".

        `device` None takes a GPU if there is one; `dtype` None is bfloat16 there, else float32
        (the depth head is float32 always). `text_encoder` replaces the release's own: "small", or
        a folder or hub id of Qwen3. `plan` None takes the fastest of `mofo.memory` that holds
        `num_samples` of `size` (else as trained) at once under `cfg_scale`; `announce` is told
        needs and plan before anything large is loaded. `compiled` blocks cost minutes once and are
        faster afterwards.
        """
        device = _device(device)
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        folder = weights.fetch(path, revision)
        outline = weights.outline(folder)
        text = str(text_encoder or outline.use.get("text", OFFICIAL_TEXT))
        encoders = Encoders(text=text, autoencoder=str(folder), device=device, dtype=dtype)
        needs = memory.measure(
            outline,
            text=encoders.text_encoder.num_bytes,
            autoencoder=memory.autoencoder_bytes(folder, dtype),
            dtype=dtype,
            size=size or _size(outline),
            num_samples=num_samples,
            cfg_scale=OFFICIAL_CFG_SCALE if cfg_scale is None else cfg_scale,
        )
        free = memory.available(device)
        chosen = memory.choose(needs, free, plan)
        if announce is not None:
            announce(memory.summary(needs, free, chosen))
        mofo = cls(
            folder=folder,
            outline=outline,
            encoders=encoders,
            device=device,
            dtype=dtype,
            plan=chosen,
            compiled=compiled,
        )
        if chosen == "resident":  # what is wrong with the weights shows here, not at the first use
            _ = mofo.release
        return mofo

    @cached_property
    def release(self) -> Release:
        """The network with its weights; they are loaded when this is first read."""
        host = self.plan == "offload"
        release = weights.load(self.folder, "cpu" if host else self.device, self.dtype)
        release.dit.requires_grad_(False)  # whatever the plan: the bits may depend on it
        if host:
            memory.stream_blocks(release.dit, self.device)
        if self.compiled:
            memory.compile_blocks(release.dit)
        return release

    def read_prompts(self, prompts: Sequence[str]) -> None:
        """Encode prompts that will be needed, so that the text encoder has its turn but once."""
        self._text(["", *prompts])

    def joint(
        self,
        prompt: str | list[str],
        *,
        seeds: Seeds = None,
        num_steps: int = 50,
        cfg_scale: float | None = None,
        log2_alpha: float | None = 5.0,
        refine: bool = False,
        size: Size = None,
        on_step: OnStep = None,
    ) -> Any:
        """A picture with its depth: a `Result`, or a list of them for a list of prompts.

        `seeds`: one per sample, 0, 1, 2, ... if left out. `cfg_scale` None: what the release
        recommends, 4 where it says nothing. `log2_alpha` > 0 resolves the picture
        before the depth; None walks both together. `refine` predicts the depth once more, from the
        finished picture's tokens. `on_step` is told (steps done, steps in all).
        """
        prompts, single = listed(prompt)
        sizes = [size or self.size] * len(prompts)
        cfg_scale = self.cfg_scale if cfg_scale is None else cfg_scale
        how = {"num_steps": num_steps, "cfg_scale": cfg_scale, "log2_alpha": log2_alpha}
        calls = self._calls("joint", prompts, sizes, size, seeds=seeds, fit="native", **how)
        step = counter(on_step, len(calls) * num_steps * (2 if refine else 1))

        def make(call: Call) -> list[Result]:
            image, depth = self._sample(call, step)
            if refine:
                second = replace(call, cfg_scale=1.0, log2_alpha=None)
                depth = self._sample(second, step, image=image)[1]
            pictures, maps = self._pictures(image, call), self._maps(depth, call)
            extra = [{"refine_depth": refine}] * len(maps)
            return self._results(call, pictures, maps, image, depth, extra)

        return in_order(calls, make, single)

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
        sources, single = listed(picture)
        pictures = [read_picture(source) for source in sources]
        if ensemble < 1:
            raise ValueError(f"ensemble is {ensemble}; give 1 (no ensemble) or more")
        sizes = [one.shape[:2] for one in pictures]
        how = {"num_steps": num_steps, "cfg_scale": cfg_scale, "log2_alpha": None}
        calls = self._calls("i2d", prompt, sizes, size, seeds=seeds, fit=fit, **how)
        step = counter(on_step, len(calls) * num_steps * ensemble)

        def make(call: Call) -> list[Result]:
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

        return in_order(calls, make, single)

    def depth_to_image(
        self,
        depth: DepthSource | list[Any],
        prompt: str | list[str],
        *,
        valid: np.ndarray | list[Any] | None = None,
        seeds: Seeds = None,
        num_steps: int = 50,
        cfg_scale: float | None = None,
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
        sources, single = listed(depth)
        masks: list[Any] = [None] * len(sources) if valid is None else list(valid)
        masks = [valid] if single else masks
        if len(masks) != len(sources):
            raise ValueError(f"{len(masks)} valid masks for {len(sources)} depth maps; one each")
        maps = [read_depth(*one) for one in zip(sources, masks, strict=True)]
        sizes = [metres.shape for metres, _ in maps]
        cfg_scale = self.cfg_scale if cfg_scale is None else cfg_scale
        how = {"num_steps": num_steps, "cfg_scale": cfg_scale, "log2_alpha": log2_alpha}
        calls = self._calls("d2i", prompt, sizes, size, seeds=seeds, fit=fit, **how)
        step = counter(on_step, len(calls) * num_steps)

        def make(call: Call) -> list[Result]:
            given = [maps[k] for k in call.members]
            pairs = [fits.depth_in(*one, fit) for one, fit in zip(given, call.fits, strict=True)]
            filled, measured = map(np.stack, zip(*pairs, strict=True))
            tokens, _ = self.outline.codec.encode(
                torch.from_numpy(filled), torch.from_numpy(measured)
            )
            image, tokens = self._sample(call, step, depth=tokens.to(self.device))
            made = zip(self._pictures(image, call), call.fits, strict=True)
            pictures = [fits.picture_out(*one) for one in made]
            # A letterbox's borders are measured nowhere, but are no holes.
            holes = [
                one.box.height * one.box.width - mask.sum()
                for one, (_, mask) in zip(call.fits, pairs, strict=True)
            ]
            extra = [{"num_filled": int(n), "filled_with": "nearest"} for n in holes]
            relative = [_unit_mean(*one) for one in given]
            return self._results(call, pictures, relative, image, tokens, extra)

        return in_order(calls, make, single)

    @property
    def weights_hash(self) -> str:
        """Names the weights in metadata."""
        return self._digest.result()

    def _calls(self, mode: str, prompt, sizes, size: Size, **settings: Any) -> list[Call]:
        stride = self.outline.codec.patch_size
        return cut(mode, prompt, sizes, size=size or self.size, stride=stride, **settings)

    def _text(self, prompts: list[str]) -> Float[Tensor, "b lt c"]:
        """Text tokens; unless all is resident, the text encoder and the network take turns."""
        if self.plan == "resident":
            return self.encoders.text(prompts)
        known = self.encoders.text_encoder.knows(prompts)
        loaded = "release" in vars(self) and self.plan == "turns"
        if loaded and not known:
            self.release.dit.to("cpu")
        tokens = self.encoders.text(prompts)
        if not known:
            self.encoders.free_text()
        if loaded and not known:
            self.release.dit.to(self.device)
        return tokens

    def _sample(
        self,
        call: Call,
        step: Callable[[], None],
        image: Tensor | None = None,
        depth: Tensor | None = None,
    ) -> tuple[Float[Tensor, "b l ci"], Float[Tensor, "b l cd"]]:
        nulls = [""] if call.cfg_scale > 1 else []
        text = self._text([*nulls, *call.prompts])  # before the network: it may come after a turn
        made_image, made_depth = sample(
            self.release.dit,
            self.outline.schedule,
            text[len(nulls) :],
            grid=call.grid,
            image=image,
            depth=depth,
            null_text=text[:1] if nulls else None,
            num_steps=call.num_steps,
            cfg_scale=call.cfg_scale,
            log2_alpha=call.log2_alpha,
            seeds=call.seeds,
            on_step=step,
        )
        assert made_depth is not None  # the network has a depth stream
        if not (made_image.isfinite().all() and made_depth.isfinite().all()):
            raise ValueError(
                f"the network in {self.folder} gave numbers that are not finite; its weights are "
                "damaged, or cfg_scale is far too large"
            )
        return made_image, made_depth

    def _pictures(self, tokens: Tensor, call: Call) -> list[Picture]:
        pixels = self.encoders.pixels(tokens, call.grid).float().cpu()
        pixels = ((pixels + 1) * 127.5).round().to(torch.uint8)
        return list(pixels.permute(0, 2, 3, 1).contiguous().numpy())

    def _maps(self, tokens: Tensor, call: Call) -> list[DepthMap]:
        depth, valid = self.outline.codec.decode(tokens, call.grid)
        return list(zip(depth.cpu().numpy(), valid.cpu().numpy(), strict=True))

    def _results(self, call: Call, pictures, maps, image, depth, extra) -> list[Result]:
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

    def _metadata(self, call: Call, k: int) -> dict[str, Any]:
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
            "dtype": str(self.dtype).removeprefix("torch."),
            "plan": self.plan,
            "compiled": self.compiled,
            "versions": {
                "mofo": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }


def _size(release: Release) -> tuple[int, int]:
    height, width = release.use.get("image_size", OFFICIAL_SIZE)
    return int(height), int(width)


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
    rows, columns = fit.source
    inside = Image.fromarray(spread[top : top + height, left : left + width])
    smooth = np.asarray(inside.resize((columns, rows), Image.Resampling.BILINEAR))
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
