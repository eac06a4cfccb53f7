import json
import multiprocessing

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from medmoco.data.abdomen import CLASSES, render
from medmoco.data.anatomy import draw_patient
from medmoco.data.phantom import generate_phantom
from medmoco.data.task import read_task
from medmoco.data.volumes import read_volume
from medmoco.errors import UserError

TINY = {"patients": 2, "size": 24, "slices": 4}


@pytest.fixture(scope="module")
def drawn():
    """Sixteen patients at a resolution that shows their organs: HU, labels, affine, patient."""
    patients = []
    for number in range(16):
        random = np.random.default_rng([0, number])
        patient = draw_patient(random)
        patients.append((*render(patient, random, 64, 16), patient))
    return patients


def organ_volumes(drawn, name):
    """Millilitres of an organ in each patient."""
    value = CLASSES.index(name)
    return np.array(
        [(labels == value).sum() * abs(np.linalg.det(a)) / 1000 for _, labels, a, _ in drawn]
    )


def test_phantom_is_a_decathlon_task(tiny_task):
    task = read_task(tiny_task)
    assert task.classes == CLASSES
    assert len(task.classes) - 1 >= 5
    assert task.modality == "ct"
    assert len(task.cases) == 10
    image, label = nib.load(task.cases[0].image), nib.load(task.cases[0].label)
    assert image.shape == label.shape == (48, 48, 6)
    np.testing.assert_array_equal(image.affine, label.affine)
    assert image.get_data_dtype() == np.int16
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
    in_plane, _, between = image.header.get_zooms()
    assert between > in_plane


def test_every_organ_is_in_every_patient(drawn):
    for _, labels, _, _ in drawn:
        assert set(np.unique(labels)) == set(range(len(CLASSES)))


def test_liver_lies_on_the_right_and_spleen_on_the_left(tiny_task):
    case = read_task(tiny_task).cases[0]
    label = read_volume(case.label, label=True)
    centre = label.voxels.shape[0] / 2
    assert np.argwhere(label.voxels == CLASSES.index("liver"))[:, 0].mean() > centre
    assert np.argwhere(label.voxels == CLASSES.index("right kidney"))[:, 0].mean() > centre
    assert np.argwhere(label.voxels == CLASSES.index("spleen"))[:, 0].mean() < centre


@pytest.mark.parametrize(
    ("organ", "low", "high"),
    [
        ("liver", 1000, 1800),  # 1400 to 1800 g in ICRP 89
        ("spleen", 90, 260),  # 198 +- 88 ml in Caglar et al.
        ("right kidney", 100, 200),  # 134 ml in Emamian et al.
        ("left kidney", 100, 200),  # 146 ml
    ],
)
def test_organs_have_published_volumes_and_vary(drawn, organ, low, high):
    volumes = organ_volumes(drawn, organ)
    assert low < volumes.mean() < high
    assert 0.1 < volumes.std() / volumes.mean() < 0.5


def test_attenuations_follow_the_tissue(drawn):
    for hu, labels, _, patient in drawn:
        for name, expected in (("liver", "liver"), ("spleen", "spleen"), ("aorta", "aorta")):
            inner = ndimage.binary_erosion(labels == CLASSES.index(name))
            if inner.sum() > 20:
                assert np.median(hu[inner]) == pytest.approx(patient.attenuation[expected], abs=25)
        assert np.median(hu[:4, :4]) < -900  # air around the patient
    contrast = [patient.attenuation["aorta"] for *_, patient in drawn]
    assert max(contrast) - min(contrast) > 80  # phases differ


def test_noise_is_that_of_ct(drawn):
    for hu, labels, _, _ in drawn:
        liver = ndimage.binary_erosion(labels == CLASSES.index("liver"), iterations=2)
        assert 8 < np.std(hu[liver]) < 35  # 10 to 20 of noise, the rest texture and veins


def test_same_seed_gives_the_same_files(tmp_path):
    for name in ("a", "b"):
        generate_phantom(tmp_path / name, **TINY, seed=5)
    files = sorted(path for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 5
    for path in files:
        other = tmp_path / "b" / path.relative_to(tmp_path / "a")
        assert path.read_bytes() == other.read_bytes()


def test_patients_do_not_depend_on_their_number(tmp_path):
    generate_phantom(tmp_path / "few", patients=1, size=24, slices=4)
    generate_phantom(tmp_path / "more", patients=2, size=24, slices=4)
    name = "imagesTr/phantom_000.nii.gz"
    assert (tmp_path / "few" / name).read_bytes() == (tmp_path / "more" / name).read_bytes()


def test_existing_phantom_is_found_and_not_drawn_again(tmp_path, capsys):
    folder = generate_phantom(tmp_path / "p", **TINY)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    generate_phantom(folder, **TINY)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times
    assert "(found)" in capsys.readouterr().out


def test_phantom_of_other_settings_is_not_overwritten(tmp_path):
    generate_phantom(tmp_path / "p", **TINY, seed=1)
    with pytest.raises(UserError, match=r"expected the phantom .* got .*'seed': 1.*choose another"):
        generate_phantom(tmp_path / "p", **TINY, seed=2)


def test_folder_with_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="expected a phantom or no such folder, got something els"):
        generate_phantom(tmp_path, **TINY)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"patients": 0}, "expected patients of at least 1, got 0"),
        ({"size": 8}, "expected size of at least 16, got 8"),
        ({"slices": 1}, "expected slices of at least 2, got 1"),
        ({"seed": -1}, "expected seed of at least 0, got -1"),
    ],
)
def test_numbers_out_of_range_are_named(tmp_path, setting, message):
    with pytest.raises(UserError, match=message):
        generate_phantom(tmp_path / "p", **(TINY | setting))


def test_interrupted_phantom_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("medmoco.data.phantom.render", interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate_phantom(tmp_path / "p", **TINY)
    assert [path.name for path in tmp_path.iterdir()] == [".p.lock"]


def test_two_processes_draw_one_phantom(tmp_path):
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        folders = pool.starmap(generate_phantom, [(tmp_path / "p", 2, 24, 4)] * 2)
    assert folders == [tmp_path / "p"] * 2
    assert len(json.loads((tmp_path / "p" / "dataset.json").read_text())["training"]) == 2
