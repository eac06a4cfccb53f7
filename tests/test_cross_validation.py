"""`medmoco segment --folds`: a run for each fold, and one summary over all."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from test_segment import fails, segment, summary_of

from medmoco.command import run_command
from medmoco.cross_validation import fold_lines, over_folds, pooled_result
from medmoco.report import read_run
from medmoco.segment import main

QUICK = ("--mode", "finetune", "--epochs", "1", "--batch-size", "8")


def result(**volumes):
    """Dice of two classes, as `DiceTable.result` of these volumes would hold them."""
    rows = {
        case: dict(zip(("liver", "spleen"), dice, strict=True)) for case, dice in volumes.items()
    }
    columns = [[row[name] for row in rows.values()] for name in ("liver", "spleen")]
    means = [np.mean([v for v in column if v is not None]) for column in columns]
    return {
        "dice_mean": float(np.mean(means)),
        "dice_per_class": dict(zip(("liver", "spleen"), means, strict=True)),
        "dice_per_volume": rows,
        "seconds": 1.5,
    }


def test_every_case_counts_the_same_in_whichever_fold_it_lies():
    pooled = pooled_result({0: result(a=(0.5, None), b=(1.0, 0.4)), 2: result(c=(0.0, 0.8))})
    assert pooled["dice_per_class"] == {"liver": pytest.approx(0.5), "spleen": pytest.approx(0.6)}
    assert pooled["dice_mean"] == pytest.approx(0.55)
    assert pooled["absent"] == {"liver": 0, "spleen": 1}
    assert list(pooled["dice_per_volume"]) == ["a", "b", "c"]
    assert pooled["seconds"] == 3.0
    folds = pooled["folds"]
    assert folds["dice"] == {"0": pytest.approx(0.575), "2": pytest.approx(0.4)}
    assert folds["mean"] == pytest.approx(0.4875)
    assert folds["std"] == pytest.approx(np.std([0.575, 0.4], ddof=1))


def test_a_single_fold_has_no_spread_and_a_case_of_two_folds_stays_in_both():
    assert pooled_result({1: result(a=(0.5, 0.5))})["folds"]["std"] is None
    both = pooled_result({0: result(a=(0.5, 0.5)), 1: result(a=(0.7, 0.7))})
    assert list(both["dice_per_volume"]) == ["a", "a (fold_1)"]
    assert pooled_result({0: None, 1: None}) is None


def summary_with(dice, controls=()):
    return {
        "medmoco": "0", "method": None, "seed": 0, "classes": ["background", "liver", "spleen"],
        "linear": None, "finetune": dice, "controls": dict(controls), "warnings": ["careful"],
        "bad_files": [{"path": "x", "reason": "y"}], "seconds": {"segment": 2.0},
    }  # fmt: skip


def test_summary_over_the_folds_keeps_what_they_share_once():
    scratch = {"finetune_scratch": result(b=(0.1, 0.1))}
    folds = {0: summary_with(result(a=(0.2, 0.4))), 3: summary_with(result(b=(0.4, 0.6)), scratch)}
    summary = over_folds(folds, 5)
    assert summary["folds"] == {"finished": [0, 3], "of": 5}
    assert summary["linear"] is None
    assert summary["finetune"]["dice_mean"] == pytest.approx(0.4)
    assert summary["controls"]["finetune_scratch"]["dice_mean"] == pytest.approx(0.1)
    assert (summary["warnings"], len(summary["bad_files"])) == (["careful"], 1)
    assert summary["seconds"] == {"segment": 4.0}
    lines = fold_lines(summary).splitlines()
    assert lines[0] == "finetune: 0.400 ± 0.141 over the folds"
    assert lines[1] == "finetune_scratch: 0.100 over the folds"


@pytest.fixture(scope="module")
def folds(tiny_task, tmp_path_factory):
    """Fold 0 of two alone, then, resumed, both."""
    output = tmp_path_factory.mktemp("folds") / "run"
    flags = ("--folds", "2", "--fold", "0", "--label-fraction", "0.5")
    validation = ("--validation-fraction", "0.5", "--patience", "1", "--schedule", "poly")
    assert segment(tiny_task, output, *QUICK, *flags, *validation) == 0
    first = summary_of(output)
    assert run_command(main, ["--output", str(output), "--resume", "--fold", "all"]) == 0
    return output, first


def test_folds_are_runs_of_their_own_and_the_summary_is_over_those_that_are_finished(folds):
    output, first = folds
    assert first["folds"] == {"finished": [0], "of": 2}
    assert len(first["controls"]["finetune_scratch"]["dice_per_volume"]) == 5
    both = summary_of(output)
    assert both["folds"] == {"finished": [0, 1], "of": 2}
    pooled = both["controls"]["finetune_scratch"]
    parts = [summary_of(output / f"fold_{n}")["controls"]["finetune_scratch"] for n in (0, 1)]
    assert pooled["dice_per_volume"] == parts[0]["dice_per_volume"] | parts[1]["dice_per_volume"]
    assert pooled["folds"]["dice"] == {str(n): part["dice_mean"] for n, part in enumerate(parts)}
    for run in (output, output / "fold_0", output / "fold_1"):
        assert read_run(run).finetune_scratch.mean is not None


def test_fold_trains_on_a_share_of_its_training_patients_and_validates_on_a_share_of_those(folds):
    output, _ = folds
    listed = json.loads((output / "splits_final.json").read_text())
    for number, fold in enumerate(listed):
        split = json.loads((output / f"fold_{number}/split.json").read_text())
        assert split["test"] == fold["val"] and len(fold["train"]) == 5
        assert len(split["train"]) == 3 and set(split["train"]) < set(fold["train"])
        result = summary_of(output / f"fold_{number}")["controls"]["finetune_scratch"]
        assert len(result["validation_patients"]) == 2
        assert set(result["validation_patients"]) < set(split["train"])
        assert (result["best_epoch"], result["epochs"]) == (1, 1)


def test_epochs_of_fine_tuning_have_dice_by_class_and_are_drawn(folds):
    output, _ = folds
    (line,) = (output / "fold_1/metrics.jsonl").read_text().splitlines()
    record, classes = json.loads(line), summary_of(output)["classes"][1:]
    assert list(record["dice"]) == list(record["dice_validation"]) == classes
    with Image.open(output / "fold_1/progress.png") as picture:
        assert picture.size[0] > 500


def test_a_fold_is_repeated_by_its_own_configuration(folds, tmp_path, capsys):
    output, _ = folds
    config = str(output / "fold_0/config.json")
    assert run_command(main, ["--config", config, "--output", str(tmp_path / "again")]) == 0
    again, before = (
        summary_of(run)["controls"]["finetune_scratch"]["dice_per_volume"]
        for run in (tmp_path / "again", output / "fold_0")
    )
    assert again == before


def test_run_of_one_split_takes_no_fold(folds, capsys):
    output, _ = folds
    before = summary_of(output / "fold_0")
    assert run_command(main, ["--output", str(output / "fold_0"), "--resume", "--fold", "0"]) == 2
    assert "is a run of one split; choose another --output" in capsys.readouterr().err
    assert summary_of(output / "fold_0") == before


def test_folds_are_drawn_from_the_cases_that_can_be_read(tiny_task, tmp_path):
    task = shutil.copytree(tiny_task, tmp_path / "task")
    broken = sorted((task / "imagesTr").iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:500])
    flags = ("--folds", "9", "--fold", "3", "--skip-bad")
    assert segment(task, tmp_path / "run", *QUICK, *flags) == 0
    listed = json.loads((tmp_path / "run/splits_final.json").read_text())
    tested = [case for fold in listed for case in fold["val"]]
    assert len(listed) == len(tested) == 9
    assert broken.name.removesuffix(".nii.gz") not in tested


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--folds", "1"), "--folds: expected a value of at least 2, got 1"),
        (("--folds", "11"), "--folds 11: expected at most as many as there are patients, 10"),
        (("--folds", "2", "--fold", "2"), "--fold: expected all or a number from 0 to 1, got 2"),
        (("--fold", "0"), "--fold: expected --folds with the number of folds"),
        (("--patience", "3"), "--patience: expected --validation-fraction above 0 with it"),
        (("--patience", "0"), "--patience: expected a value of at least 1, got 0"),
        (("--validation-fraction", "1"), "--validation-fraction: expected a share of at least 0"),
        (
            ("--validation-fraction", "0.5", "--label-fraction", "0.01"),
            "--validation-fraction: expected at least 2 patients to train on",
        ),
    ],
)
def test_wrong_flags_are_named_before_anything_is_written(
    tiny_task, tmp_path, capsys, flags, message
):
    assert message in fails(capsys, tiny_task, tmp_path / "run", *QUICK, *flags)
    assert not (tmp_path / "run").exists()
