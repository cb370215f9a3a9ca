"""Training: kills, restarts, workers and micro-batches change nothing; frozen means absent."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn

import train
from mofo.data.sample import Sample
from mofo.data.write import write
from mofo.model import weights
from mofo.model.dit import ThreeStreamDiT
from mofo.objective import Objective
from mofo.training.checkpoint import Checkpoint, newest
from mofo.training.dcp import Whole
from mofo.training.ema import EMA
from mofo.training.manifest import Manifest
from mofo.training.module import ModalityForcing
from mofo.training.optimizer import AdamW
from mofo.training.store import by_step

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden" / "losses_tiny.txt"
NUM_STEPS = 20  # of the reference run

Train = Callable[..., Path]


class Kill(Callback):
    """Dies in the middle of a run, as a process does: no hook of the end runs."""

    def __init__(self, *, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


def picture(number: int) -> Sample:
    """Two waves of colour, and a depth that follows one of them, a fifth of it unmeasured."""
    rng = np.random.default_rng(number)
    rows, columns = np.mgrid[0:1:32j, 0:1:32j]
    waves = np.sin(6 * rng.random(2)[:, None, None] * [rows, columns] + 6 * rng.random())
    colours = 127.5 + 60 * np.einsum("whk,wc->hkc", waves, rng.uniform(-1, 1, (2, 3)))
    metres = (3 + 2 * waves[0]).astype(np.float32)
    valid = rng.random((32, 32)) > 0.2
    return Sample(
        key=f"picture-{number:02d}",
        picture=Image.fromarray(colours.clip(0, 255).astype(np.uint8)),
        metres=np.where(valid, metres, np.float32(0)),
        valid=valid,
        intrinsics=None,
        captions=(f"a wave of colour number {number}",),
        metric=True,
        source="test",
        licence="CC0",
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "waves"
    write(map(picture, range(24)), folder, "waves", samples_per_shard=8)
    return folder


@pytest.fixture(scope="module", autouse=True)
def configs() -> Iterator[None]:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        yield


@pytest.fixture(scope="module")
def start(shards: Path) -> Train:
    """What `python train.py` does, on the tiny set, in this process; returns the run folder."""

    def run(root: Path, *overrides: str, kill_at: int | None = None) -> Path:
        cfg = compose(
            "train",
            overrides=[
                "model=xs",
                f"paths.runs={root}",
                "~data.sources.real",
                f"data.sources.scenes.shards={shards}",
                "data.sources.scenes.make=null",
                "data.size=[32,32]",
                "data.batch_size=4",
                "data.num_workers=0",
                "optimizer.lr=1e-3",
                "optimizer.warmup_steps=4",
                "callbacks.ema.decay=0.9",
                "callbacks.checkpoint.every_n_steps=3",
                f"trainer.max_steps={NUM_STEPS}",
                *overrides,
            ],
        )
        if kill_at is not None:
            dying = {"_target_": f"{__name__}.Kill", "step": kill_at}
            cfg.callbacks = OmegaConf.create({"kill": dying} | dict(cfg.callbacks.items()))
        train.train(cfg)
        return root / "run"

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, start: Train) -> Path:
    """The run that nothing interrupted."""
    return start(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, start: Train) -> Path:
    """A run that died after step 11, two steps after its last checkpoint."""
    root = tmp_path_factory.mktemp("killed")
    with pytest.raises(RuntimeError, match="killed"):
        start(root, kill_at=11)
    return root / "run"


def trace(run: Path) -> list[dict[str, float]]:
    return [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]


def last_checkpoint(run: Path) -> tuple[Manifest, dict[str, Tensor]]:
    path = newest(run / "checkpoints")
    assert path is not None
    manifest = Manifest.read(path)
    return manifest, {name: one.clone() for name, one in Whole(path, manifest.tensors, "").items()}


def part_of(run: Path, part: str) -> dict[str, Tensor]:
    tensors = last_checkpoint(run)[1].items()
    return {name.removeprefix(part): one for name, one in tensors if name.startswith(part)}


def assert_same_run(run: Path, whole: Path) -> None:
    assert (run / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    (ours, tensors), (theirs, expected) = last_checkpoint(run), last_checkpoint(whole)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name
    assert ours.step == theirs.step
    for fact in ("data", "schedule", "num_updates", "skipped", "config_hash"):
        assert ours.facts[fact] == theirs.facts[fact]


def copied(run: Path, root: Path) -> Path:
    shutil.copytree(run, root / "run")
    return root / "run"


def test_a_run_writes_a_row_a_step_and_trains(whole: Path) -> None:
    rows = trace(whole)
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    assert {"train/loss", "train/image", "train/depth", "train/grad_norm", "lr"} <= set(rows[0])
    depth = [row["train/depth"] for row in rows]
    assert sum(depth[-5:]) < sum(depth[:5])


def test_the_loss_trace_is_the_golden_one(whole: Path) -> None:
    expected = [float(line) for line in GOLDEN.read_text().split()]
    assert [row["train/loss"] for row in trace(whole)] == pytest.approx(expected, rel=1e-3)


def test_a_killed_run_typed_again_equals_the_uninterrupted_one(
    tmp_path: Path, start: Train, killed: Path, whole: Path
) -> None:
    run = copied(killed, tmp_path)
    assert [row["step"] for row in trace(run)][-1] in (10, 11)
    assert last_checkpoint(run)[0].step == 9
    start(tmp_path)
    assert_same_run(run, whole)


def test_a_damaged_checkpoint_is_set_aside_and_the_older_one_used(
    tmp_path: Path, start: Train, killed: Path, whole: Path, capsys: pytest.CaptureFixture
) -> None:
    run = copied(killed, tmp_path)
    damaged = run / "checkpoints" / "step_00000009"
    file = damaged / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    start(tmp_path)
    said = capsys.readouterr().out
    assert f"{damaged} is damaged, set aside as step_00000009.damaged: {file.name} has" in said
    assert damaged.with_suffix(".damaged").exists()
    assert_same_run(run, whole)


def test_a_half_written_row_and_checkpoint_of_a_kill_are_dropped(
    tmp_path: Path, start: Train, killed: Path, whole: Path
) -> None:
    run = copied(killed, tmp_path)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1')
    partial = run / "checkpoints" / "step_00000012.1234.partial"
    partial.mkdir()
    (partial / "rank_00000.safetensors").write_bytes(b"half")
    start(tmp_path)
    assert not partial.exists()
    assert_same_run(run, whole)


def test_checkpoints_are_kept_by_number(whole: Path) -> None:
    names = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert names == ["LATEST", "step_00000018", f"step_{NUM_STEPS:08d}"]


def test_a_finished_run_typed_again_changes_nothing(
    tmp_path: Path, start: Train, whole: Path, capsys: pytest.CaptureFixture
) -> None:
    run = copied(whole, tmp_path)
    start(tmp_path)
    assert "this run is finished" in capsys.readouterr().out
    assert_same_run(run, whole)


def test_another_configuration_under_the_same_name_is_refused(
    tmp_path: Path, start: Train, killed: Path
) -> None:
    run = copied(killed, tmp_path)
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"optimizer.lr: 0.001 there, 0.002 here") as caught:
        start(tmp_path, "optimizer.lr=2e-3")
    assert "name=" in str(caught.value)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_what_trained_nothing_holds_no_name(tmp_path: Path, start: Train, whole: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)init_from=/nope: there is no /nope.*=null"):
        start(tmp_path, "init_from=/nope")
    assert not (tmp_path / "run").exists()
    with pytest.raises(RuntimeError, match="killed"):
        start(tmp_path, "optimizer.lr=2e-3", kill_at=1)  # before its first checkpoint
    assert_same_run(start(tmp_path), whole)


def test_a_worker_process_changes_nothing(tmp_path: Path, start: Train, whole: Path) -> None:
    run = start(tmp_path, "data.num_workers=1", "trainer.max_steps=6")
    assert trace(run) == trace(whole)[:6]


def test_micro_batches_change_nothing_but_rounding(
    tmp_path: Path, start: Train, whole: Path
) -> None:
    run = start(tmp_path, "data.accumulate=2", "trainer.max_steps=6")
    rows, expected = trace(run), trace(whole)[:6]
    assert len(rows) == 6
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-6)


def test_a_bf16_body_follows_the_fp32_run(tmp_path: Path, start: Train, whole: Path) -> None:
    run = start(tmp_path, "body_dtype=bfloat16", "trainer.max_steps=4")
    for row, other in zip(trace(run), trace(whole), strict=False):
        assert row["train/loss"] == pytest.approx(other["train/loss"], rel=0.02)
    state = part_of(run, "network/")
    assert all(tensor.dtype == torch.float32 for tensor in state.values())


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_samples(
    tmp_path: Path, start: Train, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total, calls = Objective.total, []

    def poisoned(self: Objective, terms: object) -> Tensor:
        calls.append(None)
        return total(self, terms) * (torch.nan if len(calls) == 5 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "total", poisoned)
        with pytest.raises(FloatingPointError, match="last with loss nan") as caught:
            start(tmp_path, "max_skipped=0")
    assert str(caught.value).count("picture-") == 4
    assert "[16, 17, 18, 19]" in str(caught.value)
    run = tmp_path / "run"
    assert [p.name for p in by_step(run / "checkpoints")] == ["step_00000003"]
    assert trace(run) == trace(whole)[:4]


def test_a_gradient_that_is_not_finite_stops_the_run(
    tmp_path: Path, start: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object) -> Tensor:
        return torch.tensor(torch.inf)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", explode)
    with pytest.raises(FloatingPointError, match="gradient norm inf; accepted are 0"):
        start(tmp_path, "max_skipped=0")
    assert not by_step(tmp_path / "run" / "checkpoints")


STAGE_1 = [
    "model.depth_channels=0",
    "model.depth_decoder_num_layers=0",
    "model.cross_stream_timestep_mixing=false",
    "data.sources.scenes.depth=false",
    "data.sources.scenes.patterns=[]",
    "trainer.max_steps=2",
]


def test_a_stage_1_export_grows_and_its_teacher_stays_out_of_the_checkpoint(
    tmp_path: Path, start: Train
) -> None:
    base = start(tmp_path / "stage1", *STAGE_1) / "export"
    assert weights.load(base).dit.config.depth_channels == 0
    run = start(tmp_path / "stage2", f"init_from={base}", "trainer.max_steps=2")
    assert all(row["train/teacher"] > 0 for row in trace(run))
    with torch.device("meta"):
        names = ThreeStreamDiT(weights.load(run / "export").dit.config).state_dict()
    assert part_of(run, "network/").keys() == names.keys()
    wanted = {f"{name}/{key}" for name in names for key in ("step", "exp_avg", "exp_avg_sq")}
    assert part_of(run, "optimizer/").keys() == wanted


def test_without_weight_there_is_no_teacher(tmp_path: Path, start: Train, whole: Path) -> None:
    off = ["objective.teacher_weight_noisy=0.0", "objective.teacher_weight_clean=0.0"]
    base = f"init_from={whole / 'export'}"
    run = start(tmp_path, base, *off, "trainer.max_steps=1")
    assert trace(run)[0]["train/teacher"] == 0


def test_the_export_is_the_average(whole: Path) -> None:
    average = part_of(whole, "average/")
    exported = weights.load(whole / "export")
    for name, tensor in exported.dit.state_dict().items():
        torch.testing.assert_close(tensor, average[name], rtol=0, atol=0)
    assert exported.use == {"image_size": [32, 32], "text": "small", "cfg_scale": 4.0}


def module(*overrides: str, **changes: object) -> ModalityForcing:
    cfg = compose("train", overrides=["model=xs", *overrides])
    parts = {key: train.build(cfg[key]) for key in ("model", "encoders", "objective", "optimizer")}
    return ModalityForcing(**parts, init_from=None, seed=0, **changes)


def test_the_denominator_is_the_share_of_the_global_batch() -> None:
    one = module()
    strategy = SimpleNamespace(reduce=lambda total, reduce_op: total + 50)  # the other rank's
    trainer = SimpleNamespace(world_size=2, accumulate_grad_batches=3, strategy=strategy)
    one._trainer = trainer
    assert one.share_of_step(70) == (70 + 50) / (2 * 3)


def test_an_unknown_body_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="body_dtype is 'float16'; accepted: float32, bfloat16"):
        module(body_dtype="float16")


def test_a_base_that_was_distilled_for_guidance_is_refused() -> None:
    with pytest.raises(ValueError, match="use_guidance_embed is true, but nothing says"):
        module("model.use_guidance_embed=true")


def test_only_matrices_decay_and_nothing_is_left_out() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    network[0].bias.requires_grad_(False)
    optimizer, _ = AdamW(weight_decay=0.5).build(network, 10)
    sizes = {group["weight_decay"]: len(group["params"]) for group in optimizer.param_groups}
    assert sizes == {0.5: 1, 0.0: 2}


def test_the_rate_warms_up_then_stays_or_falls() -> None:
    constant = AdamW(warmup_steps=4)
    assert [constant.rate(s, 20) for s in (0, 1, 3, 4, 19)] == [0.25, 0.5, 1, 1, 1]
    cosine = AdamW(warmup_steps=4, decay="cosine", final_lr_fraction=0.1)
    assert [cosine.rate(s, 20) for s in (3, 12, 20, 99)] == pytest.approx([1, 0.55, 0.1, 0.1])


def test_a_cosine_without_an_end_and_unknown_decays_are_refused() -> None:
    with pytest.raises(ValueError, match="a cosine needs an end.*-1"):
        AdamW(decay="cosine").build(nn.Linear(2, 2), -1)
    with pytest.raises(ValueError, match="'linear'; accepted: constant, cosine"):
        AdamW(decay="linear")


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_an_average_that_never_moves_or_explodes_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=f"ema decay is {decay}"):
        EMA(decay=decay)


def test_without_checkpoints_there_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    assert newest(tmp_path / "none") is None
    assert Checkpoint(folder=str(tmp_path), every_n_steps=1).keep == 2
