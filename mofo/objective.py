"""Who is given and who is generated, at which times, and what it costs.

Masks and independent times are the paper's (arXiv 2606.13676); its training code is not public, so
weights and probabilities are ours, to be ablated.

Mode of a sample: i2d with p = 0.2 (the image is clean), d2i with p = 0.2 (depth is clean), else
joint with independent times. A modality held at t = 0 is given: it takes no loss.

    image    mean over image tokens of |v - v*|^2
    depth    sum over measured pixels of ((x - x*) / max(t, 0.05))^2, over the number of measured
             pixels of the *global* batch: ranks and micro-batches only split the sum
    teacher  mean over image tokens of w(t_depth) |v - v_teacher|^2, with
             w = noisy t_depth + clean (1 - t_depth): depth that is noise must not move the prior

Denominators count the samples of every mode, so that a sample weighs the same whoever it shares
a batch with.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mofo import flow
from mofo.depth import fill_batch
from mofo.flow import SampleStreams
from mofo.schedule import LogitNormal, Uniform

FILLS = ("nearest", "mean", "noise")


class Terms(NamedTuple):
    """The loss, term by term, before its weights."""

    image: Float[Tensor, ""]
    depth: Float[Tensor, ""]
    teacher: Float[Tensor, ""]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Modality Forcing; `fill` is what the network sees where depth was not measured.

    "nearest": the nearest measured depth; "mean": the mean depth; "noise": pure noise at any time.
    """

    image_schedule: Uniform | LogitNormal
    depth_schedule: Uniform | LogitNormal
    i2d_probability: float = 0.2
    d2i_probability: float = 0.2
    fill: str = "nearest"
    image_weight: float = 1.0
    depth_weight: float = 1.0
    teacher_weight_noisy: float = 1.0
    teacher_weight_clean: float = 0.1

    def __post_init__(self) -> None:
        if self.fill not in FILLS:
            raise ValueError(f"objective.fill is {self.fill!r}; accepted: {', '.join(FILLS)}")
        if min(self.i2d_probability, self.d2i_probability) < 0 or (
            self.i2d_probability + self.d2i_probability > 1
        ):
            raise ValueError(
                f"i2d_probability {self.i2d_probability} and d2i_probability "
                f"{self.d2i_probability} must be positive and sum to at most 1; joint is the rest"
            )

    @property
    def has_teacher(self) -> bool:
        return self.teacher_weight_noisy > 0 or self.teacher_weight_clean > 0

    def times(self, n: int, rng: SampleStreams) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
        """(t_image, t_depth) of each sample; 0 marks what is given."""
        mode = rng.uniform()
        t_image = self.image_schedule.sample(n, rng)
        t_depth = self.depth_schedule.sample(n, rng)
        t_image = torch.where(mode < self.i2d_probability, 0, t_image)
        t_depth = torch.where(mode >= 1 - self.d2i_probability, 0, t_depth)
        return t_image, t_depth

    def filled(
        self, metres: Float[Tensor, "b h w"], valid: Bool[Tensor, "b h w"]
    ) -> Float[Tensor, "b h w"]:
        """Depth to encode: unmeasured pixels take the nearest measured depth, or 0, which the codec
        reads as the mean."""
        return fill_batch(metres, valid) if self.fill == "nearest" else metres.where(valid, 0)

    def corrupt_depth(
        self,
        depth: Float[Tensor, "b l c"],
        valid: Bool[Tensor, "b l c"],
        t_depth: Float[Tensor, "b"],
        rng: SampleStreams,
    ) -> Float[Tensor, "b l c"]:
        """Noisy depth tokens; unmeasured entries, which never enter the loss, as `fill` says."""
        depth_t, v = flow.corrupt(depth, t_depth, rng)
        return torch.where(valid, depth_t, v + depth) if self.fill == "noise" else depth_t

    def terms(
        self,
        v_image: Float[Tensor, "b l ci"],
        v_target: Float[Tensor, "b l ci"],
        x_depth: Float[Tensor, "b l cd"] | None,
        depth: Float[Tensor, "b l cd"] | None,
        valid: Bool[Tensor, "b l cd"] | None,
        v_teacher: Float[Tensor, "b l ci"] | None,
        t_image: Float[Tensor, "b"],
        t_depth: Float[Tensor, "b"] | None,
        measured: Float[Tensor, ""] | float,
    ) -> Terms:
        """The three terms in fp32; `measured` is the denominator of the depth term."""
        v_image = v_image.float()
        generated = (t_image > 0).float()
        zero = v_image.new_zeros(())
        image = _mean_square(v_image - v_target, generated)
        if x_depth is None:
            return Terms(image, zero, zero)

        assert depth is not None
        assert valid is not None
        assert t_depth is not None
        judged = valid & (t_depth > 0)[:, None, None]
        # Selected before the square, whose gradient at NaN would be NaN even times zero.
        error = torch.where(judged, x_depth.float() - depth, 0)
        error = error / t_depth.clamp(min=flow.MIN_TIME)[:, None, None]
        depth_term = masked_mean(error.square(), judged, measured)
        if v_teacher is None:
            return Terms(image, depth_term, zero)
        pull = self.teacher_weight_noisy * t_depth + self.teacher_weight_clean * (1 - t_depth)
        return Terms(image, depth_term, _mean_square(v_image - v_teacher, generated * pull))

    def total(self, terms: Terms) -> Float[Tensor, ""]:
        return self.image_weight * terms.image + self.depth_weight * terms.depth + terms.teacher


def masked_mean(
    values: Float[Tensor, "*shape"],
    valid: Bool[Tensor, "*shape"],
    count: Float[Tensor, ""] | float | None = None,
) -> Float[Tensor, ""]:
    """Sum over valid entries, divided by `count` (their own number if None); 0 if there are none.

    NaN in the rest stays out of the sum, but not out of the gradient of what made `values`: select
    before arithmetic as well.
    """
    total = torch.where(valid, values, 0).sum()
    count = valid.sum() if count is None else torch.as_tensor(count, device=total.device)
    return total / count.clamp(min=1)


def _mean_square(error: Float[Tensor, "b l c"], weight: Float[Tensor, "b"]) -> Float[Tensor, ""]:
    return (error.square().mean((1, 2)) * weight).mean()
