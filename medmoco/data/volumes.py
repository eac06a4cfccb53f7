"""Volumes: found in a folder, read in canonical orientation, cut into stacks, written back."""

import gzip
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.nifti1 import Nifti1Image
from nibabel.nifti2 import Nifti2Header, Nifti2Image
from nibabel.orientations import (
    apply_orientation,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)

from medmoco.data.nifti import Layout, VolumeError, is_dicom, read_channel, read_layout
from medmoco.errors import UserError
from medmoco.output import write_bytes_atomic
from medmoco.regular_file import open_regular

# As AbdomenCT-1K is distributed: AbdomenCT-1K-ImagePart1, 2 and 3 beside Mask.
ABDOMEN_1K_IMAGES, ABDOMEN_1K_LABELS = "AbdomenCT-1K-ImagePart", "Mask"
SUFFIXES = (".nii.gz", ".nii")
AXIS_NAMES = ("sagittal", "coronal", "axial")
LABEL_TYPES: tuple[type[np.integer], ...] = (np.uint8, np.uint16, np.int32)
CANONICAL = np.array([[0, 1], [1, 1], [2, 1]])  # RAS+ in nibabel's notation


@dataclass(frozen=True)
class BadFile:
    """A file that was left out, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Grid:
    """Shape (x, y, z) and affine (4, 4) of a volume in canonical RAS+ order."""

    shape: tuple[int, int, int]
    affine: np.ndarray

    @property
    def spacing(self) -> np.ndarray:
        """(3,) millimetres."""
        return voxel_sizes(self.affine)


@dataclass(frozen=True)
class Volume:
    """Voxels (x, y, z) in canonical RAS+ order: float32, or an integer type for labels."""

    voxels: np.ndarray
    affine: np.ndarray

    @property
    def grid(self) -> Grid:
        x, y, z = self.voxels.shape
        return Grid((x, y, z), self.affine)

    @property
    def spacing(self) -> np.ndarray:
        """(3,) millimetres."""
        return self.grid.spacing


def find_volumes(folder: Path) -> list[Path]:
    """All .nii and .nii.gz files below a folder, sorted; hidden files are passed over.

    Folders of labels that stand beside their folders of images (imagesTr and labelsTr, img and
    label, AbdomenCT-1K's parts and Mask) are passed over too: they hold no image to learn from.

    Raises:
        UserError: no such folder, no volumes in it, or DICOM in their place.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a folder of .nii or .nii.gz volumes, got no folder")
    volumes = sorted(path for path in _files(folder) if path.name.endswith(SUFFIXES))
    if volumes:
        return volumes
    dicom = next(filter(_holds_dicom, islice(_files(folder), 1000)), None)
    if dicom:
        raise UserError(
            f"{folder}: expected .nii or .nii.gz volumes, got DICOM ({dicom.name}); convert it "
            f"with `dcm2niix -z y -o OUTPUT {folder}`"
        )
    raise UserError(f"{folder}: expected .nii or .nii.gz volumes, got none in it or below")


def volume_name(path: Path) -> str:
    """The file name without .nii or .nii.gz."""
    return Path(path).name.removesuffix(".gz").removesuffix(".nii")


def read_grid(path: Path) -> Grid:
    """Canonical shape and affine from the header alone.

    Raises:
        VolumeError: not readable, not NIfTI, or a header that makes no sense.
    """
    return _canonical_grid(read_layout(Path(path)))


def read_volume(path: Path, channel: int = 0, label: bool = False) -> Volume:
    """Reads one volume, reoriented to RAS+, after checking the file to its last byte.

    Args:
        path: .nii or .nii.gz.
        channel: which volume of a 4-D file.
        label: voxels are class values; they must be whole numbers and may be constant.

    Raises:
        VolumeError: truncated, damaged or not NIfTI; the header promises more than the file or the
            memory holds; NaN or infinite voxels; a constant image; a label that is not integer.
    """
    path = Path(path)
    stored, layout = read_channel(path, channel, None if label else np.float32)
    voxels = _label_values(path, stored, layout) if label else _intensities(path, stored, layout)
    voxels = apply_orientation(voxels, io_orientation(layout.affine))
    return Volume(voxels, _canonical_grid(layout).affine)


def stack_axes(axis: int) -> tuple[int, int, int]:
    """Which canonical axes become (slice, row, column) of a stack cut along `axis`."""
    column, row = (other for other in range(3) if other != axis)
    return axis, row, column


def to_stack(array: np.ndarray, axis: int) -> np.ndarray:
    """Cuts a canonical volume (x, y, z) into slices (n, h, w) in radiological display.

    Row 0 is anterior (axial) or superior (coronal, sagittal); column 0 is the patient's right
    (axial, coronal) or anterior (sagittal). A view, not a copy.
    """
    return array.transpose(stack_axes(axis))[:, ::-1, ::-1]


def from_stack(stack: np.ndarray, axis: int) -> np.ndarray:
    """The inverse of `to_stack`: (n, h, w) to (x, y, z)."""
    return stack[:, ::-1, ::-1].transpose(np.argsort(stack_axes(axis)))


def label_type(values: Sequence[int]) -> type[np.integer]:
    """The smallest of uint8, uint16 and int32 that holds these class values of at least 0."""
    return next(kind for kind in LABEL_TYPES if max(values) <= np.iinfo(kind).max)


def write_label_map(path: Path, stack: np.ndarray, like: Path, axis: int) -> None:
    """Writes a label map on the grid, orientation and affine of the image it was made from.

    Args:
        path: .nii or .nii.gz; appears whole or not at all.
        stack: (n, h, w) class values of the dataset, cut along `axis`; the file keeps its type.
        like: the original image file.

    Raises:
        UserError: `like` cannot be read, or its grid is not that of the stack.
    """
    layout = read_layout(Path(like))
    stored = to_stored(from_stack(stack, axis), layout, like)
    header = layout.header.copy()
    header.set_data_dtype(stack.dtype)
    header.set_data_shape(stored.shape)
    header.set_slope_inter(1, 0)
    header["cal_max"] = header["cal_min"] = 0  # the display window of the image
    header.set_intent("none")  # what the image's voxels mean
    image = Nifti2Image if isinstance(header, Nifti2Header) else Nifti1Image
    content = image(stored, None, header).to_bytes()
    if Path(path).name.endswith(".gz"):
        content = gzip.compress(content, compresslevel=6, mtime=0)
    write_bytes_atomic(Path(path), content)


def to_stored(canonical: np.ndarray, layout: Layout, like: Path) -> np.ndarray:
    """Brings voxels (x, y, z) from canonical order to that of a file; a view.

    Args:
        layout: of the file `like`.

    Raises:
        UserError: the file's grid is another one.
    """
    grid = _canonical_grid(layout)
    if canonical.shape != grid.shape:
        raise UserError(f"{like}: expected a grid of {canonical.shape} voxels, got {grid.shape}")
    turn = ornt_transform(CANONICAL, io_orientation(layout.affine))
    return apply_orientation(canonical, turn)


def _files(folder: Path) -> Iterator[Path]:
    """Files below a folder in sorted order, through links, but never round in circles."""
    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not _hidden_or_labels(name, folders))
        yield from (Path(parent, name) for name in sorted(names) if not name.startswith("."))


