"""What it means that a run ended as if nothing had happened."""

import zlib
from collections.abc import Callable
from pathlib import Path

from mofo.training.store import Manifest, read_part
from tests.slurm.cluster import Job

NUM_STEPS = 40
EVERY = 10  # steps between checkpoints
BATCH = 4

Submit = Callable[..., Job]


def finished(job: Job) -> Job:
    assert job.wait() == "COMPLETED", job.said()[-3000:]
    assert job.steps() == NUM_STEPS
    return job


def checksums(run: Path) -> dict[str, int]:
    """Of each tensor that a run ends with: weights, optimiser, averages, and the export."""
    last = run / "checkpoints" / f"step_{NUM_STEPS:08d}"
    manifest = Manifest.read(last)
    sums = {"export": zlib.crc32((run / "export" / "model.safetensors").read_bytes())}
    for part in ("network", "optimizer", "average"):
        tensors = read_part(last, manifest, part)
        assert tensors
        sums |= {f"{part}/{name}": zlib.crc32(tensor.numpy()) for name, tensor in tensors.items()}
    return sums


def assert_same(job: Job, whole: Job) -> None:
    """The run ended as if nothing had happened, and trained on each sample once."""
    assert checksums(job.run) == checksums(whole.run)
    assert (job.run / "metrics.jsonl").read_bytes() == (whole.run / "metrics.jsonl").read_bytes()
    taken = job.trained_on()
    assert {step: sorted(positions) for step, positions in taken.items()} == {
        step: list(range((step - 1) * BATCH, step * BATCH)) for step in range(1, NUM_STEPS + 1)
    }
