"""Alignment and metrics against the references' numbers, and by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mofo.alignment import grid_sample
from mofo.metrics import METRICS, boundary_f1, compare, score

GOLDEN = np.load(Path(__file__).parent / "golden" / "eval_golden_public.npz")
CASES = [str(name) for name in GOLDEN["case_names"]]
DEPTH_CASES = [case for case in CASES if "disparity" not in case]
MARIGOLD = {
    "abs_relative_difference": "absrel", "squared_relative_difference": "sqrel",
    "rmse_linear": "rmse", "rmse_log": "rmse_log", "log10": "log10", "silog_rmse": "silog",
    "delta1_acc": "delta1", "delta2_acc": "delta2", "delta3_acc": "delta3",
    "scale": "scale", "shift": "shift",
}  # fmt: skip
UNIDEPTH = {
    "arel": "absrel", "sqrel": "sqrel", "rmse": "rmse", "rmselog": "rmse_log", "log10": "log10",
    "d1": "delta1", "d2": "delta2", "d3": "delta3", "scale": "scale",
}  # fmt: skip


def golden(case: str) -> tuple[tuple[np.ndarray, ...], dict, dict]:
    arrays = tuple(GOLDEN[f"{case}/{name}"] for name in ("pred", "gt", "mask"))
    reference = json.loads(str(GOLDEN[f"{case}/ref_json"]))["f64"]
    return arrays, json.loads(str(GOLDEN[f"{case}/meta_json"])), reference


@pytest.mark.parametrize("case", DEPTH_CASES)
@pytest.mark.parametrize(
    ("method", "alignment", "rtol"),
    [("mg_none", "none", 1e-6), ("mg_lsq", "affine", 1e-6), ("mg_scale_lsq", "scale", 1e-4)],
)
def test_clipped_least_squares_equals_marigold(case, method, alignment, rtol) -> None:
    arrays, meta, reference = golden(case)
    got = score(*arrays, alignment, meta["min_depth"], meta["max_depth"])
    agree(got, reference[method], MARIGOLD, method, meta, rtol)


@pytest.mark.parametrize("case", CASES)
def test_disparity_fit_equals_marigold(case) -> None:
    (pred, gt, mask), meta, reference = golden(case)
    if meta["kind"] == "depth":
        pred = pred.astype(np.float64)
        pred = np.where(pred > 0, 1 / np.where(pred > 0, pred, 1), 0)
    got = score(pred, gt, mask, "disparity", meta["min_depth"], meta["max_depth"])
    agree(got, reference["mg_lsq_disp"], MARIGOLD, "mg_lsq_disp", meta, 1e-6)


@pytest.mark.parametrize("case", DEPTH_CASES)
def test_median_scale_equals_the_reference(case) -> None:
    arrays, meta, reference = golden(case)
    expected = dict(reference["np_median"])
    got = score(*arrays, "median")
    if case.startswith("p08"):  # the reference's deltas count negative predictions as correct
        for name in ("d1", "d2", "d3"):
            assert got[UNIDEPTH[name]] <= expected.pop(name)
    agree(got, expected, UNIDEPTH, "np_median", meta, 1e-6)
    if "np_median/silog" not in meta["unstable"]:  # there with n - 1 in the denominator
        unbiased = np.sqrt(got["num_valid"] / (got["num_valid"] - 1))
        assert got["silog"] * unbiased == pytest.approx(expected["silog"], rel=1e-6)


def agree(got, reference, names, method, meta, rtol) -> None:
    for theirs, ours in names.items():
        if theirs in reference and f"{method}/{theirs}" not in meta["unstable"]:
            # The reference averages its deltas in float32.
            atol = 1e-7 if ours.startswith("delta") else 1e-12
            assert got[ours] == pytest.approx(reference[theirs], rel=rtol, abs=atol), ours


@pytest.mark.parametrize("case", DEPTH_CASES)
@pytest.mark.parametrize("kind", ["scale", "affine"])
def test_l1_fit_reaches_the_references_objective(case, kind) -> None:
    (pred, gt, mask), _, reference = golden(case)
    method = reference[f"moge_solver_{kind}_lr"]
    got = score(pred, gt, mask, f"{kind}_l1")
    index, covered = grid_sample(mask, 64)
    p, d = (array.astype(np.float64).ravel()[index[covered]] for array in (pred, gt))
    objective = (np.abs(got["scale"] * p + got["shift"] - d) / d).sum()
    assert objective <= method["objective_sum"] + 1e-9


def test_metrics_by_hand_on_four_pixels() -> None:
    depth = np.array([[1.0, 2.0], [4.0, 5.0]])
    pred = np.array([[1.0, 1.0], [5.2, 5.0]])
    got = score(pred, depth, np.ones((2, 2), bool), "none")
    assert got["absrel"] == pytest.approx((0 + 0.5 + 0.3 + 0) / 4)
    assert got["sqrel"] == pytest.approx((0 + 0.5 + 0.36 + 0) / 4)
    assert got["rmse"] == pytest.approx(np.sqrt((1 + 1.44) / 4))
    assert got["log10"] == pytest.approx((np.log10(2) + np.log10(1.3)) / 4)
    assert (got["delta1"], got["delta2"], got["delta3"]) == (0.5, 0.75, 0.75)
    e = np.array([0, -np.log(2), np.log(1.3), 0])
    assert got["rmse_log"] == pytest.approx(np.sqrt((e**2).mean()))
    assert got["silog"] == pytest.approx(100 * e.std())
    assert (got["num_valid"], got["scale"], got["shift"]) == (4, 1, 0)
    assert set(got) == {*METRICS, "num_valid", "scale", "shift"}
    assert all(type(value) is float for value in got.values())


def test_eps_and_negatives_are_as_a_reference_has_them_only_when_asked() -> None:
    p, d = np.array([-1.0, 1.0]), np.array([1.0, 1.0])
    plain, asked = compare(p, d), compare(p, d, eps=1.0, negatives_pass=True)
    assert (plain["delta1"], asked["delta1"]) == (0.5, 1.0)
    assert (plain["absrel"], asked["absrel"]) == (1.0, 0.5)
    assert plain["rmse"] == asked["rmse"]


def test_metrics_of_many_pixels_equal_the_plain_formulas() -> None:
    rng = np.random.default_rng(0)
    d = rng.uniform(0.5, 80, 50_000)
    p = 1e3 * d * rng.lognormal(0, 0.01, d.size)
    got, e = compare(p, d), np.log(p) - np.log(d)
    assert got["absrel"] == pytest.approx(np.mean(np.abs(p - d) / d), rel=1e-12)
    assert got["rmse"] == pytest.approx(np.sqrt(np.mean((p - d) ** 2)), rel=1e-12)
    assert got["silog"] == pytest.approx(100 * np.std(e), rel=1e-11)
    assert got["i_rmse"] == pytest.approx(np.sqrt(np.mean((1 / p - 1 / d) ** 2)), rel=1e-12)
    assert compare(7 * d, d)["silog"] == pytest.approx(0, abs=1e-12)


def edges(pred, depth, valid, radius) -> float:
    """MoGe's boundary F1, pair by pair."""
    h, w = depth.shape
    disc = [
        (dy, dx)
        for dy, dx in np.ndindex(2 * radius + 1, 2 * radius + 1)
        if (dy - radius) ** 2 + (dx - radius) ** 2 <= radius**2
    ]
    total = 0.0
    thresholds = np.linspace(0.05, 0.25, 10)
    for t in thresholds:
        found = []
        for y, x in np.ndindex(h - 2 * radius, w - 2 * radius):
            centre = y + radius, x + radius
            for dy, dx in disc:
                other = y + dy, x + dx
                if valid[centre] and valid[other]:
                    found.append([a[other] / a[centre] > 1 + t for a in (pred, depth)])
        both, num_pred, num_true = (
            sum(map(all, found)), sum(p for p, _ in found), sum(d for _, d in found),
        )  # fmt: skip
        total += t * 2 * both / max(num_pred + num_true, 1)
    return total / thresholds.sum()