def _hidden_or_labels(name: str, beside: list[str]) -> bool:
    images = {"label": "img", "labels": "images", "labelsTr": "imagesTr", "labelsTs": "imagesTs"}
    is_mask = name == ABDOMEN_1K_LABELS and any(n.startswith(ABDOMEN_1K_IMAGES) for n in beside)
    return name.startswith(".") or images.get(name) in beside or is_mask


def _holds_dicom(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            return path.suffix.lower() == ".dcm" or is_dicom(file.read(132))
    except OSError:
        return False


def _canonical_grid(layout: Layout) -> Grid:
    orientation = io_orientation(layout.affine)
    x, y, z = (int(layout.shape[axis]) for axis in np.argsort(orientation[:, 0]))
    return Grid((x, y, z), layout.affine @ inv_ornt_aff(orientation, layout.shape))


def _intensities(path: Path, stored: np.ndarray, layout: Layout) -> np.ndarray:
    voxels = _scaled(stored, layout)
    if not (finite := np.isfinite(voxels)).all():
        count = int(finite.size - finite.sum())
        raise VolumeError(path, f"expected finite voxels, got {count:,} NaN or infinite ones")
    del finite
    low, high = float(voxels.min()), float(voxels.max())
    if low == high:
        raise VolumeError(path, f"expected an image, got a constant volume (all voxels {low:g})")
    return voxels


def _label_values(path: Path, stored: np.ndarray, layout: Layout) -> np.ndarray:
    unscaled = layout.header.get_slope_inter() in ((None, None), (1, 0))
    if unscaled and stored.dtype.kind in "iu":
        return stored.astype(stored.dtype.newbyteorder("="))
    values = _scaled(stored.astype(np.float64), layout)
    if not np.isfinite(values).all() or (values != np.rint(values)).any():
        raise VolumeError(path, "expected a label map of whole numbers, got fractions or NaN")
    return values.astype(np.int64)


def _scaled(voxels: np.ndarray, layout: Layout) -> np.ndarray:
    """Applies the header's slope and intercept to floating-point voxels, in place."""
    slope, intercept = layout.header.get_slope_inter()
    if slope is not None and (slope, intercept) != (1, 0):
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found as infinite
            voxels *= voxels.dtype.type(slope)
            voxels += voxels.dtype.type(intercept)
    return voxels
