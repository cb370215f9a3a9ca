"""`ModalityForcing`: the training step, and how its networks are built.

Stage 2 (the method) trains image and depth together; stage 1 is plain text-to-image training, the
same module with a model that has no depth stream.
"""

from typing import Any, NamedTuple

import torch
from lightning import LightningModule
from torch import Tensor

from mofo import flow
from mofo.data.module import DataModule
from mofo.data.sample import Batch
from mofo.depth import DepthCodec
from mofo.flow import SampleStreams
from mofo.frozen import DTYPES, Encoders, Teacher
from mofo.model import growth
from mofo.model.dit import DiTConfig, ThreeStreamDiT
from mofo.model.weights import Release
from mofo.objective import Objective
from mofo.training import parallel
from mofo.training.export import assemble
from mofo.training.optimizer import AdamW
from mofo.training.parallel import Sharded


class Part(NamedTuple):
    """What a micro-batch leaves behind until its step is whole."""

    batch: Batch
    terms: dict[str, Tensor]

    def is_finite(self) -> bool:
        return all(bool(torch.isfinite(term)) for term in self.terms.values())

    def names(self) -> dict[int, str]:
        """Position -> key."""
        return dict(zip(self.batch.position.tolist(), self.batch.key, strict=True))


class Skipped:
    """The steps that were not taken, and the samples that they are owed to (of the last few)."""

    NUM_KEPT = 20

    def __init__(self) -> None:
        self.total = self.in_a_row = 0
        self.last: list[dict[str, Any]] = []

    def add(self, step: int, names: dict[int, str]) -> None:
        """`step`: how many were done before it."""
        self.total += 1
        self.in_a_row += 1
        one = {"step": step, "positions": list(names), "keys": list(names.values())}
        self.last = [*self.last, one][-self.NUM_KEPT :]

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)

    def __str__(self) -> str:
        return "\n".join(
            f"  after step {one['step']}: {', '.join(one['keys'])} (positions {one['positions']})"
            for one in self.last[-self.in_a_row :]
        )


