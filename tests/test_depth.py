"""`DepthCodec`, `resample`, `merge`: golden numbers, planted answers, no depth out of nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mofo import depth as module
from mofo.depth import (
    EDGE,
    SURFACE,
    DepthCodec,
    _fill_separably,
    contract,
    expand,
    fill_batch,
    fill_nearest,
    merge,
    resample,
)
from mofo.model.weights import read_tensors

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "codec.json").read_text())
CLOSE = {"rtol": 1e-6, "atol": 1e-6}
SMALL = DepthCodec(patch_size=2)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return read_tensors(GOLDEN / "codec.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_the_golden_ones(golden: dict[str, Tensor], case: str) -> None:
    tokens, valid = DepthCodec(**CASES[case]).encode(golden[f"{case}.depth"][..., 0])
    torch.testing.assert_close(tokens, golden[f"{case}.tokens"].flatten(1, 2), **CLOSE)
    assert valid.all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["", "raw_"])
def test_decoded_depth_is_the_golden_one_where_it_is_valid(
    golden: dict[str, Tensor], case: str, kind: str
) -> None:
    tokens, expected = golden[f"{case}.{kind}tokens"], golden[f"{case}.{kind}decoded"][..., 0]
    codec = DepthCodec(**CASES[case])
    depth, valid = codec.decode(tokens.flatten(1, 2), grid=tuple(tokens.shape[1:3]))
    assert valid.any()
    torch.testing.assert_close(depth[valid], expected[valid], **CLOSE)
    # The raw tokens reach beyond the ball, where the public code emits negative and huge depth.
    assert valid.all() == (kind == "")
    assert (expected <= 0).any() == (kind == "raw_")


def strange_tokens() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    edge = torch.tensor([0.0, 1.0, 2.0, 2 - EDGE, -2.0])
    around = [edge, edge.nextafter(torch.tensor(9.0)), edge.nextafter(torch.tensor(-9.0))]
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e38, -1e38, 1e-45, -0.0, 1e-20, 3.0])
    some = torch.cat([*around, odd])
    far = torch.randn(64 - len(some) - 20, generator=generator) * 3
    close = 2 + 1e-3 * torch.randn(20, generator=generator)
    return torch.cat([some, far, close]).reshape(1, 16, 4)


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_valid_depth_is_positive_finite_and_off_the_edge(scale: float, dtype: torch.dtype) -> None:
    codec = DepthCodec(patch_size=2, depth_value_scale=scale)
    depth, valid = codec.decode((strange_tokens() * scale).to(dtype), grid=(4, 4))
    assert valid.any()
    assert not valid.all()
    assert (depth[~valid] == 0).all()
    assert (depth[valid] > 0).all()
    assert (depth[valid] <= 1001).all()


def test_decode_undoes_encode_up_to_the_scale() -> None:
    metres = 10 ** torch.linspace(-1, 2, 64).reshape(1, 8, 8)
    depth, valid = SMALL.decode(SMALL.encode(metres)[0], grid=(4, 4))
    assert valid.all()
    torch.testing.assert_close(depth, metres / metres.mean())


def test_expand_undoes_contract() -> None:
    r = 10 ** torch.linspace(-3, 2.5, 100)
    z = contract(r)
    assert (z > 0).all()
    assert (z < 2).all()
    torch.testing.assert_close(expand(z), r, rtol=1e-4, atol=0)


def test_tokens_are_row_major_in_the_grid_and_inside_a_patch() -> None:
    metres = torch.arange(1.0, 25).reshape(1, 4, 6)
    tokens, _ = SMALL.encode(metres)
    expected = contract(torch.tensor([3.0, 4.0, 9.0, 10.0]) / 12.5)
    torch.testing.assert_close(tokens[0, 1], expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, -1.0, 0.0])
@pytest.mark.parametrize("says_so", [True, False])
def test_what_is_no_depth_is_unmeasured_and_does_not_move_the_mean(
    bad: float, says_so: bool
) -> None:
    metres = torch.full((1, 4, 4), 2.0)
    metres[0, 0, 0] = bad
    valid = metres == 2 if says_so else None
    tokens, measured = SMALL.encode(metres, valid)
    assert (~measured).nonzero().tolist() == [[0, 0, 0]]
    assert (tokens == 1).all()


def test_a_valid_mask_cannot_make_nan_measured() -> None:
    metres = torch.full((1, 2, 2), torch.nan)
    tokens, measured = SMALL.encode(metres, torch.ones(1, 2, 2, dtype=torch.bool))
    assert tokens.isfinite().all()
    assert not measured.any()


def test_a_fill_is_kept_but_only_measured_pixels_make_the_mean() -> None:
    metres = torch.tensor([[[4.0, 4.0], [1.0, 1.0]]])
    tokens, measured = SMALL.encode(metres, metres == 4)
    torch.testing.assert_close(tokens[0, 0], torch.tensor([1.0, 1.0, 0.25, 0.25]))
    assert measured[0, 0].tolist() == [True, True, False, False]


def test_samples_are_normalised_one_by_one() -> None:
    metres = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    both, _ = SMALL.encode(torch.stack([metres[0], 100 * metres[1]]))
    torch.testing.assert_close(both, torch.cat([SMALL.encode(one[None])[0] for one in metres]))


def test_sides_that_are_no_multiple_of_the_patch_are_refused() -> None:
    with pytest.raises(ValueError, match="depth is 4x5.*multiples of 2; crop or resize"):
        SMALL.encode(torch.ones(1, 4, 5))


def test_fill_takes_the_nearest_measured_pixel_and_keeps_the_measured() -> None:
    metres = np.zeros((1, 6), np.float32)
    metres[0, [0, 4]] = [3, 7]
    filled = fill_nearest(metres, metres > 0)
    assert filled[0].tolist() == pytest.approx([3, 3, filled[0, 2], 7, 7, 7])
    assert filled[0, 2] in (3, 7)


def test_fill_of_nothing_measured_is_one_and_of_everything_is_itself() -> None:
    metres = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert (fill_nearest(metres, np.zeros((2, 3), bool)) == 1).all()
    assert (fill_nearest(metres, np.ones((2, 3), bool)) == metres).all()


@pytest.mark.parametrize(("h", "w"), [(9, 13), (200, 70), (1, 5), (6, 1)])
def test_the_fill_for_gpus_takes_a_pixel_that_is_as_near(h: int, w: int) -> None:
    generator = torch.Generator().manual_seed(h)
    # Depth tells where it came from; a map densely measured, a sparse one, one empty, one full.
    metres = (torch.arange(h * w, dtype=torch.float64) + 1).view(1, h, w).repeat(4, 1, 1)
    drawn = torch.rand(4, h, w, generator=generator)
    valid = drawn < torch.tensor([0.4, 2 / (h * w), -1.0, 2.0])[:, None, None]
    filled = [_fill_separably(metres, valid), fill_batch(metres, valid)]
    row, column = np.indices((h, w))
    for number in range(4):
        if not valid[number].any():
            assert all((one[number] == 1).all() for one in filled)
            continue
        sources = [one[number].numpy().astype(int) - 1 for one in filled]
        assert all(valid[number].flatten()[torch.from_numpy(s)].all() for s in sources)
        distances = [(s // w - row) ** 2 + (s % w - column) ** 2 for s in sources]
        assert (distances[0] == distances[1]).all()


def plane(size: tuple[int, int], *, of: tuple[int, int]) -> np.ndarray:
    """A plane seen by `of` pixels, sampled at the centres of `size`."""
    row, column = ((np.arange(n) + 0.5) * m / n for n, m in zip(size, of, strict=True))
    return (1 / (0.5 + 0.03 * row[:, None] + 0.01 * column)).astype(np.float32)


@pytest.mark.parametrize("size", [(60, 80), (25, 31), (7, 9), (6, 200), (90, 3)])
def test_a_resampled_plane_is_the_plane(size: tuple[int, int]) -> None:
    old = (12, 16)
    depth, valid = resample(plane(old, of=old), np.ones(old, bool), size)
    assert valid.all()
    # Beyond the centres of the outermost pixels there is nothing to go by.
    row, column = ((np.arange(n) + 0.5) * m / n for n, m in zip(size, old, strict=True))
    inside = np.ix_((row >= 0.5) & (row <= old[0] - 0.5), (column >= 0.5) & (column <= 15.5))
    np.testing.assert_allclose(depth[inside], plane(size, of=old)[inside], rtol=1e-6)


def test_a_step_stays_a_step_and_no_depth_between_is_invented() -> None:
    depth = np.full((6, 8), 2.0, np.float32)
    depth[:, 4:] = 2.0 * (1 + 1.2 * SURFACE)
    resampled, valid = resample(depth, np.ones((6, 8), bool), (30, 40))
    assert valid.all()
    np.testing.assert_allclose(resampled, np.kron(depth, np.ones((5, 5))), rtol=1e-6)


def test_each_side_of_a_step_stays_smooth() -> None:
    near, far = plane((6, 8), of=(6, 8)), 3 * plane((6, 8), of=(6, 8))
    is_near = np.arange(8) < 4
    resampled, _ = resample(np.where(is_near, near, far), np.ones((6, 8), bool), (60, 80))
    along = resampled[5:-5, 39]  # beside the step
    assert (np.diff(along) < 0).all()
    assert np.abs(np.diff(along, 2)).max() < 2e-3


def test_what_is_not_valid_stays_so_and_touches_nothing() -> None:
    rng = np.random.default_rng(0)
    depth = rng.uniform(1, 1.05, (6, 8)).astype(np.float32)
    valid = rng.random((6, 8)) < 0.7
    strange = depth.copy()
    strange[~valid] = rng.choice([0, -1, np.nan, np.inf, 1.02], (~valid).sum())
    resampled, found = resample(strange, valid, (30, 40))
    assert (found == np.kron(valid, np.ones((5, 5), bool))).all()
    assert (resampled[~found] == 0).all()
    assert resampled[found].min() >= depth[valid].min() * (1 - 1e-6)
    assert resampled[found].max() <= depth[valid].max() * (1 + 1e-6)
    other, _ = resample(np.where(valid, depth, 7), valid, (30, 40))
    assert (other == resampled).all()


def test_resampling_to_the_same_size_changes_nothing() -> None:
    depth = np.random.default_rng(0).uniform(1, 9, (6, 8)).astype(np.float32)
    valid = depth > 2
    same, found = resample(depth, valid, (6, 8))
    assert (same == np.where(valid, depth, 0)).all()
    assert (found == valid).all()


def test_bands_do_not_show(monkeypatch) -> None:
    depth = np.random.default_rng(0).uniform(1, 1.3, (9, 7)).astype(np.float32)
    whole, _ = resample(depth, depth > 1.01, (50, 40))
    monkeypatch.setattr(module, "BAND", 3 * 40)
    banded, _ = resample(depth, depth > 1.01, (50, 40))
    assert (banded == whole).all()


@pytest.mark.parametrize("value", [1e-44, 1e-38, 1e38])
def test_extreme_depth_does_not_become_infinite(value: float) -> None:
    depth, _ = resample(np.full((3, 3), value, np.float32), np.ones((3, 3), bool), (7, 7))
    assert np.isfinite(depth).all()
    assert (depth >= 0).all()


def members(k: int, noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """k noisy views of one map at random scales, and the map with mean 1."""
    rng = np.random.default_rng(k)
    truth = np.exp(rng.normal(0, 0.5, (20, 30)))
    scales = np.exp(rng.normal(0, 1, (k, 1, 1)))
    depths = scales * truth * np.exp(noise * rng.normal(size=(k, 20, 30)))
    return depths.astype(np.float32), np.ones(depths.shape, bool), truth / truth.mean()


@pytest.mark.parametrize("k", [1, 2, 3, 4, 7])
def test_members_that_differ_only_in_scale_agree_completely(k: int) -> None:
    depths, valids, truth = members(k, 0.0)
    depth, valid, uncertainty = merge(depths, valids)
    assert valid.all()
    np.testing.assert_allclose(depth, truth, rtol=1e-5)
    assert uncertainty.max() < 1e-5
    assert depth.mean(dtype=np.float64) == pytest.approx(1, abs=1e-6)


def test_uncertainty_is_the_relative_spread_of_the_members() -> None:
    depths, valids, truth = members(25, 0.05)
    depth, _, uncertainty = merge(depths, valids)
    assert uncertainty.mean() == pytest.approx(0.05, rel=0.1)
    assert np.abs(depth / truth - 1).mean() < 0.02


def test_one_wrong_member_moves_little() -> None:
    depths, valids, truth = members(5, 0.001)
    depths[2] = np.random.default_rng(9).uniform(1, 100, (20, 30))
    depth, _, uncertainty = merge(depths, valids)
    assert np.abs(depth / truth - 1).max() < 0.01
    assert uncertainty.max() < 0.01


def test_the_order_of_members_changes_nothing() -> None:
    depths, valids, _ = members(6, 0.1)
    valids[np.random.default_rng(1).random(valids.shape) < 0.3] = False
    order = [3, 5, 0, 1, 4, 2]
    for one, other in zip(merge(depths, valids), merge(depths[order], valids[order]), strict=True):
        assert (one == other).all()


def test_the_scale_of_a_member_changes_nothing() -> None:
    depths, valids, _ = members(5, 0.1)
    one, _, _ = merge(depths, valids)
    other, _, _ = merge(depths * np.float32([[[1]], [[8]], [[0.25]], [[64]], [[1]]]), valids)
    np.testing.assert_allclose(other, one, rtol=1e-4)


def test_merged_depth_is_valid_where_more_than_half_of_the_members_are() -> None:
    depths, valids, truth = members(4, 0.0)
    valids[:2, 0], valids[0, 1], valids[:, 2] = False, False, False
    depths[~valids] = np.nan
    depth, valid, uncertainty = merge(depths, valids)
    assert not valid[[0, 2]].any()
    assert valid[1].all()
    assert valid[3:].all()
    assert (depth[~valid] == 0).all()
    assert (uncertainty[~valid] == 0).all()
    np.testing.assert_allclose(depth[valid], truth[valid] / truth[valid].mean(), rtol=1e-5)


def test_a_member_without_depth_and_no_depth_at_all_are_survived() -> None:
    depths, valids, truth = members(3, 0.0)
    valids[1] = False
    np.testing.assert_allclose(merge(depths, valids)[0], truth, rtol=1e-5)
    assert not any(one.any() for one in merge(depths, np.zeros_like(valids)))
