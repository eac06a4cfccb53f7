"""Intervals of mean Dice, against scipy, by hand, and by how often they hold the truth."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from medmoco.report.intervals import of_class, of_mean, over_values
from medmoco.report.run_folder import Result


def result_of(scores: np.ndarray) -> Result:
    """Rows are volumes, columns classes; NaN where a volume lacks the class."""
    rows = {
        f"case{v}": {f"class{c}": None if np.isnan(s) else float(s) for c, s in enumerate(row)}
        for v, row in enumerate(scores)
    }
    mean = float(np.nanmean(scores, axis=0).mean())
    return Result(mean, per_class={}, per_volume=rows, pooled={}, absent={}, seconds=None)


def test_intervals_are_those_of_scipy():
    scores = np.random.default_rng(0).uniform(0.4, 0.9, (7, 3))
    for c in range(3):
        expected = stats.ttest_1samp(scores[:, c], 0).confidence_interval(0.95)
        assert of_class(result_of(scores), f"class{c}") == pytest.approx(tuple(expected))
    expected = stats.ttest_1samp(scores.mean(axis=1), 0).confidence_interval(0.95)
    assert of_mean(result_of(scores)) == pytest.approx(tuple(expected))


def test_a_value_by_hand():
    """t of 0.975 with 1 degree of freedom is 12.706; s = 0.02 sqrt(2), n = 2."""
    assert over_values([0.5, 0.54]) == pytest.approx((0.52 - 12.7062 * 0.02, 0.52 + 12.7062 * 0.02))


def test_the_ends_stay_within_the_range_of_dice():
    assert over_values([0.1, 0.9]) == (0.0, 1.0)
    assert over_values([0.0, 0.0, 0.0]) == (0.0, 0.0)


def test_one_volume_or_none_has_no_interval():
    assert over_values([0.5]) is None and over_values([]) is None
    one = result_of(np.array([[0.5, 0.6]]))
    assert of_mean(one) is None and of_class(one, "class0") is None
    assert of_class(one, "unknown") is None
    assert of_mean(dataclasses.replace(one, mean=None)) is None


def test_the_mean_over_classes_is_held_as_often_as_promised_where_classes_are_absent():
    """The volumes' own means would be centred elsewhere than the mean that is shown."""
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        patient = generator.normal(0, 0.05, (30, 1))
        scores = np.array([0.9, 0.5, 0.6]) + patient + generator.normal(0, 0.05, (30, 3))
        scores[generator.random((30, 3)) < [0, 0.6, 0.3]] = np.nan
        low, high = of_mean(result_of(scores))
        held += low <= 2.0 / 3 <= high
    assert 0.92 < held / 400 < 0.98


def test_volumes_without_any_class_say_nothing_of_the_mean():
    scores = np.random.default_rng(1).uniform(0.4, 0.9, (5, 1))
    padded = np.vstack([scores, np.full((20, 1), np.nan)])
    assert of_mean(result_of(padded)) == pytest.approx(of_mean(result_of(scores)))


def test_a_class_of_a_single_volume_leaves_the_mean_without_an_interval():
    assert of_mean(result_of(np.array([[0.5, 0.6], [0.7, np.nan], [0.6, np.nan]]))) is None
