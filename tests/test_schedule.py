"""Where training spends time and where sampling walks."""

import json
from pathlib import Path

import pytest
import torch

from mofo.flow import SampleStreams
from mofo.model.weights import read_tensors
from mofo.schedule import LogitNormal, Schedule, Uniform, shift, tilt

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "schedules.json").read_text())
GIVEN = {None: None, "i2d": "image", "d2i": "depth"}
MANY = 4000


@pytest.mark.parametrize("case", CASES)
def test_walks_are_the_golden_ones(case: str) -> None:
    golden, row = read_tensors(GOLDEN / "schedules.safetensors"), CASES[case]
    t_image, t_depth = Schedule(**row["schedule"]).walk(
        row["num_steps"], GIVEN[row.get("mode")], row.get("log2_alpha")
    )
    torch.testing.assert_close(t_image, golden[f"{case}.rgb"], rtol=0, atol=1e-6)
    torch.testing.assert_close(t_depth, golden[f"{case}.depth"], rtol=0, atol=1e-6)


def test_shift_keeps_the_ends_and_is_affine_in_logits() -> None:
    assert shift(torch.tensor([0.0, 1.0]), 1.1, 0.7).tolist() == [0, 1]
    t = torch.linspace(0.05, 0.95, 10)
    torch.testing.assert_close(shift(t, 1.1, 0.7).logit(), 1.1 + 0.7 * t.logit())


def test_tilt_keeps_the_ends_and_adds_to_logits() -> None:
    assert tilt(torch.tensor([0.0, 1.0]), -15.0).tolist() == [0, 1]
    t = torch.linspace(0.05, 0.95, 10)
    torch.testing.assert_close(tilt(t, 2.0).logit(), t.logit() + 2 * torch.tensor(2.0).log())


def test_a_positive_tilt_resolves_the_image_first() -> None:
    t_image, t_depth = Schedule().walk(10, log2_alpha=5.0)
    assert (t_depth[1:-1] > t_image[1:-1]).all()


def test_no_tilt_at_all_is_the_diagonal_walk() -> None:
    t_image, t_depth = Schedule(depth_shift_mu=0.3).walk(10, log2_alpha=0.0)
    torch.testing.assert_close(t_depth, t_image)


@pytest.mark.parametrize("given", [None, "image", "depth"])
def test_walks_fall_from_noise_to_data_and_hold_what_is_given(given: str | None) -> None:
    walks = dict(zip(("image", "depth"), Schedule().walk(7, given), strict=True))
    for name, t in walks.items():
        assert t.shape == (8,)
        assert t.dtype == torch.float32
        if name == given:
            assert (t == 0).all()
        else:
            assert (t[0], t[-1]) == (1, 0)
            assert (t.diff() < 0).all()


def test_soft_conditioning_walks_a_given_depth_below_the_image() -> None:
    t_image, t_depth = Schedule().walk(10, "depth", -5.0)
    assert (t_depth[1:-1] > 0).all()
    assert (t_depth[1:-1] < t_image[1:-1]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "num_steps is 0"),
        ((5, "text"), "given is 'text'.*accepted: None, 'image', 'depth'"),
        ((5, "image", 1.0), "log2_alpha=1.0.*leave log2_alpha out"),
    ],
)
def test_walks_that_make_no_sense_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule().walk(*arguments)


def test_uniform_times_are_uniform_before_the_shift() -> None:
    t = Uniform(mu=1.1, sigma=0.8).sample(MANY, SampleStreams(0, range(MANY)))
    drawn = torch.sigmoid((t.logit() - 1.1) / 0.8).sort().values
    steps = torch.linspace(0, 1, MANY)
    assert (drawn - steps).abs().max() < 1.95 / MANY**0.5  # Kolmogorov-Smirnov, p = 0.001


def test_logit_normal_times_have_normal_logits() -> None:
    t = LogitNormal(mu=1.1, sigma=0.8).sample(MANY, SampleStreams(0, range(MANY)))
    drawn = torch.special.ndtr((t.logit() - 1.1) / 0.8).sort().values
    assert (drawn - torch.linspace(0, 1, MANY)).abs().max() < 1.95 / MANY**0.5
