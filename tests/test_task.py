import json

import numpy as np
import pytest
from volume_files import ramp, save_volume

from medmoco.data.task import patient_of, read_task
from medmoco.errors import UserError

DECATHLON = {"0": "background", "1": "liver", "2": "spleen"}


def write_task(folder, description, names=("b", "a"), suffix=""):
    for name in names:
        save_volume(folder / "imagesTr" / f"{name}{suffix}.nii.gz", ramp())
        save_volume(folder / "labelsTr" / f"{name}.nii.gz", ramp(kind=np.uint8) % 3)
    if description is not None:
        (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def listed(*names):
    pairs = ({"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names)
    return list(pairs)


def test_decathlon_folder_is_read(tmp_path):
    content = {"modality": {"0": "CT"}, "labels": DECATHLON, "training": listed("b", "a")}
    task = read_task(write_task(tmp_path, content))
    assert [case.name for case in task.cases] == ["a", "b"]
    assert task.cases[0].image == tmp_path / "imagesTr" / "a.nii.gz"
    assert task.cases[0].label == tmp_path / "labelsTr" / "a.nii.gz"
    assert task.classes == ("background", "liver", "spleen")
    assert task.values == (0, 1, 2)
    assert task.modality == "ct"


def test_nnunet_folder_with_channels_is_read(tmp_path):
    content = {
        "channel_names": {"0": "T2"},
        "labels": {"background": 0, "tumour": 4, "edema": 2},
        "file_ending": ".nii.gz",
    }
    write_task(tmp_path, content, suffix="_0000")
    save_volume(tmp_path / "imagesTr" / "a_0001.nii.gz", ramp())
    task = read_task(tmp_path)
    assert [case.name for case in task.cases] == ["a", "b"]
    assert task.cases[0].image.name == "a_0000.nii.gz"
    assert task.cases[0].label == tmp_path / "labelsTr" / "a.nii.gz"
    assert task.classes == ("background", "edema", "tumour")
    assert task.values == (0, 2, 4)
    assert task.modality == "mr"


def test_listed_image_is_found_under_its_first_channel(tmp_path):
    content = {"labels": DECATHLON, "training": listed("a")}
    task = read_task(write_task(tmp_path, content, names=("a",), suffix="_0000"))
    assert task.cases[0].name == "a"
    assert task.cases[0].image.name == "a_0000.nii.gz"


@pytest.mark.parametrize(("images", "labels"), [("img", "label"), ("images", "labels")])
def test_pair_of_folders_is_read_and_classes_found_in_the_labels(tmp_path, images, labels):
    for number in ("0001", "0002"):
        save_volume(tmp_path / images / f"img{number}.nii.gz", ramp())
        save_volume(tmp_path / labels / f"label{number}.nii.gz", ramp(kind=np.uint8) % 2 * 5)
    task = read_task(tmp_path)
    assert [case.name for case in task.cases] == ["img0001", "img0002"]
    assert task.cases[1].label.name == "label0002.nii.gz"
    assert task.classes == ("background", "label 5")
    assert task.values == (0, 5)
    assert task.modality is None


def test_image_without_label_is_kept_for_the_cache_to_report(tmp_path):
    write_task(tmp_path, None)
    (tmp_path / "labelsTr" / "a.nii.gz").unlink()
    case = read_task(tmp_path).cases[0]
    assert case.name == "a"
    assert case.label == tmp_path / "labelsTr" / "a.nii.gz"


def test_labels_of_nothing_but_background_are_refused(tmp_path):
    save_volume(tmp_path / "imagesTr" / "a.nii.gz", ramp())
    save_volume(tmp_path / "labelsTr" / "a.nii.gz", ramp(kind=np.uint8) * 0)
    with pytest.raises(UserError, match="expected label maps with a class besides 0, got none"):
        read_task(tmp_path)


def test_label_values_that_do_not_fit_a_byte_are_refused(tmp_path):
    save_volume(tmp_path / "imagesTr" / "a.nii.gz", ramp())
    save_volume(tmp_path / "labelsTr" / "a.nii.gz", ramp() * 10)
    with pytest.raises(UserError, match="expected label values from 0 to 255, got 0 to 1190"):
        read_task(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected a readable JSON file"),
        ("[]", "expected a JSON object, got list"),
        ({"training": []}, 'expected an object of classes under "labels", got None'),
        ({"labels": {"0": "background"}}, "expected a class besides background"),
        ({"labels": {"0": "background", "1": "a", "2": "a"}}, "each name once"),
        ({"labels": {"background": 0, "x": 300}}, "from 0 to 255 .* got 300 for 'x'"),
        ({"labels": {"background": 0, "x": 1, "y": 1}}, "expected different values .* 1 for 'y'"),
        ({"labels": {"background": 0, "whole": [1, 2]}}, "regions and ignored labels"),
        ({"labels": {"background": 0, "x": 1, "ignore": 2}}, "regions and ignored labels"),
        ({"labels": {"background": 0, "x": -1}}, "a class name and a whole number"),
        ({"labels": DECATHLON, "training": {}}, 'a list under "training", got dict'),
        ({"labels": DECATHLON, "training": ["a.nii.gz"]}, "got 'a.nii.gz'"),
        ({"labels": DECATHLON, "training": [{"image": "a"}]}, '"label": FILE'),
        ({"labels": DECATHLON, "training": listed("a", "a")}, "each case once, got 'a' twice"),
        ({"labels": DECATHLON, "file_ending": ".mha"}, "file_ending .nii.gz or .nii, got '.mha'"),
    ],
)
def test_broken_dataset_json_is_named(tmp_path, content, message):
    write_task(tmp_path, None)
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_task(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'dataset.json'}: expected")


@pytest.mark.parametrize("path", ["../secret.nii.gz", "/etc/passwd", "imagesTr/../../x.nii.gz"])
def test_paths_that_leave_the_folder_are_refused(tmp_path, path):
    training = [{"image": path, "label": "./labelsTr/a.nii.gz"}]
    write_task(tmp_path / "task", {"labels": DECATHLON, "training": training})
    with pytest.raises(UserError, match=f"expected paths within the folder, got '{path}'"):
        read_task(tmp_path / "task")


def test_paths_that_leave_the_current_folder_are_refused(tmp_path, monkeypatch):
    training = [{"image": "../secret.nii.gz", "label": "./labelsTr/a.nii.gz"}]
    write_task(tmp_path, {"labels": DECATHLON, "training": training})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"expected paths within the folder, got '\.\./secret"):
        read_task(".")


def test_links_are_followed_wherever_they_lead(tmp_path):
    """git-annex, DVC and Hugging Face link their files; users link cases and whole folders."""
    elsewhere = save_volume(tmp_path / "annex" / "object.nii.gz", ramp())
    write_task(tmp_path / "task", {"labels": DECATHLON, "training": listed("a")})
    image = tmp_path / "task" / "imagesTr" / "a.nii.gz"
    image.unlink(missing_ok=True)
    image.symlink_to(elsewhere)
    (tmp_path / "link").symlink_to(tmp_path / "task")
    for folder in (tmp_path / "task", tmp_path / "link"):
        assert read_task(folder).cases[0].image == folder / "imagesTr" / "a.nii.gz"


def test_a_name_as_long_as_names_go_is_one(tmp_path):
    name = "n" * 248  # with .nii.gz; the name of its first channel would be too long
    write_task(tmp_path, {"labels": DECATHLON, "training": listed(name)}, ())
    assert read_task(tmp_path).cases[0].name == name


def test_what_is_not_read_of_dataset_json_may_be_nan(tmp_path):
    write_task(tmp_path, {"labels": DECATHLON, "training": listed("a"), "mean": float("nan")})
    assert len(read_task(tmp_path).cases) == 1


@pytest.mark.parametrize(
    "path", ["a\0b.nii.gz", "\ud800.nii.gz", "n" * 300 + ".nii.gz", "a/" * 3000]
)
def test_paths_that_no_system_has_are_refused(tmp_path, path):
    training = [{"image": "./imagesTr/a.nii.gz", "label": path}]
    write_task(tmp_path, {"labels": DECATHLON, "training": training})
    with pytest.raises(UserError, match=r"dataset\.json: expected paths of files, got '"):
        read_task(tmp_path)


def test_folder_without_any_layout_is_named(tmp_path):
    with pytest.raises(UserError, match=r"expected a dataset\.json or folders imagesTr and label"):
        read_task(tmp_path)
    with pytest.raises(UserError, match="expected the folder of a labelled data set, got no fol"):
        read_task(tmp_path / "nowhere")


# Patients


def test_each_case_is_a_patient_by_default():
    assert patient_of("p1_ct", None) == "p1_ct"


@pytest.mark.parametrize(("expression", "patient"), [(r"^p\d+", "p12"), (r"p(\d+)_", "12")])
def test_regular_expression_names_the_patient(expression, patient):
    assert patient_of("p12_arterial", expression) == patient


def test_csv_names_the_patient(tmp_path):
    table = tmp_path / "patients.csv"
    table.write_text("case,patient\na,anna\nb.nii.gz, bob\n")
    assert patient_of("a", str(table)) == "anna"
    assert patient_of("b", str(table)) == "bob"
    with pytest.raises(UserError, match="expected a line for case c, got none"):
        patient_of("c", str(table))


def test_bad_patients_are_named(tmp_path):
    with pytest.raises(UserError, match="the expression does not match case a"):
        patient_of("a", "x")
    with pytest.raises(UserError, match="expected a CSV file or a regular expression"):
        patient_of("a", "(")
    with pytest.raises(UserError, match="expected a readable CSV file"):
        patient_of("a", str(tmp_path / "missing.csv"))
    (tmp_path / "wide.csv").write_text("a,b,c\n")
    with pytest.raises(UserError, match=r"expected `case,patient` in row 1, got 'a,b,c'"):
        patient_of("a", str(tmp_path / "wide.csv"))


def test_task_groups_cases_of_one_patient(tmp_path):
    write_task(tmp_path, None, names=("p1_a", "p1_b", "p2_a"))
    assert [case.patient for case in read_task(tmp_path, r"^p\d").cases] == ["p1", "p1", "p2"]


@pytest.mark.data
def test_hippocampus_is_read(hippocampus):
    task = read_task(hippocampus)
    assert len(task.cases) == 220
    assert task.classes == ("background", "Anterior", "Posterior")
    assert task.modality == "mr"
