"""One, two and four ranks, whole or sharded, in parts or at once: the same training.

Each world size is launched once (tests/ranks.py); the tests compare what the runs wrote.
"""

import json
import math
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pictures
import pytest
import ranks
import torch
import torch.distributed as dist
import yaml
from hydra import initialize_config_dir
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mofo.data.write import write
from mofo.depth import DepthCodec
from mofo.model import weights
from mofo.model.dit import DiTConfig, ThreeStreamDiT
from mofo.model.weights import Release
from mofo.schedule import Schedule
from mofo.training import parallel
from mofo.training.module import Skipped
from mofo.training.parallel import Sharded

ROOT = Path(__file__).parents[1]
WITHOUT_DEPTH = {
    "depth_channels": 0,
    "depth_decoder_num_layers": 0,
    "cross_stream_timestep_mixing": False,
}
NUM_STEPS, SHORT = 50, 16  # the short runs go past the poisoned step
NATIVE_FAULTS = ("Signal 11 (SIGSEGV)", "Signal 6 (SIGABRT)")
AGREED = 1e-5  # relative, of whatever a step logs

Outcome = dict[str, Any]


def config() -> DiTConfig:
    sizes = yaml.safe_load((ROOT / "configs/model/xs.yaml").read_text())
    return DiTConfig(**{key: value for key, value in sizes.items() if key != "_target_"})


def network(**changes: Any) -> ThreeStreamDiT:
    """Every weight random, so that no gate is closed."""
    dit = ThreeStreamDiT(replace(config(), **changes))
    rng = torch.Generator().manual_seed(0)
    for parameter in dit.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng) * 0.1
    return dit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    write(
        [pictures.picture(i, size=(32, 32)) for i in range(24)],
        folder / "shards",
        "waves",
        samples_per_shard=8,
    )
    base = network(**WITHOUT_DEPTH)
    codec, schedule = DepthCodec(patch_size=1), Schedule()
    weights.save(Release(dit=base, codec=codec, schedule=schedule), folder / "base")
    return folder


@pytest.fixture(scope="module")
def one(folder: Path) -> Iterator[Callable[..., Outcome]]:
    """A case on one device, in this process."""
    done: dict[tuple[str, int], Outcome] = {}

    def run(case: str, num_steps: int = NUM_STEPS) -> Outcome:
        if (case, num_steps) not in done:
            with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
                done[case, num_steps] = ranks.train(folder, case, num_steps)
        return done[case, num_steps]

    return run


def launch(folder: Path, world: int, cases: dict[str, int]) -> dict[str, Outcome]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={world}", str(ROOT / "tests" / "ranks.py"), str(folder)]
    command += [f"{case}={num_steps}" for case, num_steps in cases.items()]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"GLOO_SOCKET_IFNAME": "lo"}
    for _ in range(2):
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
        # Now and then gloo's own thread (pt_gloo_runloop) dies of a fault of memory in the middle
        # of a run; the numbers of another launch count.
        if not any(fault in ran.stderr for fault in NATIVE_FAULTS):
            break
    assert ran.returncode == 0, ran.stderr[-4000:]
    return {case: json.loads((folder / f"{case}-{world}.json").read_text()) for case in cases}


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, Outcome]:
    short = dict.fromkeys(("micro_sharded", "poisoned_sharded"), SHORT)
    return launch(folder, 2, dict.fromkeys(("plain", "sharded"), NUM_STEPS) | short)


@pytest.fixture(scope="module")
def two_more(folder: Path) -> dict[str, Outcome]:
    cases = ("micro", "micro_reduced", "all_sharded", "teacher_whole", "poisoned")
    cases += (
        "bf16",
        "bf16_sharded",
        "scratch",
        "scratch_sharded",
        "compiled_sharded",
        "bf16_compiled",
    )
    return launch(folder, 2, dict.fromkeys(cases, SHORT))


@pytest.fixture(scope="module")
def four(folder: Path) -> dict[str, Outcome]:
    cases = ("plain", "sharded", "replicated", "micro_replicated", "poisoned_sharded")
    return launch(folder, 4, dict.fromkeys(cases, NUM_STEPS))


