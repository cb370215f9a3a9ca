"""`sample`: golden runs, exact on straight lines, and what is given comes back untouched."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mofo import flow
from mofo.model import weights
from mofo.model.dit import DiTConfig, ThreeStreamDiT
from mofo.sampler import sample
from mofo.schedule import Schedule

GOLDEN = Path(__file__).parent / "golden"
RUNS = [
    (version, name)
    for version in ("tiny_v1", "tiny_v2")
    for name in json.loads((GOLDEN / version / "golden.json").read_text())["samples"]
]
GRID = (2, 3)
CONFIG = DiTConfig(
    in_channels=4,
    depth_channels=4,
    context_in_dim=8,
    hidden_size=16,
    num_heads=2,
    depth_double=1,
    depth_single=1,
    depth_decoder_num_layers=1,
    axes_dim=[2, 2, 2, 2],
)


class Straight(ThreeStreamDiT):
    """The exact answer for data that is one picture and one depth map: all paths are straight.

    With `follows_text` the image's velocity is the mean of the text instead.
    """

    def __init__(self, *, follows_text: bool = False) -> None:
        nn.Module.__init__(self)
        self.config, self.follows_text = CONFIG, follows_text
        generator = torch.Generator().manual_seed(9)
        self.image, self.depth = torch.randn(2, 6, 4, generator=generator)
        self.calls: list[tuple] = []

    def forward(self, text, image, depth, t_image, t_depth, *, grid, guidance=None):
        self.calls.append((len(text), image, depth, t_image, t_depth))
        v_image = (image - self.image) / t_image.clamp(min=1e-6)[:, None, None]
        if self.follows_text:
            v_image = text.mean((1, 2))[:, None, None].expand_as(image)
        return v_image, self.depth.expand_as(image)


@pytest.fixture(scope="module")
def network() -> ThreeStreamDiT:
    """A small network whose every weight matters."""
    dit = ThreeStreamDiT(CONFIG).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in dit.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return dit


def text(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 8, generator=torch.Generator().manual_seed(2))


def tokens(n: int = 2, seed: int = 3) -> Tensor:
    return torch.randn(n, 6, 4, generator=torch.Generator().manual_seed(seed))


def run(dit: ThreeStreamDiT, n: int = 2, **options) -> tuple[Tensor, Tensor | None]:
    options = {"num_steps": 4, "seeds": range(n), "grid": GRID} | options
    return sample(dit, Schedule(), options.pop("text", text(n)), **options)


@pytest.mark.parametrize(("version", "name"), RUNS)
def test_samples_are_the_golden_ones(version: str, name: str) -> None:
    row = json.loads((GOLDEN / version / "golden.json").read_text())
    golden, case = weights.read_tensors(GOLDEN / version / "golden.safetensors"), row["samples"]
    release, case = weights.load(GOLDEN / version), case[name]
    got = sample(
        release.dit,
        release.schedule,
        golden["ctx"],
        grid=tuple(row["grid"]),
        image=golden["img"] if case["mode"] == "i2d" else None,
        depth=golden["depth"] if case["mode"] == "d2i" else None,
        null_text=golden["null_ctx"] if case.get("null") else None,
        num_steps=case["num_steps"],
        cfg_scale=case.get("cfg_scale", 1.0),
        log2_alpha=case.get("log2_alpha"),
        noise=(golden.get(f"{name}.noise_rgb"), golden.get(f"{name}.noise_depth")),
    )
    for tensor, stream in zip(got, ("rgb", "depth"), strict=True):
        torch.testing.assert_close(tensor, golden[f"{name}.{stream}"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_steps", [1, 5])
@pytest.mark.parametrize("log2_alpha", [None, 2.0])
def test_straight_paths_are_sampled_exactly(num_steps: int, log2_alpha: float | None) -> None:
    dit = Straight()
    image, depth = run(dit, num_steps=num_steps, log2_alpha=log2_alpha)
    torch.testing.assert_close(image, dit.image.expand_as(image), rtol=0, atol=1e-5)
    torch.testing.assert_close(depth, dit.depth.expand_as(depth), rtol=0, atol=1e-5)


def test_a_given_image_stays_clean_and_comes_back_untouched() -> None:
    dit, given = Straight(), tokens().bfloat16()
    image, depth = run(dit, image=given)
    assert image is given
    torch.testing.assert_close(depth, dit.depth.expand_as(depth), rtol=0, atol=1e-5)
    for _, seen, _, t_image, _ in dit.calls:
        assert torch.equal(seen, given.float())
        assert not t_image.any()


def test_a_given_depth_stays_clean_and_comes_back_untouched() -> None:
    dit, given = Straight(), tokens()
    image, depth = run(dit, depth=given)
    assert depth is given
    torch.testing.assert_close(image, dit.image.expand_as(image), rtol=0, atol=1e-5)
    for _, _, seen, _, t_depth in dit.calls:
        assert torch.equal(seen, given)
        assert not t_depth.any()


def test_a_soft_depth_is_renoised_along_the_tilted_walk_with_one_noise() -> None:
    dit, given = Straight(), tokens()
    noise = (tokens(seed=4), tokens(seed=5))
    image, depth = run(dit, depth=given, log2_alpha=-5.0, noise=noise)
    _, walk = Schedule().walk(4, "depth", -5.0)
    assert depth is given
    for (_, _, seen, _, t_depth), t in zip(dit.calls, walk, strict=False):
        assert (t_depth == t).all()
        torch.testing.assert_close(seen, flow.mix(given, noise[1], t_depth))
    torch.testing.assert_close(image, dit.image.expand_as(image), rtol=0, atol=1e-5)


MODES = [
    {},
    {"log2_alpha": 5.0},
    {"null_text": text(1) * 0, "cfg_scale": 3.0},
    {"image": tokens(3)},
    {"depth": tokens(3)},
    {"depth": tokens(3), "log2_alpha": -5.0},
]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "+".join(mode) or "joint")
def test_a_sample_is_the_same_alone_and_in_a_batch(network: ThreeStreamDiT, mode: dict) -> None:
    one = {k: v[2:] if k in ("image", "depth") else v for k, v in mode.items()}
    # The loop is exact; in a network, matrix products round differently in another batch size.
    for dit, atol in ((Straight(follows_text=True), 0), (network, 2e-5)):
        together = run(dit, 3, seeds=[5, 6, 70], **mode)
        alone = run(dit, 1, text=text(3)[2:], seeds=[70], **one)
        for many, single in zip(together, alone, strict=True):
            torch.testing.assert_close(many[2:], single, rtol=0, atol=atol)


def test_the_same_seed_is_the_same_sample_and_another_is_another(network: ThreeStreamDiT) -> None:
    (first, _), (again, _), (other, _) = (run(network, seeds=s) for s in ([1, 2], [1, 2], [1, 3]))
    assert torch.equal(first, again)
    assert torch.equal(first[0], other[0])
    assert not torch.equal(first[1], other[1])


def test_seeds_draw_image_noise_then_depth_noise(network: ThreeStreamDiT) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    image = torch.stack([torch.randn(6, 4, generator=g) for g in generators])
    depth = torch.stack([torch.randn(6, 4, generator=g) for g in generators])
    seeded, given = run(network), run(network, noise=(image, depth))
    for one, other in zip(seeded, given, strict=True):
        assert torch.equal(one, other)


def test_guidance_goes_beyond_the_condition_in_one_batched_pass() -> None:
    dit = Straight(follows_text=True)
    condition, null = torch.full((2, 3, 8), 2.0), torch.full((1, 3, 8), 0.5)
    noise = (tokens(), tokens(seed=4))
    image, _ = run(dit, text=condition, null_text=null, cfg_scale=3.0, noise=noise)
    torch.testing.assert_close(image, noise[0] - (0.5 + 3 * (2.0 - 0.5)))
    assert [call[0] for call in dit.calls] == [4] * 4


def test_a_scale_of_one_never_asks_for_the_null_text() -> None:
    dit = Straight()
    run(dit, null_text=text(1))
    assert [call[0] for call in dit.calls] == [2] * 4


def test_the_null_text_may_be_one_row_or_one_per_sample(network: ThreeStreamDiT) -> None:
    null = text(3)[2:]
    one = run(network, null_text=null, cfg_scale=2.0)
    many = run(network, null_text=null.expand(2, -1, -1), cfg_scale=2.0)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def test_the_state_is_fp32_over_a_bf16_body(network: ThreeStreamDiT) -> None:
    dit = ThreeStreamDiT(CONFIG)
    dit.load_state_dict(network.state_dict())
    dit.to(torch.bfloat16).depth_final_layer.float()
    image, depth = run(dit)
    assert image.dtype == depth.dtype == torch.float32
    assert (image != image.bfloat16().float()).any()


def test_a_text_to_image_network_samples_images_alone() -> None:
    dit = ThreeStreamDiT(replace(CONFIG, depth_channels=0))
    image, depth = run(dit, null_text=text(1), cfg_scale=2.0)
    assert image.shape == (2, 6, 4)
    assert depth is None


@pytest.mark.parametrize("guidance", [4.0, torch.tensor([4.0, 4.0])], ids=["float", "tensor"])
def test_a_guidance_embedding_is_fed_in_both_halves(guidance: float | Tensor) -> None:
    dit = ThreeStreamDiT(replace(CONFIG, use_guidance_embed=True))
    image, _ = run(dit, guidance=guidance, null_text=text(1), cfg_scale=2.0)
    assert image.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": tokens(), "depth": tokens()}, "both given"),
        ({"cfg_scale": 4.0}, "cfg_scale is 4.0.*null_text"),
        ({"image": tokens(), "log2_alpha": 5.0}, "log2_alpha=5.0.*does not walk"),
        ({"seeds": (0, 1, 2)}, "3 seeds for 2 captions"),
        ({"num_steps": 0}, "num_steps is 0"),
    ],
)
def test_requests_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(Straight(), **options)
