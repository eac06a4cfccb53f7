"""Predicted label maps and the true ones: matched by case, read onto one grid."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.ndimage import affine_transform

from medmoco.data.convert import require_grid, require_values
from medmoco.data.nifti import VolumeError, read_layout
from medmoco.data.task import (
    ABDOMEN_1K_LABELS,
    FOLDER_PAIRS,
    MAX_VALUE,
    case_key,
    read_classes,
    read_task,
)
from medmoco.data.volumes import Grid, Volume, find_volumes, read_volume, volume_name
from medmoco.errors import UserError

LABEL_FOLDERS = (*(labels for _, labels in FOLDER_PAIRS), ABDOMEN_1K_LABELS)
SHOWN = 5  # names in a message


@dataclass(frozen=True)
class Pair:
    """One case: the prediction's name, and both files."""

    case: str
    prediction: Path
    truth: Path


@dataclass(frozen=True)
class Pairs:
    """The cases to score, by name, and the files that stand alone."""

    pairs: tuple[Pair, ...]
    left_out: tuple[Path, ...]


def find_truth(folder: Path) -> tuple[list[Path], dict[int, str] | None]:
    """The true label maps, and the names of their values where these are known.

    Args:
        folder: label maps, at any depth, with a dataset.json in it or in the folder above; or a
            labelled data set as `read_task` takes it.

    Raises:
        UserError: what `read_task` and `find_volumes` raise.
    """
    if any((folder / labels).is_dir() for labels in LABEL_FOLDERS):
        task = read_task(folder)
        names = dict(zip(task.values, task.classes, strict=True))
        return [case.label for case in task.cases], names
    return find_volumes(folder), described_classes(folder, folder.resolve().parent)


def described_classes(*folders: Path) -> dict[int, str] | None:
    """Value to name from the first of these folders' dataset.json; None if there is none."""
    for folder in folders:
        if (folder / "dataset.json").is_file():
            names, values = read_classes(folder / "dataset.json")
            return dict(zip(values, names, strict=True))
    return None


def match(predictions: list[Path], truths: list[Path], only_common: bool) -> Pairs:
    """Matches files by case name; img0001, label0001 and 0001 are one case.

    Args:
        only_common: leave out what stands alone instead of stopping.

    Raises:
        UserError: a case has two files, a file is its own truth, files stand alone, or all do.
    """
    predicted, true = _by_case(predictions), _by_case(truths)
    common = sorted(predicted.keys() & true.keys())
    pairs = tuple(Pair(volume_name(predicted[k]), predicted[k], true[k]) for k in common)
    for pair in pairs:
        if pair.prediction.resolve() == pair.truth.resolve():
            raise UserError(f"{pair.prediction}: expected a prediction and its truth, got one file")
    alone = [predicted[key] for key in sorted(predicted.keys() - true.keys())]
    unpredicted = [true[key] for key in sorted(true.keys() - predicted.keys())]
    if not pairs:
        raise UserError(
            "expected predictions named like their truth, got no name in common: predictions "
            f"{some(map(volume_name, alone))}; truth {some(map(volume_name, unpredicted))}"
        )
    if (alone or unpredicted) and not only_common:
        parts = (("predictions without truth", alone), ("truth without prediction", unpredicted))
        listed = "; ".join(
            f"{len(paths)} {what}: {some(map(volume_name, paths))}"
            for what, paths in parts
            if paths
        )
        raise UserError(
            f"{listed} (--only-common scores the {len(pairs)} cases that both folders hold)"
        )
    return Pairs(pairs, tuple(alone + unpredicted))


def read_label_map(path: Path, values: Sequence[int] | None) -> Volume:
    """Label values as uint8, in canonical order.

    Args:
        values: that the map may hold; None for any from 0 to 255.

    Raises:
        VolumeError: what `read_volume` raises, several volumes in one file, or other values.
    """
    channels = read_layout(path).channels
    if channels > 1:
        raise VolumeError(path, f"expected one label map, got {channels} volumes in one file")
    volume = read_volume(path, label=True)
    low, high = volume.voxels.min(), volume.voxels.max()
    if low < 0 or high > MAX_VALUE:
        raise VolumeError(path, f"expected label values from 0 to {MAX_VALUE}, got {low} to {high}")
    labels = volume.voxels.astype(np.uint8)
    if values is not None:
        require_values(path, np.flatnonzero(np.bincount(labels.ravel(order="K"))), values)
    return Volume(labels, volume.affine)


def align(pair: Pair, prediction: Volume, truth: Grid, resample: bool) -> Volume:
    """The prediction on the grid of its truth.

    Both are in canonical order, so that files which store one grid in different orientations agree.

    Args:
        resample: bring a prediction from another grid onto the truth's instead of stopping.

    Raises:
        VolumeError: the grids differ; with both.
    """
    try:
        require_grid(pair.prediction, prediction.grid, truth, f"its truth, {pair.truth}")
    except VolumeError as error:
        if resample:
            return resample_labels(prediction, truth)
        raise VolumeError(
            pair.prediction, f"{error.reason}; --resample brings it onto the truth's grid"
        ) from None
    return prediction


def resample_labels(labels: Volume, grid: Grid) -> Volume:
    """The label of the nearest voxel at each voxel of another grid; 0 outside of the volume."""
    to_source = np.linalg.inv(labels.affine) @ grid.affine
    resampled = affine_transform(
        labels.voxels,
        to_source[:3, :3],
        to_source[:3, 3],
        output_shape=grid.shape,
        order=0,
        mode="grid-constant",  # "constant" would cut half of each outermost voxel off
    )
    return Volume(resampled, grid.affine)


def some(names: Iterable[str]) -> str:
    """The first few of many names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more


def _by_case(paths: list[Path]) -> dict[str, Path]:
    cases: dict[str, Path] = {}
    for path in paths:
        other = cases.setdefault(case_key(volume_name(path)), path)
        if other is not path:
            raise UserError(f"expected one file a case, got {other} and {path}")
    return cases