class ModalityForcing(LightningModule):
    """Post-training of a text-to-image base into three streams.

    `init_from`: None for random weights, a base (single file, diffusers or stage-1 export folder)
    to grow from, or a three-stream release folder to go on from. The teacher is the same weights
    without depth, frozen; random weights have none.
    `body_dtype` is what the network computes in, by cast: its weights, which the optimiser sees,
    and its depth head stay float32. `recompute` trades time for the memory of activations,
    `compile` some minutes at the start for speed. A step whose loss or gradient is not finite is
    not taken, on any rank; after more than `max_skipped` of them in a row the run stops.
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
        recompute: bool = False,
        compile: bool = False,
        max_skipped: int = 10,
    ) -> None:
        super().__init__()
        if body_dtype not in DTYPES:
            raise ValueError(f"body_dtype is {body_dtype!r}; accepted: {', '.join(DTYPES)}")
        if model.use_guidance_embed:
            raise ValueError(
                "model.use_guidance_embed is true, but nothing says at which guidance a base "
                "that was distilled for it should be trained; start from a base without it"
            )
        self.body_dtype = DTYPES[body_dtype]
        self.config, self.encoders, self.objective = model, encoders, objective
        self.settings, self.init_from, self.seed = optimizer, init_from, seed
        self.recompute, self.compile_blocks, self.max_skipped = recompute, compile, max_skipped
        self.skipped = Skipped()
        self.parts: list[Part] = []  # the micro-batches of this step, so far
        self.codec = DepthCodec(patch_size=round(model.depth_channels**0.5) or 1)
        self.teacher: Teacher | None = None
        self.dit: ThreeStreamDiT

    def configure_model(self) -> None:
        if hasattr(self, "dit"):
            return
        strategy, tensors = self.trainer.strategy, None
        if self.init_from is None:
            dit = ThreeStreamDiT(self.config)
        elif isinstance(strategy, Sharded):
            tensors = growth.starting(self.init_from, self.config)
            with torch.device("meta"):
                dit = ThreeStreamDiT(self.config)
        else:
            dit = growth.start(self.init_from, self.config)
        if self.body_dtype != torch.float32 and not isinstance(strategy, Sharded):
            parallel.compute_in(dit, self.body_dtype)
        if self.recompute:
            parallel.recompute(dit)
        if self.compile_blocks:
            parallel.compile_blocks(dit)
        if isinstance(strategy, Sharded):
            strategy.shard(dit, self.body_dtype, tensors)
        self.dit = dit.train()
        if self.init_from and self.config.depth_channels and self.objective.has_teacher:
            self.teacher = self.load_teacher(self.init_from)

    def load_teacher(self, path: str) -> Teacher:
        """What never learns needs no copy in float32: it is kept in the dtype it computes in."""
        strategy = self.trainer.strategy
        if not (isinstance(strategy, Sharded) and strategy.shard_teacher):
            return Teacher(growth.text_to_image(path, self.body_dtype))
        config, tensors = growth.teaching(path)
        with torch.device("meta"):
            teacher = Teacher(ThreeStreamDiT(config).to(self.body_dtype))
        strategy.shard_frozen(teacher.dit, tensors)
        return teacher

    def on_fit_start(self) -> None:
        for frozen in filter(None, (self.encoders, self.teacher)):
            frozen.to(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        last = len(self.parts) + 1 == self.trainer.accumulate_grad_batches
        parallel.hold_gradients(self.dit, self.trainer.strategy, last=last)
        if not self.parts:
            self.measured = self.share_of_step(batch.step_measured)
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

        v_image, x_depth = self.dit(text, image_t, depth_t, t_image, t_depth, grid=batch.grid)
        v_teacher = self.teacher and self.teacher(text, image_t, t_image, grid=batch.grid)

        terms = self.objective.terms(
            v_image, v_target, x_depth, depth, valid, v_teacher, t_image, t_depth, self.measured
        )
        return self.finish(batch, self.objective.total(terms), terms._asdict())

    def text_to_image_step(
        self, batch: Batch, text: Tensor, image: Tensor, rng: SampleStreams
    ) -> Tensor:
        """Stage 1: depth is absent, and the image is never given."""
        t_image = self.objective.image_schedule.sample(len(image), rng)
        image_t, v_target = flow.corrupt(image, t_image, rng)
        v_image, _ = self.dit(text, image_t, None, t_image, None, grid=batch.grid)
        terms = self.objective.terms(
            v_image, v_target, None, None, None, None, t_image, None, measured=1.0
        )
        return self.finish(batch, self.objective.total(terms), {})

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
        """Keep what this micro-batch says; the step is judged when it is whole."""
        named = {"train/loss": loss} | {f"train/{name}": term for name, term in terms.items()}
        self.parts.append(Part(batch, {name: term.detach() for name, term in named.items()}))
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
        """Clip by the norm over all ranks, log the step, and judge it: all ranks agree."""
        norm = torch.nn.utils.clip_grad_norm_(self.dit.parameters(), self.settings.clip_norm)
        norm = parallel.whole(norm)
        parts, self.parts = self.parts, []
        names = list(parts[0].terms)
        # One message for the means over micro-batches and ranks, and for whether they are finite.
        means = torch.stack([torch.stack(list(part.terms.values())) for part in parts]).mean(0)
        broken = ~(torch.isfinite(means).all() & torch.isfinite(norm))
        reduced = torch.cat([means, broken[None].to(means)])
        if self.trainer.world_size > 1:
            reduced = self.trainer.strategy.reduce(reduced, reduce_op="sum")
            reduced = reduced / self.trainer.world_size
        self.log_dict(dict(zip(names, reduced, strict=False)) | {"train/grad_norm": norm})
        if reduced[-1] > 0:
            self.skip(optimizer, parts, loss=float(reduced[0]), norm=float(norm))
        else:
            self.skipped.in_a_row = 0

    def skip(self, optimizer: Any, parts: list[Part], *, loss: float, norm: float) -> None:
        """Without gradients the optimiser changes neither weights nor moments."""
        optimizer.zero_grad(set_to_none=True)
        found = parallel.gather([part.names() for part in parts if not part.is_finite()])
        if not any(found):  # the gradient alone
            found = parallel.gather([part.names() for part in parts])
        step = self.trainer.global_step
        names = {position: key for rank in found for part in rank for position, key in part.items()}
        self.skipped.add(step, names)
        if self.skipped.in_a_row > self.max_skipped:
            raise FloatingPointError(
                f"{self.skipped.in_a_row} steps in a row had a loss or gradient that was not "
                f"finite, the last with loss {loss} and gradient norm {norm}; accepted are "
                f"{self.max_skipped}. Nothing was updated by them. Look at their samples, or lower "
                f"the learning rate:\n{self.skipped}"
            )

    def release(self, state: dict[str, Tensor] | None = None) -> Release:
        """What to export: the present weights, or `state` (an EMA) in their place.

        Of a sharded network, `state` is `parallel.full_state` of either, on rank 0.
        """
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
