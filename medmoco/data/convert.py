"""From voxels to 16-bit pixels and class indices; what the set as a whole decides."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medmoco.data.nifti import VolumeError
from medmoco.data.store import FULL_SCALE
from medmoco.data.volumes import Grid, Volume, to_stack

CLEARLY_COARSER = 1.1  # ratio of spacings
AXIAL = 2
MAX_DISPLACEMENT = 0.1  # voxels by which label and image may lie apart: rounding of the affine
MR_PERCENTILES = (0.5, 99.5)
PERCENTILE_VOXELS = 1 << 22  # more of them change no percentile that matters
AIR = -200.0  # HU; no tissue lies below, the air in and around a body does
AIR_SHARE = 0.001


def coarsest_axis(grids: Sequence[Grid]) -> int:
    """The axis of clearly the coarsest spacing, by the median of the set; else the axial one."""
    spacing = np.median([grid.spacing for grid in grids], axis=0)
    _, second, coarsest = np.sort(spacing)
    return int(spacing.argmax()) if coarsest > CLEARLY_COARSER * second else AXIAL


def guess_modality(voxels: np.ndarray) -> str:
    """ "ct" if there is air in Hounsfield units; MR has no sign beyond a little ringing."""
    return "ct" if np.count_nonzero(voxels < AIR) >= AIR_SHARE * voxels.size else "mr"


def to_pixels(
    path: Path, voxels: np.ndarray, modality: str, window: tuple[float, float], axis: int
) -> np.ndarray:
    """Clips to the HU window (CT) or the 0.5 to 99.5 percentiles (MR), scaled to 0..65535.

    Args:
        path: of the volume, for errors.
        voxels: (x, y, z) float32 in canonical order.
        modality: "ct" or "mr".
        window: HU that become 0 and 65535 in CT.
        axis: along which slices are cut.

    Returns:
        (n, h, w) uint16, the stack of slices as `to_stack` cuts it.

    Raises:
        VolumeError: every voxel lies on one side of the window.
    """
    if modality == "ct":
        low, high = window
        if voxels.max() <= low or voxels.min() >= high:
            raise VolumeError(
                path,
                f"expected voxels within the window of {low:g} to {high:g} HU, "
                f"got {voxels.min():g} to {voxels.max():g}",
            )
    else:
        low, high = np.percentile(_sample(voxels), MR_PERCENTILES)
        if low == high:  # nearly everything has one value
            low, high = voxels.min(), voxels.max()
    factor = np.float32(FULL_SCALE / (float(high) - float(low)))
    stack = to_stack(voxels, axis)
    pixels = np.empty(stack.shape, np.uint16)
    # A slice at a time, since a volume can fill much of the memory.
    for plane, out in zip(stack, pixels, strict=True):
        scaled = np.clip(plane, np.float32(low), np.float32(high))
        scaled -= np.float32(low)
        scaled *= factor
        out[:] = np.rint(scaled, out=scaled).clip(0, FULL_SCALE, out=scaled)
    return pixels


def _sample(voxels: np.ndarray) -> np.ndarray:
    """Evenly spaced voxels in the order of the memory, without a copy of the others."""
    in_memory = voxels.transpose(np.argsort(np.negative(np.abs(voxels.strides)), kind="stable"))
    return in_memory.flat[:: max(1, voxels.size // PERCENTILE_VOXELS)]


def to_classes(path: Path, label: Volume, image: Grid, values: Sequence[int]) -> np.ndarray:
    """Class indices (x, y, z) uint8 of a label map that lies on its image's grid.

    Raises:
        VolumeError: another shape or affine than the image's, or values that name no class.
    """
    require_grid(path, label.grid, image, "its image")
    require_values(path, np.unique(label.voxels), values)
    table = np.zeros(max(values) + 1, np.uint8)
    table[list(values)] = np.arange(len(values))
    return table[label.voxels]


def require_grid(path: Path, found: Grid, expected: Grid, of: str) -> None:
    """Checks that a volume lies where it should, voxel by voxel.

    Raises:
        VolumeError: shows both grids and says `of` whom: the shapes differ, or where voxels lie.
    """
    same_shape = found.shape == expected.shape
    apart = displacement(found.affine, expected) if same_shape else 0.0
    if same_shape and apart <= MAX_DISPLACEMENT * expected.spacing.min():
        return
    reason = f"expected the grid of {of}, {_described(expected)}, got {_described(found)}"
    raise VolumeError(path, reason + (f": voxels lie up to {apart:.3g} mm apart" * same_shape))


def require_values(path: Path, found: np.ndarray, values: Sequence[int]) -> None:
    """Checks the label values that a file holds against those that name a class.

    Raises:
        VolumeError: names a few of those that do not.
    """
    unknown = np.setdiff1d(found, values)
    if len(unknown):
        listed = ", ".join(map(str, unknown[:10])) + (", ..." if len(unknown) > 10 else "")
        raise VolumeError(path, f"expected label values {list(values)}, got also {listed}")


def displacement(affine: np.ndarray, grid: Grid) -> float:
    """Millimetres by which this affine moves the voxels at most; a corner moves farthest."""
    ends = np.array(grid.shape) - 1
    corners = np.array(np.meshgrid(*([0, end] for end in ends), [1])).reshape(4, -1)
    return float(np.linalg.norm(((affine - grid.affine) @ corners)[:3], axis=0).max())


def _described(grid: Grid) -> str:
    rows = np.array2string(grid.affine[:3].round(4), separator=", ").replace("\n", "")
    return f"shape {grid.shape} and affine {rows}"
