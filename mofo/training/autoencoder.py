"""Training of the small autoencoder, from scratch, on pictures alone.

Loss: mean |error| + edge_weight x mean |error of pixel differences| (sharp outlines survive a small
network only if asked for) + latent_weight x mean square of the latents, which are decoded with noise
of standard deviation `latent_noise` on them. The noise makes the latent space smooth (a slightly
wrong token decodes to a slightly wrong picture), the last term stops the encoder from outgrowing it.
The token statistics (`bn`) are running averages; the last steps barely move the encoder.
"""

import math
from pathlib import Path

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor

from mofo.data.sample import Batch
from mofo.flow import SampleStreams
from mofo.model import autoencoder

STATISTICS_MOMENTUM = 0.01  # about a hundred batches, so that one batch's pictures do not show


class AutoencoderTraining(L.LightningModule):
    """Fits an autoencoder and writes its two files, in bf16, into `folder` at the end."""

    def __init__(
        self,
        *,
        widths: tuple[int, ...],
        blocks: int,
        latent_channels: int,
        edge_weight: float,
        latent_noise: float,
        latent_weight: float,
        learning_rate: float,
        warmup_steps: int,
        seed: int,
        folder: str | Path,
    ) -> None:
        super().__init__()
        self.ae = autoencoder.create(tuple(widths), blocks, latent_channels)
        self.ae.network.bn.momentum = STATISTICS_MOMENTUM
        self.edge_weight, self.latent_weight = edge_weight, latent_weight
        self.latent_noise = latent_noise
        self.learning_rate, self.warmup_steps = learning_rate, warmup_steps
        self.seed, self.folder = seed, Path(folder)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images = batch.image.contiguous(memory_format=torch.channels_last)
        latents = self.ae.network.encode(images).latent_dist.mean
        self.ae.network.bn(autoencoder.fold(latents.detach()))
        noise = SampleStreams(self.seed, batch.position, self.device).normal(latents.shape[1:])
        decoded = self.ae.network.decode(latents + self.latent_noise * noise).sample

        pixels, edges = reconstruction_error(decoded, images)
        size = latents.square().mean()
        loss = pixels + self.edge_weight * edges + self.latent_weight * size
        if not loss.isfinite():
            raise ValueError(f"loss is {loss.item()} for {batch.key}; lower learning_rate")
        terms = {"loss": loss, "pixels": pixels, "edges": edges, "size": size}
        self.log_dict(
            {f"train/{name}": term for name, term in terms.items()}, batch_size=len(batch)
        )
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        decoded = self.ae.decode(self.ae.encode(batch.image), self.token_grid(batch.image))
        self.log("val/psnr", psnr(decoded, batch.image).mean(), batch_size=len(batch))

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(
            self.ae.parameters(), lr=self.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
        )
        num_steps = self.trainer.estimated_stepping_batches

        def factor(step: int) -> float:
            warm = min(1.0, (step + 1) / self.warmup_steps)
            return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / num_steps)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            self.ae.to(torch.bfloat16).network.bn.float()
            autoencoder.save(self.ae, self.folder)

    def token_grid(self, images: Float[Tensor, "b 3 h w"]) -> tuple[int, int]:
        """Rows and columns of the tokens of these pictures."""
        h, w = images.shape[-2:]
        return h // self.ae.stride, w // self.ae.stride


def reconstruction_error(
    decoded: Float[Tensor, "b 3 h w"], images: Float[Tensor, "b 3 h w"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean absolute error of the pixels, and of the differences between neighbouring pixels."""
    error = decoded - images
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean(), edges


def psnr(
    decoded: Float[Tensor, "b 3 h w"], images: Float[Tensor, "b 3 h w"]
) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio in dB of each picture in [-1, 1], whose peak is 2."""
    mean_square = (decoded.clamp(-1, 1) - images).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / mean_square.clamp_min(1e-10))
