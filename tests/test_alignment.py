"""Each solver against its minimised quantity: reference, linear programme, brute force, by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from mofo.alignment import ALIGNMENTS, column_sample, fit, grid_sample, weighted_median

GOLDEN = np.load(Path(__file__).parent / "golden" / "eval_golden_public.npz")
CASES = [str(name) for name in GOLDEN["case_names"]]
L1 = ("scale_l1", "affine_l1", "scale_l1_truncated", "affine_l1_truncated")
WITH_SHIFT = ("affine", "affine_l1", "affine_l1_truncated")
DEPTH = [name for name in ALIGNMENTS if name not in ("none", "disparity")]


def loss(alignment: str, line, p: np.ndarray, d: np.ndarray) -> float:
    """What the docstring of the solver says."""
    aligned = line[0] * p + line[1]
    if "_l1" not in alignment:
        return float(np.square(aligned - d).sum())
    errors = np.abs(aligned - d) / d
    return float((np.minimum(errors, 1) if alignment.endswith("truncated") else errors).sum())


def pixels(seed: int, *, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 20))
    p, d = rng.normal(size=n), rng.uniform(0.5, 5, n)
    return (np.round(p), np.round(d) + 0.5) if ties else (p, d)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_l1_scale_and_shift_reach_the_linear_programmes_optimum(seed, ties) -> None:
    p, d = pixels(seed, ties=ties)
    n = len(p)
    cost = np.r_[0, 0, 1 / d]
    above = np.block([[p[:, None], np.ones((n, 1)), -np.eye(n)]])
    below = np.block([[-p[:, None], -np.ones((n, 1)), -np.eye(n)]])
    free = [(None, None)] * 2 + [(0, None)] * n
    best = linprog(cost, np.vstack([above, below]), np.r_[d, -d], bounds=free).fun
    assert loss("affine_l1", fit("affine_l1", p, d), p, d) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_no_line_through_pixels_is_better_than_a_truncated_solver(seed, ties) -> None:
    p, d = pixels(seed, ties=ties)
    through_zero = [(y / x, 0.0) for x, y in zip(p, d, strict=True) if x]
    through_two = [(0.0, y) for y in d]
    for i, j in zip(*np.triu_indices(len(p), 1), strict=True):
        if p[i] != p[j]:
            slope = (d[j] - d[i]) / (p[j] - p[i])
            through_two.append((slope, d[i] - slope * p[i]))
    for name, lines in (
        ("scale_l1_truncated", through_zero),
        ("affine_l1_truncated", through_two),
    ):
        least = min(loss(name, line, p, d) for line in lines)
        assert loss(name, fit(name, p, d), p, d) <= least + 1e-9


@pytest.mark.parametrize("name", ["scale", "affine", *L1])
def test_no_neighbouring_line_is_better(name) -> None:
    rng = np.random.default_rng(3)
    p = rng.uniform(0, 1, 200)
    d = 4 * p + 1 + rng.normal(0, 0.2, 200).clip(-0.5, 0.5)
    line = fit(name, p, d)
    least = loss(name, line, p, d)
    for step in 10.0 ** np.arange(-6, 0) * rng.choice([-1, 1], 6):
        assert loss(name, (line.scale + step, line.shift), p, d) > least
        if name in WITH_SHIFT:
            assert loss(name, (line.scale, line.shift + step), p, d) > least


@pytest.mark.parametrize("case", [case for case in CASES if "disparity" not in case])
@pytest.mark.parametrize("kind", ["scale", "affine", "scale_trunc1", "affine_trunc1"])
@pytest.mark.parametrize("pixels", ["lr", "full"])
def test_l1_fit_reaches_the_references_objective(case, kind, pixels) -> None:
    method = f"moge_solver_{kind}_{pixels}"
    reference = json.loads(str(GOLDEN[f"{case}/ref_json"]))["f64"].get(method, {})
    if "objective_sum" not in reference:  # the reference skips its larger problems
        assert "skipped" in reference or kind == "scale_trunc1"
        return
    pred, gt, mask = (GOLDEN[f"{case}/{name}"] for name in ("pred", "gt", "mask"))
    if pixels == "full":
        p, d = pred[mask], gt[mask]
    else:
        index, covered = grid_sample(mask, 64)
        p, d = (array.ravel()[index[covered]] for array in (pred, gt))
    p, d = p.astype(float), d.astype(float)
    name = kind.replace("_trunc1", "") + ("_l1_truncated" if "trunc1" in kind else "_l1")
    line = fit(name, p, d)
    assert len(p) == reference.get("n", len(p))
    assert loss(name, line, p, d) <= reference["objective_sum"] + 1e-9
    assert line.scale == pytest.approx(reference["scale"], rel=1e-6)
    assert line.shift == pytest.approx(reference.get("shift", 0.0), rel=1e-6)


@pytest.mark.parametrize("name", DEPTH)
def test_planted_line_is_recovered(name) -> None:
    rng = np.random.default_rng(0)
    d, shift = rng.uniform(1, 9, 101), 0.7 if name in WITH_SHIFT else 0.0
    assert fit(name, (d - shift) / 2.5, d) == pytest.approx((2.5, shift), rel=1e-9, abs=1e-9)
    disparity = fit("disparity", 3 / d + 0.2, d)
    assert disparity == pytest.approx((1 / 3, -0.2 / 3))


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_without_pixels_nothing_is_fitted(name) -> None:
    with pytest.raises(ValueError, match="no pixel has measured depth"):
        fit(name, np.zeros(0), np.zeros(0))


@pytest.mark.parametrize("name", DEPTH)
def test_one_pixel_is_met_exactly_and_leaves_scale_zero_where_there_is_a_shift(name) -> None:
    line = fit(name, np.array([2.0]), np.array([3.0]))
    assert line == ((0.0, 3.0) if name in WITH_SHIFT else (1.5, 0.0))


@pytest.mark.parametrize("name", WITH_SHIFT)
def test_two_different_pixels_are_met_exactly(name) -> None:
    line = fit(name, np.array([2.0, 4.0]), np.array([3.0, 9.0]))
    assert line == pytest.approx((3.0, -3.0))


@pytest.mark.parametrize("name", WITH_SHIFT)
@pytest.mark.parametrize("value", [0.0, 0.1, -7.0])
def test_constant_prediction_gets_scale_zero_and_the_best_constant(name, value) -> None:
    d = np.array([1.0, 2.0, 2.0, 2.0, 40.0])
    line = fit(name, np.full(5, value), d)
    # The mean, and the median with weights 1/d.
    assert line == pytest.approx((0.0, 9.4 if name == "affine" else 2.0))


@pytest.mark.parametrize("name", ["scale", "scale_l1", "scale_l1_truncated"])
def test_prediction_of_zeros_gets_scale_zero(name) -> None:
    assert fit(name, np.zeros(3), np.array([1.0, 2.0, 3.0])) == (0.0, 0.0)


@pytest.mark.parametrize("name", ["affine", "affine_l1", "affine_l1_truncated"])
def test_negative_optimum_is_kept(name) -> None:
    d = np.random.default_rng(1).uniform(1, 9, 50)
    assert fit(name, 10 - d, d) == pytest.approx((-1, 10))
    assert fit(name.replace("affine", "scale"), -d, d).scale == pytest.approx(-1)


def test_gross_outliers_in_the_prediction_break_l1_and_not_truncated_l1() -> None:
    rng = np.random.default_rng(2)
    d = rng.uniform(1, 9, 200)
    p = 0.8 * d
    p[:70] *= rng.uniform(20, 60, 70)
    assert fit("scale_l1", p, d).scale < 0.1
    assert fit("scale_l1_truncated", p, d).scale == pytest.approx(1.25)
    assert fit("affine_l1_truncated", p, d) == pytest.approx((1.25, 0), abs=1e-9)


def test_medians_of_an_even_count() -> None:
    p, d = np.array([4.0, 1.0, 2.0, 3.0]), np.array([1.0, 5.0, 2.0, 4.0])
    assert fit("median", p, d).scale == 3 / 2.5
    assert fit("median_lower", p, d).scale == 1
    theirs = torch.from_numpy(d).median() / torch.from_numpy(p).median()
    assert fit("median_lower", p, d).scale == float(theirs)


def test_of_two_weighted_medians_the_lower_one_is_taken() -> None:
    assert weighted_median(np.array([3.0, 1.0, 2.0]), np.array([1.0, 1.0, 2.0])) == 2
    assert weighted_median(np.array([3.0, 1.0, 2.0, 9.0]), np.ones(4)) == 2
    # sum |a p - d| / d is the same for all a of [1, 2].
    assert fit("scale_l1", np.array([1.0, 1.0]), np.array([1.0, 2.0])).scale == 1


@pytest.mark.parametrize(
    ("p", "d", "alignment", "message"),
    [
        ([1, np.nan], [1, 1], "affine", "1 of 2 predicted depths at measured pixels are not fin"),
        ([1, np.inf], [1, 1], "scale_l1", "1 of 2 predicted depths"),
        ([1, 1], [1, np.nan], "affine_l1", "1 of 2 true depths"),
        ([1, 1], [1, 0], "scale", "1 of 2 true depths"),
        ([1, 1], [1, 1], "best", "must be one of: none, median, scale"),
        ([0, 0], [1, 1], "median", "median is 0"),
        ([0, -1], [1, 1], "disparity", "no predicted disparity is positive"),
    ],
)
def test_pixels_from_which_no_line_follows_are_refused(p, d, alignment, message) -> None:
    with pytest.raises(ValueError, match=message):
        fit(alignment, np.array(p, float), np.array(d, float))


@pytest.mark.parametrize("case", CASES)
def test_sampling_grid_equals_moge(case) -> None:
    index, covered = grid_sample(GOLDEN[f"{case}/mask"], 64)
    expected = GOLDEN[f"{case}/lr_mask"]
    assert (covered == expected).all()
    assert (index[expected] == GOLDEN[f"{case}/lr_flat_index"][expected]).all()


def test_sampling_grid_takes_the_nearest_measured_pixel_of_a_cell() -> None:
    rng = np.random.default_rng(0)
    valid = rng.random((23, 37)) < 0.2
    index, covered = grid_sample(valid, 4)
    y, x = np.nonzero(valid)
    for i, j in np.ndindex(4, 4):
        if covered[i, j]:
            centre = np.array([(i + 0.5) * 23 / 4, (j + 0.5) * 37 / 4])
            distance = (y + 0.5 - centre[0]) ** 2 + (x + 0.5 - centre[1]) ** 2
            chosen = np.array(divmod(index[i, j], 37)) + 0.5
            inside = np.maximum(np.abs(y + 0.5 - centre[0]) / 23, np.abs(x + 0.5 - centre[1]) / 37)
            assert ((chosen - centre) ** 2).sum() <= distance[inside < 1 / 9].min(initial=np.inf)
    assert not grid_sample(np.zeros((5, 7), bool), 4)[1].any()


@pytest.mark.parametrize(
    ("h", "w", "limit"), [(4032, 6048, 1024), (150, 210, 64), (375, 1242, 1024), (777, 1333, 1000)]
)
def test_fewer_columns_are_those_that_a_one_dimensional_resize_takes(h, w, limit) -> None:
    resize = torch.nn.Upsample(scale_factor=min(limit / h, limit / w), mode="nearest")
    theirs = resize(torch.arange(w, dtype=torch.float64)[None, None])[0, 0]
    assert (column_sample((h, w), limit) == theirs.numpy()).all()
    assert len(column_sample((480, 640), 1024)) == 640
