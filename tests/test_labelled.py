"""What wins where flags, the encoder's file and dataset.json all have a say."""

from pathlib import Path

from medmoco.data.task import Task
from medmoco.labelled import cache_settings, read_split
from medmoco.segment import SegmentConfig

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