@pytest.mark.parametrize("seed", range(4))
def test_boundary_f1_equals_its_definition_pair_by_pair(seed) -> None:
    rng = np.random.default_rng(seed)
    depth = rng.choice([1.0, 1.1, 1.2, 2.0], (9, 11))
    pred = depth * rng.lognormal(0, 0.05, depth.shape)
    pred[2, 3] = [0.0, -1.0, 1.0, 5.0][seed]
    valid = rng.random(depth.shape) < 0.8
    with np.errstate(divide="ignore"):
        expected = {radius: edges(pred, depth, valid, radius) for radius in (1, 2, 3)}
    assert boundary_f1(pred, depth, valid) == pytest.approx(expected, abs=1e-12)
    assert boundary_f1(depth, depth, valid)[1] == 1


def test_boundary_f1_is_zero_without_edges_or_room_for_a_disc() -> None:
    flat, valid = np.ones((8, 8)), np.ones((8, 8), bool)
    assert boundary_f1(flat, flat, valid) == {1: 0, 2: 0, 3: 0}
    steps = np.array([[1.0, 2.0], [1.0, 2.0]])
    assert boundary_f1(steps, steps, np.ones((2, 2), bool)) == {1: 0, 2: 0, 3: 0}


def planted() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.uniform(1, 9, (11, 13)), rng.random((11, 13)) < 0.3


