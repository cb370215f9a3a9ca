"""Protocols against every stable number of the references, and what they promise beyond."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hydra import compose as compose_config
from hydra import initialize_config_dir
from hydra.utils import instantiate

from mofo import alignment
from mofo.evaluation.protocol import KINDS, Fit, Protocol, aligned, judge
from mofo.metrics import METRICS, compare

ROOT = Path(__file__).parents[1]
GOLDEN = np.load(ROOT / "tests" / "golden" / "eval_golden_public.npz")
CASES = [str(name) for name in GOLDEN["case_names"]]
FILES = sorted(path.stem for path in (ROOT / "configs/eval/protocol").glob("*.yaml"))


def load(name: str) -> Protocol:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        composed = compose_config(f"eval/protocol/{name}")
    return instantiate(composed.eval.protocol, _convert_="all")


PROTOCOLS = {name: load(name) for name in FILES}
MARIGOLD, MOGE = PROTOCOLS["marigold_exact"], PROTOCOLS["moge_exact"]

# What the references call our metrics.
MARIGOLD_NAMES = {
    "abs_relative_difference": "absrel", "squared_relative_difference": "sqrel",
    "rmse_linear": "rmse", "rmse_log": "rmse_log", "log10": "log10", "silog_rmse": "silog",
    "delta1_acc": "delta1", "delta2_acc": "delta2", "delta3_acc": "delta3", "i_rmse": "i_rmse",
    "scale": "scale", "shift": "shift",
}  # fmt: skip
UNIDEPTH_NAMES = {
    "arel": "absrel", "sqrel": "sqrel", "rmse": "rmse", "rmselog": "rmse_log", "log10": "log10",
    "d1": "delta1", "d2": "delta2", "d3": "delta3",
}  # fmt: skip
MOGE_NAMES = {
    "metric": "depth_metric", "scale": "depth_scale_invariant",
    "affine": "depth_affine_invariant", "disparity": "disparity_affine_invariant",
}  # fmt: skip
MOGE_EDGES = {
    "radius1_f1": "boundary_f1", "radius2_f1": "boundary_f1_2", "radius3_f1": "boundary_f1_3",
}  # fmt: skip
# Point maps and fields of view, which no protocol here scores.
NOT_OURS = ("moge_compute_metrics/points_", "moge_compute_metrics/fov_x")

Numbers = dict[str, float]


class Case:
    def __init__(self, name: str) -> None:
        self.pred, self.gt, self.mask = (
            GOLDEN[f"{name}/{part}"] for part in ("pred", "gt", "mask")
        )
        self.p, self.d = self.pred[self.mask].astype(float), self.gt[self.mask].astype(float)
        self.meta = json.loads(str(GOLDEN[f"{name}/meta_json"]))
        self.reference = flat(json.loads(str(GOLDEN[f"{name}/ref_json"]))["f64"])

    def judge(self, protocol: Protocol, kind: str, pred: np.ndarray | None = None, **more):
        pred = self.pred if pred is None else pred
        low, high = self.meta["min_depth"], self.meta["max_depth"]
        rules = {"low": low, "high": high, "is_metric": self.meta["is_metric"]} | more
        return judge(pred, self.gt, self.mask, kind=kind, protocol=protocol, **rules)


def flat(tree: dict, above: str = "") -> Numbers:
    """Nested dictionaries as one, keys joined by slashes."""
    numbers = {}
    for key, value in tree.items():
        below = flat(value, f"{above}{key}/") if isinstance(value, dict) else {above + key: value}
        numbers |= below
    return numbers


def named(method: str, ours: Numbers, names: dict[str, str]) -> Numbers:
    return {f"{method}/{theirs}": ours[name] for theirs, name in names.items() if name in ours}


def only(protocol: Protocol, kind: str, **fit) -> Protocol:
    """The protocol with one fit."""
    return replace(protocol, fits={"only": Fit(predicts=[kind], **fit)})


def by_marigold(case: Case) -> Numbers:
    got: Numbers = {}
    if case.meta["kind"] == "depth":
        plain = case.judge(only(MARIGOLD, "metric", alignment="none"), "metric", is_metric=True)
        got |= named("mg_none", plain["only"], MARIGOLD_NAMES)
        got |= named("mg_lsq", case.judge(MARIGOLD, "affine", name="")["affine"], MARIGOLD_NAMES)
        limit = case.meta["max_resolution"]
        if limit:
            fewer = only(MARIGOLD, "affine", alignment="affine", max_resolution={"set": limit})
            fitted = case.judge(fewer, "affine", name="set")["only"]
            got |= named("mg_lsq_maxres", fitted, MARIGOLD_NAMES)
            got["mg_lsq_maxres/max_resolution"] = limit
        scaled = case.judge(only(MARIGOLD, "scale", alignment="scale"), "scale")["only"]
        got |= named("mg_scale_lsq", scaled, MARIGOLD_NAMES)
    disparity = case.pred
    if case.meta["kind"] == "depth":
        whole = case.pred.astype(float)
        disparity = np.divide(1, whole, out=np.zeros_like(whole), where=whole > 0)
    fitted = case.judge(MARIGOLD, "disparity", disparity, name="")["disparity"]
    got |= named("mg_lsq_disp", fitted, MARIGOLD_NAMES)
    got["mg_lsq_disp/n_fit"] = np.count_nonzero(disparity[case.mask] > 0)
    return got


def by_unidepth(case: Case) -> Numbers:
    """Its silog has n - 1 in the denominator, its tau is a delta of 1.03."""
    if case.meta["kind"] != "depth":
        return {}
    got: Numbers = {}
    for method, name in {
        "ud_none": "none", "ud_median": "median_lower", "ud_ssi": "affine", "np_median": "median",
    }.items():  # fmt: skip
        line = alignment.fit(name, case.p, case.d)
        p = line.scale * case.p + line.shift
        ours = compare(p, case.d, negatives_pass=True)
        got |= named(method, ours, UNIDEPTH_NAMES) | {f"{method}/scale": line.scale}
        got[f"{method}/silog"] = ours["silog"] * (len(p) / (len(p) - 1)) ** 0.5
        got[f"{method}/tau"] = float(np.mean(np.maximum(p / case.d, case.d / p) < 1.03))
    return got


def by_moge(case: Case) -> Numbers:
    judged = case.judge(MOGE, case.meta["moge_pred_key"], sharp=case.meta["has_sharp_boundary"])
    got: Numbers = {}
    for fit, ours in judged.items():
        method = f"moge_compute_metrics/{MOGE_NAMES[fit]}"
        got |= named(method, ours, {"rel": "absrel", "delta1": "delta1"})
        got |= named("moge_compute_metrics/boundary", ours, MOGE_EDGES)
    kind = "disparity" if "disparity" in case.meta["kind"] else "scale"
    disparity = only(MOGE, kind, alignment="disparity")
    fitted = case.judge(disparity, kind)["only"]
    names = {"scale": "scale", "shift": "shift", "min_disparity_clamp": "floor"}
    return got | named("moge_solver_disparity", fitted, names)


def by_moge_solvers(case: Case) -> Numbers:
    if case.meta["kind"] != "depth":
        return {}
    index, covered = alignment.grid_sample(case.mask, 64)
    sampled = [array.ravel()[index[covered]].astype(float) for array in (case.pred, case.gt)]
    got: Numbers = {}
    for kind in ("scale", "affine"):
        for form, (p, d) in {
            "lr": sampled, "full": (case.p, case.d), "trunc1_lr": sampled,
            "trunc1_full": (case.p, case.d),
        }.items():  # fmt: skip
            method = f"moge_solver_{kind}_{form}"
            if f"{method}/objective_sum" not in case.reference:
                continue
            cut = form.startswith("trunc1")
            line = alignment.fit(f"{kind}_l1" + "_truncated" * cut, p, d)
            errors = np.abs(line.scale * p + line.shift - d) / d
            ours = compare(line.scale * p + line.shift, d, eps=1e-6, negatives_pass=True)
            got |= {
                f"{method}/n": len(p),
                f"{method}/scale": line.scale,
                f"{method}/shift": line.shift,
                f"{method}/objective_sum": float((np.minimum(errors, 1) if cut else errors).sum()),
                f"{method}/rel": ours["absrel"],
                f"{method}/delta1": ours["delta1"],
            }
    return got


@pytest.mark.parametrize("name", CASES)
def test_every_stable_number_of_the_references_is_reproduced(name) -> None:
    case = Case(name)
    got = by_marigold(case) | by_unidepth(case) | by_moge(case) | by_moge_solvers(case)
    compared = 0
    for key, expected in case.reference.items():
        if key in case.meta["unstable"] or key.startswith(NOT_OURS) or key.endswith("/skipped"):
            continue
        assert key in got, f"nothing here computes {key}"
        if key.endswith("/objective_sum"):
            assert got[key] <= expected + 1e-9, key
        else:
            # This solver of Marigold's is in float32; all deltas are averaged in float32.
            rel = 1e-4 if key.startswith("mg_scale_lsq") else 2e-8
            share = key.rsplit("/", 1)[1].startswith(("delta", "d1", "d2", "d3", "tau"))
            assert got[key] == pytest.approx(expected, rel=rel, abs=1e-7 if share else 1e-12), key
        compared += 1
    # Where the reference has a score there is one here, and the other way round.
    scores = {key for key in case.reference if key.startswith("moge_compute_metrics")}
    ours = {key for key in got if key.startswith("moge_compute_metrics")}
    assert ours == {key for key in scores if not key.startswith(NOT_OURS)}
    assert compared >= (20 if case.meta["kind"] == "depth" else 15)


def scene(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A noisy prediction, truth in metres, mask."""
    rng = np.random.default_rng(seed)
    truth = rng.uniform(1, 9, (20, 30))
    return truth * rng.lognormal(0, 0.1, truth.shape), truth, rng.random(truth.shape) < 0.7


