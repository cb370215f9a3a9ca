"""Who is generated, at which times, and what counts in the loss."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mofo import flow
from mofo.depth import DepthCodec
from mofo.flow import SampleStreams
from mofo.objective import FILLS, Objective, Terms, masked_mean
from mofo.schedule import LogitNormal, Uniform

MANY = 4000
OBJECTIVE = Objective(image_schedule=Uniform(), depth_schedule=LogitNormal())
T_IMAGE, T_DEPTH = torch.tensor([0.5, 0.0, 0.9, 0.3]), torch.tensor([0.2, 0.7, 0.0, 0.02])


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """Predictions and targets of four samples: two joint, one i2d, one d2i."""
    generator = torch.Generator().manual_seed(seed)
    names = {"v_image": 5, "v_target": 5, "v_teacher": 5, "x_depth": 4, "depth": 4, "valid": 4}
    out = {name: torch.randn(4, 6, c, generator=generator) for name, c in names.items()}
    return out | {"valid": out["valid"] > 0.5, "t_image": T_IMAGE, "t_depth": T_DEPTH}


def terms(given: dict[str, Tensor], measured: float | None = None, **changes: float) -> Terms:
    measured = float(given["valid"].sum()) if measured is None else measured
    return replace(OBJECTIVE, **changes).terms(**given, measured=measured)


def test_the_terms_are_the_documented_ones() -> None:
    given = tensors()
    got = terms(given, teacher_weight_noisy=3.0, teacher_weight_clean=0.5)
    image = (given["v_image"] - given["v_target"]).square().mean((1, 2))
    teacher = (given["v_image"] - given["v_teacher"]).square().mean((1, 2))
    depth = (given["x_depth"] - given["depth"]).square() * given["valid"]
    held = T_DEPTH.clamp(min=0.05)
    assert got.image == pytest.approx(float(image[[0, 2, 3]].sum() / 4))
    by_sample = depth.sum((1, 2)) / held**2
    expected = by_sample[[0, 1, 3]].sum() / given["valid"].sum()
    assert got.depth == pytest.approx(float(expected))
    pull = 3.0 * T_DEPTH + 0.5 * (1 - T_DEPTH)
    assert got.teacher == pytest.approx(float((pull * teacher)[[0, 2, 3]].sum() / 4))


def test_the_total_weighs_the_terms() -> None:
    weighted = replace(OBJECTIVE, image_weight=2.0, depth_weight=3.0)
    ones = Terms(*torch.tensor([1.0, 10.0, 100.0]))
    assert weighted.total(ones) == 132


def test_what_is_given_takes_no_loss_and_no_gradient() -> None:
    given = tensors()
    given["v_image"].requires_grad_()
    given["x_depth"].requires_grad_()
    OBJECTIVE.total(terms(given)).backward()
    assert not given["v_image"].grad[T_IMAGE == 0].any()
    assert not given["x_depth"].grad[T_DEPTH == 0].any()
    assert given["v_image"].grad[T_IMAGE > 0].all()
    assert given["x_depth"].grad[T_DEPTH > 0][given["valid"][T_DEPTH > 0]].all()


def test_unmeasured_pixels_carry_no_gradient_even_when_nan() -> None:
    given = tensors()
    plain = terms(given).depth
    given["depth"] = torch.where(given["valid"], given["depth"], torch.nan)
    given["x_depth"].requires_grad_()
    loss = terms(given).depth
    loss.backward()
    gradient = given["x_depth"].grad
    assert loss == plain
    assert gradient.isfinite().all()
    assert not gradient[~given["valid"]].any()


def test_unmeasured_metres_never_reach_loss_or_statistics() -> None:
    metres = torch.rand(1, 4, 6, generator=torch.Generator().manual_seed(0)) + 1
    valid = metres > 1.4
    losses = []
    for junk in (torch.nan, torch.inf, -5.0, 0.0, 1e30):
        depth, measured = DepthCodec(patch_size=2).encode(torch.where(valid, metres, junk), valid)
        given = {name: one[:1] for name, one in tensors().items()}
        given |= {"depth": depth, "valid": measured, "x_depth": torch.zeros(1, 6, 4)}
        losses.append(terms(given).depth)
    assert len(set(map(float, losses))) == 1
    assert losses[0] > 0


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_and_ranks_only_split_the_global_mean(parts: int) -> None:
    given = tensors()
    given["valid"][1:3] = False  # parts differ in how much they measured; some measured nothing
    whole = tensors() | {"valid": given["valid"]}
    leaf = whole["x_depth"].requires_grad_()
    loss = OBJECTIVE.total(terms(whole))
    loss.backward()
    # Lightning averages over micro-batches, DDP over ranks: each part divides by its share.
    share = float(given["valid"].sum()) / parts
    split = torch.zeros(())
    part_leaf = given["x_depth"].requires_grad_()
    for rows in torch.arange(4).chunk(parts):
        part = {name: one[rows] for name, one in given.items()}
        split = split + OBJECTIVE.total(terms(part, measured=share)) / parts
    split.backward()
    torch.testing.assert_close(split, loss)
    torch.testing.assert_close(part_leaf.grad, leaf.grad)


def test_no_measured_pixel_at_all_is_a_loss_of_zero() -> None:
    given = tensors()
    given["valid"] = torch.zeros_like(given["valid"])
    assert terms(given, measured=0.0).depth == 0


def test_without_depth_or_teacher_only_the_image_term_is_left() -> None:
    given = tensors()
    no_teacher = terms(given | {"v_teacher": None})
    assert (no_teacher.teacher, no_teacher.depth) == (0, terms(given).depth)
    absent = dict.fromkeys(("x_depth", "depth", "valid", "v_teacher", "t_depth"))
    stage_1 = terms(given | absent, measured=1.0)
    assert stage_1 == Terms(terms(given).image, torch.zeros(()), torch.zeros(()))


def test_the_loss_is_fp32_over_a_bf16_body() -> None:
    given = tensors()
    given["v_image"] = given["v_image"].bfloat16()
    assert all(term.dtype == torch.float32 for term in terms(given))


def test_masked_mean_divides_by_the_valid_or_by_the_given_count() -> None:
    values = torch.tensor([1.0, 5.0, torch.nan, 3.0])
    valid = torch.tensor([True, False, False, True])
    assert masked_mean(values, valid) == 2
    assert masked_mean(values, valid, 8.0) == 0.5
    assert masked_mean(values, torch.zeros(4, dtype=torch.bool)) == 0


def streams(n: int, seed: int = 0) -> SampleStreams:
    return SampleStreams(seed, range(n))


@pytest.mark.parametrize("mix", [(0.2, 0.2), (0.0, 0.5), (0.0, 0.0), (1.0, 0.0)])
def test_modes_are_mixed_as_told(mix: tuple[float, float]) -> None:
    objective = replace(OBJECTIVE, i2d_probability=mix[0], d2i_probability=mix[1])
    t_image, t_depth = objective.times(MANY, streams(MANY))
    assert not ((t_image == 0) & (t_depth == 0)).any()
    for t, p in zip((t_image, t_depth), mix, strict=True):
        spread = (p * (1 - p) / MANY) ** 0.5
        assert float((t == 0).float().mean()) == pytest.approx(p, abs=4 * spread)


def test_joint_times_are_independent_and_follow_their_own_schedules() -> None:
    objective = replace(
        OBJECTIVE,
        image_schedule=LogitNormal(mu=1.0, sigma=0.5),
        depth_schedule=LogitNormal(mu=-1.0, sigma=2.0),
    )
    t_image, t_depth = objective.times(MANY, streams(MANY))
    joint = (t_image > 0) & (t_depth > 0)
    logits = torch.stack([t_image[joint].logit(), t_depth[joint].logit()])
    assert logits.mean(1).tolist() == pytest.approx([1.0, -1.0], abs=0.15)
    assert logits.std(1).tolist() == pytest.approx([0.5, 2.0], rel=0.1)
    assert abs(float(torch.corrcoef(logits)[0, 1])) < 0.08


def test_times_of_a_sample_do_not_depend_on_its_batch() -> None:
    together = OBJECTIVE.times(9, SampleStreams(3, range(9)))
    alone = OBJECTIVE.times(1, SampleStreams(3, [8]))
    assert [float(t[8]) for t in together] == [float(t[0]) for t in alone]


@pytest.mark.parametrize("fill", FILLS)
def test_fill_decides_what_stands_where_nothing_was_measured(fill: str) -> None:
    objective = replace(OBJECTIVE, fill=fill)
    metres = torch.tensor([[[2.0, 9.0, 9.0, 6.0]]]).expand(3, 1, 4)
    valid = torch.tensor([[[True, False, False, True]]]).expand(3, 1, 4)
    depth, measured = DepthCodec(patch_size=1).encode(objective.filled(metres, valid), valid)
    t = torch.tensor([0.0, 0.4, 1.0])
    got = objective.corrupt_depth(depth, measured, t, streams(3))
    noise = streams(3).normal((4, 1))
    # Of unit mean and contracted: 2 m, 4 m (the mean) and 6 m become 0.5, 1 and 2 - 2/3.
    seen = {"nearest": [0.5, 0.5, 4 / 3, 4 / 3], "mean": [0.5, 1, 1, 4 / 3]}
    clean = torch.tensor(seen.get(fill, seen["mean"])).view(1, 4, 1).expand(3, 4, 1)
    expected = flow.mix(clean, noise, t)
    if fill == "noise":
        expected = torch.where(measured, expected, noise)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fill": "zero"}, "objective.fill is 'zero'; accepted: nearest, mean, noise"),
        ({"i2d_probability": -0.1}, "i2d_probability -0.1"),
        ({"i2d_probability": 0.6, "d2i_probability": 0.6}, "sum to at most 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(OBJECTIVE, **changes)


def test_a_teacher_without_weight_is_no_teacher() -> None:
    off = replace(OBJECTIVE, teacher_weight_noisy=0.0, teacher_weight_clean=0.0)
    assert (OBJECTIVE.has_teacher, off.has_teacher) == (True, False)
