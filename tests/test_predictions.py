"""Predictions as files, a run's own and those of others, and their uncertainties."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from judged import MODEL, PICTURES, ROW, SAMPLES, SCALE, depths, go, sample, timeless
from PIL import Image

from evaluate import evaluate
from mofo.data.write import write
from mofo.evaluation.calibration import calibration
from mofo.evaluation.kept import keeping, of_files
from mofo.evaluation.lines import read_lines
from mofo.evaluation.predictors import (
    Prediction,
    Predictor,
)
from mofo.evaluation.protocol import Protocol

ROOT = Path(__file__).parents[1]
KEYS = [one.key for one in SAMPLES]


@pytest.fixture
def uncertain() -> Predictor:
    def predict(images, keys):
        depth = [image.mean(2) / 300 + 1 for image in images]
        for one in depth:
            one[0, 0] = np.nan
        return [Prediction(depth=x, uncertainty=np.abs(np.sin(9 * x)) + 0.01) for x in depth]

    settings = {"num_steps": 4}
    return Predictor(
        name="my model", kind="scale", predict=predict, weights="f00d", settings=settings
    )


def test_predictions_that_a_run_kept_are_scored_to_the_same_numbers(tmp_path, uncertain) -> None:
    kept = keeping(uncertain, tmp_path / "run" / "predictions", ROW.name)
    first = go(tmp_path / "run", predictors=[kept])
    folder = tmp_path / "run" / "predictions" / "my model"
    again = of_files(folder, set_name=ROW.name, keys=KEYS)
    assert timeless(go(tmp_path / "again", predictors=[again])) == timeless(first)
    assert all(line["uncertainty"]["correlation"] for line in first)
    other = {"protocol": Protocol(id="scale@1", about="", fits={"scale": SCALE})}
    direct = go(tmp_path / "direct", predictors=[uncertain], **other)
    rescored = go(tmp_path / "rescored", predictors=[again], **other)
    for one, two in zip(direct, rescored, strict=True):
        assert two["fits"]["scale"]["absrel"] == pytest.approx(one["fits"]["scale"]["absrel"], 1e-3)
        assert one["num_nonfinite"] == two["num_nonfinite"]
        assert two["weights"] == "f00d"


def test_kept_predictions_have_half_precision_unless_that_would_lose_them(tmp_path) -> None:
    for number, (scale, dtype) in enumerate([(1.0, "f2"), (1e5, "f4"), (1e-6, "f4")]):
        far = depths(lambda image, key, scale=scale: np.full((16, 20), scale))
        kept = keeping(far, tmp_path, f"set {number}")
        go(tmp_path / f"run {number}", predictors=[kept])
        with np.load(tmp_path / "model" / f"set {number}" / "image_3.npz") as archive:
            assert archive["depth"].dtype == dtype
            assert np.allclose(archive["depth"], scale)


def plain_files(folder: Path, suffix: str) -> Path:
    folder.mkdir()
    for one in SAMPLES:
        millimetres = np.where(one.valid, one.metres * 1000, 0).astype(np.uint16)
        if suffix == ".png":
            Image.fromarray(millimetres).save(folder / f"{one.key}.png")
        elif suffix == ".npy":
            np.save(folder / f"{one.key}.npy", millimetres[None].astype(np.float32))
        else:
            np.savez(folder / f"{one.key}.npz", depth=millimetres.astype(np.float32))
    return folder


@pytest.mark.parametrize("suffix", [".png", ".npy", ".npz"])
def test_files_of_others_are_read(tmp_path, suffix) -> None:
    folder = plain_files(tmp_path / "theirs", suffix)
    unit = 0.001 if suffix == ".png" else None
    names = {"set_name": "rooms", "keys": KEYS, "kind": "scale"}
    lines = go(tmp_path / "run", predictors=[of_files(folder, **names, unit=unit)])
    assert [line["predictor"] for line in lines] == ["theirs"] * 7
    assert all(line["fits"]["affine"]["absrel"] < 1e-3 for line in lines)
    assert all(line["weights"] for line in lines)
    before = of_files(folder, **names, unit=unit).weights
    assert before == lines[0]["weights"]
    one = folder / f"image_2{suffix}"
    one.write_bytes(one.read_bytes()[:-1] + b"!")
    assert of_files(folder, **names, unit=unit).weights != before


def test_a_missing_or_broken_file_is_a_failed_image(tmp_path) -> None:
    folder = plain_files(tmp_path / "theirs", ".npy")
    (folder / "image_2.npy").unlink()
    (folder / "image_4.npy").write_bytes(b"nothing")
    theirs = of_files(folder, set_name="rooms", keys=KEYS, kind="scale")
    failed = {
        x["key"]: x["failed"] for x in go(tmp_path / "run", predictors=[theirs]) if x["failed"]
    }
    assert set(failed) == {"image_2", "image_4"}
    assert "there is no" in failed["image_2"]
    assert "image_2.npz, .npy or .png" in failed["image_2"]
    assert "image_4.npy cannot be read (it is no file of np.save or" in failed["image_4"]


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.png"])
def test_a_broken_file_is_named_and_nobody_told_to_unpickle_it(tmp_path, name) -> None:
    theirs = {"set_name": "rooms", "keys": ["a"], "kind": "scale", "unit": 1}
    whole = io.BytesIO()
    np.savez(whole, depth=np.ones((9, 9)))
    for data in (b"\x80garbage", b"PK\3\4 garbage", whole.getvalue()[:-40]):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{tmp_path / name} cannot be read") as caught:
            of_files(tmp_path, **theirs)(PICTURES[:1], ["a"])
        assert "pickle" not in str(caught.value)
        assert " at 0x" not in str(caught.value)


def test_files_whose_numbers_say_nothing_are_refused(tmp_path) -> None:
    pngs = plain_files(tmp_path / "pngs", ".png")
    names = {"set_name": "rooms", "keys": KEYS}
    with pytest.raises(ValueError, match="pngs are is not said; say kind="):
        of_files(pngs, **names)
    with pytest.raises(ValueError, match="give unit=0.001 for millimetres"):
        of_files(pngs, **names, kind="metric")
    with pytest.raises(ValueError, match="no prediction for rooms.*7 files.*image_0.npy, image_1"):
        of_files(tmp_path, **names, kind="metric")
    with pytest.raises(ValueError, match="there is no folder"):
        of_files(tmp_path / "nothing", **names, kind="metric")
    keeping(MODEL, tmp_path, "rooms")
    with pytest.raises(ValueError, match="was written with kind=scale, but kind is metric now"):
        of_files(tmp_path / "model", **names, kind="metric")


def test_a_file_of_another_size_is_a_failed_image(tmp_path) -> None:
    folder = plain_files(tmp_path / "theirs", ".npy")
    np.save(folder / "image_2.npy", np.ones((8, 10)))
    theirs = of_files(folder, set_name="rooms", keys=KEYS, kind="scale")
    [line] = [x for x in go(tmp_path / "run", predictors=[theirs]) if x["failed"]]
    assert line["failed"] == "prediction is 8 x 10, truth is 16 x 20"


# Calibration


def test_an_uncertainty_that_is_the_error_is_perfect_and_one_of_chance_is_not() -> None:
    rng = np.random.default_rng(0)
    error = rng.exponential(1, 20_000)
    perfect = calibration(error, error)
    assert perfect["ause"] == pytest.approx(0, abs=1e-12)
    assert perfect["correlation"] == pytest.approx(1)
    assert perfect["error"] == perfect["uncertainty"] == sorted(perfect["error"])
    assert np.mean(perfect["error"]) == pytest.approx(error.mean())
    chance = calibration(rng.random(20_000), error)
    assert abs(chance["correlation"]) < 0.03
    # what is left keeps its mean by chance; the oracle leaves the k smallest tenths
    ranked = np.sort(error)
    oracle = np.mean([ranked[: 2000 * k].mean() for k in range(1, 11)])
    assert chance["ause"] == pytest.approx(1 - oracle / error.mean(), abs=0.03)
    reverse = calibration(-error, error)
    assert reverse["correlation"] == pytest.approx(-1)
    assert reverse["ause"] > chance["ause"] > 0.3


def test_equal_uncertainties_have_no_correlation_and_few_pixels_no_calibration() -> None:
    assert calibration(np.ones(50), np.arange(50.0))["correlation"] == 0
    assert calibration(np.arange(50.0), np.zeros(50))["ause"] == 0
    assert calibration(np.ones(9), np.ones(9)) is None


# The command


def test_the_command_scores_dumps_and_scores_again(tmp_path) -> None:
    write([sample(n, (64, 64)) for n in range(3)], tmp_path / "set", "set")
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        shared = ["eval=small", "captions=[]", "device=cpu", "batch_size=2", "eval.rows=[]"]
        first = compose(
            "evaluate", [*shared, f"run_dir={tmp_path / 'a'}", "dump=true", "ensemble=2"]
        )
        kept = tmp_path / "a" / "predictions" / "mofo"
        again = compose("evaluate", [*shared, f"run_dir={tmp_path / 'b'}", f"predictions={kept}"])
    row = {
        "_target_": "mofo.evaluation.benchmark.Row",
        "name": "rooms",
        "shards": f"{tmp_path}/set",
    }
    first.eval.rows = again.eval.rows = [row]
    assert "mofo" in evaluate(first)
    assert "mofo" in evaluate(again)
    lines, others = (read_lines(tmp_path / name) for name in "ab")
    assert [line["predictor"] for line in lines] == ["mofo"] * 3 + ["constant"] * 3
    assert all(line["uncertainty"] for line in lines[:3])
    for one, two in zip(lines, others, strict=True):
        same = ("fits", "uncertainty", "predictor", "weights", "num_valid", "list_sha256")
        assert {name: one[name] for name in same} == {name: two[name] for name in same}
    assert json.loads((kept / "predictor.json").read_text())["settings"]["ensemble"] == 2
