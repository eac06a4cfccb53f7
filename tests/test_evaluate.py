"""`medmoco evaluate` on small label maps: what it writes, what it prints, what it refuses."""

import csv
import json
import os
import re
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from volume_files import save_volume

from medmoco.command import run_command
from medmoco.errors import UserError
from medmoco.evaluate import main

AFFINE = np.diag([1.0, 1.0, 2.5, 1.0])
COUNTS = ("TP", "FP", "FN", "TN", "n_pred", "n_ref")


def random_labels(seed):
    coarse = np.random.default_rng(seed).integers(0, 3, (4, 4, 3)).astype(np.uint8)
    return np.kron(coarse, np.ones((3, 3, 2), np.uint8))


@pytest.fixture
def folders(tmp_path):
    """Three cases with classes 1 and 2: one wrong in part, one with class 2 missed, one perfect
    and without class 2."""
    truths = [random_labels(seed) for seed in range(3)]
    truths[2][truths[2] == 2] = 0
    predictions = [np.roll(truths[0], 1, 0), truths[1].copy(), truths[2].copy()]
    predictions[1][predictions[1] == 2] = 0
    for name, maps in (("pred", predictions), ("truth", truths)):
        for number, labels in enumerate(maps):
            save_volume(tmp_path / name / f"case_{number}.nii.gz", labels, AFFINE)
    return tmp_path


def evaluate(folder, *flags):
    main(["--pred", str(folder / "pred"), "--truth", str(folder / "truth"), *flags])


