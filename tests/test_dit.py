"""The network: released names and shapes, golden numbers, parity with diffusers, every option."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import diffusers_network
from torch import Tensor, nn

from mofo.model import growth, weights
from mofo.model.dit import DiTConfig, ThreeStreamDiT
from mofo.model.layouts import from_diffusers

GOLDEN = Path(__file__).parent / "golden"
TINY = DiTConfig(
    in_channels=16,
    depth_channels=64,
    context_in_dim=48,
    hidden_size=32,
    num_heads=1,
    depth_double=1,
    depth_single=1,
    depth_decoder_num_layers=1,
    axes_dim=[8, 8, 8, 8],
)
T2I = replace(TINY, depth_channels=0, hidden_size=64, num_heads=2, depth_single=2)
VERSIONS = ["tiny_v1", "tiny_v2"]


def read_golden(version: str) -> tuple[dict[str, Tensor], tuple[int, int]]:
    row = json.loads((GOLDEN / version / "golden.json").read_text())
    return weights.read_tensors(GOLDEN / version / "golden.safetensors"), tuple(row["grid"])


def randomise(network: nn.Module, seed: int = 0) -> nn.Module:
    """Gates and heads away from zero, so that every weight shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return network


def build(config: DiTConfig) -> ThreeStreamDiT:
    return randomise(ThreeStreamDiT(config)).eval()


def inputs(config: DiTConfig, grid: tuple[int, int] = (2, 3)) -> list[Tensor]:
    generator, n = torch.Generator().manual_seed(1), grid[0] * grid[1]
    shapes = [(2, 5, config.context_in_dim), (2, n, config.in_channels), (2, n, 64), (2,), (2,)]
    return [torch.rand(shape, generator=generator) for shape in shapes]


@torch.no_grad()
def run(network: ThreeStreamDiT, arguments: list, **options) -> tuple[Tensor, Tensor | None]:
    return network(*arguments, grid=(2, 3), **options)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_forward_pass_is_the_golden_one(version: str) -> None:
    golden, grid = read_golden(version)
    dit = weights.load(GOLDEN / version).dit
    arguments = [golden[k] for k in ("ctx", "img", "depth", "t_rgb", "t_depth")]
    with torch.no_grad():
        v_image, x_depth = dit(*arguments, grid=grid)
    torch.testing.assert_close(v_image, golden["out_rgb"], rtol=0, atol=1e-5)
    torch.testing.assert_close(x_depth, golden["out_depth"], rtol=0, atol=1e-5)


def test_a_bf16_body_keeps_an_fp32_depth_head_off_the_bf16_grid() -> None:
    golden, grid = read_golden("tiny_v2")
    dit = weights.load(GOLDEN / "tiny_v2", dtype=torch.bfloat16).dit
    arguments = [golden[k] for k in ("ctx", "img", "depth", "t_rgb", "t_depth")]
    with torch.no_grad():
        v_image, x_depth = dit(*arguments, grid=grid)
    torch.testing.assert_close(v_image.float(), golden["out_rgb_bf16"].float(), rtol=0, atol=2e-2)
    torch.testing.assert_close(x_depth, golden["out_depth_bf16"].float(), rtol=0, atol=2e-2)
    assert x_depth.dtype == torch.float32
    assert (x_depth != x_depth.bfloat16().float()).float().mean() > 0.9


def test_text_to_image_is_the_golden_one() -> None:
    golden = weights.read_tensors(GOLDEN / "t2i_tiny" / "golden.safetensors")
    dit = growth.text_to_image(GOLDEN / "t2i_tiny" / "flux2_t2i.safetensors")
    with torch.no_grad():
        v_image, depth = dit(golden["ctx"], golden["x"], None, golden["t"], None, grid=(4, 4))
    torch.testing.assert_close(v_image, golden["out"], rtol=0, atol=1e-5)
    assert depth is None


@pytest.mark.parametrize("has_guidance", [False, True])
def test_text_to_image_agrees_with_diffusers(has_guidance: bool) -> None:
    theirs = diffusers_network(has_guidance=has_guidance)
    randomise(theirs).eval()
    ours = ThreeStreamDiT(
        replace(T2I, cross_stream_timestep_mixing=False, use_guidance_embed=has_guidance)
    )
    ours.load_state_dict(from_diffusers(theirs.state_dict()))
    text, image, _, t, _ = inputs(T2I)
    guidance = torch.tensor([1.0, 4.0]) if has_guidance else None
    text_ids = torch.cartesian_prod(*[torch.arange(n) for n in (1, 1, 1, text.shape[1])])
    image_ids = torch.cartesian_prod(*[torch.arange(n) for n in (1, 2, 3, 1)])
    with torch.no_grad():
        expected = theirs(
            hidden_states=image,
            encoder_hidden_states=text,
            timestep=t,
            img_ids=image_ids,
            txt_ids=text_ids,
            guidance=guidance,
        ).sample
    got, _ = run(ours, [text, image, None, t, None], guidance=guidance)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_the_9b_has_exactly_the_released_names_and_shapes() -> None:
    rows = (line.split(" ", 1) for line in (GOLDEN / "released_keys.txt").open())
    released = {name.removeprefix("dit."): json.loads(shape) for name, shape in rows}
    with torch.device("meta"):
        state = ThreeStreamDiT(DiTConfig()).state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == released
    assert len(state) == 279
    assert sum(tensor.numel() for tensor in state.values()) == pytest.approx(11.99e9, rel=5e-4)