@pytest.mark.parametrize("alignment", ["median", "scale", "affine", "scale_l1", "affine_l1"])
def test_planted_scale_and_shift_are_recovered(alignment) -> None:
    depth, valid = planted()
    shift = 0.7 if alignment.startswith("affine") else 0.0
    got = score((depth - shift) / 2.5, depth, valid, alignment)
    assert got["scale"] == pytest.approx(2.5, rel=1e-9)
    assert got["shift"] == pytest.approx(shift, abs=1e-9)
    assert got["absrel"] == pytest.approx(0, abs=1e-9)


def test_planted_disparity_is_recovered() -> None:
    depth, valid = planted()
    got = score(3 / depth + 0.2, depth, valid, "disparity")
    assert got["scale"] == pytest.approx(1 / 3)
    assert got["absrel"] == pytest.approx(0, abs=1e-9)


def test_unmeasured_pixels_change_nothing() -> None:
    depth, valid = planted()
    pred = depth**1.1
    expected = score(pred, depth, valid)
    for junk in (np.nan, np.inf, -1.0, 0.0):
        assert score(np.where(valid, pred, junk), np.where(valid, depth, junk), valid) == expected


def test_torch_and_numpy_agree() -> None:
    depth, valid = planted()
    pred = (depth**1.1).astype(np.float32)
    tensors = (torch.from_numpy(pred).requires_grad_(), torch.from_numpy(depth))
    assert score(*tensors, torch.from_numpy(valid)) == score(pred, depth, valid)
    half = torch.from_numpy(pred).bfloat16()
    assert score(half, depth, valid)["absrel"] == pytest.approx(0.03, abs=0.03)


def test_negative_predictions_are_never_correct() -> None:
    depth = np.full((2, 2), 3.0)
    got = score(-depth, depth, np.ones((2, 2), bool), "none")
    assert (got["delta1"], got["delta3"], got["absrel"]) == (0, 0, 2)


def test_negative_optimum_is_kept_and_shown() -> None:
    depth, valid = planted()
    assert score(10 - depth, depth, valid)["scale"] == pytest.approx(-1)


@pytest.mark.parametrize("alignment", ["affine", "affine_l1"])
def test_constant_prediction_and_single_pixel_get_scale_zero(alignment) -> None:
    depth, valid = planted()
    got = score(np.full_like(depth, 0.1), depth, valid, alignment)
    assert got["scale"] == 0
    assert depth[valid].min() < got["shift"] < depth[valid].max()
    one = np.zeros_like(valid)
    one[3, 4] = True
    assert score(depth**2, depth, one, alignment)["absrel"] == pytest.approx(0)


def test_clipping_follows_alignment() -> None:
    depth = np.array([[1.0, 10.0]])
    got = score(np.array([[0.1, 1.0]]), depth, np.ones((1, 2), bool), "scale", low=2.0, high=4.0)
    assert got["absrel"] == pytest.approx((1.0 + 0.6) / 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"valid": np.zeros((2, 3), bool)}, "no pixel has measured depth"),
        ({"alignment": "best"}, "must be one of: none, median, scale"),
        ({"pred": np.ones((3, 2))}, "prediction is 3x2, but the truth is 2x3"),
        ({"pred": np.full((2, 3), np.nan)}, "6 of 6 predicted depths"),
        ({"depth": np.zeros((2, 3))}, "6 of 6 true depths"),
        ({"pred": np.zeros((2, 3)), "alignment": "median"}, "median is 0"),
    ],
)
def test_bad_input_is_refused(change, message) -> None:
    good = {"pred": np.ones((2, 3)), "depth": np.ones((2, 3)), "valid": np.ones((2, 3), bool)}
    with pytest.raises(ValueError, match=message):
        score(**(good | change))