def assert_same_training(found: Outcome, expected: Outcome, *, within: float = AGREED) -> None:
    assert len(found["rows"]) <= len(expected["rows"])
    for row, other in zip(found["rows"], expected["rows"], strict=False):
        assert row == pytest.approx(other, rel=within, abs=1e-6, nan_ok=True)
    if len(found["rows"]) == len(expected["rows"]):
        for part in ("weights", "average"):
            assert found[part][0] == pytest.approx(expected[part][0], rel=within)
    assert all(rank == found["ranks"][0] for rank in found["ranks"])


@pytest.mark.parametrize("case", ["plain", "sharded", "micro_sharded"])
def test_two_ranks_train_what_one_trains(case: str, one: Callable, two: dict[str, Outcome]) -> None:
    expected = one("plain")
    assert expected["rows"][0]["train/teacher"] > 0
    assert expected["rows"][0]["train/depth"] > 0
    assert_same_training(two[case], expected)


def test_a_rank_keeps_its_part_alone(two: dict[str, Outcome]) -> None:
    assert two["plain"]["held"] == two["plain"]["all"]
    assert two["sharded"]["held"] / two["sharded"]["all"] == pytest.approx(1 / 2, abs=0.01)


@pytest.mark.parametrize("case", ["plain", "sharded"])
def test_the_average_can_take_the_weights_place_and_leave_it(
    case: str, two: dict[str, Outcome]
) -> None:
    weights, average = two[case]["weights"], two[case]["average"]
    assert weights != average
    assert two[case]["exchanged"] == [average, average, weights]


def test_micro_batches_and_recomputation_change_nothing(one: Callable) -> None:
    assert_same_training(one("micro", SHORT), one("plain"))
    recomputed = one("recomputed", SHORT)
    assert recomputed["rows"] == one("plain")["rows"][:SHORT]


def test_one_bad_sample_on_one_rank_costs_all_ranks_that_step_alone(
    one: Callable, two: dict[str, Outcome]
) -> None:
    alone, sharded = one("poisoned", SHORT), two["poisoned_sharded"]
    assert_same_training(sharded, alone)
    step = ranks.POISONED // ranks.BATCH
    for found in (alone, sharded):
        assert [i for i, row in enumerate(found["rows"]) if math.isnan(row["train/loss"])] == [step]
        assert (found["skipped"]["total"], found["skipped"]["in_a_row"]) == (1, 0)
        assert found["skipped"]["last"][0]["step"] == step
        assert ranks.POISONED in found["skipped"]["last"][0]["positions"]
        assert found["seen"] == SHORT * ranks.BATCH  # it is not met again
    # The other rank's samples are not suspected.
    assert len(sharded["skipped"]["last"][0]["keys"]) == ranks.BATCH // 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["micro", "micro_reduced", "all_sharded", "teacher_whole", "poisoned", "scratch"]
)
def test_the_other_ways_over_two_ranks_train_the_same(
    case: str, one: Callable, two_more: dict[str, Outcome]
) -> None:
    alone = one(case if case in ("poisoned", "scratch") else "plain", SHORT)
    assert_same_training(two_more[case], alone)


@pytest.mark.slow
def test_a_sharded_start_from_nothing_is_that_of_one_device(
    one: Callable, two_more: dict[str, Outcome]
) -> None:
    assert_same_training(two_more["scratch_sharded"], one("scratch", SHORT))


@pytest.mark.slow
def test_bf16_is_the_same_whole_and_sharded(two_more: dict[str, Outcome]) -> None:
    assert_same_training(two_more["bf16_sharded"], two_more["bf16"], within=0.02)
    first, other = (two_more[case]["rows"][0] for case in ("bf16_sharded", "bf16"))
    assert first == pytest.approx(other, rel=AGREED)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "eager"), [("compiled_sharded", "sharded"), ("bf16_compiled", "bf16")]
)
def test_blocks_are_compiled_although_they_are_cast_recomputed_and_sharded(
    case: str, eager: str, two: dict[str, Outcome], two_more: dict[str, Outcome]
) -> None:
    assert_same_training(two_more[case], (two | two_more)[eager])
    # A double block, and single blocks at two lengths: as many for any number of blocks.
    assert 3 <= two_more[case]["graphs"] <= 5


