"""Small training runs on several ranks, one after the other in the same processes.

    torchrun --standalone --nproc_per_node=2 tests/ranks.py FOLDER CASE=STEPS...

FOLDER holds `shards/` and `base/` (see tests/test_parallel.py); each case writes `CASE-WORLD.json`
there: the trace of losses, checksums of what was trained, and what was skipped.
"""

import json
import os
import sys
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch._dynamo.utils import counters

from mofo.data.sample import Batch
from mofo.training import parallel
from mofo.training.ema import EMA, averaged, averaged_weights
from mofo.training.module import ModalityForcing

ROOT = Path(__file__).parents[1]
COMPILE_BLOCKS = parallel.compile_blocks
BATCH = 8
POISONED = 12 * BATCH + 5  # a sample of the thirteenth step, on the last of two or four ranks

FSDP = ["trainer=fsdp", "trainer.accelerator=cpu"]
CASES: dict[str, list[str]] = {
    "plain": [],
    "sharded": FSDP,
    "recomputed": ["recompute=true"],
    "micro": ["data.accumulate=2"],
    "micro_sharded": [*FSDP, "data.accumulate=2"],
    "micro_reduced": [*FSDP, "data.accumulate=2", "trainer.strategy.hold_gradients=false"],
    "all_sharded": [*FSDP, "recompute=true", "trainer.strategy.offload=true"],
    "replicated": [*FSDP, "trainer.strategy.replicas=2"],
    "micro_replicated": [*FSDP, "trainer.strategy.replicas=2", "data.accumulate=2"],
    "teacher_whole": [*FSDP, "trainer.strategy.shard_teacher=false"],
    "poisoned": [],
    "poisoned_sharded": FSDP,
    "bf16": ["body_dtype=bfloat16", "recompute=true"],
    "bf16_sharded": [*FSDP, "body_dtype=bfloat16", "recompute=true"],
    "compiled": ["compile=true", "recompute=true"],
    "compiled_sharded": [*FSDP, "compile=true", "recompute=true"],
    "bf16_compiled": ["body_dtype=bfloat16", "compile=true", "recompute=true"],
    "scratch": ["init_from=null"],
    "scratch_sharded": [*FSDP, "init_from=null"],
}


class Poisoned(ModalityForcing):
    """Meets one sample whose loss is not a number, on the rank that it falls to."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if POISONED not in batch.position:
            return loss
        terms = {name: term * torch.nan for name, term in self.parts[-1].terms.items()}
        self.parts[-1] = self.parts[-1]._replace(terms=terms)
        return loss * torch.nan


class Trace(Callback):
    """What each step logged."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step > len(self.rows):
            self.rows.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def checksum(state: dict[str, Tensor]) -> int:
    crc = 0
    for name in sorted(state):
        crc = zlib.crc32(state[name].contiguous().numpy().tobytes(), crc)
    return crc


def total(state: dict[str, Tensor]) -> float:
    return sum(float(tensor.double().abs().sum()) for tensor in state.values())


def train(folder: Path, case: str, num_steps: int) -> dict[str, Any]:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    cfg = compose(
        "train",
        overrides=[
            "model=xs",
            f"init_from={folder / 'base'}",
            "~data.sources.real",
            f"data.sources.scenes.shards={folder / 'shards'}",
            "data.sources.scenes.make=null",
            "data.size=[32,32]",
            f"data.batch_size={BATCH}",
            "optimizer.lr=1e-3",
            "optimizer.warmup_steps=4",
            f"trainer.max_steps={num_steps}",
            f"trainer.devices={world}",
            "trainer.num_nodes=1",
            *CASES[case],
        ],
    )
    torch._dynamo.reset()
    counters.clear()
    build = instantiate
    # The default would call a C++ compiler for minutes, and computes the same.
    parallel.compile_blocks = partial(COMPILE_BLOCKS, backend="aot_eager")
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    kind = Poisoned if case.startswith("poisoned") else ModalityForcing
    parts = {
        key: build(cfg[key], _convert_="all")
        for key in ("model", "encoders", "objective", "optimizer")
    }
    module = kind(
        **parts,
        init_from=cfg.init_from,
        seed=cfg.seed,
        body_dtype=cfg.body_dtype,
        recompute=cfg.recompute,
        compile=cfg.compile,
    )
    trace, ema = Trace(), EMA(decay=0.9)
    trainer = build(cfg.trainer, callbacks=[trace, ema], logger=False, _convert_="all")
    trainer.fit(module, build(cfg.data, _convert_="all"))
    return report(trainer, module, trace)


def report(trainer: L.Trainer, module: ModalityForcing, trace: Trace) -> dict[str, Any]:
    average = averaged(trainer)
    assert average is not None
    before, gathered = measures(module.dit), measures(average)
    with averaged_weights(trainer, module):
        inside = measures(module.dit)
    return {
        "rows": trace.rows,
        "weights": before,
        "average": gathered,
        "exchanged": [inside, measures(average), measures(module.dit)],
        "skipped": module.skipped.state_dict(),
        "graphs": counters["stats"]["unique_graphs"],
        "seen": module.data.samples_seen,
        "held": sum(parallel.local(p).numel() for p in module.dit.parameters()),
        "all": sum(p.numel() for p in module.dit.parameters()),
        "ranks": parallel.gather(
            [checksum({"": parallel.whole(p.detach())}) for p in module.dit.parameters()]
        ),
    }


def measures(source: Any) -> tuple[float, int]:
    """Sum of magnitudes and checksum of the whole tensors."""
    state = parallel.full_state(source)
    return total(state), checksum(state)


def main(folder: str, *cases: str) -> None:
    torch.set_num_threads(1)
    for case in cases:
        name, num_steps = case.split("=")
        out = train(Path(folder), name, int(num_steps))
        if int(os.environ.get("RANK", "0")) == 0:
            world = os.environ.get("WORLD_SIZE", "1")
            (Path(folder) / f"{name}-{world}.json").write_text(json.dumps(out))
    parallel.leave()


if __name__ == "__main__":
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        main(*sys.argv[1:])
