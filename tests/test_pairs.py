"""Label maps found, matched and read: names, grids, orientations, and everything that is wrong."""

import nibabel as nib
import numpy as np
import pytest
from volume_files import OBLIQUE, as_stored, save_volume

from medmoco.data.nifti import VolumeError
from medmoco.data.pairs import (
    Pair,
    align,
    described_classes,
    find_truth,
    match,
    read_label_map,
    resample_labels,
)
from medmoco.data.volumes import Volume
from medmoco.errors import UserError

AFFINE = np.diag([1.0, 1.5, 2.0, 1.0])


def paths(tmp_path, folder, *names):
    return [tmp_path / folder / name for name in names]


def random_labels(shape=(6, 7, 8), seed=0):
    return np.random.default_rng(seed).integers(0, 4, shape).astype(np.uint8)


# Matching


def test_cases_are_matched_by_name_whatever_the_suffix(tmp_path):
    predictions = paths(tmp_path, "pred", "b.nii.gz", "a.nii")
    truths = paths(tmp_path, "truth", "a.nii.gz", "b.nii")
    matched = match(predictions, truths, only_common=False)
    assert matched.pairs == (
        Pair("a", predictions[1], truths[0]),
        Pair("b", predictions[0], truths[1]),
    )
    assert matched.left_out == ()


def test_an_image_s_name_matches_its_label_s(tmp_path):
    predictions = paths(tmp_path, "pred", "img0001.nii.gz")
    truths = paths(tmp_path, "label", "label0001.nii.gz")
    assert match(predictions, truths, False).pairs[0].case == "img0001"


def test_what_stands_alone_is_listed_together_from_both_sides(tmp_path):
    predictions = paths(tmp_path, "pred", "a.nii", *(f"p{i}.nii" for i in range(7)))
    truths = paths(tmp_path, "truth", "a.nii", "t1.nii")
    with pytest.raises(UserError) as caught:
        match(predictions, truths, only_common=False)
    assert str(caught.value) == (
        "7 predictions without truth: p0, p1, p2, p3, p4 and 2 more; "
        "1 truth without prediction: t1 (--only-common scores the 1 cases that both folders hold)"
    )


def test_only_common_leaves_the_others_out(tmp_path):
    predictions = paths(tmp_path, "pred", "a.nii", "p.nii")
    truths = paths(tmp_path, "truth", "a.nii", "t.nii")
    matched = match(predictions, truths, only_common=True)
    assert [pair.case for pair in matched.pairs] == ["a"]
    assert matched.left_out == (predictions[1], truths[1])


def test_no_name_in_common_is_an_error_even_then(tmp_path):
    predictions, truths = paths(tmp_path, "pred", "p.nii"), paths(tmp_path, "truth", "t.nii")
    with pytest.raises(UserError, match="no name in common: predictions p; truth t"):
        match(predictions, truths, only_common=True)


def test_two_files_of_one_case_are_named(tmp_path):
    twice = paths(tmp_path, "pred", "a.nii", "sub/a.nii.gz")
    with pytest.raises(UserError, match=r"one file a case, got .*pred/a\.nii and .*sub/a\.nii\.gz"):
        match(twice, paths(tmp_path, "truth", "a.nii"), False)


def test_a_file_is_not_its_own_truth(tmp_path):
    folder = tmp_path / "truth"
    save_volume(folder / "a.nii.gz", random_labels())
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(UserError, match="a prediction and its truth, got one file"):
        match([tmp_path / "link" / "a.nii.gz"], [folder / "a.nii.gz"], False)


# Truth


def test_truth_of_a_labelled_data_set_is_that_of_its_cases(tiny_task):
    truths, names = find_truth(tiny_task)
    assert len(truths) == 10
    assert all(path.parent == tiny_task / "labelsTr" for path in truths)
    assert names[0] == "background" and len(names) > 2


def test_names_are_those_of_the_dataset_json_above(tiny_task):
    assert find_truth(tiny_task / "labelsTr")[1] == find_truth(tiny_task)[1]


def test_a_plain_folder_names_nothing(tmp_path):
    path = save_volume(tmp_path / "truth" / "a.nii.gz", random_labels())
    assert find_truth(path.parent) == ([path], None)


