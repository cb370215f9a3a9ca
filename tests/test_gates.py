"""Gates: each rejects what it should by name, and what passes is not changed."""

import logging
from dataclasses import replace

import numpy as np
import pytest
from pictures import picture, sparse

from mofo.data.gates import LOG_EVERY, Gates, Rejections
from mofo.data.sample import Sample

MAP, POINTS, IMAGE = picture(0), sparse(0), picture(0, depth=False)  # 24 x 32
NUM_MEASURED = int(MAP.valid.sum())


def flat(*depths: float) -> Sample:
    """24 x 32 pixels of which one each has these depths and all others 2 m."""
    metres = np.full((24, 32), 2, np.float32)
    metres.flat[: len(depths)] = depths
    return replace(MAP, metres=metres, valid=np.ones((24, 32), bool))


def test_without_settings_everything_passes_unchanged() -> None:
    for sample in (MAP, POINTS, IMAGE, replace(MAP, captions=())):
        assert Gates().admit(sample) is sample


@pytest.mark.parametrize(
    ("sample", "gates", "failed"),
    [
        (MAP, {"min_image_size": 25}, "min_image_size"),
        (MAP, {"min_image_size": 24}, None),
        (MAP, {"min_measured_count": NUM_MEASURED + 1}, "min_measured_count"),
        (MAP, {"min_measured_count": NUM_MEASURED}, None),
        (MAP, {"min_measured_fraction": 0.8}, "min_measured_fraction"),
        (MAP, {"min_measured_fraction": 0.6}, None),
        (POINTS, {"min_measured_count": 51}, "min_measured_count"),
        (POINTS, {"min_measured_count": 50}, None),
        (POINTS, {"min_measured_fraction": 0.07}, "min_measured_fraction"),
        (POINTS, {"min_measured_fraction": 0.06}, None),
        (IMAGE, {"min_measured_count": 1}, "min_measured_count"),
        (IMAGE, {"max_relative_depth": 2}, None),
        (POINTS, {"max_relative_depth": 2.0}, "max_relative_depth"),
        (flat(*[9.0] * 20), {"max_relative_depth": 4}, "max_relative_depth"),
        (flat(*[7.0] * 20), {"max_relative_depth": 4}, None),
        # A single wrong pixel is not the scene.
        (flat(9000.0), {"max_relative_depth": 4}, None),
        (MAP, {"depth_range": [1000, 2000], "min_measured_count": 1}, "min_measured_count"),
        (POINTS, {"caption_length": [7, 100]}, None),
        (POINTS, {"caption_length": [20, 100]}, "caption_length"),
        (replace(POINTS, captions=()), {"caption_length": [1, 100]}, "caption_length"),
        (POINTS, {"caption_length": [0, 3]}, None),
    ],
)
def test_a_gate_rejects_what_is_beyond_it(sample: Sample, gates: dict, failed: str | None) -> None:
    admitted = Gates(**gates).admit(sample)
    if failed:
        assert admitted == failed
    else:
        assert isinstance(admitted, Sample)
        assert admitted.key == sample.key


def test_depth_out_of_range_is_no_longer_measured_and_the_rest_is_as_it_was() -> None:
    new = Gates(depth_range=(1, 5)).admit(MAP)
    np.testing.assert_array_equal(new.valid, MAP.valid & (MAP.metres >= 1) & (MAP.metres <= 5))
    np.testing.assert_array_equal(new.metres, np.where(new.valid, MAP.metres, 0))
    new = Gates(depth_range=(30, 60)).admit(POINTS)
    inside = [row for row in POINTS.points if 30 <= row[2] <= 60]
    np.testing.assert_array_equal(new.points, inside)


def test_captions_of_another_length_are_dropped() -> None:
    assert Gates(caption_length=(8, 100)).admit(POINTS).captions == ("sparse number 0",)
    assert Gates(caption_length=(0, 3)).admit(POINTS).captions == ()


def test_hidden_depth_passes_no_gate() -> None:
    strict = Gates(min_measured_count=10**6, depth_range=(1000, 2000))
    assert strict.admit(MAP, depth=False) is MAP
    assert strict.admit(MAP) == "min_measured_count"


@pytest.mark.parametrize(
    "setting",
    [
        {"depth_range": [5, 1]},
        {"depth_range": [1]},
        {"depth_range": [float("nan"), 1]},
        {"caption_length": [-1, 5]},
        {"min_measured_fraction": 1.5},
        {"min_measured_count": -1},
        {"max_relative_depth": 1.0},
        {"min_image_size": 0},
    ],
)
def test_a_gate_that_cannot_be_is_refused(setting: dict) -> None:
    (name,) = setting
    with pytest.raises(ValueError, match=f"gate {name} is .* but must be"):
        Gates(**setting)


def test_a_summary_is_logged_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    rejections = Rejections()
    with caplog.at_level(logging.INFO):
        for number in range(LOG_EVERY):
            rejections.add("road", "min_image_size" if number % 4 == 0 else None)
    (record,) = caplog.records
    assert record.getMessage() == (
        f"source 'road': 25.0 % of {LOG_EVERY} samples rejected: min_image_size {LOG_EVERY // 4}"
    )
