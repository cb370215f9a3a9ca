"""Where training spends time (`LogitNormal`, `Uniform`) and where sampling walks (`Schedule`).

The shift of FLUX.2, shared by both:

    shift(t; mu, sigma) = e^mu / (e^mu + (1/t - 1)^sigma),    logit(shift(t)) = mu + sigma logit(t)

The tilt of the depth walk against the image walk, alpha = 2^log2_alpha:

    tilt(t) = alpha t / (1 + (alpha - 1) t)

alpha > 1 keeps depth noisier than the image (the image is resolved first), alpha < 1 cleaner.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mofo.flow import SampleStreams


def shift(t: Float[Tensor, "..."], mu: float, sigma: float = 1.0) -> Float[Tensor, "..."]:
    """Move times in [0, 1] towards noise (mu > 0); 0 and 1 stay where they are."""
    return math.exp(mu) / (math.exp(mu) + (1 / t - 1) ** sigma)


def tilt(t: Float[Tensor, "..."], log2_alpha: float) -> Float[Tensor, "..."]:
    """Bend one modality's times against the other's; 0 and 1 stay where they are."""
    alpha = 2.0**log2_alpha
    return alpha * t / (1 + (alpha - 1) * t)


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Training times: a uniform draw through the shift."""

    mu: float = 1.1
    sigma: float = 1.0

    def sample(self, n: int, rng: SampleStreams) -> Float[Tensor, "b"]:
        t = rng.uniform()
        assert len(t) == n
        return shift(t, self.mu, self.sigma)


@dataclass(frozen=True, kw_only=True)
class LogitNormal:
    """Training times: a standard logit-normal draw, shifted, so logit(t) ~ N(mu, sigma)."""

    mu: float = 1.1
    sigma: float = 1.0

    def sample(self, n: int, rng: SampleStreams) -> Float[Tensor, "b"]:
        z = rng.normal()
        assert len(z) == n
        return torch.sigmoid(self.mu + self.sigma * z)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The walks of the sampler; field names are those of a release's `config.json`."""

    rgb_shift_mu: float = 1.1
    rgb_shift_sigma: float = 1.0
    depth_shift_mu: float = 1.1
    depth_shift_sigma: float = 1.0

    def walk(
        self, num_steps: int, given: str | None = None, log2_alpha: float | None = None
    ) -> tuple[Float[Tensor, "steps"], Float[Tensor, "steps"]]:
        """(t_image, t_depth), each of num_steps + 1 times from 1 to 0 in float32.

        `given` ("image" or "depth") holds that modality at 0. With `log2_alpha` the depth walk is
        the tilted image walk; for a given depth this is soft conditioning (the method's
        project page).
        """
        if num_steps < 1:
            raise ValueError(f"num_steps is {num_steps}, but a walk needs at least 1 step")
        if given not in (None, "image", "depth"):
            raise ValueError(f"given is {given!r}; accepted: None, 'image', 'depth'")
        if given == "image" and log2_alpha is not None:
            raise ValueError(
                f"log2_alpha={log2_alpha} tilts depth against the image's walk, but the image is "
                "given and does not walk; leave log2_alpha out"
            )
        line = torch.linspace(1, 0, num_steps + 1)
        t_image = shift(line, self.rgb_shift_mu, self.rgb_shift_sigma)
        t_depth = shift(line, self.depth_shift_mu, self.depth_shift_sigma)
        if log2_alpha is not None:
            t_depth = tilt(t_image, log2_alpha)
        elif given == "depth":
            t_depth = torch.zeros_like(line)
        if given == "image":
            t_image = torch.zeros_like(line)
        return t_image, t_depth
