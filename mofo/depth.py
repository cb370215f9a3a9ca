"""`DepthCodec`: metres <-> unit mean <-> contracted <-> patch tokens, with validity.

Below it, what is done to whole maps: `fill_nearest`, `fill_batch`, `resample`, `merge`.

    r = d / mean(d over valid)      z = r if r <= 1 else 2 - 1/r      token = scale * z, patchified

so depth lives in (0, 2) and far depth saturates (the method's code). The inverse is
z / (2 m - m^2) with m = max(|z|, 1). The scale of a sample is lost: decoded depth is relative.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

# At and beyond the ball's edge (z >= 2) the inverse blows up and turns negative; what comes
# this close is not depth. The farthest valid depth is 1000 times the mean.
EDGE = 1e-3

# Neighbouring pixels whose inverse depths differ by at most this share lie on one surface. Measured
# on the dense pairs of data/samples, reduced to sides of 64, 128 and 256 and resampled: of 0.02 to
# 0.4 it leaves the fewest pixels wrong by over 4 % (3.9 % at 64, against 4.8 % of nearest pixel).
SURFACE = 0.1
BAND = 2**16  # pixels resampled at a time: what a processor's cache holds
ROWS = 64  # of maps whose columns are compared at a time: 130 MB of a width of 512
NORMAL = 1.4826  # standard deviations of a normal distribution in one median absolute deviation


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
    return metres.ravel().take(rows * np.int32(metres.shape[1]) + columns)


def fill_batch(
    metres: Float[Tensor, "b h w"], valid: Bool[Tensor, "b h w"]
) -> Float[Tensor, "b h w"]:
    """`fill_nearest` of each map, on the device that it is on.

    Of pixels equally near, a GPU may take another than the CPU does.
    """
    if metres.device.type != "cpu":
        return _fill_separably(metres, valid)
    pairs = zip(metres.numpy(), valid.numpy(), strict=True)
    return torch.from_numpy(np.stack([fill_nearest(*pair) for pair in pairs]))


def _fill_separably(
    metres: Float[Tensor, "b h w"], valid: Bool[Tensor, "b h w"]
) -> Float[Tensor, "b h w"]:
    """The nearest in each column first, then along each row the best of the columns.

    That is h w^2 comparisons, which a GPU makes faster than it would branch.
    """
    h, w = metres.shape[1:]
    far = 2 * (h + w)  # farther than anything measured: of a column without any
    row = torch.arange(h, device=metres.device)[:, None]
    above = torch.where(valid, row, -far).cummax(1).values
    below = torch.where(valid, row, h + far).flip(1).cummin(1).values.flip(1)
    nearest = torch.where(row - above <= below - row, above, below)
    squared = (nearest - row).square()[..., None]
    column = torch.arange(w, device=metres.device)
    across = (column[:, None] - column).square()
    best = []
    for rows in squared.flatten(0, 1).split(ROWS):
        # The column rides in the low digits, so that ties go to the first on every device.
        best.append(((rows.mT + across) * w + column).amin(2) % w)
    taken = torch.cat(best).view_as(nearest)
    source = nearest.gather(2, taken).clamp(0, h - 1) * w + taken
    filled = metres.flatten(1).gather(1, source.flatten(1)).view_as(metres)
    return torch.where(valid.any(2).any(1)[:, None, None], filled, 1)


class _Positions(NamedTuple):
    """Of each new pixel along one side: the two old pixels whose centres it lies between, how far
    it is from the first to the second, and the old pixel under its centre."""

    first: Int[np.ndarray, " n"]
    second: Int[np.ndarray, " n"]
    share: Float32[np.ndarray, " n"]
    under: Int[np.ndarray, " n"]


def resample(
    depth: Float[np.ndarray, "h w"], valid: Bool[np.ndarray, "h w"], size: tuple[int, int]
) -> tuple[Float32[np.ndarray, "h2 w2"], Bool[np.ndarray, "h2 w2"]]:
    """Depth on another grid: smooth on a surface, sharp between two; 0 where not valid.

    A new pixel lies on the surface of the old pixel under its centre, and is valid if that is.
    It is bilinear over those of the four old pixels around it that lie on that surface too: in
    inverse depth, so that a plane stays a plane. Where a side shrinks, nothing is averaged.
    """
    if depth.shape == size:
        return np.where(valid, depth, 0).astype(np.float32), valid
    rows, columns = (_positions(old, new) for old, new in zip(depth.shape, size, strict=True))
    # Depth that is not valid becomes an inverse of 0, which lies on no surface.
    usable = np.where(valid, depth, np.inf).clip(min=np.finfo(np.float32).tiny)
    inverse = (1 / usable).astype(np.float32)
    left, right, under = (inverse[:, at] for at in (columns.first, columns.second, columns.under))
    sides = (left, 1 - columns.share), (right, columns.share)
    out = np.zeros(size, np.float32)
    height = max(1, BAND // size[1])
    for top in range(0, size[0], height):
        band = slice(top, top + height)
        centre = under[rows.under[band]]
        total, weights = np.zeros_like(centre), np.zeros_like(centre)
        share = rows.share[band, None]
        for at, vertical in ((rows.first[band], 1 - share), (rows.second[band], share)):
            for side, horizontal in sides:
                near = side[at]
                weight = vertical * horizontal * (np.abs(near - centre) <= SURFACE * centre)
                total += weight * near
                weights += weight
        np.divide(weights, total, out=out[band], where=total > 0)
    return out, out > 0


def merge(
    depths: Float[np.ndarray, "k h w"], valids: Bool[np.ndarray, "k h w"]
) -> tuple[Float32[np.ndarray, "h w"], Bool[np.ndarray, "h w"], Float32[np.ndarray, "h w"]]:
    """One depth of k relative ones, where it is valid, and its relative uncertainty.

    The members are scaled to each other. Depth is their median, with mean 1, and valid where more
    than half of them are. Uncertainty is 1.4826 times their median absolute deviation, as a share
    of the depth: the standard deviation, were they normal. Both are 0 where not valid.
    """
    # In an order of their own, so that the order given does not even change the last bit.
    order = sorted(range(len(depths)), key=lambda k: (depths[k].tobytes(), valids[k].tobytes()))
    depths, valids = depths[order], valids[order]
    valid = 2 * valids.sum(axis=0) > len(valids)
    depth, uncertainty = np.zeros(valid.shape, np.float32), np.zeros(valid.shape, np.float32)
    if not valid.any():
        return depth, valid, uncertainty
    logs = np.log(np.where(valids, depths, np.nan).astype(np.float64))
    members = np.exp(logs - _log_scales(logs)[:, None, None])[:, valid]
    middle = _median(members)
    depth[valid] = middle / middle.mean()
    uncertainty[valid] = NORMAL * _median(np.abs(members - middle)) / middle
    return depth, valid, uncertainty


def _log_scales(logs: Float[np.ndarray, "k h w"]) -> Float[np.ndarray, " k"]:
    """The median difference of each pair of maps, reconciled by least squares; NaN is left out.

    Differences to the median of all would be 0 wherever a map is that median itself, and hide its
    scale: alternating the two stops 1 % off.
    """
    pairs, differences = [], []
    for i, j in combinations(range(len(logs)), 2):
        difference = logs[i] - logs[j]
        if (known := np.isfinite(difference)).any():
            pairs.append(np.eye(len(logs))[i] - np.eye(len(logs))[j])
            differences.append(np.median(difference[known]))
    return np.linalg.lstsq(np.reshape(pairs, (-1, len(logs))), differences)[0]


def _median(values: Float[np.ndarray, "k *n"]) -> Float[np.ndarray, "*n"]:
    """Over the first axis, NaN left out; there is always something else."""
    ordered = np.sort(values, axis=0)  # NaN comes last
    count = np.isfinite(ordered).sum(axis=0)
    low, high = (
        np.take_along_axis(ordered, at[None], axis=0)[0] for at in ((count - 1) // 2, count // 2)
    )
    return (low + high) / 2


def _positions(old: int, new: int) -> _Positions:
    at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    first = np.minimum(at.astype(np.int64), max(old - 2, 0))
    under = (2 * np.arange(new) + 1) * old // (2 * new)
    second = np.minimum(first + 1, old - 1)
    return _Positions(first, second, (at - first).astype(np.float32), under)
