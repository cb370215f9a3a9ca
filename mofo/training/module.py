"""`ModalityForcing`: the training step, and how its networks are built.

Stage 2 (the method) trains image and depth together; stage 1 is plain text-to-image training, the
same module with a model that has no depth stream.
"""

import torch
from lightning import LightningModule
from torch import Tensor
from torch.func import functional_call

from mofo import flow
from mofo.data.module import DataModule
from mofo.data.sample import Batch
from mofo.depth import DepthCodec
from mofo.flow import SampleStreams
from mofo.frozen import Encoders, Teacher
from mofo.model import weights
from mofo.model.dit import DiTConfig, ThreeStreamDiT
from mofo.model.weights import Release
from mofo.objective import Objective
from mofo.training.export import assemble
from mofo.training.optimizer import AdamW

BODY_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ModalityForcing(LightningModule):
    """Post-training of a text-to-image base into three streams.

    `init_from`: None for random weights, a base (single file, diffusers or stage-1 export folder)
    to grow from, or a three-stream release folder to go on from. The teacher is that base.
    `body_dtype` is what the network computes in, by cast: its weights, which the optimiser sees,
    and its depth head stay float32.
    """

    def __init__(
        self,
        *,
        model: DiTConfig,
        encoders: Encoders,
        objective: Objective,
        optimizer: AdamW,
        init_from: str | None,
        seed: int,
        body_dtype: str = "float32",
    ) -> None:
        super().__init__()
        if body_dtype not in BODY_DTYPES:
            raise ValueError(f"body_dtype is {body_dtype!r}; accepted: {', '.join(BODY_DTYPES)}")
        self.body_dtype = BODY_DTYPES[body_dtype]
        self.config, self.encoders, self.objective = model, encoders, objective
        self.settings, self.init_from, self.seed = optimizer, init_from, seed
        self.codec = DepthCodec(patch_size=round(model.depth_channels**0.5) or 1)
        self.teacher: Teacher | None = None
        self.dit: ThreeStreamDiT

    def configure_model(self) -> None:
        if hasattr(self, "dit"):
            return
        if self.init_from is None:
            self.dit = ThreeStreamDiT(self.config)
            return
        self.dit = weights.start(self.init_from, self.config).train()
        if self.config.depth_channels and self.objective.has_teacher:
            self.teacher = Teacher(weights.text_to_image(self.init_from))

    def on_fit_start(self) -> None:
        for frozen in filter(None, (self.encoders, self.teacher)):
            frozen.to(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        rng = self.noise_source(batch.position)
        text = self.encoders.text(batch.caption)
        image = self.encoders.image(batch.image)
        if not self.config.depth_channels:
            return self.text_to_image_step(batch, text, image, rng)

        # Independent times are the method: one model learns every conditional at once.
        t_image, t_depth = self.objective.times(len(image), rng)
        metres = self.objective.filled(batch.metres, batch.valid)
        depth, valid = self.codec.encode(metres, batch.valid)
        image_t, v_target = flow.corrupt(image, t_image, rng)
        depth_t = self.objective.corrupt_depth(depth, valid, t_depth, rng)

        v_image, x_depth = self.predict(text, image_t, depth_t, t_image, t_depth, grid=batch.grid)
        v_teacher = self.teacher and self.teacher(text, image_t, t_image, grid=batch.grid)

        measured = self.share_of_step(batch.step_measured)
        terms = self.objective.terms(
            v_image, v_target, x_depth, depth, valid, v_teacher, t_image, t_depth, measured
        )
        return self.finish(batch, self.objective.total(terms), terms._asdict())

    def text_to_image_step(
        self, batch: Batch, text: Tensor, image: Tensor, rng: SampleStreams
    ) -> Tensor:
        """Stage 1: depth is absent, and the image is never given."""
        t_image = self.objective.image_schedule.sample(len(image), rng)
        image_t, v_target = flow.corrupt(image, t_image, rng)
        v_image, _ = self.predict(text, image_t, None, t_image, None, grid=batch.grid)
        terms = self.objective.terms(
            v_image, v_target, None, None, None, None, t_image, None, measured=1.0
        )
        return self.finish(batch, self.objective.total(terms), {})

    def predict(self, *streams: Tensor | None, grid: tuple[int, int]) -> tuple:
        """The network at `body_dtype`: a cast of its weights for this step, not autocast."""
        if self.body_dtype == torch.float32:
            return self.dit(*streams, grid=grid)
        cast = {
            name: weight if name.startswith("depth_final_layer.") else weight.to(self.body_dtype)
            for name, weight in self.dit.named_parameters()
        }
        return functional_call(self.dit, cast, streams, {"grid": grid})

    def noise_source(self, position: Tensor) -> SampleStreams:
        """One stream per sample, a pure function of (seed, position in the global order)."""
        return SampleStreams(self.seed, position.tolist(), device=self.device)

    def share_of_step(self, step_measured: int) -> Tensor:
        """The depth term's denominator: this micro-batch's share of the global batch's pixels.

        Gradients are averaged over ranks and micro-batches, so the global count is divided by
        their number and the average becomes the mean over the global batch.
        """
        total = torch.tensor(float(step_measured), device=self.device)
        ranks = self.trainer.world_size
        if ranks > 1:
            total = self.trainer.strategy.reduce(total, reduce_op="sum")
        return total / (ranks * self.trainer.accumulate_grad_batches)

    def finish(self, batch: Batch, loss: Tensor, terms: dict[str, Tensor]) -> Tensor:
        """Log, and let no loss that is not finite reach the optimiser."""
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.trainer.global_step}; the batch holds "
                f"{', '.join(batch.key)} (positions {batch.position.tolist()}). Nothing was "
                "updated: look at these samples, or lower the learning rate"
            )
        named = {"train/loss": loss} | {f"train/{name}": term for name, term in terms.items()}
        self.log_dict({name: term.detach() for name, term in named.items()})
        return loss

    def configure_optimizers(self) -> dict:
        optimizer, scheduler = self.settings.build(self.dit, self.trainer.max_steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    @property
    def data(self) -> DataModule:
        return self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Once a step, and before callbacks save: a resumed run reads on from the next position.
        self.data.advance(self.data.batch_size)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, **_) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.dit.parameters(), self.settings.clip_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the gradient norm is {norm.item()} at step {self.trainer.global_step} although "
                "the loss is finite. Nothing was updated: lower the learning rate"
            )
        self.log("train/grad_norm", norm)

    def release(self, state: dict[str, Tensor] | None = None) -> Release:
        """What to export: the present weights, or `state` (an EMA) in their place."""
        dit = self.dit
        if state is not None:
            with torch.device("meta"):
                dit = ThreeStreamDiT(self.config)
            dit.load_state_dict(state, assign=True)
        return assemble(
            dit,
            image_schedule=self.objective.image_schedule,
            depth_schedule=self.objective.depth_schedule,
            size=self.data.size,
            text=self.encoders.name,
        )
