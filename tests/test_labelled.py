"""What wins where flags, the encoder's file and dataset.json all have a say."""

from pathlib import Path

import numpy as np

from medmoco.data.task import Task
from medmoco.labelled import cache_settings, read_split
from medmoco.segment import SegmentConfig, prepare

TASK = Task(Path("task"), (), ("background", "liver"), (0, 1), "ct")
METADATA = {"modality": "mr", "window": (0.0, 100.0), "slice_axis": 1}


def test_slices_are_made_as_the_encoder_learned_them():
    settings = cache_settings(SegmentConfig(), TASK, METADATA)
    assert (settings.modality, settings.window, settings.slice_axis) == ("mr", (0.0, 100.0), 1)


def test_flags_win_over_the_file_of_the_encoder():
    flags = SegmentConfig(modality="ct", window_low=-50.0, slice_axis=0)
    settings = cache_settings(flags, TASK, METADATA)
    assert (settings.modality, settings.window, settings.slice_axis) == ("ct", (-50.0, 100.0), 0)


def test_without_an_encoder_the_task_decides():
    settings = cache_settings(SegmentConfig(), TASK, {})
    assert (settings.modality, settings.window) == ("ct", (-175.0, 250.0))
    assert settings.slice_axis is None


def test_label_fraction_shrinks_the_training_set_alone(tiny_task):
    whole = read_split(SegmentConfig(task=tiny_task))[1]
    half = read_split(SegmentConfig(task=tiny_task, label_fraction=0.5))[1]
    assert (len(whole.train), len(half.train)) == (8, 4)
    assert set(half.train) < set(whole.train)
    assert (half.pretrain, half.test) == (whole.pretrain, whole.test)


def test_pixels_of_the_classes_are_those_of_the_canvases(tiny_task, tmp_path):
    config = SegmentConfig(task=tiny_task, cache=tmp_path, arch="resnet18", width=0.125)
    segmentation = prepare(config)
    cache, dataset, pixels = segmentation.cache, segmentation.dataset, segmentation.pixels
    assert pixels.shape == (len(dataset), len(cache.classes))
    np.testing.assert_allclose(pixels.sum(dim=1), segmentation.grid.size**2)
    for item, index in enumerate(dataset.indices):
        labels = cache.label(*cache.locate(index))
        shown = set(np.flatnonzero(pixels[item] > 0).tolist())
        assert shown == set(np.unique(labels).tolist()) | {0}
    labels = np.stack([item["label"] for item in dataset])
    counted = np.bincount(labels.ravel(), minlength=len(cache.classes))
    np.testing.assert_allclose(pixels.sum(dim=0), counted, rtol=0.1)
