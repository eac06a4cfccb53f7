"""How well a mean is known: Student's 95 % intervals over test volumes, or over seeds."""

import math
from collections.abc import Sequence

from scipy.stats import t as student

from medmoco.report.run_folder import Result, finite

LEVEL = 0.95


def interval(mean: float, deviations: Sequence[float]) -> tuple[float, float] | None:
    """mean ± t s / √n, within the [0, 1] of Dice.

    Args:
        mean: of n independent values.
        deviations: of the values from the mean, n of them.

    Returns:
        Lower and upper end; None below two values.
    """
    count = len(deviations)
    if count < 2:
        return None
    error = math.sqrt(sum(d * d for d in deviations) / (count - 1) / count)
    half = float(student.ppf((1 + LEVEL) / 2, count - 1)) * error
    return max(0.0, mean - half), min(1.0, mean + half)


def over_values(values: Sequence[float]) -> tuple[float, float] | None:
    """The interval of the values' own mean."""
    mean = sum(values) / len(values) if values else 0.0
    return interval(mean, [value - mean for value in values])


def of_class(result: Result, name: str) -> tuple[float, float] | None:
    """Of the mean over the test volumes in which the class has a Dice."""
    scores = (finite(row.get(name)) for row in result.per_volume.values())
    return over_values([score for score in scores if score is not None])


def of_mean(result: Result) -> tuple[float, float] | None:
    """Of the mean over classes of the means over volumes.

    A volume's deviation is the mean of its classes' deviations, each weighted by how many volumes
    its own mean is taken over: the linearisation of a sum of ratios. Where every volume has every
    class, this is the interval of the volumes' means. None where a class is in a single volume.
    """
    if result.mean is None:
        return None
    rows = [
        row
        for row in result.per_volume.values()
        if any(finite(score) is not None for score in row.values())
    ]
    deviations = [0.0] * len(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    columns = [[finite(row.get(name)) for row in rows] for name in names]
    known = [column for column in columns if any(score is not None for score in column)]
    if any(sum(score is not None for score in column) < 2 for column in known):
        return None
    for column in known:
        scores = [score for score in column if score is not None]
        mean, weight = sum(scores) / len(scores), len(rows) / len(scores) / len(known)
        for i, score in enumerate(column):
            if score is not None:
                deviations[i] += weight * (score - mean)
    return interval(result.mean, deviations)