def test_the_first_description_is_taken(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dataset.json").write_text(f'{{"labels": {{"{name}": 3}}}}')
    expected = {0: "background", 3: "two"}
    assert described_classes(tmp_path, tmp_path / "two", tmp_path / "one") == expected


# Reading


def test_values_are_read_as_they_are(tmp_path):
    labels = random_labels().astype(np.float32)
    path = save_volume(tmp_path / "a.nii.gz", labels, AFFINE)
    got = read_label_map(path, None)
    assert got.voxels.dtype == np.uint8
    np.testing.assert_array_equal(got.voxels, labels)


def bad_map(tmp_path, voxels):
    return save_volume(tmp_path / "bad.nii.gz", voxels, AFFINE)


@pytest.mark.parametrize(
    ("voxels", "message"),
    [
        (np.full((3, 3, 3), 0.5, np.float32), "whole numbers, got fractions"),
        (np.full((3, 3, 3), np.nan, np.float32), "whole numbers, got fractions or NaN"),
        (np.full((3, 3, 3), -1, np.int16), r"values from 0 to 255, got -1 to -1"),
        (np.full((3, 3, 3), 256, np.int16), r"values from 0 to 255, got 256 to 256"),
        (np.zeros((3, 3, 3, 2), np.uint8), "one label map, got 2 volumes in one file"),
        (np.full((3, 3, 3), 7, np.uint8), r"label values \[0, 1, 2\], got also 7"),
    ],
)
def test_a_map_that_is_none_is_refused_with_its_name(tmp_path, voxels, message):
    with pytest.raises(VolumeError, match=rf"bad\.nii\.gz: expected .*{message}"):
        read_label_map(bad_map(tmp_path, voxels), [0, 1, 2])


# Grids


def read(path):
    return read_label_map(path, None)


@pytest.mark.parametrize("codes", ["LAS", "RPI", "PIR", "SAR"])
@pytest.mark.parametrize("affine", [AFFINE, OBLIQUE], ids=["straight", "oblique"])
def test_one_grid_stored_in_another_order_is_the_same(tmp_path, codes, affine):
    labels = random_labels()
    truth = save_volume(tmp_path / "truth.nii.gz", labels, affine)
    prediction = save_volume(tmp_path / "pred.nii.gz", *as_stored(labels, affine, codes))
    pair = Pair("a", prediction, truth)
    aligned = align(pair, read(prediction), read(truth).grid, resample=False)
    np.testing.assert_array_equal(aligned.voxels, read(truth).voxels)


def test_grids_that_differ_are_both_shown_with_the_way_out(tmp_path):
    truth = save_volume(tmp_path / "truth.nii.gz", random_labels(), AFFINE)
    shifted = AFFINE.copy()
    shifted[0, 3] = 2.5
    prediction = save_volume(tmp_path / "pred.nii.gz", random_labels(), shifted)
    with pytest.raises(VolumeError) as caught:
        align(Pair("a", prediction, truth), read(prediction), read(truth).grid, resample=False)
    message = str(caught.value)
    assert message.startswith(f"{prediction}: expected the grid of its truth, {truth}, ")
    first, second = "[[1. , 0. , 0. , 0. ]", "[[1. , 0. , 0. , 2.5]"
    assert message.index(first) < message.index("got shape (6, 7, 8)") < message.index(second)
    assert "2.5 mm apart" in message and "--resample" in message


def test_shapes_that_differ_are_both_shown(tmp_path):
    truth = save_volume(tmp_path / "truth.nii.gz", random_labels((6, 7, 8)), AFFINE)
    prediction = save_volume(tmp_path / "pred.nii.gz", random_labels((6, 7, 9)), AFFINE)
    with pytest.raises(VolumeError, match=r"shape \(6, 7, 8\) and affine .*shape \(6, 7, 9\)"):
        align(Pair("a", prediction, truth), read(prediction), read(truth).grid, resample=False)


def test_rounding_of_an_affine_is_no_other_grid(tmp_path):
    nudged = AFFINE.copy()
    nudged[:3, 3] += 1e-3
    files = [
        save_volume(tmp_path / f"{name}.nii.gz", random_labels(), affine)
        for name, affine in (("pred", nudged), ("truth", AFFINE))
    ]
    prediction = read(files[0])
    assert align(Pair("a", *files), prediction, read(files[1]).grid, resample=True) is prediction


def test_resampling_takes_the_nearest_voxel_in_the_world():
    labels = Volume(random_labels((7, 8, 9)), OBLIQUE)
    # Numbers by which no voxel of one grid lies just between two of the other.
    turned = [[0.71, 0.1, 0, -2.0], [0, 0.92, 0.1, 1.1], [0.13, 0, 1.31, -1.1], [0, 0, 0, 1]]
    turned = np.array(turned) + np.pi / 1e4 * np.eye(4)[[1, 2, 0, 3]]
    affine = OBLIQUE @ turned
    grid = Volume(np.zeros((10, 9, 8)), affine).grid
    got = resample_labels(labels, grid)
    np.testing.assert_array_equal(got.affine, affine)
    inside = 0
    for index in np.ndindex(grid.shape):
        world = affine @ [*index, 1]
        nearest = np.rint(np.linalg.solve(OBLIQUE, world)[:3]).astype(int)
        within = ((nearest >= 0) & (nearest < labels.voxels.shape)).all()
        inside += within
        assert got.voxels[index] == (labels.voxels[tuple(nearest)] if within else 0)
    assert 100 < inside < 600  # both cases were seen


def test_prediction_at_twice_the_resolution_comes_back_exactly(tmp_path):
    labels = random_labels((5, 6, 4))
    fine_affine = AFFINE @ np.diag([0.5, 0.5, 0.5, 1])
    fine_affine[:3, 3] = (AFFINE @ [-0.25, -0.25, -0.25, 1])[:3]
    fine = np.kron(labels, np.ones((2, 2, 2), np.uint8))
    prediction = save_volume(tmp_path / "pred.nii.gz", fine, fine_affine)
    truth = save_volume(tmp_path / "truth.nii.gz", labels, AFFINE)
    aligned = align(Pair("a", prediction, truth), read(prediction), read(truth).grid, resample=True)
    np.testing.assert_array_equal(aligned.voxels, nib.load(truth).get_fdata())
