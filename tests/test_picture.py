"""benchmarks/picture.py: the picture at the head of README.md."""

import json

import numpy as np
import pytest
from PIL import Image
from run_folders import make_run

from medmoco.command import run_command
from medmoco.report.cases import read_cases, read_prediction
from medmoco.report.run_folder import read_run
from picture import cases_plot, main, panels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("picture") / "run")


def test_picture_is_drawn_from_runs_and_told_in_words(folder, tmp_path, capsys):
    other = make_run(tmp_path / "other", seed=1, method="mocov2")
    assert run_command(main, [str(other), str(folder), "--output", str(tmp_path / "p.png")]) == 0
    told = capsys.readouterr().out
    best = max(
        (case for case in read_run(folder).results["fine-tuned"].per_volume),
        key=lambda case: np.mean(
            [s for s in read_run(folder).finetune.per_volume[case].values() if s is not None]
        ),
    )
    assert f"best test case {best}, Dice 0." in told
    assert "other, epoch 3: largest" in told and "run, epoch 0: largest" in told
    with Image.open(tmp_path / "p.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] > pixels.shape[0] > 300
    coloured = np.ptp(pixels.astype(int), axis=2) > 60
    left, right = np.array_split(coloured, 2, axis=1)
    assert left.mean() > 0.001 and right.mean() > 0.01, "curves and masks"


def test_masks_lie_on_the_labels_of_the_fullest_slice(folder):
    run, case = read_run(folder), read_cases(folder)[-1]
    fullest = max(range(len(case.truth)), key=lambda i: np.count_nonzero(case.truth[i]))
    path = folder / "predictions/finetune-pretrained" / f"{case.case}.nii.gz"
    predicted = read_prediction(path, case)[fullest]
    scan, *masked = panels(run, case)
    # Columns are 2 mm wide and rows 1 mm high: pixels become square.
    assert scan.shape == (24, 40, 3)
    np.testing.assert_allclose(scan[:, ::2, 0], case.image[fullest] / 255)
    for panel, labels in zip(masked, (case.truth[fullest], predicted), strict=True):
        assert len(np.unique(labels)) > 2
        coloured = np.ptp(panel, axis=2) > 0
        np.testing.assert_array_equal(coloured, (labels > 0).repeat(2, axis=1))


def test_runs_that_cannot_be_drawn_are_named(folder, tmp_path, capsys):
    bare = make_run(tmp_path / "bare")
    (bare / "metrics.jsonl").unlink()
    assert run_command(main, [str(bare), "--output", str(tmp_path / "p.png")]) == 2
    assert "bare: expected a pretraining run, got one without spectra" in capsys.readouterr().err
    summary = json.loads((bare / "summary.json").read_text())
    (bare / "summary.json").write_text(json.dumps(summary | {"finetune": None}))
    assert run_command(main, [str(folder), str(bare), "--output", str(tmp_path / "p.png")]) == 2
    assert "bare: expected a run with a fine-tuned model" in capsys.readouterr().err
    gone = make_run(tmp_path / "gone")
    case = read_cases(gone)[0].case
    (gone / "predictions/finetune-pretrained" / f"{case}.nii.gz").unlink()
    assert run_command(main, [str(gone), "--output", str(tmp_path / "p.png")]) == 2
    assert "expected the label map of a test case, got no file" in capsys.readouterr().err
    assert not (tmp_path / "p.png").exists()


def test_worst_and_best_case_have_their_dice_beside_them(folder):
    alt = cases_plot(read_run(folder)).alt
    assert "worst test case case <b>" in alt and "Dice 0.062" in alt