OPTIONS = [
    {},
    {"cross_stream_timestep_mixing": False},
    {"depth_decoder_num_layers": 0},
    {"depth_decoder_num_layers": 2, "cross_stream_timestep_mixing": False},
    {"use_guidance_embed": True},
    {"axes_dim": [2, 14, 14, 2]},
    {"axes_dim": [0, 16, 16, 0]},
    {"hidden_size": 48, "num_heads": 3, "axes_dim": [4, 4, 4, 4]},
    {"mlp_ratio": 2.5, "depth_double": 2, "depth_single": 3},
    {"theta": 10_000},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_runs_and_uses_every_parameter(options: dict) -> None:
    config = replace(TINY, **options)
    dit = build(config)
    guidance = torch.tensor([3.0, 4.0]) if config.use_guidance_embed else None
    v_image, x_depth = dit(*inputs(config), grid=(2, 3), guidance=guidance)
    (v_image.square().sum() + x_depth.square().sum()).backward()
    assert (v_image.shape, x_depth.shape) == ((2, 6, 16), (2, 6, 64))
    idle = {name for name, p in dit.named_parameters() if p.grad is None or not p.grad.any()}
    assert not idle


def test_without_depth_channels_there_are_no_depth_parameters() -> None:
    dit = build(replace(T2I, use_guidance_embed=True))
    assert not [name for name, _ in dit.named_parameters() if "depth" in name or "alpha" in name]
    text, image, _, t, _ = inputs(T2I)
    v_image, x_depth = run(dit, [text, image, None, t, None], guidance=torch.ones(2))
    assert v_image.shape == (2, 6, 16)
    assert x_depth is None


def test_without_depth_three_streams_are_the_text_to_image_model() -> None:
    three = build(TINY)
    two = ThreeStreamDiT(replace(TINY, depth_channels=0))
    two.load_state_dict({name: three.state_dict()[name] for name in two.state_dict()})
    text, image, _, t, _ = inputs(TINY)
    got, expected = (run(net, [text, image, None, t, None])[0] for net in (three, two))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("mixes", [True, False])
def test_only_time_mixing_shows_a_modality_the_time_of_the_other(mixes: bool) -> None:
    dit = build(replace(TINY, cross_stream_timestep_mixing=mixes))
    t = [torch.tensor([0.2, 0.4]), torch.tensor([0.6, 0.8])]
    with torch.no_grad():
        image, depth = dit.embed_times(*t, None)
        image_again, _ = dit.embed_times(t[0], 1 - t[1], None)
        _, depth_again = dit.embed_times(1 - t[0], t[1], None)
    assert torch.equal(image, image_again) is not mixes
    assert torch.equal(depth, depth_again) is not mixes


def test_a_sample_is_the_same_alone_and_in_a_batch() -> None:
    dit, arguments = build(TINY), inputs(TINY)
    together, alone = run(dit, arguments), run(dit, [one[1:] for one in arguments])
    for many, one in zip(together, alone, strict=True):
        torch.testing.assert_close(many[1:], one, rtol=0, atol=1e-6)


def test_fresh_weights_start_with_no_output_and_with_identity_blocks() -> None:
    outputs = run(ThreeStreamDiT(TINY), inputs(TINY))
    assert all((out == 0).all() for out in outputs)


@pytest.mark.parametrize("embeds", [True, False])
def test_guidance_without_its_embedding_and_the_reverse_are_refused(embeds: bool) -> None:
    dit = build(replace(TINY, use_guidance_embed=embeds))
    guidance = None if embeds else torch.ones(2)
    message = "guidance is None, but this network needs" if embeds else "takes no guidance"
    with pytest.raises(ValueError, match=message):
        run(dit, inputs(TINY), guidance=guidance)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "hidden_size 32 is not a multiple of num_heads 3"),
        ({"axes_dim": [8, 8, 8]}, r"axes_dim \[8, 8, 8\] must be 4 sizes.*= 32"),
        ({"axes_dim": [8, 8, 8, 4]}, "sum to the head size"),
        ({"axes_dim": [7, 9, 8, 8]}, "must be even"),
    ],
)
def test_dimensions_that_do_not_fit_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **options)
