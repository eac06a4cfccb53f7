"""Splits by patient, never by slice: two slices of one patient are near-duplicates."""

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medmoco.data.task import Task
from medmoco.errors import UserError
from medmoco.json_file import read_json
from medmoco.output import write_json
from medmoco.printing import LONGEST, brief, say

PARTS = ("pretrain", "train", "test")
NAMED = 5  # cases or patients that an error lists


@dataclass(frozen=True)
class Split:
    """Case names for pretraining (no labels used), training with labels, and testing."""

    pretrain: tuple[str, ...]
    train: tuple[str, ...]
    test: tuple[str, ...]


def split_task(
    task: Task,
    split_file: Path | None = None,
    label_fraction: float = 1.0,
    seed: int = 0,
    test_fraction: float = 0.2,
) -> Split:
    """Splits the cases of a task by patient.

    Args:
        split_file: JSON of {"pretrain", "train", "test"} (pretrain may be absent: all but test), or
            nnU-Net's splits_final.json, of which fold 0 is taken. Without it, a seeded choice.
        label_fraction: share of the training patients whose labels are used, in (0, 1]; a smaller
            share is part of a larger one.
        test_fraction: share of the patients kept for testing, in (0, 1).

    Raises:
        UserError: fewer than two patients, a fraction out of range, a split file that is broken,
            names unknown cases, or has a patient in both train and test.
    """
    check_label_fraction(label_fraction)
    if not 0 < test_fraction < 1:
        raise UserError(
            f"--test-fraction: expected a share above 0 and below 1, got {test_fraction}"
        )
    if split_file is not None:
        pretrain, train, test = _read_split(Path(split_file), task)
    else:
        pretrain, test = _choose_test(task, seed, test_fraction)
        train = pretrain
    return Split(pretrain, with_labels(task, train, label_fraction, seed), test)


def check_label_fraction(fraction: float) -> None:
    """Raises a UserError unless the share of patients is in (0, 1]."""
    if not 0 < fraction <= 1:
        raise UserError(f"--label-fraction: expected a share above 0 and up to 1, got {fraction}")


def write_split(path: Path, split: Split) -> None:
    """Writes the JSON that `split_task` reads."""
    write_json(path, asdict(split))


def _choose_test(
    task: Task, seed: int, test_fraction: float
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    patients = shuffled_patients(task, [case.name for case in task.cases], seed)
    if len(patients) < 2:
        raise UserError(
            f"{task.root}: expected at least 2 patients, one to train and one to test, "
            f"got {len(patients)}"
        )
    count = min(max(1, round(test_fraction * len(patients))), len(patients) - 1)
    chosen = set(patients[:count])
    test = tuple(case.name for case in task.cases if case.patient in chosen)
    return tuple(case.name for case in task.cases if case.patient not in chosen), test


def with_labels(task: Task, train: Sequence[str], fraction: float, seed: int) -> tuple[str, ...]:
    """The cases of a share of the patients to train on, at least of one, chosen by the seed."""
    patients = shuffled_patients(task, train, seed + 1)  # not the order that chose the test set
    chosen = set(patients[: math.ceil(fraction * len(patients) - 1e-9)])
    kept = set(train)
    return tuple(case.name for case in task.cases if case.name in kept and case.patient in chosen)


def shuffled_patients(task: Task, names: Collection[str], seed: int) -> list[str]:
    """The patients of these cases, in an order that the seed decides."""
    wanted = set(names)
    patients = sorted({case.patient for case in task.cases if case.name in wanted})
    return [patients[i] for i in np.random.default_rng(seed).permutation(len(patients))]


def _read_split(path: Path, task: Task) -> tuple[tuple[str, ...], ...]:
    content = read_json(path, nan_is_null=True)
    if isinstance(content, list) and content:
        content = named_parts(path, content[0])
    split = checked_split(str(path), content, task)
    return split.pretrain, split.train, split.test


def named_parts(path: Path | str, fold: Any) -> Any:
    """A fold of nnU-Net's splits_final.json under our names: it tests on "val"."""
    if not isinstance(fold, dict) or not {"train", "val"} <= fold.keys():
        raise UserError(f'{path}: expected lists "train" and "val" in each of nnU-Net\'s folds')
    for part in ("train", "val"):
        _require_names(str(path), part, fold[part])
    return {"train": fold["train"], "test": fold["val"]}


def checked_split(path: str, content: Any, task: Task) -> Split:
    """A split whose cases are of the task, and no patient of which is on both sides.

    Args:
        path: how messages name it.
        content: {"pretrain", "train", "test"}; without "pretrain", that is all but the test.

    Raises:
        UserError: it is something else, names unknown cases, or has a patient in train and test.
    """
    parts = _split_parts(path, content)
    patient = {case.name: case.patient for case in task.cases}
    unknown = sorted({name for names in parts.values() for name in names} - set(patient))
    if unknown:
        raise UserError(
            f"{path}: expected cases of {task.root}, got {len(unknown)} that it does not hold, or "
            f"that --exclude leaves out: {_listed(unknown)}"
        )
    tested = {patient[name] for name in parts["test"]}
    if "pretrain" not in parts:
        parts["pretrain"] = [name for name in patient if patient[name] not in tested]
    both = sorted(tested & {patient[name] for name in parts["train"]})
    if both:
        raise UserError(
            f"{path}: expected each patient in train or in test, got {len(both)} in both: "
            f"{_listed(both)}"
        )
    seen = sorted(tested & {patient[name] for name in parts["pretrain"]})
    if seen:
        say(f"warning: {path}: {len(seen)} test patients are also in pretrain, {seen[0]} for one")
    return Split(*(tuple(sorted(parts[part])) for part in PARTS))


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(name[:LONGEST] for name in names[:NAMED])
    return shown + (", ..." if len(names) > NAMED else "")


def _split_parts(path: str, content: Any) -> dict[str, list[str]]:
    """The named lists of a split."""
    if not isinstance(content, dict) or not {"train", "test"} <= content.keys():
        raise UserError(f'{path}: expected lists "train" and "test", or nnU-Net\'s list of folds')
    parts = {part: content[part] for part in PARTS if part in content}
    for part, names in parts.items():
        _require_names(path, part, names)
    return parts


def _require_names(path: str, part: str, names: Any) -> None:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f'{path}: expected a list of case names under "{part}", got {brief(names)}')
    if not names and part != "pretrain":
        raise UserError(f'{path}: expected at least one case under "{part}", got none')
