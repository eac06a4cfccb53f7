import json
from pathlib import Path

import pytest

from medmoco.data.splits import Split, split_task, write_split
from medmoco.data.task import Case, Task
from medmoco.errors import UserError


def make_task(patients: int, sessions: int = 1) -> Task:
    cases = tuple(
        Case(f"p{p:02d}s{s}", f"p{p:02d}", Path("image"), Path("label"))
        for p in range(patients)
        for s in range(sessions)
    )
    return Task(Path("folder"), cases, ("background", "organ"), (0, 1), None)


def patients_of(names):
    return {name[:3] for name in names}


def test_no_patient_is_on_both_sides():
    split = split_task(make_task(10, sessions=3))
    assert len(split.test) == 2 * 3
    assert not patients_of(split.test) & patients_of(split.train)
    assert split.pretrain == split.train
    assert len(split.train) + len(split.test) == 30


def test_seed_decides_the_split():
    task = make_task(20)
    assert split_task(task, seed=1) == split_task(task, seed=1)
    assert split_task(task, seed=1).test != split_task(task, seed=2).test


def test_smaller_label_fraction_is_part_of_a_larger_one():
    task = make_task(20, sessions=2)
    small, large = (split_task(task, label_fraction=share) for share in (0.1, 0.5))
    assert len(patients_of(small.train)) == 2
    assert len(patients_of(large.train)) == 8
    assert set(small.train) < set(large.train) < set(large.pretrain)
    assert small.test == large.test


def test_smallest_label_fraction_leaves_one_patient():
    assert len(split_task(make_task(5), label_fraction=0.001).train) == 1


def test_fewer_patients_than_parts_is_an_error():
    with pytest.raises(UserError, match="expected at least 2 patients, one to train and one to t"):
        split_task(make_task(1, sessions=5))
    split = split_task(make_task(2))
    assert len(split.train) == len(split.test) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_fraction": 0.0}, "--label-fraction: expected a share above 0 and up to 1, got 0"),
        ({"label_fraction": 1.5}, "--label-fraction: expected .*, got 1.5"),
        ({"test_fraction": 1.0}, "--test-fraction: expected a share above 0 and below 1, got 1.0"),
        ({"test_fraction": -1.0}, "--test-fraction: expected .*, got -1.0"),
    ],
)
def test_fractions_out_of_range_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        split_task(make_task(5), **arguments)


def test_written_split_is_read_again(tmp_path):
    task = make_task(10)
    split = split_task(task, seed=3)
    write_split(tmp_path / "split.json", split)
    assert split_task(task, tmp_path / "split.json") == split


def test_split_without_pretrain_pretrains_on_all_patients_but_those_of_the_test(tmp_path):
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"train": ["p01s0"], "test": ["p02s0"]}))
    split = split_task(make_task(4, sessions=2), path)
    assert split.train == ("p01s0",)
    assert patients_of(split.pretrain) == {"p00", "p01", "p03"}


def test_first_fold_of_nnunet_is_taken(tmp_path):
    path = tmp_path / "splits_final.json"
    folds = [{"train": ["p00s0", "p01s0"], "val": ["p02s0"]}, {"train": [], "val": []}]
    path.write_text(json.dumps(folds))
    split = split_task(make_task(3), path)
    assert split == Split(("p00s0", "p01s0"), ("p00s0", "p01s0"), ("p02s0",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected a readable JSON file"),
        ("[]", 'expected lists "train" and "test"'),
        ('{"train": ["p00s0"]}', 'expected lists "train" and "test"'),
        ('[{"train": ["p00s0"]}]', 'expected lists "train" and "val" in each of nnU-Net'),
        ('["p00s0"]', 'expected lists "train" and "val" in each of nnU-Net'),
        ('{"train": "p00s0", "test": []}', 'expected a list of case names under "train"'),
        ('{"train": [], "test": ["p00s0"]}', 'expected at least one case under "train", got none'),
        (
            '{"train": ["x"], "test": ["p00s0"]}',
            "cases of folder, got 1 that it does not hold, or that --exclude leaves out: x",
        ),
        ('{"train": ["p00s0"], "test": ["p00s1"]}', "in train or in test, got 1 in both: p00"),
    ],
)
def test_bad_split_file_is_named(tmp_path, content, message):
    (tmp_path / "split.json").write_text(content)
    with pytest.raises(UserError, match=message):
        split_task(make_task(3, sessions=2), tmp_path / "split.json")


def test_missing_split_file_is_named(tmp_path):
    with pytest.raises(UserError, match="expected a readable JSON file"):
        split_task(make_task(3), tmp_path / "split.json")


def test_test_patient_in_pretraining_is_warned_of(tmp_path, capsys):
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"pretrain": ["p02s0"], "train": ["p01s0"], "test": ["p02s0"]}))
    split_task(make_task(3), path)
    assert "1 test patients are also in pretrain, p02 for one" in capsys.readouterr().out