@pytest.mark.slow
@pytest.mark.parametrize("case", ["plain", "sharded", "replicated", "micro_replicated"])
def test_four_ranks_train_what_one_trains(
    case: str, one: Callable, four: dict[str, Outcome]
) -> None:
    assert_same_training(four[case], one("plain"))


@pytest.mark.slow
def test_four_ranks_skip_together(one: Callable, four: dict[str, Outcome]) -> None:
    assert_same_training(four["poisoned_sharded"], one("poisoned"))
    assert four["poisoned_sharded"]["skipped"]["total"] == 1


@pytest.mark.slow
def test_copies_are_held_by_groups_of_ranks(four: dict[str, Outcome]) -> None:
    shares = {case: four[case]["held"] / four[case]["all"] for case in ("sharded", "replicated")}
    assert shares == pytest.approx({"sharded": 1 / 4, "replicated": 1 / 2}, abs=0.01)


def streams() -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(1)
    draw = [torch.randn(2, *size, generator=rng) for size in ((5, 64), (16, 24), (16, 64))]
    return *draw, torch.rand(2, generator=rng), torch.rand(2, generator=rng)


def gradients(dit: ThreeStreamDiT) -> list[Tensor]:
    v_image, x_depth = dit(*streams(), grid=(4, 4))
    (v_image.float().square().mean() + x_depth.square().mean()).backward()
    found = [parameter.grad for parameter in dit.parameters()]
    assert all(gradient is not None for gradient in found)  # DDP need not look for unused ones
    return found


def test_a_network_computes_in_bf16_and_learns_in_float32() -> None:
    copied, cast = network().to(torch.bfloat16), network()
    copied.depth_final_layer.load_state_dict(cast.depth_final_layer.state_dict(), assign=True)
    names = list(cast.state_dict())
    parallel.compute_in(cast, torch.bfloat16)
    parallel.recompute(cast)
    found, expected = gradients(cast), gradients(copied)
    assert {gradient.dtype for gradient in found} == {torch.float32}
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other.float())
    assert list(cast.state_dict()) == names
    dtypes = [x.dtype for x in cast(*streams(), grid=(4, 4))]
    assert dtypes == [torch.bfloat16, torch.float32]


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_weights_are_gathered_whole_and_given_row_by_row(alone: None) -> None:
    mesh = init_device_mesh("cpu", (1,))
    given = {"weight": torch.randn(3, 2).to(torch.bfloat16)}
    with torch.device("meta"):
        linear = nn.Linear(2, 3, bias=False)
    fully_shard(linear, mesh=mesh)
    parallel.fill(linear, given, torch.device("cpu"))
    found = parallel.full_state(linear)["weight"]
    assert found.dtype == torch.float32
    assert torch.equal(found, given["weight"].float())


def test_leaving_frees_process_groups_that_only_a_cycle_holds() -> None:
    parallel.leave()  # nothing to leave
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.new_group(backend="gloo")
    freed = weakref.ref(group)
    cycle: list[Any] = [group]
    cycle.append(cycle)
    del group, cycle
    parallel.leave()
    assert freed() is None
    assert not dist.is_initialized()


def test_copies_that_do_not_divide_the_ranks_are_refused() -> None:
    strategy = Sharded(replicas=3)
    strategy.parallel_devices = [torch.device("cpu")] * 4
    with pytest.raises(ValueError, match=r"replicas is 3, but must divide the number of ranks, 4"):
        strategy.setup_environment()


def test_the_record_of_skipped_steps_survives_json_and_stays_small() -> None:
    skipped = Skipped()
    for step in range(30):
        skipped.add(step, {step: f"key-{step}"})
    restored = Skipped()
    restored.load_state_dict(json.loads(json.dumps(skipped.state_dict())))
    assert (restored.total, restored.in_a_row, len(restored.last)) == (30, 30, Skipped.NUM_KEPT)
    restored.in_a_row = 1
    assert str(restored) == "  after step 29: key-29 (positions [29])"