@pytest.mark.parametrize("name", FILES)
def test_a_protocol_is_plain_data_that_says_what_it_does(name) -> None:
    protocol = PROTOCOLS[name]
    settings = protocol.settings()
    assert settings.pop("aggregation").startswith("mean over images")
    fits = {key: Fit(**fit) for key, fit in settings["fits"].items()}
    assert Protocol(**(settings | {"fits": fits})) == protocol
    assert protocol.id == f"{name.replace('_', '-')}@1"
    assert len(protocol.about) > 60


@pytest.mark.parametrize(
    ("name", "kind", "fits"),
    [
        ("marigold", "metric", ["affine"]),
        ("marigold", "affine", ["affine"]),
        ("marigold", "disparity", ["disparity"]),
        ("moge", "metric", ["metric", "scale", "affine", "disparity"]),
        ("moge", "scale", ["scale", "affine", "disparity"]),
        ("moge", "affine", ["affine"]),
        ("moge", "disparity", ["disparity"]),
        ("scale", "scale", ["scale"]),
        ("metric", "metric", ["metric"]),
        ("small", "scale", ["affine"]),
    ],
)
def test_a_prediction_is_scored_as_what_it_is_and_less(name, kind, fits) -> None:
    pred, truth, valid = scene()
    judged = judge(pred, truth, valid, kind=kind, protocol=PROTOCOLS[name], is_metric=True)
    assert list(judged) == fits
    for fit, values in judged.items():
        extra = {"i_rmse", "scale", "shift"} | ({"floor"} if fit == "disparity" else set())
        assert set(values) == {*METRICS, *extra}
        assert all(type(value) is float for value in values.values())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("scale", {"kind": "affine"}, "scale@1 scores predictions of kind metric, scale, not aff"),
        ("metric", {"kind": "metric", "is_metric": False}, "metric@1 needs truth in metres"),
        ("moge", {"kind": "depth"}, "kind is 'depth', but must be: metric, scale, affine, disp"),
        ("marigold_exact", {}, "say name="),
        ("moge", {"pred": np.ones((3, 2))}, "prediction is 3x2, but the truth is 2x3"),
        ("moge", {"valid": np.zeros((2, 3), bool)}, "no pixel has measured depth"),
        ("moge", {"pred": np.full((2, 3), np.nan)}, "no predicted depth is finite"),
        ("moge", {"truth": np.array([[1.0, 1, 1], [1, 1, 0]])}, "1 of 6 true depths"),
        ("metric", {"kind": "metric", "pred": np.full((2, 3), 1e300)}, "so large that"),
        ("small", {"kind": "disparity", "pred": -np.ones((2, 3))}, "fit disparity: no predicted"),
    ],
)
def test_what_cannot_be_scored_is_refused_with_the_reason(name, change, message) -> None:
    good = {"pred": np.ones((2, 3)), "truth": np.ones((2, 3)), "valid": np.ones((2, 3), bool)}
    rules = {"kind": "scale", "is_metric": True}
    with pytest.raises(ValueError, match=message):
        judge(**(good | rules | change), protocol=PROTOCOLS[name])


