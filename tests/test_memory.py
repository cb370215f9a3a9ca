"""Memory: what is needed, which plan fits, and blocks that come to the device in turns."""

import json
from pathlib import Path

import pytest
import torch
from tiny import network
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mofo import memory
from mofo.depth import DepthCodec
from mofo.memory import Available
from mofo.model import autoencoder, text, weights
from mofo.model.dit import DiTConfig, ThreeStreamDiT
from mofo.model.weights import Release
from mofo.schedule import Schedule

GOLDEN = Path(__file__).parent / "golden"
# Qwen/Qwen3-8B's config.json, as far as sizes go.
QWEN3_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
FLUX2_AUTOENCODER = 84_046_115 * 2  # bf16


def deep(**changes) -> ThreeStreamDiT:
    sizes = {"depth_double": 2, "depth_single": 3, "depth_decoder_num_layers": 2}
    # Frozen as streamed blocks are: for weights that learn, matmul takes another path for strided
    # input (torch's should_fold), and on some CPUs that path rounds differently.
    return network(**sizes, **changes).requires_grad_(False)


def forward(dit: ThreeStreamDiT, *, has_depth: bool = True, batch: int = 2) -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    given = [
        torch.randn(batch, length, c, generator=rng) for length, c in ((3, 64), (6, 24), (6, 64))
    ]
    times = torch.rand(2, batch, generator=rng)
    depth, t_depth = (given[2], times[1]) if has_depth else (None, None)
    with torch.no_grad():
        made = dit(given[0], given[1], depth, times[0], t_depth, grid=(2, 3))
    return [one for one in made if one is not None]


def blocks_of(dit: ThreeStreamDiT) -> list[torch.nn.Module]:
    return [*dit.double_blocks, *dit.single_blocks, *dit.depth_decoder_blocks]


def storages(module: torch.nn.Module) -> set[int]:
    return {one.untyped_storage().data_ptr() for one in module.parameters()}


def official(size: int = 512, **call) -> memory.Needs:
    """The method's release with Qwen3-8B in bf16; nothing of it is allocated."""
    with torch.device("meta"):
        dit = ThreeStreamDiT(DiTConfig())
    release = Release(dit=dit, codec=DepthCodec(), schedule=Schedule())
    return memory.measure(
        release,
        text=call.pop("text"),
        autoencoder=FLUX2_AUTOENCODER,
        dtype=torch.bfloat16,
        size=(size, size),
        **call,
    )


