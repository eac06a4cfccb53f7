"""The ablation's statistics: differences, intervals over seeds and volumes, corrections."""

import numpy as np
import pytest

from ablation_statistics import EFFECTS, effect, holm, mean_over_organs


def row(variant, seed, volume, organ, dice, stage="linear", labels=30, draw=0):
    return {
        "variant": variant,
        "seed": str(seed),
        "stage": stage,
        "labels": str(labels),
        "draw": str(draw),
        "volume": volume,
        "organ": organ,
        "dice": "" if dice is None else str(dice),
    }


def test_scores_are_means_over_organs_and_draws():
    rows = [
        row("a", 0, "v", "liver", 0.5),
        row("a", 0, "v", "spleen", 0.7),
        row("a", 0, "w", "liver", 0.4),
        row("a", 0, "w", "spleen", None),
        row("a", 0, "v", "liver", 0.1, stage="finetune", labels=3, draw=0),
        row("a", 0, "v", "liver", 0.3, stage="finetune", labels=3, draw=1),
        row("a", 0, "v", "liver", 0.9, stage="finetune", labels=30),
    ]
    np.testing.assert_allclose(mean_over_organs(rows, "linear")["a"], [[60, 40]])
    np.testing.assert_allclose(mean_over_organs(rows, "finetune", 3)["a"], [[20]])


def test_variants_are_compared_on_the_seeds_and_volumes_that_they_share():
    rows = [row("a", seed, volume, "x", 0.5) for seed in (0, 1) for volume in ("v", "w")]
    rows += [row("b", 1, volume, "x", 0.6) for volume in ("w", "z")]
    scores = mean_over_organs(rows, "linear")
    assert scores["a"].tolist() == [[50]] and scores["b"].tolist() == [[60]]


def test_effects_of_a_two_by_two():
    ones = np.ones((2, 3))
    scores = {"mocov2": 30 * ones, "local": 34 * ones, "zca": 40 * ones, "medmoco": 47 * ones}
    factorial = {name: own for name, own in EFFECTS.items() if own.keys() <= scores.keys()}
    found = {name: effect(name, weights, scores).points for name, weights in factorial.items()}
    assert found == pytest.approx(
        {"local learning": 5.5, "decorrelation": 11.5, "both together": 17, "interaction": 3}
    )


def test_few_seeds_have_a_range_and_no_interval():
    found = effect("d", {"a": 1}, {"a": np.array([[1.0, 2.0], [3.0, 4.0]])})
    assert (found.points, found.lowest, found.highest) == (2.5, 1.5, 3.5)
    assert found.low is None and found.high is None and found.p is None


def test_an_interval_is_as_wide_as_seeds_and_volumes_make_it():
    """Of normal effects the standard error is known: both variances, each over its number."""
    generator = np.random.default_rng(3)
    seeds, volumes = 40, 60
    by_seed, by_volume = generator.normal(0, 3, (seeds, 1)), generator.normal(0, 4, (1, volumes))
    found = effect("d", {"a": 1}, {"a": 1 + by_seed + by_volume})
    expected = 2 * 1.96 * np.sqrt(by_seed.var() / seeds + by_volume.var() / volumes)
    assert found.low is not None and found.high is not None
    assert found.high - found.low == pytest.approx(expected, rel=0.1)
    assert found.low < found.points < found.high


@pytest.mark.parametrize(
    ("of_seeds", "of_volumes", "of_rest"),
    [(1, 0, 0.1), (1, 0, 3), (2, 2, 2), (1, 3, 1), (0, 3, 1), (0, 0, 1)],
)
def test_intervals_miss_the_truth_as_rarely_as_they_say(of_seeds, of_volumes, of_rest):
    """Also where five seeds make all the difference; with none at all they may be too wide."""
    generator = np.random.default_rng(5)
    experiments, missed, sure = 2000, 0, 0
    for _ in range(experiments):
        data = of_seeds * generator.normal(size=(5, 1)) + of_volumes * generator.normal(size=30)
        found = effect("d", {"a": 1}, {"a": data + of_rest * generator.normal(size=(5, 30))})
        assert found.low is not None and found.high is not None and found.p is not None
        missed += not found.low <= 0 <= found.high
        assert (found.p < 0.05) == (not found.low <= 0 <= found.high)
        sure += found.p < 0.003
    assert missed / experiments < 0.07
    assert sure / experiments < 0.008


def test_what_is_certain_has_a_small_p_and_what_is_nothing_a_large_one():
    assert effect("d", {"a": 1}, {"a": np.full((5, 4), 2.0)}).p == 0
    sign = np.array([[1.0], [-1.0], [1.0], [-1.0], [0.0]]) * np.ones((5, 4))
    nothing = effect("d", {"a": 1}, {"a": sign})
    assert nothing.p is not None and nothing.p > 0.5


def test_a_single_volume_has_no_interval():
    assert effect("d", {"a": 1}, {"a": np.ones((5, 1))}).p is None


def test_holm_corrects_the_smallest_most_and_never_reorders():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