def test_without_metres_the_metric_fit_alone_is_left_out() -> None:
    judged = judge(*scene(), kind="metric", protocol=PROTOCOLS["moge"], is_metric=False)
    assert list(judged) == ["scale", "affine", "disparity"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["marigold", "moge", "small"])
def test_the_aligned_map_is_what_was_scored(name, kind) -> None:
    pred, truth, valid = scene()
    pred[valid.nonzero()[0][:3], valid.nonzero()[1][:3]] = np.nan, np.inf, -1.0
    rules = {"kind": kind, "protocol": PROTOCOLS[name], "low": 1.5, "high": 7.0}
    for fit_name, values in judge(pred, truth, valid, is_metric=True, **rules).items():
        depth = aligned(pred, values, fit=PROTOCOLS[name].fits[fit_name], **rules)
        assert compare(depth[valid], truth[valid])["absrel"] == values["absrel"]
        assert (depth[~np.isfinite(pred)] == 0).all()
        if name == "marigold":
            assert set(depth[np.isfinite(pred)].clip(1.5, 7.0)) == set(depth[np.isfinite(pred)])


@pytest.mark.parametrize("name", ["marigold", "moge", "scale", "metric"])
def test_a_pixel_without_prediction_leaves_the_fit_alone_and_costs_its_whole_depth(name) -> None:
    pred, truth, valid = scene()
    at = tuple(np.argwhere(valid)[0])
    rules = {"kind": "metric", "protocol": PROTOCOLS[name], "is_metric": True}
    less = valid.copy()
    less[at] = False
    expected = judge(pred, truth, less, **rules)
    pred[at] = np.nan
    n = valid.sum()
    for fit, values in judge(pred, truth, valid, **rules).items():
        assert values["scale"] == expected[fit]["scale"]
        # AbsRel of depth 0 is 1.
        assert values["absrel"] == pytest.approx((expected[fit]["absrel"] * (n - 1) + 1) / n)
        assert values["delta1"] == pytest.approx(expected[fit]["delta1"] * (n - 1) / n)


