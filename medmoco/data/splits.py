"""Splits by patient, never by slice: two slices of one patient are near-duplicates."""

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medmoco.data.task import Task
from medmoco.errors import UserError
from medmoco.output import write_json

PARTS = ("pretrain", "train", "test")


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
    if not 0 < label_fraction <= 1:
        raise UserError(
            f"--label-fraction: expected a share above 0 and up to 1, got {label_fraction}"
        )
    if not 0 < test_fraction < 1:
        raise UserError(
            f"--test-fraction: expected a share above 0 and below 1, got {test_fraction}"
        )
    if split_file is not None:
        pretrain, train, test = _read_split(Path(split_file), task)
    else:
        pretrain, test = _choose_test(task, seed, test_fraction)
        train = pretrain
    return Split(pretrain, _fraction(task, train, label_fraction, seed), test)


def write_split(path: Path, split: Split) -> None:
    """Writes the JSON that `split_task` reads."""
    write_json(path, asdict(split))


def _choose_test(
    task: Task, seed: int, test_fraction: float
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    patients = _shuffled_patients(task, [case.name for case in task.cases], seed)
    if len(patients) < 2:
        raise UserError(
            f"{task.root}: expected at least 2 patients, one to train and one to test, "
            f"got {len(patients)}"
        )
    count = min(max(1, round(test_fraction * len(patients))), len(patients) - 1)
    chosen = set(patients[:count])
    test = tuple(case.name for case in task.cases if case.patient in chosen)
    return tuple(case.name for case in task.cases if case.patient not in chosen), test


def _fraction(task: Task, train: Sequence[str], fraction: float, seed: int) -> tuple[str, ...]:
    patients = _shuffled_patients(task, train, seed + 1)  # not the order that chose the test set
    chosen = set(patients[: math.ceil(fraction * len(patients) - 1e-9)])
    kept = set(train)
    return tuple(case.name for case in task.cases if case.name in kept and case.patient in chosen)


def _shuffled_patients(task: Task, names: Collection[str], seed: int) -> list[str]:
    wanted = set(names)
    patients = sorted({case.patient for case in task.cases if case.name in wanted})
    return [patients[i] for i in np.random.default_rng(seed).permutation(len(patients))]


def _read_split(path: Path, task: Task) -> tuple[tuple[str, ...], ...]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected a readable JSON split: {error}") from None
    parts = _split_parts(path, content)
    patient = {case.name: case.patient for case in task.cases}
    unknown = sorted({name for names in parts.values() for name in names} - set(patient))
    if unknown:
        raise UserError(
            f"{path}: expected cases of {task.root}, got {len(unknown)} that it does not hold, "
            f"{unknown[0]} for one"
        )
    tested = {patient[name] for name in parts["test"]}
    if "pretrain" not in parts:
        parts["pretrain"] = [name for name in patient if patient[name] not in tested]
    both = sorted(tested & {patient[name] for name in parts["train"]})
    if both:
        raise UserError(f"{path}: expected each patient in train or in test, got {both[0]} in both")
    seen = sorted(tested & {patient[name] for name in parts["pretrain"]})
    if seen:
        print(f"warning: {path}: {len(seen)} test patients are also in pretrain, {seen[0]} for one")
    return tuple(tuple(sorted(parts[part])) for part in PARTS)


def _split_parts(path: Path, content: Any) -> dict[str, list[str]]:
    """The named lists of a split; fold 0 of nnU-Net's list of {"train", "val"}."""
    if isinstance(content, list) and content and isinstance(content[0], dict):
        content = {"train": content[0].get("train"), "test": content[0].get("val")}
    if not isinstance(content, dict) or not {"train", "test"} <= content.keys():
        raise UserError(f'{path}: expected lists "train" and "test", or nnU-Net\'s list of folds')
    parts = {part: content[part] for part in PARTS if part in content}
    for part, names in parts.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f'{path}: expected a list of case names under "{part}", got {names!r}')
        if not names and part != "pretrain":
            raise UserError(f'{path}: expected at least one case under "{part}", got none')
    return parts