def strict_json(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def summary(folder):
    return strict_json(folder / "pred-evaluation" / "summary.json")


def rows(folder):
    with open(folder / "pred-evaluation" / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def nnunet(folder, labels):
    """nnU-Net's own formulas, with NaN where it writes NaN."""
    per_case = []
    for prediction in sorted((folder / "pred").iterdir()):
        p, r = (nib.load(f).get_fdata() for f in (prediction, folder / "truth" / prediction.name))
        metrics = {}
        for label in labels:
            p_mask, r_mask = p == label, r == label
            tp, fp = (p_mask & r_mask).sum(), (p_mask & ~r_mask).sum()
            fn, tn = (~p_mask & r_mask).sum(), (~p_mask & ~r_mask).sum()
            none = tp + fp + fn == 0
            metrics[label] = {
                "Dice": np.nan if none else 2 * tp / (2 * tp + fp + fn),
                "IoU": np.nan if none else tp / (tp + fp + fn),
                **{"TP": tp, "FP": fp, "FN": fn, "TN": tn, "n_pred": tp + fp, "n_ref": tp + fn},
            }
        per_case.append(metrics)
    return per_case


# What is written


def test_summary_has_nnunet_s_form_and_figures(folders):
    evaluate(folders)
    got, expected = summary(folders), nnunet(folders, (1, 2))
    keys = ("Dice", "IoU", *COUNTS)
    for number, (case, metrics) in enumerate(zip(got["metric_per_case"], expected, strict=True)):
        assert case["prediction_file"] == str(folders / "pred" / f"case_{number}.nii.gz")
        assert case["reference_file"] == str(folders / "truth" / f"case_{number}.nii.gz")
        for label, scores in metrics.items():
            for key in keys:
                value = case["metrics"][str(label)][key]
                assert np.nan_to_num(scores[key], nan=-1) == pytest.approx(
                    -1 if value is None else value
                )
    for label in (1, 2):
        for key in keys:
            mean = np.nanmean([metrics[label][key] for metrics in expected])
            assert got["mean"][str(label)][key] == pytest.approx(mean)
    for key in keys:
        mean = np.mean([got["mean"][label][key] for label in ("1", "2")])
        assert got["foreground_mean"][key] == pytest.approx(mean)


def test_missed_class_counts_with_the_volume_s_diagonal_and_absent_class_does_not(folders):
    evaluate(folders)
    got = summary(folders)
    missed, absent = (got["metric_per_case"][number]["metrics"]["2"] for number in (1, 2))
    diagonal = np.sqrt(12**2 + 12**2 + 15**2)
    assert (missed["Dice"], missed["IoU"], missed["NSD"]) == (0, 0, 0)
    assert missed["HD95"] == missed["ASSD"] == pytest.approx(diagonal)
    assert [absent[key] for key in ("Dice", "IoU", "HD95", "NSD", "ASSD")] == [None] * 5
    first = got["metric_per_case"][0]["metrics"]["2"]
    assert got["mean"]["2"]["HD95"] == pytest.approx((first["HD95"] + diagonal) / 2)
    assert got["medmoco"]["outcomes"]["2"] == {"found": 1, "missed": 1, "invented": 0, "absent": 1}


def test_pooled_scores_take_all_voxels_together(folders):
    evaluate(folders)
    got = summary(folders)
    for label in ("1", "2"):
        tp, fp, fn = (
            sum(case["metrics"][label][key] for case in got["metric_per_case"])
            for key in ("TP", "FP", "FN")
        )
        pooled = got["medmoco"]["pooled"][label]
        assert pooled["Dice"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
        assert pooled["IoU"] == pytest.approx(tp / (tp + fp + fn))


def test_csv_has_a_row_a_case_and_class_with_the_same_figures(folders):
    evaluate(folders)
    cases = summary(folders)["metric_per_case"]
    assert [(row["case"], row["label"]) for row in rows(folders)] == [
        (f"case_{number}", label) for number in range(3) for label in "12"
    ]
    for row in rows(folders):
        scores = cases[int(row["case"][-1])]["metrics"][row["label"]]
        for key, value in scores.items():
            assert row[key] == ("" if value is None else str(value))
    assert {row["outcome"] for row in rows(folders)} == {"found", "missed", "absent"}


def test_distances_are_in_millimetres_of_the_file(tmp_path):
    labels = np.zeros((8, 8, 8), np.uint8)
    labels[2:5, 2:5, 4] = 1
    save_volume(tmp_path / "truth" / "a.nii.gz", labels, AFFINE)
    save_volume(tmp_path / "pred" / "a.nii.gz", np.roll(labels, 1, 2), AFFINE)
    evaluate(tmp_path, "--tolerance", "2.4")
    scores = summary(tmp_path)["mean"]["1"]
    assert (scores["HD95"], scores["ASSD"], scores["NSD"]) == (2.5, 2.5, 0)
    evaluate(tmp_path, "--tolerance", "2.5", "--overwrite")
    assert summary(tmp_path)["mean"]["1"]["NSD"] == 1
    assert summary(tmp_path)["medmoco"]["tolerance_mm"] == 2.5


def test_the_number_of_workers_changes_nothing(folders):
    evaluate(folders, "--workers", "1")
    one = (folders / "pred-evaluation" / "summary.json").read_bytes()
    evaluate(folders, "--workers", "3", "--overwrite")
    assert (folders / "pred-evaluation" / "summary.json").read_bytes() == one


def test_resampled_cases_are_named_and_scored_on_the_truth_s_grid(tmp_path, capsys):
    labels = random_labels(0)
    fine = np.kron(labels, np.ones((2, 2, 2), np.uint8))
    affine = AFFINE @ np.diag([0.5, 0.5, 0.5, 1])
    affine[:3, 3] = (AFFINE @ [-0.25, -0.25, -0.25, 1])[:3]
    save_volume(tmp_path / "truth" / "a.nii.gz", labels, AFFINE)
    save_volume(tmp_path / "pred" / "a.nii.gz", fine, affine)
    with pytest.raises(UserError, match="--resample"):
        evaluate(tmp_path)
    evaluate(tmp_path, "--resample")
    assert summary(tmp_path)["foreground_mean"]["Dice"] == 1
    assert summary(tmp_path)["medmoco"]["resampled"] == ["a"]
    assert "resampled onto the truth's grid: a" in capsys.readouterr().out


def test_a_data_set_gives_names_and_truth(tiny_task, tmp_path):
    for file in sorted((tiny_task / "labelsTr").iterdir())[:2]:
        (tmp_path / "pred").mkdir(exist_ok=True)
        (tmp_path / "pred" / file.name).write_bytes(file.read_bytes())
    main(["--pred", str(tmp_path / "pred"), "--truth", str(tiny_task), "--only-common"])
    description = json.loads((tiny_task / "dataset.json").read_text())
    names = {str(v): str(k) for k, v in description["labels"].items()}
    if "0" in description["labels"]:
        names = description["labels"]
    names.pop("0")
    got = summary(tmp_path)["medmoco"]
    assert got["classes"] == names
    assert (got["cases"], len(got["left_out"])) == (2, 8)


# What is printed


def test_worst_cases_come_first_and_the_next_command_last(folders, capsys):
    evaluate(folders)
    out = capsys.readouterr().out
    worst = out.split("worst cases")[1].splitlines()[2:5]
    dice = [float(line.split()[1]) for line in worst]
    assert dice == sorted(dice) and worst[-1].startswith("case_2")
    assert any(line.endswith("label 2 missed") for line in worst)
    assert "missed or invented: Dice, IoU and NSD 0, the volume's diagonal as distance" in out
    assert out.splitlines()[-1].startswith("next:     column ")


def test_next_command_of_a_run_is_its_report(folders, capsys):
    (folders / "config.json").write_text('{"medmoco": "0.1.0"}')
    evaluate(folders)
    assert (
        capsys.readouterr().out.splitlines()[-1] == f"next:     python -m medmoco.report {folders}"
    )


def test_nothing_but_the_output_is_touched(folders):
    def content(name):
        return {file.name: file.read_bytes() for file in (folders / name).iterdir()}

    before = content("pred"), content("truth")
    evaluate(folders, "--output", str(folders / "deep" / "out"))
    assert before == (content("pred"), content("truth"))
    assert sorted(os.listdir(folders)) == ["deep", "pred", "truth"]
    assert sorted(os.listdir(folders / "deep" / "out")) == ["metrics.csv", "summary.json"]


def test_the_folder_of_predictions_may_be_the_output_as_in_nnunet(folders):
    evaluate(folders, "--output", str(folders / "pred"))
    assert strict_json(folders / "pred" / "summary.json")["medmoco"]["cases"] == 3


def test_it_is_a_command_whose_errors_are_one_line(folders, capsys):
    flags = ["--pred", str(folders / "pred"), "--truth", str(folders / "truth")]
    command = [sys.executable, "-m", "medmoco", "evaluate", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert run_command(main, flags) == 2
    assert re.fullmatch("error: --output .*--overwrite.*\n", capsys.readouterr().err)


# Names of classes


def test_names_are_given_with_commas(folders):
    evaluate(folders, "--labels", "liver, spleen")
    assert summary(folders)["medmoco"]["classes"] == {"1": "liver", "2": "spleen"}


def test_names_are_given_by_a_file(folders):
    (folders / "names.json").write_text('{"labels": {"background": 0, "spleen": 2, "liver": 1}}')
    evaluate(folders, "--labels", str(folders / "names.json"))
    assert summary(folders)["medmoco"]["classes"] == {"1": "liver", "2": "spleen"}


def test_nnunet_s_copy_among_the_predictions_names_them(folders):
    (folders / "pred" / "dataset.json").write_text('{"labels": {"a": 1, "b": 2, "c": 3}}')
    evaluate(folders)
    got = summary(folders)
    assert got["medmoco"]["classes"] == {"1": "a", "2": "b", "3": "c"}
    assert got["medmoco"]["outcomes"]["3"]["absent"] == 3
    assert got["mean"]["3"]["Dice"] is None
    assert got["foreground_mean"]["Dice"] is not None  # of the classes that occur


@pytest.mark.parametrize("labels", ["liver,,spleen", "liver,liver", "background"])
def test_names_that_cannot_be_told_apart_are_refused(folders, labels):
    with pytest.raises(UserError, match="--labels"):
        evaluate(folders, "--labels", labels)


# What is refused


def test_both_folders_are_needed():
    with pytest.raises(UserError, match="expected --pred and --truth"):
        main(["--pred", "somewhere"])


def test_values_without_a_name_are_listed_with_their_files(folders):
    with pytest.raises(UserError) as caught:
        evaluate(folders, "--labels", "liver")
    first, *lines = str(caught.value).splitlines()
    assert first == "3 bad files among 3 predictions and their truth:"
    assert all(line.endswith("expected label values [0, 1], got also 2") for line in lines)
    assert [line.split(":")[0].split("/")[-2] for line in lines] == ["pred", "truth", "truth"]
    assert not (folders / "pred-evaluation").exists()


def test_unreadable_files_are_listed_together(folders):
    (folders / "pred" / "case_0.nii.gz").write_bytes(b"no volume")
    (folders / "truth" / "case_0.nii.gz").write_bytes(b"")
    whole = (folders / "pred" / "case_2.nii.gz").read_bytes()
    (folders / "pred" / "case_2.nii.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError) as caught:
        evaluate(folders)
    first, *lines = str(caught.value).splitlines()
    assert first == "3 bad files among 3 predictions and their truth:"
    for line, words in zip(lines, ("gzip stream", "empty file", "truncated"), strict=True):
        assert words in line


def test_predictions_are_not_their_own_truth(folders):
    with pytest.raises(UserError, match="a prediction and its truth, got one file"):
        main(["--pred", str(folders / "truth"), "--truth", str(folders / "truth")])


def test_empty_folders_are_named(folders):
    (folders / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: expected \.nii"):
        main(["--pred", str(folders / "empty"), "--truth", str(folders / "truth")])
    with pytest.raises(UserError, match=r"empty: expected \.nii"):
        main(["--pred", str(folders / "pred"), "--truth", str(folders / "empty")])


def test_maps_of_background_alone_are_refused(tmp_path):
    for name in ("pred", "truth"):
        save_volume(tmp_path / name / "a.nii.gz", np.zeros((4, 4, 4), np.uint8), AFFINE)
    with pytest.raises(UserError, match="a class besides 0, got none"):
        evaluate(tmp_path)


def test_earlier_results_are_kept_without_overwrite(folders):
    evaluate(folders)
    with pytest.raises(UserError, match=r"summary\.json is there already; add --overwrite"):
        evaluate(folders)
    evaluate(folders, "--overwrite")


def test_the_folder_of_a_run_is_no_output(folders):
    (folders / "run").mkdir()
    (folders / "run" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="a folder of its own, got that of a run"):
        evaluate(folders, "--output", str(folders / "run"), "--overwrite")


def test_a_file_is_no_output(folders):
    with pytest.raises(UserError, match="expected a folder, got a file"):
        evaluate(folders, "--output", str(folders / "pred" / "case_0.nii.gz"))
    with pytest.raises(UserError, match="cannot be written"):
        evaluate(folders, "--output", str(folders / "pred" / "case_0.nii.gz" / "below"))


@pytest.mark.data
def test_real_label_maps_against_themselves_moved_by_a_millimetre(hippocampus, tmp_path):
    for file in sorted((hippocampus / "labelsTr").iterdir())[:3]:
        image = nib.load(file)
        moved = np.roll(np.asarray(image.dataobj), 1, axis=1).astype(np.uint8)
        save_volume(tmp_path / "pred" / file.name, moved, image.affine)
    main(["--pred", str(tmp_path / "pred"), "--truth", str(hippocampus), "--only-common"])
    got = summary(tmp_path)
    assert got["medmoco"]["classes"] == {"1": "Anterior", "2": "Posterior"}
    assert got["foreground_mean"]["NSD"] == 1 and got["foreground_mean"]["HD95"] == 1
    assert 0.7 < got["foreground_mean"]["Dice"] < 0.95
