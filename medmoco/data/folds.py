"""Cross-validation: folds by patient, in the form of nnU-Net's splits_final.json."""

import dataclasses
from pathlib import Path

import numpy as np

from medmoco.data.splits import (
    Split,
    check_label_fraction,
    checked_split,
    named_parts,
    shuffled_patients,
    split_task,
    with_labels,
)
from medmoco.data.task import Task
from medmoco.errors import UserError
from medmoco.json_file import read_json
from medmoco.output import write_json

FOLDS_NAME = "splits_final.json"


def split_folds(
    task: Task, split_file: Path | None = None, folds: int | None = None, seed: int = 0
) -> tuple[Split, ...]:
    """The splits of a cross-validation, the fold that is left out of the training as their test.

    Args:
        split_file: nnU-Net's splits_final.json, a list of {"train", "val"}, taken as it is; or
            {"pretrain", "train", "test"}, of which the training part is divided and the test left
            alone. Without it, the whole task is divided.
        folds: number of folds, at least 2; with a list, None or its length.
        seed: decides which patients make a fold.

    Raises:
        UserError: more folds than patients, no number of folds, or a broken split file, see
            `split_task`.
    """
    content = read_json(split_file, nan_is_null=True) if split_file else None
    if isinstance(content, list):
        return _given_folds(str(split_file), content, task, folds)
    if folds is None:
        raise UserError(
            "--fold: expected --folds with the number of folds, or nnU-Net's list as --split"
        )
    if split_file:
        whole = split_task(task, split_file)
    else:
        every = tuple(case.name for case in task.cases)
        whole = Split(pretrain=every, train=every, test=())
    return _divide(task, whole, folds, seed)


def label_share(task: Task, split: Split, fraction: float, seed: int) -> Split:
    """The split with a share of its training patients, chosen as `split_task` does.

    Raises:
        UserError: the fraction is out of range.
    """
    check_label_fraction(fraction)
    return dataclasses.replace(split, train=with_labels(task, split.train, fraction, seed))


def choose_folds(fold: str | None, count: int) -> tuple[int, ...]:
    """The numbers that --fold means: "all", or one of them.

    Raises:
        UserError: no such fold.
    """
    if fold in (None, "all"):
        return tuple(range(count))
    if fold is None or not fold.isdecimal() or int(fold) >= count:
        raise UserError(f"--fold: expected all or a number from 0 to {count - 1}, got {fold}")
    return (int(fold),)


def write_folds(path: Path, splits: tuple[Split, ...]) -> None:
    """Writes nnU-Net's splits_final.json, which `split_folds` reads."""
    write_json(path, [{"train": list(s.train), "val": list(s.test)} for s in splits])


def _given_folds(
    path: str, content: list[object], task: Task, folds: int | None
) -> tuple[Split, ...]:
    if not content:
        raise UserError(f"{path}: expected at least one fold, got none")
    if folds not in (None, len(content)):
        raise UserError(f"--folds {folds}: {path} has {len(content)}; leave the flag out")
    names = [f"{path}, fold {number}" for number in range(len(content))]
    return tuple(
        checked_split(name, named_parts(name, fold), task)
        for name, fold in zip(names, content, strict=True)
    )


def _divide(task: Task, whole: Split, folds: int, seed: int) -> tuple[Split, ...]:
    """Patients in a seeded order, cut into parts whose sizes differ by one at most."""
    patients = shuffled_patients(task, whole.train, seed)
    if folds > len(patients):
        raise UserError(
            f"--folds {folds}: expected at most as many as there are patients, {len(patients)}"
        )
    patient = {case.name: case.patient for case in task.cases}
    splits = []
    for part in np.array_split(patients, folds):
        tested = set(part.tolist())
        left_out = tuple(case for case in whole.train if patient[case] in tested)
        train = tuple(case for case in whole.train if patient[case] not in tested)
        pretrain = tuple(case for case in whole.pretrain if patient[case] not in tested)
        splits.append(Split(pretrain, train, left_out))
    return tuple(splits)
