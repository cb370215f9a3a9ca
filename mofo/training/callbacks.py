"""`Preview`, `Validation`, `Export`: what is made of the averaged weights beside the training.

All ranks sample together, because the weights of a sharded network are gathered by all of them.
"""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, UInt8
from lightning.pytorch.callbacks import Callback
from PIL import Image

from mofo import picture
from mofo.alignment import ALIGNMENTS
from mofo.data.gates import naming
from mofo.data.make import make
from mofo.data.shards import Shards
from mofo.data.storage import FULL
from mofo.data.transforms import centre_box, crop_resize
from mofo.metrics import score
from mofo.sampler import sample
from mofo.training.ema import averaged, averaged_weights
from mofo.training.export import write
from mofo.training.module import ModalityForcing
from mofo.training.parallel import full_state
from mofo.training.progress import progress_of
from mofo.training.watch import still_busy

SHOWN = ("absrel", "delta1")
ENLARGED_TO = 192  # pixels of a small picture's shorter side
Metres = Float[np.ndarray, "h w"]
Valid = Bool[np.ndarray, "h w"]


class Preview(Callback):
    """Every `every_n_steps`, samples of `captions` as one picture."""

    def __init__(
        self, *, folder: str, every_n_steps: int, captions: list[str], num_steps: int = 25
    ) -> None:
        self.folder, self.every_n_steps = Path(folder) / "previews", every_n_steps
        self.captions, self.num_steps = list(captions), num_steps
        self.last_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: ModalityForcing) -> None:
        self.last_step = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        step = trainer.global_step
        due = step != self.last_step and step % self.every_n_steps == 0
        self.last_step = step
        if due:
            still_busy(trainer)
            with averaged_weights(trainer, pl_module):
                drawn = self.draw(trainer, pl_module)
            if trainer.is_global_zero:
                show(trainer, drawn, self.folder / f"step_{step:08d}.png", "preview")

    def draw(self, trainer: Any, pl_module: ModalityForcing) -> picture.Picture:
        release, encoders = pl_module.release(), pl_module.encoders
        grid = grid_of(trainer)
        image, depth = sample(
            release.dit,
            release.schedule,
            encoders.text(self.captions),
            grid=grid,
            null_text=encoders.text([""]),
            cfg_scale=3.0,
            num_steps=self.num_steps,
            seeds=range(len(self.captions)),
        )
        pixels = encoders.pixels(image, grid).float().cpu()
        rows = [[picture.from_unit(p.numpy()) for p in pixels]]
        if depth is not None:
            maps, valid = release.codec.decode(depth.cpu(), grid=grid)
            pairs = zip(maps.numpy(), valid.numpy(), strict=True)
            rows.append([picture.depth_picture(m, v) for m, v in pairs])
        return arranged(rows)


class HeldOut(NamedTuple):
    """An image with its measured depth; `counts` is False for what only fills up a batch."""

    key: str
    image: picture.Picture
    metres: Metres
    valid: Valid
    counts: bool


