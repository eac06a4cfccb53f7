"""Where predicted voxels lie: in world coordinates, whatever the order, the axes and the type."""

import json

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine, voxel_sizes
from threshold_segmenter import threshold_segmenter
from volume_files import OBLIQUE, as_stored

from medmoco.command import run_command
from medmoco.models.segmenter import save_segmenter
from medmoco.predict import main
from medmoco.segment import main as segment

# Rotated, sheared by rounding as scanners' headers are, and of other spacing along each axis.
ROTATION = nib.eulerangles.euler2mat(0.2, -0.15, 0.1)
TURNED = nib.affines.from_matvec(ROTATION @ np.diag([1.5, 1.5, 4.0]), [-80, 31.7, 1200])
ANISOTROPIC = np.diag([0.7, 1.4, 5.0, 1])
ORIENTATIONS = ["RAS", "LAS", "RPI", "LPS", "SAR", "PIR"]


def scan(shape=(21, 18, 11)):
    """HU of a body in air with an L-shaped bright object: no turn or flip maps it to itself."""
    hu = np.full(shape, -900.0)
    hu[2:-2, 2:-2, 1:-1] = 40
    x, y, z = shape
    hu[5 : x - 6, 4:9, 2 : z - 3] = 220
    hu[5:9, 4 : y - 3, 2:5] = 220
    return hu


