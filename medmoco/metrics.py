"""Overlap of label maps: Dice per volume and pooled over a set, background excluded.

Distances between surfaces: `surface_distance.py`; all of a case's scores: `scores.py`.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

CHUNK = 1 << 18  # voxels


def overlap_counts(prediction: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """Counts the voxels that Dice is made of.

    Args:
        prediction: class indices, any shape.
        truth: class indices, same shape.
        classes: number of classes, background included; all indices lie below it.

    Returns:
        (classes, 3) int64: |P and G|, |P|, |G| of each class.

    Raises:
        ValueError: the shapes differ, or an index is not a class.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction has shape {prediction.shape}, truth has {truth.shape}")
    for name, labels in (("prediction", prediction), ("truth", truth)):
        if labels.size and not 0 <= labels.min() <= labels.max() < classes:
            raise ValueError(
                f"{name} must hold classes 0 to {classes - 1}, got {labels.min()} to {labels.max()}"
            )
    counts = np.zeros(classes**2, np.int64)
    true, predicted = truth.ravel(), prediction.ravel()
    for start in range(0, truth.size, CHUNK):  # bincount takes 8 bytes a voxel
        part = slice(start, start + CHUNK)
        pairs = true[part].astype(np.int64) * classes + predicted[part]
        counts += np.bincount(pairs, minlength=classes**2)
    joint = counts.reshape(classes, classes)
    return np.stack([joint.diagonal(), joint.sum(axis=0), joint.sum(axis=1)], axis=1)


def dice_from_counts(counts: Iterable[int]) -> float | None:
    """2 |P and G| / (|P| + |G|) of one row of `overlap_counts`; None if both are empty."""
    both, predicted, true = (int(count) for count in counts)
    return 2 * both / (predicted + true) if predicted + true else None


def iou_from_counts(counts: Iterable[int]) -> float | None:
    """|P and G| / |P or G| of one row of `overlap_counts`; None if both are empty."""
    both, predicted, true = (int(count) for count in counts)
    return both / (predicted + true - both) if predicted + true else None


class DiceTable:
    """Collects predictions volume by volume and sums them up.

    A class that a volume lacks in truth and prediction has no Dice there: it is left out of the
    means and counted under "absent". Predicted where there is none, it scores 0.
    """

    def __init__(self, classes: tuple[str, ...]):
        """`classes` in the order of their indices, the background first."""
        self.classes = classes
        self.counts: dict[str, np.ndarray] = {}

    def add(self, case: str, prediction: np.ndarray, truth: np.ndarray) -> None:
        """Takes the class indices of one volume, both of the same shape."""
        self.counts[case] = overlap_counts(prediction, truth, len(self.classes))

    def result(self) -> dict[str, Any]:
        """The scores as JSON values, null where Dice has no value.

        Returns:
            dice_mean: mean of dice_per_class; dice_per_class: mean over the volumes;
            dice_per_volume: {case: {class: Dice}}; dice_pooled: Dice per class with the voxels of
            all volumes taken together (as in mmseg); absent: volumes left out, per class.
        """
        foreground = list(enumerate(self.classes))[1:]
        per_volume = {
            case: {name: dice_from_counts(counts[c]) for c, name in foreground}
            for case, counts in self.counts.items()
        }
        columns = {name: [row[name] for row in per_volume.values()] for _, name in foreground}
        per_class = {name: _mean(column) for name, column in columns.items()}
        pooled = sum(self.counts.values(), np.zeros((len(self.classes), 3), dtype=np.int64))
        return {
            "dice_mean": _mean(list(per_class.values())),
            "dice_per_class": per_class,
            "dice_per_volume": per_volume,
            "dice_pooled": {name: dice_from_counts(pooled[c]) for c, name in foreground},
            "absent": {name: column.count(None) for name, column in columns.items()},
        }


def _mean(values: list[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
