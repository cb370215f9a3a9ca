"""A protocol is data: how predictions are brought to the truth, and what is then counted.

    protocol = instantiate(configs/eval/protocol/marigold.yaml)
    judge(pred, truth, valid, kind="scale", protocol=protocol, low=1e-3, high=10.0, is_metric=True)
    # {"affine": {"absrel": 0.05, "delta1": 0.97, ..., "scale": 8.2, "shift": 0.3}}

A predictor declares what it predicts, most specific first: `metric` (metres), `scale` (depth up to
a factor), `affine` (depth up to scale and shift), `disparity` (inverse depth up to scale and
shift). Each `Fit` says which of these it is for; a prediction that says more may be fitted as if it
said less. Which images and pixels count, and the range that depth is clipped to, belong to a set.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Num

from mofo import alignment
from mofo.alignment import Pixels
from mofo.metrics import Array, as_arrays, boundary_f1, compare

EDGE_METRICS = {1: "boundary_f1", 2: "boundary_f1_2", 3: "boundary_f1_3"}  # by radius
AGGREGATION = "mean over images, then over sets; an image without a score is listed"
KINDS = ("metric", "scale", "affine", "disparity")


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One way of bringing a prediction to the truth, and the kinds of prediction it is for.

    `alignment` is one of `mofo.alignment.ALIGNMENTS`. It is fitted on all measured pixels; on a
    mask-aware sample of `grid` x `grid`; or, for a set that `max_resolution` names, on fewer
    columns (`column_sample`). An aligned disparity is at least `floor`, null: 1 / the farthest
    truth; with `positive_only`, predicted disparities that are not positive are left out of the
    fit. `metric_truth`: only where the truth is in metres.
    """

    alignment: str
    predicts: Sequence[str]
    grid: int | None = None
    max_resolution: Mapping[str, int] = field(default_factory=dict)
    floor: float | None = None
    positive_only: bool = False
    metric_truth: bool = False

    def __post_init__(self) -> None:
        if self.alignment not in alignment.ALIGNMENTS:
            accepted = ", ".join(alignment.ALIGNMENTS)
            raise ValueError(f"alignment is {self.alignment!r}, but must be one of: {accepted}")
        suited = _suited(self.alignment)
        if not self.predicts or set(self.predicts) - set(suited):
            raise ValueError(
                f"{self.alignment} is for {', '.join(self.predicts) or 'nothing'}, but only means "
                f"something for: {', '.join(suited)}"
            )


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Under one id always the same numbers: whoever changes a field that counts raises the version.

    The first of `fits` that suits a prediction is its main one. With `clip`, aligned depth is
    clipped to the range of its set; then it is at least `least`. AbsRel divides by the truth plus
    `eps`. With `negatives_pass`, negative depths count as correct in delta1..3 (a defect of some
    references, see `compare`) and a depth's disparity is 1 / depth whatever its sign.
    """

    id: str
    about: str
    fits: Mapping[str, Fit]
    clip: bool = False
    least: float | None = None
    eps: float = 0.0
    negatives_pass: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9-]*@[1-9]\d*", self.id):
            raise ValueError(f"protocol id is {self.id!r}, but must look like marigold@1")
        if not self.fits:
            raise ValueError(f"{self.id} has no fits; name one, such as affine")

    def fits_for(self, kind: str, *, is_metric: bool) -> dict[str, Fit]:
        """The fits that suit a prediction and its truth, the main one first; at least one."""
        if kind not in KINDS:
            raise ValueError(f"a prediction's kind is {kind!r}, but must be: {', '.join(KINDS)}")
        suited = {name: fit for name, fit in self.fits.items() if kind in fit.predicts}
        if not suited:
            accepted = [k for k in KINDS if any(k in fit.predicts for fit in self.fits.values())]
            raise ValueError(
                f"{self.id} scores predictions of kind {', '.join(accepted)}, not {kind}; "
                "choose another protocol"
            )
        if not is_metric:
            suited = {name: fit for name, fit in suited.items() if not fit.metric_truth}
        if not suited:
            raise ValueError(f"{self.id} needs truth in metres, which this set's is not")
        return suited

    def settings(self) -> dict[str, Any]:
        """All of it as plain data, for a line of JSON."""
        return json.loads(json.dumps({**asdict(self), "aggregation": AGGREGATION}))


def judge(
    pred: Num[Array, "hp wp"],
    truth: Num[Array, "h w"],
    valid: Bool[Array, "h w"],
    *,
    kind: str,
    protocol: Protocol,
    is_metric: bool,
    low: float | int | None = None,
    high: float | int | None = None,
    sharp: bool = False,
    name: str | None = None,
) -> dict[str, dict[str, float]]:
    """Of each fit that suits: the metrics, and the scale and shift (and floor) that gave them.

    The main fit has EDGE_METRICS too where the truth is `sharp`. A pixel without finite prediction
    is left out of the fit, then scored as depth 0: leaving it out of the score would reward
    predicting only what is easy. `name` is that of the set, for protocols that treat sets
    differently. ValueError, with the reason, where there is no score: list that image.
    """
    image = _Image(pred, truth, valid)
    judged: dict[str, dict[str, float]] = {}
    for fit_name, fit in protocol.fits_for(kind, is_metric=is_metric).items():
        where = f"{protocol.id}, fit {fit_name}"
        try:
            line = image.fit(fit, kind, protocol, name)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        place = {"kind": kind, "fit": fit, "protocol": protocol, "low": low, "high": high}
        with np.errstate(over="ignore", invalid="ignore"):
            p = aligned(image.p, line, **place)
            metrics = compare(p, image.d, eps=protocol.eps, negatives_pass=protocol.negatives_pass)
        if sharp and not judged:
            whole = aligned(image.pred, line, **place)
            f1 = boundary_f1(whole, image.truth.astype(float), image.valid)
            metrics |= {EDGE_METRICS[radius]: value for radius, value in f1.items()}
        judged[fit_name] = metrics | line
        if not np.isfinite(list(judged[fit_name].values())).all():
            raise ValueError(f"{where}: the prediction is so large that metrics overflow")
    return judged


def aligned(
    pred: Num[np.ndarray, "..."],
    line: Mapping[str, float],
    *,
    kind: str,
    fit: Fit,
    protocol: Protocol,
    low: float | int | None,
    high: float | int | None,
) -> Float64[np.ndarray, "..."]:
    """The depth that `judge` scored: `line` has the scale, shift and floor that it found.

    Finite everywhere; 0 where the prediction is not.
    """
    pred = np.asarray(pred, np.float64)
    finite = np.isfinite(pred)
    spotless = finite.all()
    depth = pred if spotless else np.where(finite, pred, 0.0)
    if fit.alignment == "disparity":
        depth = _disparity(depth, kind, protocol)
    depth = line["scale"] * depth + line["shift"]
    if fit.alignment == "disparity":
        depth = 1.0 / np.maximum(depth, line["floor"])
    if protocol.clip and (low is not None or high is not None):
        depth = np.clip(depth, low, high)
    if protocol.least is not None:
        depth = np.maximum(depth, protocol.least)
    return depth if spotless else np.where(finite, depth, 0.0)


class _Image:
    """One image's prediction and truth, and the measured pixels that fits ask for."""

    def __init__(
        self, pred: Num[Array, "hp wp"], truth: Num[Array, "h w"], valid: Bool[Array, "h w"]
    ) -> None:
        self.pred, self.truth, self.valid = as_arrays(pred, truth, valid)
        self.p, self.d = self.pred[self.valid].astype(float), self.truth[self.valid].astype(float)
        finite = np.isfinite(self.p)
        alignment.check(np.where(finite, self.p, 0.0), self.d)
        if not finite.any():
            raise ValueError("no predicted depth is finite where depth was measured")
        self.used, self.fitted = self.valid, (self.p, self.d)
        if not finite.all():
            self.used = self.valid & np.isfinite(self.pred)
            self.fitted = self.p[finite], self.d[finite]
        self.sampled: dict[int, tuple[Pixels, Pixels]] = {}

    def fit(self, fit: Fit, kind: str, protocol: Protocol, name: str | None) -> dict[str, float]:
        """The scale and shift, with the floor of a disparity."""
        p, d = self._pixels(fit, name)
        if fit.alignment != "disparity":
            return alignment.fit(fit.alignment, p, d)._asdict()
        p = _disparity(p, kind, protocol)
        # The solver called disparity leaves out what is not positive; affine takes all.
        solver, d = ("disparity", d) if fit.positive_only else ("affine", 1.0 / d)
        floor = 1.0 / self.d.max() if fit.floor is None else fit.floor
        return alignment.fit(solver, p, d)._asdict() | {"floor": float(floor)}

    def _pixels(self, fit: Fit, name: str | None) -> tuple[Pixels, Pixels]:
        if fit.max_resolution and name is None:
            raise ValueError("this protocol treats sets differently; say name=, the set's")
        if name is not None and name in fit.max_resolution:
            columns = alignment.column_sample(self.valid.shape, fit.max_resolution[name])
            used = self.used[:, columns]
            p, d = self.pred[:, columns][used], self.truth[:, columns][used]
            return p.astype(float), d.astype(float)
        if fit.grid is None:
            return self.fitted
        if fit.grid not in self.sampled:
            index, covered = alignment.grid_sample(self.used, fit.grid)
            p, d = (array.ravel()[index[covered]] for array in (self.pred, self.truth))
            self.sampled[fit.grid] = p.astype(float), d.astype(float)
        return self.sampled[fit.grid]


def _disparity(
    pred: Float64[np.ndarray, "*n"], kind: str, protocol: Protocol
) -> Float64[np.ndarray, "*n"]:
    """A depth that is not positive counts as infinitely far, except where negatives pass."""
    if kind == "disparity":
        return pred
    if protocol.negatives_pass:
        with np.errstate(divide="ignore"):
            return 1.0 / pred
    return np.divide(1.0, pred, out=np.zeros_like(pred), where=pred > 0)


def _suited(name: str) -> tuple[str, ...]:
    """The kinds that keep their meaning: no scale for an affine depth, no depth for a disparity."""
    if name == "none":
        return ("metric",)
    if name == "disparity":
        return ("metric", "scale", "disparity")
    return ("metric", "scale", "affine") if name.startswith("affine") else ("metric", "scale")