def save(path, hu, affine, codes="RAS", *, scaled=True, channels=0):
    """As int16, with slope and intercept if `scaled`, in the order of the axes that `codes` names.

    With `channels`, a 4-D file whose channel 1 is the scan; the others are inverted.
    """
    stored, stored_affine = as_stored(hu, affine, codes)
    if channels:
        stored = np.stack([stored if k == 1 else -stored for k in range(channels)], -1)
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    slope, intercept = (0.5, -1024) if scaled else (1, 0)
    raw = np.rint((stored - intercept) / slope).astype(np.int16)
    image = nib.Nifti1Image(raw, stored_affine, header)
    image.header.set_slope_inter(slope, intercept)
    image.set_qform(stored_affine, 1)
    image.set_sform(stored_affine, 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return stored_affine


def predict(*arguments):
    return run_command(main, [str(argument) for argument in ("--device", "cpu", *arguments)])


def bright_in_world(path, above):
    """(n, 3) mm of the voxels above a value, sorted; by nibabel, not by our reader."""
    image = nib.load(path)
    points = apply_affine(image.affine, np.argwhere(np.asarray(image.dataobj) > above))
    return points[np.lexsort(points.T.round(2))]


@pytest.fixture
def model(tmp_path):
    def save_model(**settings):
        save_segmenter(tmp_path / "model.pt", threshold_segmenter(150, **settings))
        return tmp_path / "model.pt"

    return save_model


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("name", ["turned", "oblique"])
def test_mask_lies_in_the_world_where_the_bright_object_of_the_image_does(
    tmp_path, model, name, axis
):
    affine = {"turned": TURNED, "oblique": OBLIQUE}[name]
    inputs, output = tmp_path / "scans", tmp_path / "masks"
    for codes in ORIENTATIONS:
        save(inputs / f"{codes}.nii.gz", scan(), affine, codes)
    # Pixels as fine as the finest axis, so that hardly a boundary moves by resampling.
    spacing = float(voxel_sizes(affine).min())
    settings = {"axis": axis, "spacing": spacing, "size": 48, "value": 3}
    assert predict("--model", model(**settings), "--input", inputs, "--output", output) == 0
    expected = apply_affine(affine, np.argwhere(scan() > 150))
    for codes in ORIENTATIONS:
        image = nib.load(inputs / f"{codes}.nii.gz")
        mask = nib.load(output / f"{codes}.nii.gz")
        assert mask.shape == image.shape and mask.get_data_dtype() == np.uint8
        np.testing.assert_allclose(mask.affine, image.affine, atol=1e-6)
        for form in ("qform", "sform"):
            theirs, code = getattr(image, f"get_{form}")(coded=True)
            ours, same = getattr(mask, f"get_{form}")(coded=True)
            assert same == code
            np.testing.assert_allclose(ours, theirs, atol=1e-6)
        assert set(np.unique(mask.dataobj)) == {0, 3}
        found = bright_in_world(output / f"{codes}.nii.gz", 2)
        apart = np.linalg.norm(found[:, None] - expected, axis=-1)
        # Every voxel of the object is marked, to 1e-3 mm; what resampling adds is a rim.
        assert (apart.min(axis=0) < 1e-3).mean() > 0.97
        assert (apart.min(axis=1) < 1e-3).mean() > 0.97
        np.testing.assert_allclose(found.mean(0), expected.mean(0), atol=0.5 * spacing)


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_without_resampling_the_mask_is_the_object_voxel_by_voxel(tmp_path, model, codes):
    save(tmp_path / "scan.nii", scan(), TURNED, codes)
    path = model(spacing=1.5)
    flags = ("--input", tmp_path / "scan.nii", "--output", tmp_path / "masks")
    assert predict("--model", path, *flags) == 0
    found = bright_in_world(tmp_path / "masks/scan.nii.gz", 0)
    np.testing.assert_allclose(found, bright_in_world(tmp_path / "scan.nii", 150), atol=1e-3)


@pytest.mark.parametrize("size", [32, 12], ids=["one canvas", "sliding windows"])
def test_anisotropic_pixels_are_resampled_and_brought_back(tmp_path, model, size):
    save(tmp_path / "scan.nii.gz", scan((40, 20, 9)), ANISOTROPIC, "LAS")
    path = model(spacing=0.7, size=size)
    flags = ("--input", tmp_path / "scan.nii.gz", "--output", tmp_path / "masks")
    assert predict("--model", path, *flags) == 0
    found = np.asarray(nib.load(tmp_path / "masks/scan.nii.gz").dataobj)
    expected = nib.load(tmp_path / "scan.nii.gz").get_fdata() > 150
    assert 2 * (found & expected).sum() / (found.sum() + expected.sum()) > 0.97


def test_channel_of_a_4d_file_is_segmented_on_a_3d_grid(tmp_path, model):
    save(tmp_path / "scan.nii.gz", scan(), TURNED, "RPI", channels=3)
    path = model(spacing=1.5)
    flags = ("--input", tmp_path / "scan.nii.gz", "--output", tmp_path / "masks", "--channel", "1")
    assert predict("--model", path, *flags) == 0
    image, mask = nib.load(tmp_path / "scan.nii.gz"), nib.load(tmp_path / "masks/scan.nii.gz")
    assert mask.shape == image.shape[:3]
    np.testing.assert_allclose(mask.affine, image.affine, atol=1e-6)
    np.testing.assert_array_equal(mask.get_fdata() > 0, image.get_fdata()[..., 1] > 150)


def moved_scan(random):
    """A scan whose bright object lies somewhere else in each, and its label."""
    hu = random.normal(-800, 20, (24, 22, 9))
    hu[2:-2, 2:-2] = random.normal(40, 10, (20, 18, 9))
    corner = random.integers((4, 4, 1), (12, 10, 3))
    inside = tuple(
        slice(start, start + extent) for start, extent in zip(corner, (8, 7, 5), strict=True)
    )
    hu[inside] = random.normal(200, 10, (8, 7, 5))
    label = np.zeros(hu.shape)
    label[inside] = 5
    return hu, label


def test_from_training_to_masks_of_scans_in_every_orientation(tmp_path):
    """A task of 4-D Decathlon files: train on some, predict others, in their own geometry."""
    random = np.random.default_rng(0)
    task, scans = tmp_path / "task", tmp_path / "scans"
    affines = [TURNED, ANISOTROPIC, OBLIQUE]
    cases = []
    for number, codes in enumerate(ORIENTATIONS):
        name, affine = f"case{number:02d}", affines[number % 3]
        hu, label = moved_scan(random)
        save(task / f"imagesTr/{name}.nii.gz", hu, affine, codes, channels=2)
        save(task / f"labelsTr/{name}.nii.gz", label, affine, codes, scaled=False)
        save(scans / f"{name}.nii.gz", hu, affine, codes, channels=2)
        cases.append({"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"})
    labels = {"background": 0, "tumour": 5}
    description = {"labels": labels, "modality": {"0": "CT"}, "training": cases}
    (task / "dataset.json").write_text(json.dumps(description))

    run, output = tmp_path / "run", tmp_path / "masks"
    flags = f"--task {task} --output {run} --channel 1 --width 0.125 --mode finetune --device cpu"
    flags += " --slice-axis 2 --epochs 15 --lr 0.01 --batch-size 8 --spacing 1.4"
    assert run_command(segment, flags.split()) == 0
    assert predict("--model", run, "--input", scans, "--output", output, "--channel", "1") == 0
    for entry in cases:
        truth, scan_file = task / entry["label"], task / entry["image"]
        mask = output / truth.name
        image, found = nib.load(scan_file), nib.load(mask)
        assert found.shape == image.shape[:3]
        corners = np.array(np.meshgrid(*([0, n - 1] for n in found.shape))).reshape(3, -1).T
        np.testing.assert_allclose(
            apply_affine(found.affine, corners), apply_affine(image.affine, corners), atol=1e-3
        )
        # The trained network finds the object where its label is in the world.
        ours, theirs = bright_in_world(mask, 4), bright_in_world(truth, 4)
        assert set(np.unique(found.dataobj)) == {0, 5}
        step = voxel_sizes(image.affine).max()
        np.testing.assert_allclose(ours.mean(0), theirs.mean(0), atol=0.75 * step)

    # What the run's own test wrote of the same cases is the same label map.
    tested = json.loads((run / "split.json").read_text())["test"]
    assert tested
    for case in tested:
        cached = nib.load(run / f"predictions/finetune-scratch/{case}.nii.gz")
        found = nib.load(output / f"{case}.nii.gz")
        np.testing.assert_array_equal(found.dataobj, cached.dataobj)
        np.testing.assert_array_equal(found.affine, cached.affine)
