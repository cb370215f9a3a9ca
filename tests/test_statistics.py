"""Intervals of means: the bootstrap over images against loops, theory and planted differences."""

import numpy as np
import pytest

from mofo.evaluation import statistics
from mofo.evaluation.statistics import excludes_zero, intervals, resampled, resampled_means


def test_a_resampled_mean_is_the_mean_of_the_images_drawn() -> None:
    values = np.random.default_rng(0).random((7, 2))
    drawn = np.random.default_rng(3).integers(0, 7, (50, 7), dtype=np.int32)
    expected = values[drawn].mean(axis=1)
    assert np.allclose(resampled_means(values, num_resamples=50, seed=3), expected, rtol=1e-12)


def test_draws_follow_the_seed_whatever_is_held_at_once(monkeypatch) -> None:
    values = np.random.default_rng(0).random((9, 3))
    whole = resampled_means(values, num_resamples=100)
    monkeypatch.setattr(statistics, "CHUNK", 20)
    assert (resampled_means(values, num_resamples=100) == whole).all()
    assert (resampled_means(values, num_resamples=100, seed=1) != whole).any()


def test_intervals_have_the_width_that_theory_gives() -> None:
    values = np.random.default_rng(1).normal(5, 2, (400, 1))
    [(low, high)] = intervals(resampled_means(values))
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.05)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.02)


def test_nineteen_of_twenty_intervals_hold_the_true_mean() -> None:
    rng, hits = np.random.default_rng(2), 0
    for seed in range(300):
        means = resampled_means(rng.gamma(2, 1, (60, 1)), num_resamples=400, seed=seed)
        [(low, high)] = intervals(means)
        hits += low < 2 < high
    assert 0.90 < hits / 300 < 0.98


def test_a_paired_difference_is_sure_where_two_means_are_not() -> None:
    rng = np.random.default_rng(4)
    hard = rng.gamma(2, 1, 200)
    one, other = hard + rng.normal(0, 0.02, 200), hard + 0.02 + rng.normal(0, 0.02, 200)
    of_one, of_other, paired = intervals(resampled_means(np.stack([one, other, one - other], 1)))
    assert of_one[1] > of_other[0]
    assert excludes_zero(paired)
    assert paired[1] < 0


def test_an_image_without_a_number_is_left_out_of_its_column_alone() -> None:
    values = np.random.default_rng(5).random((30, 2))
    alone = resampled_means(values)[:, 0]
    values[3, 1] = np.nan
    means = resampled_means(values)
    assert (means[:, 0] == alone).all()
    assert means[:, 1].mean() == pytest.approx(np.nanmean(values[:, 1]), abs=2e-3)


def test_a_draw_without_any_number_does_not_count() -> None:
    values = np.array([[1.0, np.nan], [2.0, 7.0], [3.0, np.nan]])
    means = resampled_means(values, num_resamples=200)
    assert np.isnan(means[:, 1]).any()
    assert intervals(means)[1] == (7.0, 7.0)
    assert intervals(np.full((5, 1), np.nan)) == [None]


def test_no_image_has_no_mean() -> None:
    with pytest.raises(ValueError, match="no image to draw from"):
        resampled_means(np.zeros((0, 1)))


@pytest.mark.parametrize(
    ("interval", "sure"),
    [
        ((0.1, 0.2), True),
        ((-0.2, -0.1), True),
        ((-0.1, 0.1), False),
        ((0.0, 1.0), False),
        (None, False),
    ],
)
def test_zero_is_excluded_only_beyond_the_ends(interval, sure: bool) -> None:
    assert excludes_zero(interval) is sure


def test_draws_follow_from_the_images_that_a_column_has() -> None:
    rng = np.random.default_rng(6)
    one = {f"image_{k}": float(rng.random()) for k in range(20)}
    other = {key: value + 1 for key, value in reversed(one.items())}
    fewer = dict(list(one.items())[3:])
    found = resampled({"one": one, "fewer": fewer, "other": other, "lone": {"a": 1.0}}, of="list")
    assert list(found) == ["one", "fewer", "other"]
    assert np.allclose(found["other"], found["one"] + 1, rtol=1e-12)
    assert np.allclose(resampled({"fewer": fewer}, of="list")["fewer"], found["fewer"], rtol=1e-12)
    assert not np.allclose(resampled({"one": one}, of="other")["one"], found["one"])
