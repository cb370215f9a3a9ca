"""The leaves of the network: RoPE, time embedding, modulation, QK-norm, attention, gated MLP.

Nothing here has a bias; parameter names are those of the released state dict. Rotary tables and
RMS norms are computed in fp32 whatever the body's dtype.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Complex, Float
from torch import Tensor, nn

NORM_EPS = 1e-6  # FLUX.2's layer norms and RMS norms
TIME_SCALE = 1000.0  # times in [0, 1] enter the sinusoid as 0 .. 1000
MAX_PERIOD = 10_000.0


class Linear(nn.Linear):
    """A linear map without bias."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__(num_in, num_out, bias=False)


def position_ids(
    num_text: int, grid: tuple[int, int], num_maps: int, device: torch.device
) -> Float[Tensor, "l 4"]:
    """Four axes (modality, row, column, sequence) of [text, image, depth]; `num_maps`: 1 or 2."""
    text = torch.zeros(num_text, 4, device=device)
    text[:, 3] = torch.arange(num_text, device=device)
    rows, cols = torch.meshgrid(
        torch.arange(grid[0], device=device), torch.arange(grid[1], device=device), indexing="ij"
    )
    maps = torch.zeros(num_maps, grid[0] * grid[1], 4, device=device)
    maps[..., 0] = torch.arange(num_maps, device=device)[:, None]
    maps[..., 1] = rows.flatten()
    maps[..., 2] = cols.flatten()
    return torch.cat([text, maps.flatten(0, 1)])


def rope_table(
    ids: Float[Tensor, "l axes"], axes_dim: Sequence[int], theta: int
) -> Complex[Tensor, "l half_k"]:
    """The turn of every channel pair (2i, 2i + 1) as a unit complex number, fp32."""
    angles = []
    for axis, dim in enumerate(axes_dim):
        exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim
        angles.append(ids[:, axis, None].double() * theta**-exponent)
    joined = torch.cat(angles, dim=-1).float()
    return torch.polar(torch.ones_like(joined), joined)


def rotate(
    x: Float[Tensor, "b n l k"], rope: Complex[Tensor, "l half_k"]
) -> Float[Tensor, "b n l k"]:
    """Apply RoPE in fp32: one complex product, a third of the time of the real form on a CPU."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope).flatten(-2).to(x.dtype)


def sinusoid(t: Float[Tensor, "b"], dim: int, dtype: torch.dtype) -> Float[Tensor, "b dim"]:
    """Cosines, then sines, of t x 1000. The argument is formed in `dtype` as the release does."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(MAX_PERIOD) * steps / half)
    angles = (t.to(dtype) * TIME_SCALE).float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)


class TimeMLP(nn.Module):
    """The embedding of a scalar: sinusoid -> Linear, SiLU, Linear."""

    def __init__(self, num_in: int, width: int) -> None:
        super().__init__()
        self.in_layer = Linear(num_in, width)
        self.out_layer = Linear(width, width)

    def forward(self, embedded: Float[Tensor, "b c"]) -> Float[Tensor, "b d"]:
        return self.out_layer(F.silu(self.in_layer(embedded)))


class Modulation(NamedTuple):
    """What a time embedding does to a block: each (b, 1, d), or (b, l, d) by token."""

    shift: Tensor
    scale: Tensor  # 1 is already added
    gate: Tensor


class ModulationHead(nn.Module):
    """One (single) or two (double) modulations from a time embedding, shared by all blocks."""

    def __init__(self, width: int, num_modulations: int) -> None:
        super().__init__()
        self.lin = Linear(width, 3 * num_modulations * width)
        self.num_modulations = num_modulations

    def forward(self, vec: Float[Tensor, "b d"]) -> list[Modulation]:
        parts = self.lin(F.silu(vec))[:, None].chunk(3 * self.num_modulations, dim=-1)
        triples = zip(parts[0::3], parts[1::3], parts[2::3], strict=True)
        return [Modulation(shift, 1 + scale, gate) for shift, scale, gate in triples]


def by_token(modulations: Sequence[Modulation], lengths: Sequence[int]) -> Modulation:
    """One modulation for a joined sequence whose spans have their own; built once per forward."""
    return Modulation(
        *(
            torch.cat([part.expand(-1, n, -1) for part, n in zip(parts, lengths, strict=True)], 1)
            for parts in zip(*modulations, strict=True)
        )
    )


def modulate(x: Float[Tensor, "b l d"], by: Modulation) -> Float[Tensor, "b l d"]:
    """LayerNorm, then (1 + scale) x + shift."""
    return torch.addcmul(by.shift, F.layer_norm(x, x.shape[-1:], eps=NORM_EPS), by.scale)


def add_gated(
    x: Float[Tensor, "b l d"], update: Float[Tensor, "b l d"], by: Modulation
) -> Float[Tensor, "b l d"]:
    """The residual x + gate * update."""
    return torch.addcmul(x, update, by.gate)


class RMSNorm(nn.Module):
    """RMS norm over the head size, fp32 inside."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: Float[Tensor, "b n l k"]) -> Float[Tensor, "b n l k"]:
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=NORM_EPS)
        return normed.to(x.dtype) * self.scale


class QKNorm(nn.Module):
    """Normalises queries and keys per head."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(size)
        self.key_norm = RMSNorm(size)


class Heads(NamedTuple):
    """Queries, keys and values, each (b, n, l, k)."""

    q: Tensor
    k: Tensor
    v: Tensor


def split_heads(qkv: Float[Tensor, "b l c"], num_heads: int, norm: QKNorm) -> Heads:
    """Unpack (3, heads, head size) and normalise queries and keys."""
    q, k, v = rearrange(qkv, "b l (three n k) -> three b n l k", three=3, n=num_heads)
    return Heads(norm.query_norm(q), norm.key_norm(k), v)


def attend(heads: Heads, rope: Complex[Tensor, "l half_k"]) -> Float[Tensor, "b l d"]:
    """Rotary attention over the whole sequence."""
    q, k = rotate(heads.q, rope), rotate(heads.k, rope)
    return rearrange(F.scaled_dot_product_attention(q, k, heads.v), "b n l k -> b l (n k)")


class SwiGLU(nn.Module):
    """SiLU(first half) * second half."""

    def forward(self, x: Float[Tensor, "b l twice"]) -> Float[Tensor, "b l c"]:
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value