def test_unmeasured_pixels_and_the_type_of_numbers_change_nothing() -> None:
    pred, truth, valid = (array.astype(np.float32) for array in scene())
    valid = valid.astype(bool)
    rules = {"kind": "scale", "protocol": PROTOCOLS["moge"], "is_metric": True, "sharp": True}
    expected = judge(pred.astype(float), truth.astype(float), valid, **rules)
    for junk in (np.nan, np.inf, -1.0):
        got = judge(np.where(valid, pred, junk), np.where(valid, truth, junk), valid, **rules)
        assert got == expected


def test_where_edges_are_sharp_the_main_fit_alone_has_their_f1() -> None:
    pred, truth, valid = scene()
    rules = {"kind": "metric", "protocol": PROTOCOLS["moge"], "is_metric": True}
    judged = judge(pred, truth, valid, sharp=True, **rules)
    assert [name for name, values in judged.items() if "boundary_f1" in values] == ["metric"]
    assert judge(2 * truth, truth, valid, sharp=True, **rules)["metric"]["boundary_f1"] == 1


def test_negative_depth_passes_only_in_the_exact_variant() -> None:
    truth, valid = np.full((2, 2), 3.0), np.ones((2, 2), bool)
    pred = np.array([[3.0, 3.0], [-3.0, -3.0]])
    rules = {"kind": "metric", "is_metric": True}
    delta = {
        name: judge(pred, truth, valid, protocol=PROTOCOLS[name], **rules)["metric"]["delta1"]
        for name in ("moge", "moge_exact", "metric")
    }
    assert delta == {"moge": 0.5, "moge_exact": 1.0, "metric": 0.5}


def test_the_scale_protocol_gives_the_least_absrel_that_a_factor_can() -> None:
    pred, truth, valid = scene()
    rules = {"is_metric": True, "protocol": PROTOCOLS["scale"]}
    best = judge(pred, truth, valid, kind="scale", **rules)["scale"]
    p, d = pred[valid], truth[valid]
    for factor in best["scale"] * np.linspace(0.9, 1.1, 21):
        assert compare(factor * p, d)["absrel"] >= best["absrel"] - 1e-12


def test_marigold_keeps_a_negative_scale_and_shows_it() -> None:
    _, truth, valid = scene()
    judged = judge(
        10 - truth, truth, valid, kind="affine", protocol=PROTOCOLS["marigold"], is_metric=False
    )
    assert judged["affine"]["scale"] == pytest.approx(-1)


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        ({"alignment": "best", "predicts": ["scale"]}, "must be one of: none, median, scale"),
        ({"alignment": "affine", "predicts": ["disparity"]}, "only means something for: metric"),
        ({"alignment": "scale", "predicts": ["affine"]}, "scale is for affine"),
        ({"alignment": "none", "predicts": []}, "none is for nothing"),
    ],
)
def test_a_fit_without_meaning_is_refused(fit, message) -> None:
    with pytest.raises(ValueError, match=message):
        Fit(**fit)


def test_a_protocol_without_version_or_fits_is_refused() -> None:
    fits = PROTOCOLS["moge"].fits
    with pytest.raises(ValueError, match="must look like marigold@1"):
        Protocol(id="moge", about="", fits=fits)
    with pytest.raises(ValueError, match="has no fits"):
        Protocol(id="moge@2", about="", fits={})
