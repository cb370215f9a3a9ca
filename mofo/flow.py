"""The noise convention, stated once.

t = 0 is data, t = 1 is noise (FLUX.2's direction):

    x_t = (1 - t) x + t noise        v = noise - x        x = x_t - t v

Many papers and libraries run the other way; convert at the border and nowhere else.
Randomness is one stream per sample, so that nothing depends on who shares a batch with whom.
"""

import hashlib
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


class SampleStreams:
    """One random stream per sample, a pure function of (seed, position in the global order).

    Drawn on the CPU and moved to `device`, so numbers do not depend on the accelerator. Ranks,
    workers, micro-batches and restarts change nothing: a sample carries its own stream.
    """

    def __init__(
        self,
        seed: int,
        position: Iterable[int] | Int[Tensor, "b"],
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self._generators = [_generator(_mix(seed, int(p))) for p in position]

    @classmethod
    def from_seeds(
        cls, seeds: Sequence[int], device: torch.device | str = "cpu"
    ) -> "SampleStreams":
        """Streams that start exactly at these seeds: what a user types to see a picture again."""
        streams = cls(0, (), device)
        streams._generators = [_generator(seed) for seed in seeds]
        return streams

    def normal(self, shape: Sequence[int] = ()) -> Float[Tensor, "b ..."]:
        """Standard Gaussian of `shape` for each sample."""
        drawn = [torch.randn(tuple(shape), generator=g) for g in self._generators]
        return torch.stack(drawn).to(self.device)

    def uniform(self, shape: Sequence[int] = ()) -> Float[Tensor, "b ..."]:
        """Uniform on [0, 1) of `shape` for each sample."""
        drawn = [torch.rand(tuple(shape), generator=g) for g in self._generators]
        return torch.stack(drawn).to(self.device)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _mix(seed: int, position: int) -> int:
    # A hash, not seed + position: neighbouring runs would otherwise share shifted noise.
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def corrupt(
    x: Float[Tensor, "b l c"], t: Float[Tensor, "b"], rng: SampleStreams
) -> tuple[Float[Tensor, "b l c"], Float[Tensor, "b l c"]]:
    """Noise clean tokens to time `t`; returns (x_t, v)."""
    noise = rng.normal(x.shape[1:]).to(x.dtype)
    return mix(x, noise, t), noise - x


def mix(
    x: Float[Tensor, "b l c"], noise: Float[Tensor, "b l c"], t: Float[Tensor, "b"]
) -> Float[Tensor, "b l c"]:
    """x_t from data and noise."""
    t = t[:, None, None]
    return (1 - t) * x + t * noise


def clean(
    x_t: Float[Tensor, "b l c"], v: Float[Tensor, "b l c"], t: Float[Tensor, "b"]
) -> Float[Tensor, "b l c"]:
    """The data that a velocity points back to: x_t - t v."""
    return x_t - t[:, None, None] * v


def step(
    x_t: Float[Tensor, "b l c"],
    v: Float[Tensor, "b l c"],
    t: Float[Tensor, ""],
    s: Float[Tensor, ""],
) -> Float[Tensor, "b l c"]:
    """One Euler step from time t to time s."""
    return x_t + (s - t) * v


# A clean-data prediction x becomes the velocity (x_t - x) / t; below this time the division is
# held, in training and in sampling alike (the method's inference code).
MIN_TIME = 0.05


def velocity(
    x_t: Float[Tensor, "b l c"], x: Float[Tensor, "b l c"], t: Float[Tensor, "b"]
) -> Float[Tensor, "b l c"]:
    """The velocity of a clean-data prediction: (x_t - x) / max(t, 0.05)."""
    return (x_t - x) / t.clamp(min=MIN_TIME)[:, None, None]
