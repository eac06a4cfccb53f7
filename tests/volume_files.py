"""Small NIfTI files for the tests of the data modules."""

from pathlib import Path

import nibabel as nib
import numpy as np

OBLIQUE = np.array(
    [[1.9, -0.4, 0.5, 10], [0.5, 2.8, -0.9, -20], [-0.3, 0.8, 3.7, 30], [0, 0, 0, 1]], float
)


def save_volume(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 1, 2, 1]) if affine is None else affine), path)
    return path


def ramp(shape: tuple[int, ...] = (4, 5, 6), kind: type = np.int16) -> np.ndarray:
    """All voxels different."""
    return np.arange(np.prod(shape)).reshape(shape).astype(kind)


def as_stored(voxels: np.ndarray, affine: np.ndarray, codes: str) -> tuple[np.ndarray, np.ndarray]:
    """A canonical volume as a file of another orientation would hold it: voxels and affine."""
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes)
    )
    stored = nib.orientations.apply_orientation(voxels, turn)
    return stored, affine @ nib.orientations.inv_ornt_aff(turn, voxels.shape)
