"""AbdomenCT-1K and BTCV as they are distributed: a miniature of each."""

import numpy as np
import pytest
from volume_files import save_volume

from medmoco.data.cache import CacheSettings, build_cache
from medmoco.data.sources import folder_sources, task_sources
from medmoco.data.task import read_task

WINDOW = (-175.0, 250.0)


def save_case(image, label, organs, seed):
    """A CT of 12 x 10 x 6 voxels of 0.8 x 0.8 x 5 mm in HU, and its label map with all organs."""
    random = np.random.default_rng(seed)
    affine = np.diag([-0.8, -0.8, 5, 1])
    voxels = random.integers(-1024, 400, (12, 10, 6)).astype(np.int16)
    save_volume(image, voxels, affine)
    labels = np.resize(np.arange(organs + 1), (12, 10, 6)).astype(np.uint8)
    save_volume(label, labels, affine)


@pytest.fixture
def abdomen_1k(tmp_path):
    for part, number in ((1, 1), (2, 401), (3, 1062)):
        folder = tmp_path / f"AbdomenCT-1K-ImagePart{part}"
        folder = folder / folder.name if part == 2 else folder  # some unpack it twice
        label = tmp_path / "Mask" / f"Case_{number:05}.nii.gz"
        save_case(folder / f"Case_{number:05}_0000.nii.gz", label, 4, number)
    return tmp_path


@pytest.fixture
def btcv(tmp_path):
    for number in (1, 21, 40):
        image = tmp_path / "img" / f"img{number:04}.nii.gz"
        save_case(image, tmp_path / "label" / f"label{number:04}.nii.gz", 13, number)
    return tmp_path


def test_abdomen_1k_is_a_task_of_four_organs(abdomen_1k):
    task = read_task(abdomen_1k)
    assert [case.name for case in task.cases] == ["Case_00001", "Case_00401", "Case_01062"]
    assert task.cases[1].label.name == "Case_00401.nii.gz"
    assert task.classes == ("background", "liver", "kidney", "spleen", "pancreas")
    assert task.values == (0, 1, 2, 3, 4)


def test_abdomen_1k_is_pretrained_on_its_images_alone(abdomen_1k):
    names = [source.case for source in folder_sources(abdomen_1k)]
    assert names == ["Case_00001_0000", "Case_00401_0000", "Case_01062_0000"]
    patients = [source.patient for source in folder_sources(abdomen_1k)]
    assert patients == ["Case_00001", "Case_00401", "Case_01062"]


def test_a_case_of_abdomen_1k_is_kept_from_pretraining_by_its_name(abdomen_1k):
    (left,) = folder_sources(abdomen_1k, exclude={"Case_00001", "Case_00401"})
    assert left.case == "Case_01062_0000"


def test_btcv_is_a_task_of_thirteen_organs(btcv):
    task = read_task(btcv)
    assert [case.name for case in task.cases] == ["img0001", "img0021", "img0040"]
    assert task.cases[0].label.name == "label0001.nii.gz"
    assert len(task.classes) == 14 and task.values == tuple(range(14))
    assert (task.classes[1], task.classes[6], task.classes[13]) == (
        "spleen",
        "liver",
        "left adrenal gland",
    )


def test_other_values_under_the_same_names_are_not_named_after_btcv(btcv):
    for path in (btcv / "label").iterdir():
        save_volume(path, np.ones((12, 10, 6), np.uint8))
    assert read_task(btcv).classes == ("background", "label 1")


@pytest.mark.parametrize("name", ["abdomen_1k", "btcv"])
def test_both_are_read_as_ct_in_axial_slices(name, request, tmp_path_factory):
    task = read_task(request.getfixturevalue(name))
    settings = CacheSettings(modality="auto", slice_axis=None, window=WINDOW, channel=0)
    cache = build_cache(
        task_sources(task),
        settings,
        tmp_path_factory.mktemp("cache"),
        classes=task.classes,
        values=task.values,
    )
    assert (cache.modality, cache.axis, len(cache.volumes)) == ("ct", 2, 3)
    assert cache.volumes[0].shape == (6, 10, 12)
    labels = np.unique(np.asarray(cache.labels(0)))
    np.testing.assert_array_equal(labels, np.arange(len(task.classes)))
