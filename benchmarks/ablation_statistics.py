"""What differences between variants are worth: intervals over seeds and test volumes together.

Seeds and volumes are both samples: another seed gives another encoder, another hospital's patients
other volumes; they are crossed, as every encoder segments every volume. So a difference is taken
for a mean of a two-way table with random rows and columns. Its variance comes from their mean
squares, with the degrees of freedom of Satterthwaite [1]. (A bootstrap over rows and columns, as of
Owen 2007, is too sure of itself with five seeds: where these make the difference, one in six of its
95 % intervals misses the truth.)

[1] Satterthwaite, "An approximate distribution of estimates of variance components", 1946.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

LEAST_SEEDS = 5  # with fewer no interval is told: the ends of the range say more
# Weights of variants; the first four of the 2 x 2.
EFFECTS: dict[str, dict[str, float]] = {
    "local learning": {"mocov2": -0.5, "local": 0.5, "zca": -0.5, "medmoco": 0.5},
    "decorrelation": {"mocov2": -0.5, "local": -0.5, "zca": 0.5, "medmoco": 0.5},
    "both together": {"mocov2": -1, "medmoco": 1},
    "interaction": {"mocov2": 1, "local": -1, "zca": -1, "medmoco": 1},
    "limited gradient": {"medmoco-unclipped": -1, "medmoco": 1},
    "medmoco over no pretraining": {"random": -1, "medmoco": 1},
}


@dataclass(frozen=True)
class Effect:
    """A difference of mean Dice, in points of 100.

    Attributes:
        points: the difference.
        low, high: ends of the 95 % interval; None with fewer than LEAST_SEEDS seeds.
        p: two-sided, before any correction; None likewise.
        lowest, highest: of the single seeds.
    """

    name: str
    points: float
    low: float | None
    high: float | None
    p: float | None
    lowest: float
    highest: float


def mean_over_organs(
    rows: Iterable[Mapping[str, str]], stage: str, labels: int | None = None
) -> dict[str, np.ndarray]:
    """(seeds, volumes) of each variant, Dice in points of 100.

    The mean over organs, and over the draws of labelled volumes; what has no Dice is left out. Only
    seeds that all variants have and volumes that all models were tested on are taken.

    Args:
        rows: of dice.csv.
        stage: linear or finetune.
        labels: of the models to take; None for any number.
    """
    sums: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        if row["stage"] != stage or (labels is not None and int(row["labels"]) != labels):
            continue
        if row["dice"] != "":
            key = (row["variant"], row["seed"], row["volume"])
            sums.setdefault(key, []).append(100 * float(row["dice"]))
    variants = sorted({variant for variant, _, _ in sums})
    seeds = _common((seed for v, seed, _ in sums if v == variant) for variant in variants)
    pairs = {(variant, seed) for variant in variants for seed in seeds}
    volumes = _common((volume for v, s, volume in sums if (v, s) == pair) for pair in sorted(pairs))
    return {
        variant: np.array([[np.mean(sums[variant, s, v]) for v in volumes] for s in seeds])
        for variant in variants
    }


def effect(name: str, weights: Mapping[str, float], scores: Mapping[str, np.ndarray]) -> Effect:
    """The weighted sum of the variants' mean scores, and what is known of it.

    Args:
        weights: of variants; those of a difference add up to 0.
        scores: (seeds, volumes) of each variant, as `mean_over_organs` gives them.
    """
    difference = sum(weight * scores[variant] for variant, weight in weights.items())
    assert isinstance(difference, np.ndarray)
    by_seed = difference.mean(1)
    points, low, high, p = float(difference.mean()), None, None, None
    if len(by_seed) >= LEAST_SEEDS and difference.shape[1] > 1:
        error, freedom = _standard_error(difference)
        margin = student.ppf(0.975, freedom) * error
        low, high = float(points - margin), float(points + margin)
        distance = abs(points) / error if error else float(np.inf if points else 0)
        p = float(2 * student.sf(distance, freedom))
    return Effect(name, points, low, high, p, float(by_seed.min()), float(by_seed.max()))


def _standard_error(table: np.ndarray) -> tuple[float, float]:
    """Of the mean of a two-way table with random rows and columns; its degrees of freedom."""
    rows, columns = table.shape
    by_row, by_column = table.mean(1), table.mean(0)
    rest = table - by_row[:, None] - by_column + table.mean()
    of_rows = columns * by_row.var(ddof=1)
    of_columns = rows * by_column.var(ddof=1)
    of_rest = np.square(rest).sum() / ((rows - 1) * (columns - 1))
    squares = max(of_rows + of_columns - of_rest, of_rows, of_columns)
    spread = of_rows**2 / (rows - 1) + of_columns**2 / (columns - 1)
    spread += of_rest**2 / ((rows - 1) * (columns - 1))
    least = min(rows, columns) - 1
    freedom = max(squares**2 / spread, least) if spread else least
    return float(np.sqrt(squares / table.size)), float(freedom)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for being several, in the order in which they came [1].

    [1] Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def _common(groups: Iterable[Iterable[str]]) -> list[str]:
    sets = [set(group) for group in groups]
    return sorted(set.intersection(*sets)) if sets else []
