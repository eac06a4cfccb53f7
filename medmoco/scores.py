"""Scores of one predicted label map against the true one: overlap and distances of each class.

What happens where a mask is empty:

| class in truth | in prediction | counted as | Dice, IoU, NSD | HD95, ASSD |
|---|---|---|---|---|
| yes | yes | found | their value | their value |
| yes | no | missed | 0 | the volume's diagonal in mm |
| no | yes | invented | 0 | the volume's diagonal in mm |
| no | no | absent | left out of every mean | left out of every mean |

A distance to nothing has no value, and leaving such cases out would reward a model for missing an
organ; the reference implementation of Metrics Reloaded asks for the worst value at this point. The
diagonal is longer than any distance in the volume. It depends on the field of view: means with a
missed organ in them compare only on the same volumes, and the number of missed ones says more.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.ndimage import find_objects
from tqdm import tqdm

from medmoco.data.nifti import VolumeError
from medmoco.data.pairs import Pair, align, read_label_map
from medmoco.errors import UserError
from medmoco.metrics import dice_from_counts, iou_from_counts, overlap_counts
from medmoco.surface_distance import (
    average_symmetric_surface_distance,
    bounding_box,
    diagonal,
    hausdorff_95,
    normalised_surface_dice,
    surface_distances,
)


@dataclass(frozen=True)
class ClassScores:
    """One class of one case: voxels, and distances that are None where both masks are empty."""

    n_both: int
    n_pred: int
    n_ref: int
    n_voxels: int  # of the volume
    hd95: float | None  # mm
    nsd: float | None
    assd: float | None  # mm

    @property
    def dice(self) -> float | None:
        return dice_from_counts((self.n_both, self.n_pred, self.n_ref))

    @property
    def iou(self) -> float | None:
        return iou_from_counts((self.n_both, self.n_pred, self.n_ref))

    @property
    def outcome(self) -> str:
        """ "found", "missed", "invented" or "absent"."""
        if self.n_ref:
            return "found" if self.n_pred else "missed"
        return "invented" if self.n_pred else "absent"


def absent(n_voxels: int) -> ClassScores:
    """The scores of a class that neither map of a volume of so many voxels has."""
    return ClassScores(0, 0, 0, n_voxels, None, None, None)


def score_labels(
    prediction: np.ndarray, truth: np.ndarray, axes: np.ndarray, tolerance: float
) -> dict[int, ClassScores]:
    """Scores every value but 0 that one of two label maps holds.

    Args:
        prediction: (x, y, z) uint8 label values.
        truth: same shape and type.
        axes: (3, 3), the step in mm from voxel to voxel along each axis.
        tolerance: of the NSD, mm.
    """
    size, worst = truth.size, diagonal(truth.shape, axes)
    # In a volume of one slice every voxel lacks neighbours: its surfaces are contours in the plane.
    flat = tuple(axis for axis, length in enumerate(truth.shape) if length == 1)[:2]
    prediction, truth = prediction.squeeze(flat), truth.squeeze(flat)
    axes = np.delete(axes, flat, axis=1)
    foreground = (prediction > 0) | (truth > 0)
    if not foreground.any():
        return {}
    box = bounding_box(foreground)
    prediction, truth = prediction[box], truth[box]
    counts = overlap_counts(prediction, truth, int(max(prediction.max(), truth.max())) + 1)
    scores = {}
    for value, box in _boxes(prediction, truth).items():
        ours, theirs = prediction[box] == value, truth[box] == value
        n_both, n_pred, n_ref = counts[value].tolist()
        hd95, nsd, assd = _surface_scores(ours, theirs, axes, tolerance, worst)
        scores[value] = ClassScores(n_both, n_pred, n_ref, size, hd95, nsd, assd)
    return scores


def _boxes(prediction: np.ndarray, truth: np.ndarray) -> dict[int, tuple[slice, ...]]:
    """Of each value besides 0 the smallest box that holds it in both maps."""
    boxes: dict[int, tuple[slice, ...]] = {}
    for labels in (prediction, truth):
        for value, box in enumerate(find_objects(labels), 1):
            if box is not None:
                ends = zip(box, boxes.get(value, box), strict=True)
                boxes[value] = tuple(
                    slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in ends
                )
    return dict(sorted(boxes.items()))


def _surface_scores(
    prediction: np.ndarray, truth: np.ndarray, axes: np.ndarray, tolerance: float, worst: float
) -> tuple[float, float, float]:
    """HD95, NSD and ASSD of two masks that are not both empty."""
    if not (prediction.any() and truth.any()):
        return worst, 0.0, worst
    distances = surface_distances(prediction, truth, axes)
    return (
        hausdorff_95(distances),
        normalised_surface_dice(distances, tolerance),
        average_symmetric_surface_distance(distances),
    )


@dataclass(frozen=True)
class CaseScores:
    """One case: the scores of every value that prediction or truth holds."""

    pair: Pair
    n_voxels: int
    by_value: dict[int, ClassScores]
    resampled: bool

    def of(self, value: int) -> ClassScores:
        return self.by_value.get(value) or absent(self.n_voxels)


def score_pair(
    pair: Pair, values: Sequence[int] | None, tolerance: float, resample: bool
) -> CaseScores | list[VolumeError]:
    """Reads and scores one case.

    Args:
        values: that a label map may hold; None for any.
        tolerance: of the NSD, mm.
        resample: bring predictions from other grids onto the truth's.

    Returns:
        The scores, or what is wrong with the files.
    """
    maps, bad = [], []
    for path in (pair.prediction, pair.truth):
        try:
            maps.append(read_label_map(path, values))
        except VolumeError as error:
            bad.append(error)
    if bad:
        return bad
    prediction, truth = maps
    try:
        aligned = align(pair, prediction, truth.grid, resample)
    except VolumeError as error:
        return [error]
    # Reversed, the axes of a NIfTI file lie in memory as numpy prefers them.
    axes = truth.affine[:3, 2::-1]
    scores = score_labels(aligned.voxels.T, truth.voxels.T, axes, tolerance)
    return CaseScores(pair, truth.voxels.size, scores, resampled=aligned is not prediction)


def score_pairs(
    pairs: Sequence[Pair],
    values: Sequence[int] | None,
    *,
    tolerance: float,
    resample: bool,
    workers: int,
) -> list[CaseScores]:
    """Scores cases in their order, `workers` at a time.

    Raises:
        UserError: names all bad files together, each with its reason.
    """
    score = partial(score_pair, values=values, tolerance=tolerance, resample=resample)
    # Threads, not processes: numpy, scipy's trees and zlib let go of the interpreter while they
    # work, and a process would first import torch, which takes longer than many a set of cases.
    with ThreadPoolExecutor(workers) as pool:
        bar = tqdm(pool.map(score, pairs), "evaluate", len(pairs), unit="case", disable=None)
        results = list(bar)
    bad = [error for result in results if isinstance(result, list) for error in result]
    if bad:
        files = "1 bad file" if len(bad) == 1 else f"{len(bad)} bad files"
        lines = "".join(f"\n  {error}" for error in bad)
        raise UserError(f"{files} among {len(pairs)} predictions and their truth:{lines}")
    return [result for result in results if isinstance(result, CaseScores)]
