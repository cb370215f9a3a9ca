"""What is said of one prediction: its scores, or why it has none, and what was wrong with it."""

import numpy as np
from jaxtyping import Float64

from mofo.data.sample import Sample
from mofo.evaluation import protocol as protocols
from mofo.evaluation.benchmark import Row
from mofo.evaluation.calibration import calibration
from mofo.evaluation.lines import Line
from mofo.evaluation.predictors import Prediction
from mofo.evaluation.protocol import Protocol, judge

# Words of attribution that a licensor asks for, by a mark of the licence text.
ATTRIBUTION = {"Zenseact": "Zenseact Open Dataset, (c) Zenseact AB, CC BY-SA 4.0"}
LONGEST = 300  # characters of a reason


def verdict(
    sample: Sample | Exception,
    made: Prediction | Exception | None,
    *,
    kind: str,
    row: Row,
    protocol: Protocol,
) -> Line:
    """The part of a line that depends on image and prediction; an exception says what went wrong.

    Predictions that are not finite, and those that are not positive, are counted where depth was
    measured.
    """
    said = {"fits": None, "num_valid": 0, "num_nonfinite": 0, "num_nonpositive": 0}
    said |= {"uncertainty": None, "credit": "", "licence": "", "metric": None}
    if isinstance(sample, Exception):
        return {**said, "failed": f"the image cannot be read: {_reason(sample)}"}
    is_metric = row.metric and sample.metric
    said |= {"credit": _credit(sample), "licence": sample.licence, "metric": is_metric}
    truth, valid = sample.depth or (None, None)
    if truth is None or valid is None or not valid.any():
        return {**said, "failed": "no pixel has measured depth"}
    said["num_valid"] = int(valid.sum())
    if not isinstance(made, Prediction):
        return {**said, "failed": f"no prediction: {_reason(made)}"}
    try:
        pred = _numbers(made.depth, truth.shape)
        at = pred[valid]
        finite = np.isfinite(at)
        said["num_nonfinite"] = int((~finite).sum())
        said["num_nonpositive"] = int((at[finite] <= 0).sum())
        rules = {"kind": kind, "protocol": protocol, "is_metric": is_metric}
        place = {"low": row.low, "high": row.high, "sharp": row.sharp, "name": row.name}
        said["fits"] = judge(pred, truth, valid, **rules, **place)
        if made.uncertainty is not None:
            spread = _numbers(made.uncertainty, truth.shape)
            depth = aligned(pred, {**said, "kind": kind}, row=row, protocol=protocol)
            used = valid & np.isfinite(pred) & np.isfinite(spread)
            error = np.abs(depth[used] - truth[used]) / truth[used]
            said["uncertainty"] = calibration(spread[used], error)
    except Exception as error:  # whatever one image does, the others are scored
        return {**said, "fits": None, "failed": _reason(error)}
    return {**said, "failed": None}


def aligned(
    pred: np.ndarray, line: Line, *, row: Row, protocol: Protocol
) -> Float64[np.ndarray, "h w"]:
    """The whole map as a line's main fit has it."""
    name, metrics = next(iter(line["fits"].items()))
    fit = protocol.fits[name]
    place = {"kind": line["kind"], "fit": fit, "protocol": protocol}
    return protocols.aligned(pred, metrics, **place, low=row.low, high=row.high)


def _numbers(values: np.ndarray, shape: tuple[int, ...]) -> Float64[np.ndarray, "h w"]:
    values = np.asarray(values, np.float64)
    if values.shape != shape:
        sizes = (" x ".join(map(str, one)) for one in (values.shape, shape))
        raise ValueError("prediction is {}, truth is {}".format(*sizes))
    return values


def _reason(error: object) -> str:
    """What a ValueError says; of others also the kind, as their words alone may say nothing."""
    words = " ".join(str(error).split())[:LONGEST]
    return words if type(error) is ValueError else f"{type(error).__name__}: {words}"


def _credit(sample: Sample) -> str:
    """What must stand beside the picture."""
    asked = (words for mark, words in ATTRIBUTION.items() if mark in sample.licence)
    return next(asked, ", ".join(filter(None, (sample.source, sample.licence))))
