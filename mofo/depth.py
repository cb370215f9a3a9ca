"""`DepthCodec`: metres <-> unit mean <-> contracted <-> patch tokens, with validity.

    r = d / mean(d over valid)      z = r if r <= 1 else 2 - 1/r      token = scale * z, patchified

so depth lives in (0, 2) and far depth saturates (recipe section 4). The inverse is
z / (2 m - m^2) with m = max(|z|, 1). The scale of a sample is lost: decoded depth is relative.
"""

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

# At and beyond the ball's edge (z >= 2) the inverse blows up and turns negative; what comes
# this close is not depth (recipe section 4). The farthest valid depth is 1000 times the mean.
EDGE = 1e-3


@dataclass(frozen=True, kw_only=True)
class DepthCodec:
    """Depth maps as tokens; fields are the `depth` section of a release's `config.json`."""

    patch_size: int = 16
    depth_value_scale: float = 1.0

    def encode(
        self, depth: Float[Tensor, "b h w"], valid: Bool[Tensor, "b h w"] | None = None
    ) -> tuple[Float[Tensor, "b l c"], Bool[Tensor, "b l c"]]:
        """Tokens and which of their entries were measured.

        Without `valid`, finite positive depth counts as measured. The mean is over measured
        pixels. An unmeasured pixel keeps its value if that is finite and positive (a fill),
        else it becomes the mean. A sample without any measurement is all mean and all unmeasured.
        """
        h, w = depth.shape[1:]
        if h % self.patch_size or w % self.patch_size:
            raise ValueError(
                f"depth is {h}x{w}, but both sides must be multiples of {self.patch_size}; "
                "crop or resize it"
            )
        usable = depth.isfinite() & (depth > 0)
        valid = usable if valid is None else valid & usable
        depth = depth.float()
        count = valid.sum((1, 2), keepdim=True)
        total = torch.where(valid, depth, 0).sum((1, 2), keepdim=True)
        mean = torch.where(count > 0, total / count.clamp(min=1), 1)
        keeps = usable & (count > 0)
        unit = torch.where(keeps, depth / mean, 1)
        tokens = self._patchify(contract(unit) * self.depth_value_scale)
        return tokens, self._patchify(valid)

    def decode(
        self, tokens: Float[Tensor, "b l c"], grid: tuple[int, int]
    ) -> tuple[Float[Tensor, "b h w"], Bool[Tensor, "b h w"]]:
        """Relative depth (about unit mean) and where it can be trusted; 0 elsewhere."""
        p = self.patch_size
        pattern = "b (h w) (p1 p2) -> b (h p1) (w p2)"
        z = rearrange(tokens.float(), pattern, h=grid[0], w=grid[1], p1=p, p2=p)
        z = z / self.depth_value_scale
        valid = (z > 0) & (z < 2 - EDGE)  # False for NaN
        return torch.where(valid, expand(torch.where(valid, z, 1)), 0), valid

    def _patchify(self, maps: Tensor) -> Tensor:
        p = self.patch_size
        return rearrange(maps, "b (h p1) (w p2) -> b (h w) (p1 p2)", p1=p, p2=p)


def contract(r: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Positive ratios into (0, 2): identity up to 1, then 2 - 1/r."""
    return torch.where(r <= 1, r, 2 - 1 / r.clamp(min=1))


def expand(z: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Inverse of `contract`. This very formula: 1 / (2 - |z|) differs by 1e-4 near the edge."""
    m = z.abs().clamp(min=1)
    return z / (2 * m - m**2)


def fill_nearest(
    metres: Float[np.ndarray, "h w"], valid: Bool[np.ndarray, "h w"]
) -> Float[np.ndarray, "h w"]:
    """Give each unmeasured pixel the depth of its nearest measured one; 1 if there is none."""
    from scipy.ndimage import distance_transform_edt

    if not valid.any():
        return np.ones_like(metres)
    if valid.all():
        return metres
    nearest = distance_transform_edt(~valid, return_distances=False, return_indices=True)
    rows, columns = np.asarray(nearest)
    return metres[rows, columns]
