"""What differences between variants are worth: intervals over seeds and test volumes together.

Seeds and volumes are both samples: another seed gives another encoder, another hospital's patients
other volumes. So both are drawn anew, crossed: a seed's encoders stay together, and so do the
scores of a volume, which all variants share [1].

[1] Owen, "The pigeonhole bootstrap", Annals of Applied Statistics, 2007.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEAST_SEEDS = 5  # with fewer no interval is told: the ends of the range say more
DRAWS = 10_000
# Weights of variants; the first four of the 2 x 2.
EFFECTS: dict[str, dict[str, float]] = {
    "local learning": {"mocov2": -0.5, "local": 0.5, "zca": -0.5, "medmoco": 0.5},
    "decorrelation": {"mocov2": -0.5, "local": -0.5, "zca": 0.5, "medmoco": 0.5},
    "both together": {"mocov2": -1, "medmoco": 1},
    "interaction": {"mocov2": 1, "local": -1, "zca": -1, "medmoco": 1},
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


def effect(
    name: str, weights: Mapping[str, float], scores: Mapping[str, np.ndarray], seed: int = 0
) -> Effect:
    """The weighted sum of the variants' mean scores, and what is known of it.

    Args:
        weights: of variants; those of a difference add up to 0.
        scores: (seeds, volumes) of each variant, as `mean_over_organs` gives them.
        seed: of the bootstrap.
    """
    difference = sum(weight * scores[variant] for variant, weight in weights.items())
    assert isinstance(difference, np.ndarray)
    seeds, volumes = difference.shape
    by_seed = difference.mean(1)
    points, low, high, p = float(difference.mean()), None, None, None
    if seeds >= LEAST_SEEDS:
        generator = np.random.default_rng(seed)
        # Means over a draw are weighted means, with how often each seed and volume was drawn.
        seed_weights = generator.multinomial(seeds, [1 / seeds] * seeds, DRAWS) / seeds
        volume_weights = generator.multinomial(volumes, [1 / volumes] * volumes, DRAWS) / volumes
        means = np.einsum("ds,sv,dv->d", seed_weights, difference, volume_weights, optimize=True)
        low, high = (float(end) for end in np.quantile(means, (0.025, 0.975)))
        beyond = min((means <= 0).sum(), (means >= 0).sum())
        p = float(min(1.0, 2 * (beyond + 1) / (DRAWS + 1)))
    return Effect(name, points, low, high, p, float(by_seed.min()), float(by_seed.max()))


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
