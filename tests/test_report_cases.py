"""What a run keeps of its worst and best cases, and what the page makes of it."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
from run_folders import NASTY_CASE, make_run, write_shown_cases

from medmoco.data.table import VolumeTable
from medmoco.errors import UserError
from medmoco.report import masks, read_run, write_report
from medmoco.report.cases import (
    CASES_NAME,
    averaged,
    choose_cases,
    read_cases,
    read_prediction,
    thinned,
    write_cases,
)


@pytest.fixture(autouse=True)
def blank_plots(monkeypatch):
    monkeypatch.setattr("medmoco.report.figures.render_svg", lambda plot, theme: b"<svg/>")


def viewer(page: str) -> dict:
    """What the page gives its script."""
    return json.loads(re.search(r'id="viewer-data">(.*?)</script>', page, re.DOTALL)[1])


def report(*folders: Path) -> str:
    return write_report(folders, folders[0].parent / "page.html").read_text("utf-8")


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def arrays_of(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / CASES_NAME, allow_pickle=False) as file:
        return dict(file)


def test_the_three_worst_and_the_three_best_are_chosen_worst_first():
    scores = {f"c{i}": {"a": i / 10, "b": None} for i in (5, 1, 9, 2, 7, 3, 8)}
    assert choose_cases(scores | {"none": {"a": None}}) == ["c1", "c2", "c3", "c7", "c8", "c9"]
    few = {"x": {"a": 0.5}, "b": {"a": 0.5}, "a": {"a": 0.9}}
    assert choose_cases(few) == ["b", "x", "a"] and choose_cases({}) == []


def test_large_volumes_are_thinned_by_whole_steps():
    stack = np.arange(7 * 5 * 6, dtype=np.uint8).reshape(7, 5, 6)
    assert thinned(stack, (1, 1, 1)).tolist() == stack.tolist()
    chosen = thinned(stack, (3, 2, 3))
    # the middle ones of slices 0-2 and 3-5 and what follows; whole blocks of rows and columns
    assert chosen.tolist() == stack[[1, 4]][:, [1, 3]][:, :, [1, 4]].tolist()
    pixels = np.zeros((3, 4, 4), np.uint16)
    pixels[1, :2, 2:] = [[0, 65535], [65535, 65535]]
    assert averaged(pixels, (3, 2, 2)).tolist() == [[[0, 191], [0, 0]]]
    assert averaged(pixels, (1, 1, 1))[1, 0].tolist() == [0, 0, 0, 255]


@pytest.mark.parametrize("shape", [(1, 3, 5), (9, 24, 20), (67, 30, 513)])
def test_what_is_kept_lies_where_the_volume_does(tmp_path, shape):
    folder = make_run(tmp_path / "run")
    write_shown_cases(folder, summary_of(folder), shape)
    shown = read_cases(folder)
    assert [case.case for case in shown] == choose_cases(
        summary_of(folder)["finetune"]["dice_per_volume"]
    )
    first = shown[0]
    assert first.case == NASTY_CASE and first.shape == shape
    assert first.step == ((2, 1, 3) if shape[0] == 67 else (1, 1, 1))
    assert all(count <= most for count, most in zip(first.image.shape, (64, 256, 256), strict=True))
    assert len(first.positions) == len(first.image) and first.positions[-1] < shape[0]
    path = folder / "predictions" / "linear-pretrained" / f"{NASTY_CASE}.nii.gz"
    same = read_prediction(path, first)  # the fixture's linear model never errs
    assert same.dtype == np.uint8 and (same == first.truth).all()
    other = dataclasses.replace(first, shape=(1, 2, 3))
    assert read_prediction(path, other, own=False) is None
    with pytest.raises(UserError, match=r"expected a stack of \(1, 2, 3\) voxels"):
        read_prediction(path, other)
    packed = viewer(report(folder))["cases"][0]
    height, width = first.truth.shape[1:]
    assert (packed["height"], packed["width"]) == (height, width)
    across, down = map(float, packed["aspect"].split(" / "))
    expected = width * first.step[2] * 2.0 / (height * first.step[1] * 1.0)
    assert across / down == pytest.approx(expected, rel=1e-5)


def test_a_run_without_results_or_of_an_older_version_has_no_viewer(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / CASES_NAME).unlink()
    page = report(folder)
    assert "viewer" in re.search(r"Nothing was recorded for: ([^.]*)", page)[1]
    assert "<script" not in page and "script-src" not in page
    results = {"linear": None, "finetune": None, "controls": {}}
    write_cases(folder, SimpleNamespace(volumes=VolumeTable.of([], 0, 0)), results)
    assert not (folder / CASES_NAME).exists()


def test_without_pretrained_models_the_controls_are_shown(tmp_path):
    folder = make_run(tmp_path / "run")
    content = summary_of(folder) | {"linear": None, "finetune": None}
    (folder / "summary.json").write_text(json.dumps(content))
    page = report(folder)
    assert "Chosen by mean Dice: from scratch." in page
    assert "From scratch, 13 test volumes" in page


def test_label_maps_that_are_gone_leave_their_panels_out(tmp_path):
    folder = make_run(tmp_path / "run")
    for path in (folder / "predictions" / "linear-random").iterdir():
        path.unlink()
    (folder / "predictions" / "finetune-scratch" / f"{NASTY_CASE}.nii.gz").unlink()
    data = viewer(report(folder))
    assert [m is None for m in data["cases"][0]["maps"]] == [False, False, False, True]
    assert not any(m is None for m in data["cases"][1]["maps"])


def test_runs_side_by_side_show_each_others_cases_once(tmp_path):
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "other", seed=1)
    write_shown_cases(other, summary_of(one))  # it has label maps of the same cases
    data = viewer(report(one, other))
    assert len(data["cases"]) == 6
    assert all(m is not None for case in data["cases"] for m in case["maps"])
    assert [len(case["maps"]) for case in data["cases"]] == [9] * 6
    write_shown_cases(other, summary_of(one), shape=(5, 24, 20))
    data = viewer(report(one, other))  # on another grid, a run shows its own cases alone
    missing = {sum(m is None for m in case["maps"]) for case in data["cases"]}
    assert missing and 0 not in missing
    assert not any(all(m is None for m in case["maps"]) for case in data["cases"])


def test_a_page_has_no_more_cases_than_it_has_room_for(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run")
    sizes = [len(json.dumps(case)) for case in viewer(report(folder))["cases"]]
    monkeypatch.setattr(masks, "MAX_BYTES", int(2.5 * max(sizes)))
    page = report(folder)
    shown = [case["name"] for case in viewer(page)["cases"]]
    chosen = choose_cases(summary_of(folder)["finetune"]["dice_per_volume"])
    assert shown == [r'case <b>"x"\n<script>alert(1)&\u202e', chosen[-1]]
    left_out = re.search(r"No room on the page for: ([^.]*)", page)[1].split(", ")
    assert set(left_out) == set(chosen[1:-1])


def test_the_largest_cases_fit_a_page(tmp_path):
    """Six volumes as large as they are kept, with the noise of CT: the page stays below 10 MB."""
    folder = make_run(tmp_path / "run")
    noise = np.random.default_rng(0).normal(110, 6, (1, 256, 256)).clip(0, 255).astype(np.uint8)
    packed = masks.pack(
        masks.ShownCase(
            *("case", noise, np.zeros_like(noise)), (1, 256, 256), (1, 1, 1), (1, 1, 1), 2, (0, 1)
        ),
        [],
        [],
    )
    assert 64 * 6 * len(packed["images"][0]) < masks.MAX_BYTES < 9_000_000
    assert len(report(folder)) < 1_000_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"case": np.array(["a", None], dtype=object)}, "expected arrays"),
        ({"case": np.array(["../x"] * 6)}, "names of cases, got '../x'"),
        ({"case": np.zeros(6)}, "case has an unexpected type"),
        ({"axis": np.array(3)}, "an axis of 0 to 2"),
        ({"axis": np.array([2])}, "axis must have shape"),
        ({"step": np.zeros((6, 3), int)}, "step must be at least 1, got 0"),
        ({"shape": np.ones((6, 2), int)}, "shape must have shape"),
        ({"spacing": np.full((6, 3), np.nan)}, "spacing must be at least"),
        ({"values": np.array([0, 1])}, "truth_0 must hold class indices, got 3"),
        ({"truth_1": np.zeros((9, 24, 21), np.uint8)}, "truth_1 must have shape"),
        ({"image_0": np.zeros((9, 24, 20))}, "image_0 has an unexpected type"),
        ({"image_5": None}, "image_5.*missing"),
        ({"axis": None}, "axis.*missing"),
    ],
)
def test_malformed_cases_are_named_and_never_unpickled(tmp_path, change, message):
    folder = make_run(tmp_path / "run")
    arrays = arrays_of(folder) | change
    kept = {name: array for name, array in arrays.items() if array is not None}
    np.savez(folder / CASES_NAME, **kept)
    with pytest.raises(UserError, match=rf"cases\.npz: .*{message}"):
        report(folder)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 truncated", b"no archive"])
def test_cases_that_are_no_archive_are_named(tmp_path, content):
    folder = make_run(tmp_path / "run")
    (folder / CASES_NAME).write_bytes(content)
    with pytest.raises(UserError, match=r"cases\.npz: expected arrays"):
        report(folder)


def test_broken_label_maps_are_named(tmp_path):
    folder = make_run(tmp_path / "run")
    case = read_cases(folder)[1]
    path = folder / "predictions" / "finetune-pretrained" / f"{case.case}.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.full((20, 24, 9), 5, np.uint8), np.eye(4)), path)
    with pytest.raises(UserError, match=r"nii\.gz: expected label values \[0, 1, 2, 7\].*\[5\]"):
        report(folder)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=re.escape(str(path))):
        report(folder)


def test_runs_know_the_model_that_leads(tmp_path):
    run = read_run(make_run(tmp_path / "run"))
    assert masks.leading_model(run) == "fine-tuned"
