"""`Order`: one sample that a visitor of the page asked for, checked, made and told again.

A browser may send anything. What it sends becomes an order or a ValueError whose text can be shown.
"""

import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mofo.calls import NUM_SEEDS
from mofo.data.inputs import read_depth, read_picture
from mofo.pipeline import Mofo
from mofo.result import Result

MAX_SEED = NUM_SEEDS - 1
MAX_CFG_SCALE = 10.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one visitor may ask for, so that all are served."""

    megabytes: int = 20  # of an upload
    pixels: int = 16_000_000
    prompt: int = 500  # characters
    steps: int = 100
    queue: int = 16  # samples that wait
    keep_seconds: int = 3600  # until uploads and results are removed


LIMITS = Limits()


@dataclass(frozen=True, kw_only=True)
class Order:
    """`make` makes the sample, and so does the command line `command`.

    `given` is an uploaded picture or depth map, `name` what the visitor calls it.
    """

    mode: str
    prompt: str
    num_steps: int
    cfg_scale: float
    seed: int
    log2_alpha: float | None = None
    given: Path | None = None
    name: str = ""

    def command(self, shared: dict[str, str]) -> str:
        """`shared` are the options of every order: the model and its device."""
        given = {"i2d": {"--image": self.name}, "d2i": {"--depth": self.name}}
        options = given.get(self.mode, {}) | {"--prompt": self.prompt} | shared
        options |= {
            "--num-steps": str(self.num_steps),
            "--cfg-scale": str(self.cfg_scale),
            "--seed": str(self.seed),
        }
        if self.log2_alpha is not None:
            options["--log2-alpha"] = str(self.log2_alpha)
        words = ["mofo", self.mode]
        for option, value in options.items():
            # A value that begins with a dash must not be taken for an option.
            words += [f"{option}={value}"] if value.startswith("-") else [option, value]
        return shlex.join(words)

    def make(self, mofo: Mofo, limits: Limits, on_step: Callable[[int, int], Any]) -> Result:
        settings: dict[str, Any] = {
            "seeds": self.seed,
            "num_steps": self.num_steps,
            "cfg_scale": self.cfg_scale,
            "on_step": on_step,
        }
        if self.given is None:
            return mofo.joint(self.prompt, log2_alpha=self.log2_alpha, **settings)
        try:
            if self.mode == "i2d":
                picture = read_picture(self.given)
                _check_pixels(picture.shape[:2], limits)
                return mofo.image_to_depth(picture, self.prompt, **settings)
            metres, valid = read_depth(self.given)
            _check_pixels(metres.shape, limits)
            settings |= {"valid": valid, "log2_alpha": self.log2_alpha}
            return mofo.depth_to_image(metres, self.prompt, **settings)
        except ValueError as error:  # the visitor knows the file by its own name only
            raise ValueError(str(error).replace(str(self.given), self.name)) from error


def checked(
    mode: str, upload: Any, prompt: Any, num_steps: Any, cfg_scale: Any, seed: Any,
    log2_alpha: Any, *, root: Path, limits: Limits = LIMITS,
) -> Order:  # fmt: skip
    """The order in a browser's values; an upload must lie in `root`."""
    prompt = " ".join(str(prompt or "").split())  # one line, as the command is
    if len(prompt) > limits.prompt:
        raise ValueError(
            f"the prompt has {len(prompt)} characters, but at most {limits.prompt} are accepted; "
            "say it in fewer words"
        )
    if mode == "joint" and not prompt:
        raise ValueError("there is no prompt; say in a few words what the picture shall show")
    given, name = (None, "") if mode == "joint" else _uploaded(upload, root, mode)
    # What is given and kept exactly does not walk: there is nothing to tilt.
    tilted = mode == "joint" or (mode == "d2i" and log2_alpha)
    return Order(
        mode=mode,
        prompt=prompt,
        num_steps=int(_number("number of steps", num_steps, 1, limits.steps)),
        cfg_scale=_number("weight of the prompt", cfg_scale, 0, MAX_CFG_SCALE),
        seed=int(_number("seed", seed, 0, MAX_SEED)),
        log2_alpha=_number("log2 alpha", log2_alpha, -15, 10) if tilted else None,
        given=given,
        name=name,
    )


def is_inside(name: str, root: Path) -> bool:
    """Whether the path `name`, links followed, lies in the folder `root`."""
    try:
        return Path(name).resolve().is_relative_to(root)
    except (ValueError, OSError):  # a null character, a name too long
        return False


def _uploaded(upload: Any, root: Path, mode: str) -> tuple[Path, str]:
    """The file that was uploaded, and its name on the visitor's machine."""
    path = str(upload.get("path") or "") if isinstance(upload, dict) else ""
    if not path:
        what = "photo" if mode == "i2d" else "depth map"
        raise ValueError(f"there is no {what}; choose a file, or one of the examples")
    if not is_inside(path, root) or not Path(path).is_file():
        raise ValueError("the file is not here any more; choose it again")
    return Path(path), Path(str(upload.get("orig_name") or path)).name


def _number(what: str, value: Any, low: int | float, high: int | float) -> float:
    if not isinstance(value, int | float) or not low <= value <= high:
        shown = "empty" if value is None else str(value)
        raise ValueError(f"the {what} is {shown}; accepted: {low} to {high}")
    return float(value)


def _check_pixels(shape: tuple[int, ...], limits: Limits) -> None:
    if math.prod(shape) > limits.pixels:
        raise ValueError(
            f"the file has {shape[1]} x {shape[0]} pixels, but at most {limits.pixels / 1e6:g} "
            "million are accepted; make it smaller"
        )
