"""Networks that never learn: `Encoders` and `Teacher`.

Plain holders, not modules: they stay out of checkpoints, optimiser and `.train()` of whoever holds
them, who also moves them.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mofo.model import autoencoder as autoencoders
from mofo.model import text as texts
from mofo.model.dit import ThreeStreamDiT

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # by the names they have in configs


class Encoders:
    """Captions -> text tokens, images <-> image tokens.

    `text` and `autoencoder` are paths, or "small" for the shipped ones; `text` may be a hub id. The
    text encoder is large and seldom needed: it is loaded by the first caption that it has not seen.
    Both compute in `dtype`, but for the text encoder if `text_dtype` names another; tokens of
    images are float32 in any case.
    """

    def __init__(
        self,
        *,
        text: str,
        autoencoder: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        text_dtype: str | None = None,
    ) -> None:
        if text_dtype is not None and text_dtype not in DTYPES:
            raise ValueError(f"text_dtype is {text_dtype!r}; accepted: {', '.join(DTYPES)}")
        self.name = str(text)
        text_in = dtype if text_dtype is None else DTYPES[text_dtype]
        self.text_encoder = texts.load(text, device=device, dtype=text_in)
        self.autoencoder = autoencoders.load(autoencoder, device=device, dtype=dtype)

    def to(self, device: torch.device | str) -> None:
        self.text_encoder.to(device)
        self.autoencoder.to(device)

    @torch.no_grad()
    def text(self, captions: list[str]) -> Float[Tensor, "b lt c"]:
        return self.text_encoder.encode(captions)

    def free_text(self) -> None:
        """Give the text encoder's memory back until a caption comes that it has not seen."""
        self.text_encoder.free()

    @torch.no_grad()
    def image(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b l c"]:
        return self.autoencoder.encode(images)

    @torch.no_grad()
    def pixels(
        self, tokens: Float[Tensor, "b l c"], grid: tuple[int, int]
    ) -> Float[Tensor, "b 3 h w"]:
        """Decode image tokens; values are clamped to [-1, 1]."""
        return self.autoencoder.decode(tokens, grid=grid).clamp(-1, 1)


class Teacher:
    """The text-to-image model that training started from: the velocity to stay close to."""

    def __init__(self, dit: ThreeStreamDiT) -> None:
        self.dit = dit.eval().requires_grad_(False)

    def to(self, device: torch.device | str) -> None:
        self.dit.to(device)

    @torch.no_grad()
    def __call__(
        self,
        text: Float[Tensor, "b lt ct"],
        image_t: Float[Tensor, "b li ci"],
        t_image: Float[Tensor, "b"],
        *,
        grid: tuple[int, int],
    ) -> Float[Tensor, "b li ci"]:
        v_image, _ = self.dit(text, image_t, None, t_image, None, grid=grid)
        return v_image.float()
