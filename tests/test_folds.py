"""Cross-validation folds by patient, and nnU-Net's splits_final.json."""

import json

import pytest
from test_splits import make_task, patients_of

from medmoco.data.folds import choose_folds, label_share, split_folds, write_folds
from medmoco.data.splits import Split
from medmoco.errors import UserError


@pytest.mark.parametrize("folds", [2, 5, 11])
def test_every_patient_is_tested_once_and_never_by_a_model_that_saw_it(folds):
    task = make_task(11, sessions=2)
    splits = split_folds(task, folds=folds)
    tested = [case for split in splits for case in split.test]
    assert sorted(tested) == [case.name for case in task.cases]
    sizes = [len(patients_of(split.test)) for split in splits]
    assert max(sizes) - min(sizes) <= 1
    for split in splits:
        assert not patients_of(split.test) & patients_of(split.train + split.pretrain)
        assert len(split.train) + len(split.test) == 22


def test_seed_decides_the_folds():
    task = make_task(20)
    assert split_folds(task, folds=5, seed=1) == split_folds(task, folds=5, seed=1)
    assert split_folds(task, folds=5, seed=1) != split_folds(task, folds=5, seed=2)


def test_label_fraction_takes_a_share_of_the_training_part_alone():
    task = make_task(20, sessions=2)
    for split in split_folds(task, folds=4):
        few, more = (label_share(task, split, share, seed=0) for share in (0.05, 0.5))
        assert (few.test, few.pretrain) == (split.test, split.pretrain)
        assert len(patients_of(few.train)) == 1 and len(few.train) == 2
        assert set(few.train) < set(more.train) < set(split.train)


def test_written_folds_are_those_of_nnunet_and_are_read_again(tmp_path):
    task, path = make_task(7), tmp_path / "splits_final.json"
    splits = split_folds(task, folds=3)
    write_folds(path, splits)
    content = json.loads(path.read_text())
    assert [set(fold) for fold in content] == [{"train", "val"}] * 3
    assert content[1]["val"] == list(splits[1].test)
    assert split_folds(task, path) == split_folds(task, path, folds=3) == splits


def test_folds_of_a_split_file_divide_its_training_part_and_leave_its_test_alone(tmp_path):
    path = tmp_path / "split.json"
    content = {
        "pretrain": ["p00s0", "p03s0"],
        "train": ["p01s0", "p02s0", "p03s0"],
        "test": ["p04s0"],
    }
    path.write_text(json.dumps(content))
    splits = split_folds(make_task(6), path, folds=3)
    assert sorted(case for split in splits for case in split.test) == content["train"]
    for split in splits:
        assert "p04s0" not in split.pretrain + split.train + split.test
        assert "p00s0" in split.pretrain
        assert not set(split.pretrain) & set(split.test)


def test_more_folds_than_patients_is_an_error():
    with pytest.raises(UserError, match=r"--folds 4: expected at most .* patients, 3"):
        split_folds(make_task(3, sessions=5), folds=4)


def test_fold_needs_the_number_of_folds(tmp_path):
    with pytest.raises(UserError, match="--fold: expected --folds with the number of folds"):
        split_folds(make_task(3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected at least one fold, got none"),
        ([{"train": ["p00s0"], "val": ["p01s0"]}] * 2, "--folds 3: .*splits_final.json has 2"),
    ],
)
def test_list_of_another_length_is_named(tmp_path, content, message):
    path = tmp_path / "splits_final.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        split_folds(make_task(3), path, folds=3)


@pytest.mark.parametrize(
    ("fold", "message"),
    [
        ({"train": ["p00s0"]}, 'fold 1: expected lists "train" and "val"'),
        (["p00s0"], 'fold 1: expected lists "train" and "val"'),
        (
            {"train": ["x", "y"], "val": ["p01s0"]},
            "fold 1: .* got 2 that it does not hold, .*: x, y",
        ),
        (
            {"train": ["p00s0", "p01s0", "p02s0"], "val": ["p01s1", "p02s1"]},
            "fold 1: expected each patient in train or in test, got 2 in both: p01, p02",
        ),
        ({"train": ["p00s0"], "val": []}, 'fold 1: expected at least one case under "val"'),
    ],
)
def test_bad_fold_of_a_list_is_named(tmp_path, fold, message):
    path = tmp_path / "splits_final.json"
    path.write_text(json.dumps([{"train": ["p00s0"], "val": ["p01s0"]}, fold]))
    with pytest.raises(UserError, match=message):
        split_folds(make_task(3, sessions=2), path)


def test_numbers_of_folds():
    assert choose_folds(None, 3) == choose_folds("all", 3) == (0, 1, 2)
    assert choose_folds("2", 3) == (2,)
    for fold in ("3", "-1", "first", ""):
        with pytest.raises(UserError, match="--fold: expected all or a number from 0 to 2, got"):
            choose_folds(fold, 3)


def test_split_without_folds_takes_the_first_of_a_list(tmp_path):
    path = tmp_path / "splits_final.json"
    folds = [{"train": ["p00s0"], "val": ["p01s0"]}, {"train": ["p01s0"], "val": ["p02s0"]}]
    path.write_text(json.dumps(folds))
    assert split_folds(make_task(3), path)[1] == Split(("p00s0", "p01s0"), ("p01s0",), ("p02s0",))