class Validation(Callback):
    """Every `every_n_steps`, AbsRel and delta1 of image-to-depth on images held out from training.

    `sets` name shards (`shards`, and `make` as a data source has it). Of each, `num_images` are
    taken from all over it, brought to the training size, and shared out among the ranks; depth is
    aligned as `alignment` says. An image's noise follows from `seed` and its key. Comes before
    `Progress`, to whose rows the numbers are added. A network without depth has none.
    """

    def __init__(
        self,
        *,
        folder: str,
        every_n_steps: int,
        sets: Mapping[str, Mapping[str, Any]],
        num_images: int,
        batch_size: int,
        num_steps: int = 10,
        alignment: str = "affine",
        seed: int = 0,
        num_pictures: int = 4,
    ) -> None:
        if alignment not in ALIGNMENTS:
            accepted = ", ".join(ALIGNMENTS)
            raise ValueError(f"alignment is {alignment!r}, but must be one of: {accepted}")
        self.folder, self.every_n_steps = Path(folder) / "previews", every_n_steps
        self.sets = {name: dict(row) for name, row in sets.items()}
        self.num_images, self.batch_size, self.num_steps = num_images, batch_size, num_steps
        self.alignment, self.seed, self.num_pictures = alignment, seed, num_pictures
        self.images: dict[str, list[HeldOut]] = {}  # of this rank
        self.last_step = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Read now what is needed later: what is missing or damaged shows before any step."""
        if not pl_module.config.depth_channels:
            return
        if trainer.local_rank == 0:
            for row in self.sets.values():
                if row.get("make") is not None:
                    make(row["shards"], **row["make"])
        trainer.strategy.barrier()
        for name, row in self.sets.items():
            with naming(f"validation set {name!r}"):
                self.images[name] = self._read(trainer, row["shards"])

    def _read(self, trainer: Any, source: str) -> list[HeldOut]:
        """This rank's images, on all ranks as many."""
        shards, size = Shards(source), trainer.datamodule.size
        count = min(self.num_images, len(shards))
        indices = [len(shards) * i // count for i in range(count)]
        mine = indices[trainer.global_rank :: trainer.world_size]
        spare = -(-count // trainer.world_size) - len(mine)
        return [
            *(_held_out(shards, index, size, counts=True) for index in mine),
            *[_held_out(shards, indices[0], size, counts=False)] * spare,
        ]

    def on_train_start(self, trainer: L.Trainer, pl_module: ModalityForcing) -> None:
        self.last_step = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        step = trainer.global_step
        due = step != self.last_step and step % self.every_n_steps == 0
        self.last_step = step
        if not due or not self.images:
            return
        columns: list[list[picture.Picture]] = []
        with averaged_weights(trainer, pl_module):
            for name, images in self.images.items():
                maps = self._predict(trainer, pl_module, images)
                self._tell(trainer, name, self._score(images, maps, pl_module.device))
                pairs = list(zip(images, maps, strict=True))[: self.num_pictures]
                columns.extend(_drawn(one, pred) for one, pred in pairs)
        if trainer.is_global_zero and columns:
            rows = [list(row) for row in zip(*columns, strict=True)]
            show(trainer, arranged(rows), self.folder / f"step_{step:08d}_i2d.png", "validation")

    def _predict(self, trainer: Any, pl_module: Any, images: list[HeldOut]) -> list[Metres]:
        """Relative depth; 0 where the codec does not trust it, which counts as wrong."""
        release, encoders, maps = pl_module.release(), pl_module.encoders, []
        grid = grid_of(trainer)
        for start in range(0, len(images), self.batch_size):
            still_busy(trainer)
            some = images[start : start + self.batch_size]
            pixels = torch.from_numpy(np.stack([one.image for one in some])).permute(0, 3, 1, 2)
            _, depth = sample(
                release.dit,
                release.schedule,
                encoders.text([""] * len(some)),
                grid=grid,
                image=encoders.image(pixels.to(pl_module.device) / 127.5 - 1),
                num_steps=self.num_steps,
                seeds=[zlib.crc32(f"{self.seed}/{one.key}".encode()) for one in some],
            )
            assert depth is not None  # the network has a depth stream
            maps.extend(release.codec.decode(depth.cpu(), grid=grid)[0].numpy())
        return maps

    def _score(
        self, images: list[HeldOut], maps: list[Metres], device: torch.device
    ) -> dict[str, float]:
        """Means over the images of all ranks; rounded, as their sums depend on who had which."""
        total = torch.zeros(len(SHOWN) + 1, dtype=torch.float64)
        for one, pred in zip(images, maps, strict=True):
            if one.counts and one.valid.any():
                metrics = score(pred, one.metres, one.valid, alignment=self.alignment)
                total += torch.tensor([metrics[name] for name in SHOWN] + [1], dtype=total.dtype)
        if dist.is_initialized():
            total = total.to(device)
            dist.all_reduce(total)
        *sums, count = total.tolist()
        return {
            name: round(sum_ / max(count, 1), 6) for name, sum_ in zip(SHOWN, sums, strict=True)
        }

    def _tell(self, trainer: Any, name: str, means: dict[str, float]) -> None:
        progress = progress_of(trainer)
        if progress is not None:
            progress.extra |= {f"valid/{name}/{metric}": mean for metric, mean in means.items()}
        if trainer.is_global_zero:
            numbers = "  ".join(f"{metric} {mean:.4f}" for metric, mean in means.items())
            print(f"step {trainer.global_step}: {name}  {numbers}", flush=True)


class Export(Callback):
    """At the end, the averaged weights as a release folder, in the dtype they were trained in.

    `cfg_scale` is what the release recommends as the weight of the prompt.
    """

    def __init__(self, *, folder: str, cfg_scale: float = 4.0) -> None:
        self.folder, self.cfg_scale = Path(folder) / "export", cfg_scale

    def on_train_end(self, trainer: L.Trainer, pl_module: ModalityForcing) -> None:
        if trainer.global_step < trainer.max_steps:
            return
        state = full_state(averaged(trainer) or pl_module.dit)
        if trainer.is_global_zero:
            release = pl_module.release(state)
            release.use["cfg_scale"] = self.cfg_scale
            write(release, pl_module.encoders.autoencoder, self.folder)
            print(f"exported to {self.folder}")


def grid_of(trainer: Any) -> tuple[int, int]:
    """Rows and columns of tokens at the training size."""
    h, w = (side // trainer.datamodule.patch for side in trainer.datamodule.size)
    return h, w


def arranged(rows: list[list[picture.Picture]]) -> UInt8[np.ndarray, "hg wg 3"]:
    """A grid, in which small pictures are large enough to be seen."""
    factor = max(1, ENLARGED_TO // min(rows[0][0].shape[:2]))
    return picture.grid([[picture.enlarge(one, factor) for one in row] for row in rows])


def show(trainer: Any, drawn: picture.Picture, path: Path, name: str) -> None:
    """Save a picture, and give it to loggers that take one; a full disk costs only the picture."""
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(name, [drawn], step=trainer.global_step)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn).save(path)
    except OSError as error:
        if error.errno not in FULL:
            raise
        print(f"{path} is not written: {error.strerror}", flush=True)


def _held_out(shards: Shards, index: int, size: tuple[int, int], *, counts: bool) -> HeldOut:
    whole = shards.read(index)
    one = crop_resize(whole, centre_box(whole.shape, size), size)
    metres, valid = one.depth or (np.zeros(size, np.float32), np.zeros(size, bool))
    return HeldOut(one.key, one.image, metres, valid, counts)


def _drawn(one: HeldOut, pred: Metres) -> list[picture.Picture]:
    """Image, measured depth, predicted depth."""
    return [one.image, picture.depth_picture(one.metres, one.valid), picture.depth_picture(pred)]
