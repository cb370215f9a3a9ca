"""`LappedBasis`: the small model's autoencoder, a fixed basis instead of a network.

An orthonormal lapped transform (a butterfly over every block border, as in the LOT of Malvar and
the time-domain form of Tran et al. 2003), then principal components of 8x8 RGB blocks:

    token = (block of lapped image - mean) @ basis / scale

Basis functions overlap their neighbours, so what is lost shows as blur and not as block borders.
`scale` is the square root of a component's deviation, times a constant that makes the mean variance
of a token's channels 1: half a whitening, so that coarse structure stays louder than detail.
"""

import math
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from mofo.model.weights import read_tensors, write_tensors

FILE = "ae_basis.safetensors"
BLOCK = 8


class LappedBasis(nn.Module):
    """Pixels in [-1, 1] <-> tokens, one per 8x8 block, row-major; linear both ways."""

    stride = BLOCK
    basis: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        basis: Float[Tensor, "c d"],
        mean: Float[Tensor, "d"],
        scale: Float[Tensor, "c"],
    ) -> None:
        super().__init__()
        for name, tensor in {"basis": basis, "mean": mean, "scale": scale}.items():
            self.register_buffer(name, tensor.float())
        self.channels: int = len(basis)

    def encode(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b l c"]:
        """Encode pictures whose sides are multiples of 8."""
        check_sides(images, self.stride)
        return (blocks(images.float()) - self.mean) @ self.basis.T / self.scale

    def decode(
        self, tokens: Float[Tensor, "b l c"], grid: tuple[int, int]
    ) -> Float[Tensor, "b 3 h w"]:
        """Decode tokens of a grid of (rows, columns); the result may leave [-1, 1] a little."""
        check_tokens(tokens, grid, self.channels)
        flat = (tokens.float() * self.scale) @ self.basis + self.mean
        i, j = grid
        pattern = "b (i j) (p q c) -> b c (i p) (j q)"
        lapped = rearrange(flat, pattern, i=i, j=j, p=BLOCK, q=BLOCK)
        return _lap(lapped, inverse=True)


def check_sides(images: Float[Tensor, "b 3 h w"], stride: int) -> None:
    """Raise a ValueError unless the pictures divide into squares of `stride`."""
    h, w = images.shape[-2:]
    if h % stride or w % stride or not h * w:
        raise ValueError(
            f"image is {h}x{w}, but both sides must be multiples of {stride}; crop or resize it"
        )


def check_tokens(tokens: Float[Tensor, "b l c"], grid: tuple[int, int], channels: int) -> None:
    """Raise a ValueError unless the tokens are those of a grid of (rows, columns)."""
    if tokens.shape[1:] != (grid[0] * grid[1], channels):
        raise ValueError(
            f"tokens are {tuple(tokens.shape)}, but grid {grid} needs "
            f"(b, {grid[0] * grid[1]}, {channels}); pass the grid they were made with"
        )


def blocks(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b l d"]:
    """Flattened 8x8 RGB blocks of the lapped pictures."""
    lapped = _lap(images, inverse=False)
    return rearrange(lapped, "b c (i p) (j q) -> b (i j) (p q c)", p=BLOCK, q=BLOCK)


@torch.no_grad()
def fit(images: UInt8[Tensor, "n h w 3"], num_channels: int) -> LappedBasis:
    """Principal components of pictures, in float64, with signs that do not depend on the solver."""
    pixels = images.permute(0, 3, 1, 2).double() / 127.5 - 1
    rows = rearrange(blocks(pixels), "b l d -> (b l) d")
    mean = rows.mean(0)
    variance, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    variance, basis = variance.flip(0)[:num_channels], vectors.T.flip(0)[:num_channels]
    largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    deviation = variance.sqrt()
    scale = deviation.sqrt() * deviation.mean().sqrt()  # mean of (deviation / scale)^2 is 1
    return LappedBasis(basis * largest.sign(), mean, scale)


def load(folder: str | Path, device: torch.device | str = "cpu") -> LappedBasis:
    """Read the one file of a fitted basis."""
    path = Path(folder) / FILE
    tensors = read_tensors(path)
    if set(tensors) != {"basis", "mean", "scale"}:
        raise ValueError(
            f"{path} holds {sorted(tensors)[:5]}, but a basis has basis, mean and scale"
        )
    return LappedBasis(**tensors).to(device)


def save(ae: LappedBasis, folder: str | Path) -> None:
    """Write the one file, float32: the basis must stay orthonormal."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_tensors({name: t for name, t in ae.state_dict().items()}, Path(folder) / FILE)


def _lap(images: Tensor, inverse: bool) -> Tensor:
    """The butterfly over every inner block border, along columns and rows; orthonormal."""
    butterfly = _butterfly().to(images)
    butterfly = butterfly.T if inverse else butterfly
    for _ in range(2):
        inner = images[..., BLOCK // 2 : -BLOCK // 2]
        turned = rearrange(inner, "... (j q) -> ... j q", q=BLOCK) @ butterfly.T
        edges = images[..., : BLOCK // 2], images[..., -BLOCK // 2 :]
        images = torch.cat([edges[0], turned.flatten(-2), edges[1]], dim=-1).transpose(-1, -2)
    return images


def _butterfly() -> Float[Tensor, "8 8"]:
    """1/2 [I J; J -I] diag(I, V) [I J; J -I] with V = J C2' C4 J (cosine transforms II and IV)."""
    n = BLOCK // 2
    k = torch.arange(n, dtype=torch.float64)
    second = torch.cos(math.pi * (k[None] + 0.5) * k[:, None] / n) * math.sqrt(2 / n)
    second[0] /= math.sqrt(2)
    fourth = torch.cos(math.pi * (k[None] + 0.5) * (k[:, None] + 0.5) / n) * math.sqrt(2 / n)
    eye = torch.eye(n, dtype=torch.float64)
    flip = eye.flip(0)
    halves = torch.cat([torch.cat([eye, flip], 1), torch.cat([flip, -eye], 1)]) / math.sqrt(2)
    return halves @ torch.block_diag(eye, flip @ second.T @ fourth @ flip) @ halves
