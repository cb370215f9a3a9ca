"""The plan of a run: counted operations and bytes are those that a run has."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch.autograd.graph import saved_tensors_hooks
from watched import CONFIGS, Scales, tiny, with_callback, write_shards

import train
from mofo.model.dit import DiTConfig, ThreeStreamDiT
from mofo.training import cost, plan
from mofo.training.cost import Shape
from mofo.training.plan import Work

SMALL = DiTConfig(
    in_channels=24,
    depth_channels=64,
    context_in_dim=64,
    hidden_size=32,
    num_heads=4,
    depth_double=1,
    depth_single=2,
    depth_decoder_num_layers=1,
    axes_dim=[2, 2, 2, 2],
)
SHAPE = Shape((4, 4), 8)
LARGE = [
    "model=klein_9b",
    "encoders=flux2_qwen3",
    "data=mixture",
    "trainer=fsdp",
    "body_dtype=bfloat16",
    "recompute=true",
    "init_from=nowhere/flux2-klein-9b",
]


@pytest.fixture(scope="module", autouse=True)
def configs() -> Iterator[None]:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


def compose_with(*overrides: str, plan: list[int]) -> Any:
    cfg = compose("train", overrides=["model=xs", *overrides])
    OmegaConf.set_struct(cfg, False)
    cfg.plan = plan
    return cfg


def work(**changes: Any) -> Work:
    settings = {"model": SMALL, "teacher": None, "shape": SHAPE, "batch_size": 32, **changes}
    return Work(**settings)


def test_operations_are_those_of_the_matrix_products() -> None:
    """By hand, for a text-to-image network of one single block."""
    config = DiTConfig(
        in_channels=24, depth_channels=0, context_in_dim=64, hidden_size=32, num_heads=4,
        depth_double=0, depth_single=1, depth_decoder_num_layers=0, axes_dim=[2, 2, 2, 2],
        cross_stream_timestep_mixing=False,
    )  # fmt: skip
    d, wide, image, text = 32, 96, 16, 8
    tokens = image + text
    block = tokens * (d * (3 * d + 2 * wide) + (d + wide) * d) + 2 * tokens * tokens * d
    outside = image * 24 * d + text * 64 * d + image * d * 24
    times = 256 * d + d * d + (6 + 6 + 3 + 2) * d * d  # modulations: double twice, single, head
    assert cost.forward_flops(config, SHAPE) == 2 * (block + outside + times)


def test_a_step_is_three_forward_passes_and_one_of_the_teacher() -> None:
    forward = cost.forward_flops(SMALL, SHAPE)
    without = cost.forward_flops(SMALL, SHAPE, depth=False)
    assert without < forward
    assert cost.step_flops(SMALL, SHAPE, None) == 3 * forward
    assert cost.step_flops(SMALL, SHAPE, SMALL) == 3 * forward + without
    assert sum(work(teacher=SMALL).operations.values()) == 32 * (3 * forward + without)


def test_kept_activations_are_those_that_a_forward_pass_keeps() -> None:
    dit = ThreeStreamDiT(SMALL)
    for parameter in dit.parameters():
        parameter.data.normal_(std=0.1)
    weights = {p.untyped_storage().data_ptr() for p in dit.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        cost._run(dit, SHAPE)
    counted = cost.kept_activations(SMALL, SHAPE, torch.float32)
    assert counted.whole == pytest.approx(sum(s.nbytes() for s in kept.values()), rel=0.02)
    assert counted.recomputed < counted.whole / 2
    half = cost.kept_activations(SMALL, SHAPE, torch.bfloat16)
    assert 0.4 * counted.whole < half.whole < 0.8 * counted.whole


def test_bytes_are_those_of_a_run(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards")
    cfg = tiny(tmp_path, tmp_path / "shards", "trainer.max_steps=2")
    planned = plan.read(cfg)
    train.train(with_callback(cfg, Scales, folder=str(tmp_path / "run")))
    weighed = json.loads((tmp_path / "run" / "bytes_0.json").read_text())
    assert weighed.keys() < plan.state(planned, 1).keys()
    for name, size in weighed.items():
        assert plan.state(planned, 1)[name] == pytest.approx(size, rel=0.05), name
    [folder] = (tmp_path / "run" / "checkpoints").glob("step_*")
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert plan.checkpoint(planned) == pytest.approx(size, rel=0.05)


def test_the_first_rank_holds_most_and_all_hold_everything() -> None:
    network = work().network
    for shards in (1, 2, 3, 8, 64):
        rows = [-(-p.shape[0] // shards) * (p.numel() // p.shape[0]) for p in network.parameters()]
        assert plan.held(network, shards) == sum(rows)
        assert shards * plan.held(network, shards) >= plan.held(network, 1)
    assert plan.held(network, 1) == sum(p.numel() for p in network.parameters())


def test_sharding_divides_the_state_and_copies_multiply_it() -> None:
    whole, split = work(), work(sharded=True)
    assert plan.state(whole, 8)["weights"] == plan.state(whole, 1)["weights"]
    ratio = plan.state(split, 8)["weights"] / plan.state(whole, 8)["weights"]
    assert ratio == pytest.approx(1 / 8, rel=0.01)
    copied = replace(split, replicas=4)
    assert plan.state(copied, 8) == plan.state(split, 2)
    assert not {"weights", "optimiser"} & plan.memory(replace(split, offload=True), 8).keys()


def test_micro_batches_hold_gradients_or_send_them_more_often() -> None:
    held = work(sharded=True, accumulate=4)
    sent = replace(held, hold_gradients=False)
    name = "reduce-scatter of gradients"
    assert plan.traffic(sent, 8)[name] == 4 * plan.traffic(held, 8)[name]
    extra = plan.memory(held, 8).keys() - plan.memory(sent, 8).keys()
    assert extra == {"gradients, held whole"}
    assert held.samples(8) == 1


def test_copies_trade_gathering_between_nodes_for_one_reduction() -> None:
    split, copied = work(sharded=True), work(sharded=True, replicas=4)
    gather = "all-gather of weights"
    assert plan.traffic(copied, 32)[gather] < plan.traffic(split, 32)[gather]
    assert plan.traffic(copied, 32)["all-reduce between copies"] > 0
    assert plan.traffic(work(), 1) == {"all-reduce of gradients": 0}


def test_a_large_run_is_described_without_its_files() -> None:
    cfg = compose("train", overrides=["name=large", *LARGE])
    text = plan.describe(cfg, (8, 64))
    lines = {line[:34].strip(): line[34:].split() for line in text.splitlines()[3:]}
    assert text.startswith("large: 12 B parameters, split over all ranks")
    assert lines["ranks"] == ["8", "64"]
    assert lines["weights"] == ["5.6", "GiB", "714.4", "MiB"]
    assert lines["optimiser"] == ["11.2", "GiB", "1.4", "GiB"]
    assert lines["checkpoint"] == ["178.6", "GiB", "178.6", "GiB"]
    assert lines["forward"][1] == "PFLOP"
    assert lines["encoders"][0] == "11.2"  # the text encoder in bfloat16, as its config says
    assert {"teacher", "recomputed", "text encoder", "all-gather of the teacher"} <= lines.keys()


def test_the_numbers_of_ranks_can_be_chosen_and_must_hold_the_copies() -> None:
    described = plan.describe(compose_with(plan=[3, 5]))
    assert described.splitlines()[3].split() == ["ranks", "3", "5"]
    copies = ["trainer=fsdp", "trainer.strategy.replicas=2"]
    with pytest.raises(ValueError, match="3 ranks cannot hold 2 copies"):
        plan.describe(compose_with(*copies, plan=[3]))


def test_an_unknown_text_encoder_that_is_not_here_is_named() -> None:
    with pytest.raises(ValueError, match="^nowhere: not here"):
        plan.describe(compose("train", overrides=["encoders.text=nowhere"]))