@pytest.fixture
def qwen3_8b(tmp_path: Path) -> int:
    """Bytes of the layers that are read, from the config alone."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    return text.load(tmp_path, dtype=torch.bfloat16).num_bytes


def test_streamed_blocks_give_the_same_bits_whatever_the_order_of_calls() -> None:
    resident, streamed = deep(), deep()
    memory.stream_blocks(streamed, "cpu")
    for has_depth in (True, True, False, False, True):
        for made, expected in zip(
            forward(streamed, has_depth=has_depth),
            forward(resident, has_depth=has_depth),
            strict=True,
        ):
            assert torch.equal(made, expected)
    state = resident.state_dict()
    assert all(torch.equal(one, state[name]) for name, one in streamed.state_dict().items())


def test_two_blocks_are_on_the_device_at_once_and_never_more() -> None:
    dit = deep()
    memory.stream_blocks(dit, "cpu")
    blocks = blocks_of(dit)
    hosts = [storages(block) for block in blocks]
    assert all(len(host) == 1 for host in hosts)
    seen: list[list[int]] = []
    places: set[int] = set()

    def look(i: int) -> None:
        here = [k for k, block in enumerate(blocks) if storages(block) != hosts[k]]
        assert i in here
        seen.append(here)
        places.update(*(storages(blocks[k]) for k in here))

    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, i=i: look(i))
    forward(dit)
    assert seen == [sorted([i, (i + 1) % len(blocks)]) for i in range(len(blocks))]
    assert len(places) == 2
    assert not places & set().union(*hosts)
    largest = max(sum(p.nbytes for p in block.parameters()) for block in blocks)
    for block in (blocks[0], blocks[-1]):
        size = next(block.parameters()).untyped_storage().nbytes()
        assert largest <= size < 1.2 * largest  # weights start at multiples of 256 bytes


def test_a_block_is_copied_anew_each_time_its_turn_comes() -> None:
    dit, other = deep(), deep()
    memory.stream_blocks(dit, "cpu")
    forward(dit)
    for network_ in (dit, other):
        with torch.no_grad():
            network_.single_blocks[1].linear1.weight.mul_(2)  # it has left the device by now
    assert torch.equal(forward(dit)[0], forward(other)[0])


def test_compiled_and_streamed_blocks_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)  # seconds to import
    streamed, compiled = network(), network()
    memory.stream_blocks(streamed, "cpu")
    with pytest.raises(ValueError, match=r"cannot be both.*--compile"):
        memory.compile_blocks(streamed)
    memory.compile_blocks(compiled)
    with pytest.raises(ValueError, match=r"cannot be both.*\"turns\""):
        memory.stream_blocks(compiled, "cpu")


def test_every_block_is_compiled_under_its_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def compile_(function):
        def run(*args, **kwargs):
            calls.append(function.__self__)
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(torch, "compile", compile_)
    dit, eager = deep(), deep()
    memory.compile_blocks(dit)
    assert torch.equal(forward(dit)[0], forward(eager)[0])
    assert calls == blocks_of(dit)
    assert list(dit.state_dict()) == list(eager.state_dict())


def test_the_official_release_fits_32_gb_by_turns_and_24_gb_by_offload(qwen3_8b: int) -> None:
    host = 64 * 10**9
    i2d = official(text=qwen3_8b)
    assert i2d.network == pytest.approx(24.0e9, rel=0.01)
    assert qwen3_8b == pytest.approx(11.7e9, rel=0.01)
    assert memory.choose(i2d, Available(32 * 10**9, host)) == "turns"
    joint = official(text=qwen3_8b, cfg_scale=4.0)
    assert memory.choose(joint, Available(24 * 10**9, host)) == "offload"
    assert memory.choose(joint, Available(48 * 10**9, host)) == "resident"


def test_guidance_a_batch_and_pixels_cost_memory(qwen3_8b: int) -> None:
    one = official(text=qwen3_8b).activations
    assert official(text=qwen3_8b, cfg_scale=4.0).activations == 2 * one
    assert official(text=qwen3_8b, num_samples=3).activations == 3 * one
    assert 3 * one < official(1024, text=qwen3_8b).activations < 4 * one


def test_what_fits_nowhere_is_refused_with_what_to_reduce(qwen3_8b: int) -> None:
    needs = official(text=qwen3_8b)
    words = r"15\.\d GiB are needed, 7\.5 GiB are free.*Reduce the size, the batch, or cfg_scale"
    with pytest.raises(ValueError, match=words):
        memory.choose(needs, Available(8 * 2**30 - 2**29, 64 * 10**9))
    with pytest.raises(ValueError, match=r"beside it \(2\d\.\d GiB needed\)"):
        memory.choose(needs, Available(24 * 10**9, 10 * 10**9))
    # A CPU has no memory beside its own to stream from.
    with pytest.raises(ValueError, match="no plan fits"):
        memory.choose(needs, Available(24 * 10**9, 0))


def test_a_plan_that_is_asked_for_is_taken_as_it_is(qwen3_8b: int) -> None:
    needs = official(text=qwen3_8b)
    assert memory.choose(needs, Available(0, 0), "resident") == "resident"
    with pytest.raises(ValueError, match="plan is 'all'; accepted: resident, turns, offload"):
        memory.choose(needs, Available(0, 0), "all")


def test_two_lines_say_what_is_needed_and_what_is_there(qwen3_8b: int) -> None:
    said = memory.summary(official(text=qwen3_8b), Available(32 * 2**30, 2**36), "turns")
    first, second = said.splitlines()
    assert "network 22.4 GiB (largest block 1.2 GiB), text encoder 10.9 GiB" in first
    assert "autoencoder 160 MiB" in first
    assert "512x512, batch 1" in first
    assert '32.0 GiB free; plan "turns" takes 24.2 GiB' in second


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_measured_is_what_is_loaded(dtype: torch.dtype) -> None:
    folder = GOLDEN / "tiny_v2"
    outline = weights.outline(folder)
    assert all(one.is_meta for one in outline.dit.parameters())
    needs = memory.measure(outline, text=0, autoencoder=0, dtype=dtype, size=(32, 32))
    dit = weights.load(folder, dtype=dtype).dit
    assert needs.network == sum(one.nbytes for one in dit.parameters())
    blocks = [sum(one.nbytes for one in block.parameters()) for block in blocks_of(dit)]
    assert (needs.blocks, needs.largest_block) == (sum(blocks), max(blocks))


def test_an_autoencoder_is_measured_by_its_headers() -> None:
    loaded = autoencoder.load(GOLDEN / "ae_tiny").network.state_dict().values()
    twice = 2 * autoencoder.load(GOLDEN / "ae_tiny").channels  # both files hold the statistics
    expected = sum(one.numel() for one in loaded if one.is_floating_point()) + twice
    found = memory.autoencoder_bytes(GOLDEN / "ae_tiny", torch.bfloat16) / 2
    assert expected <= found <= expected + 2  # and how many batches they are from, in each file
    assert memory.autoencoder_bytes("small", torch.float32) > 0


def test_the_estimate_covers_what_a_forward_allocates() -> None:
    sizes = {"hidden_size": 384, "num_heads": 3, "axes_dim": [32] * 4, "context_in_dim": 64}
    config = DiTConfig(
        **sizes,
        in_channels=24,
        depth_channels=64,
        depth_double=1,
        depth_single=1,
        depth_decoder_num_layers=1,
    )
    release = Release(
        dit=ThreeStreamDiT(config).eval(), codec=DepthCodec(patch_size=8), schedule=Schedule()
    )
    needs = memory.measure(
        release, text=0, autoencoder=0, dtype=torch.float32, size=(128, 128), cfg_scale=4.0
    )
    given = [torch.zeros(2, length, c) for length, c in ((512, 64), (256, 24), (256, 64))]
    times = torch.ones(2)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        release.dit(*given, times, times, grid=(16, 16))
    held = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 0.85 * needs.activations < peak < needs.activations


def test_free_memory_of_a_cpu_is_what_the_machine_has_left() -> None:
    free = memory.available("cpu")
    assert free.device > 0
    assert free.host == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_streaming_to_a_gpu_gives_the_same_bits_and_keeps_little_there() -> None:
    resident, streamed = deep().to("cuda"), deep()
    memory.stream_blocks(streamed, "cuda")
    assert all(block.linear1.weight.is_pinned() for block in streamed.single_blocks)
    rng = torch.Generator().manual_seed(1)
    given = [
        torch.randn(1, length, c, generator=rng).cuda() for length, c in ((3, 64), (6, 24), (6, 64))
    ]
    times = torch.rand(2, 1, generator=rng).cuda()
    for _ in range(3):
        with torch.no_grad():
            made, expected = (dit(*given, *times, grid=(2, 3)) for dit in (streamed, resident))
        assert all(torch.equal(*pair) for pair in zip(made, expected, strict=True))
    assert sum(block.linear1.weight.is_cuda for block in streamed.single_blocks) <= 2
