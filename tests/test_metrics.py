import json

import numpy as np
import pytest

from medmoco.metrics import DiceTable, iou_from_counts, overlap_counts

CLASSES = ("background", "liver", "spleen")


def volume(*labels):
    return np.array(labels, dtype=np.uint8).reshape(1, 1, -1)


def score(*pairs):
    table = DiceTable(CLASSES)
    for case, (prediction, truth) in enumerate(pairs):
        table.add(f"case_{case}", prediction, truth)
    return table.result()


def test_perfect_prediction_scores_one():
    labels = volume(0, 1, 1, 2)
    assert score((labels, labels))["dice_mean"] == 1.0


def test_dice_of_a_hand_made_case():
    # liver: 1 of 2 predicted and 3 true voxels -> 2/5; spleen: 1 of 2 and 1 -> 2/3
    result = score((volume(1, 1, 0, 0, 2, 2), volume(1, 0, 1, 1, 2, 0)))
    assert result["dice_per_class"] == {
        "liver": pytest.approx(2 / 5),
        "spleen": pytest.approx(2 / 3),
    }
    assert result["dice_mean"] == pytest.approx((2 / 5 + 2 / 3) / 2)


def test_background_does_not_count():
    result = score((volume(0, 0, 0, 1), volume(0, 0, 0, 2)))
    assert result["dice_mean"] == 0.0
    assert "background" not in result["dice_per_class"]


def test_class_absent_in_both_is_left_out_and_counted():
    result = score((volume(1, 0), volume(1, 0)), (volume(1, 2), volume(1, 2)))
    assert result["dice_per_volume"]["case_0"]["spleen"] is None
    assert result["dice_per_class"]["spleen"] == 1.0
    assert result["absent"] == {"liver": 0, "spleen": 1}


def test_class_predicted_where_there_is_none_scores_zero():
    result = score((volume(1, 2), volume(1, 0)))
    assert result["dice_per_class"]["spleen"] == 0.0
    assert result["absent"]["spleen"] == 0


def test_class_absent_everywhere_is_left_out_of_the_mean():
    result = score((volume(1, 0), volume(1, 0)))
    assert result["dice_per_class"] == {"liver": 1.0, "spleen": None}
    assert result["dice_pooled"]["spleen"] is None
    assert result["dice_mean"] == 1.0


def test_no_foreground_at_all_has_no_dice():
    assert score((volume(0, 0), volume(0, 0)))["dice_mean"] is None


def test_pooled_dice_weighs_voxels_and_per_volume_dice_weighs_volumes():
    small = (volume(1, 0), volume(0, 1))  # liver: 0 of 1 and 1
    large = (volume(1, 1, 1, 1), volume(1, 1, 1, 1))  # liver: 4 of 4 and 4
    result = score(small, large)
    assert result["dice_per_class"]["liver"] == 0.5
    assert result["dice_pooled"]["liver"] == pytest.approx(2 * 4 / (5 + 5))


def test_many_voxels_of_uint8_do_not_overflow():
    labels = np.full((64, 64, 64), 2, dtype=np.uint8)
    assert overlap_counts(labels, labels, 3).tolist() == [[0, 0, 0], [0, 0, 0], [64**3] * 3]


def test_every_voxel_of_a_large_volume_is_counted_once():
    prediction, truth = np.random.default_rng(0).integers(0, 4, (2, 101, 77, 83)).astype(np.uint8)
    expected = [
        [((prediction == c) & (truth == c)).sum(), (prediction == c).sum(), (truth == c).sum()]
        for c in range(4)
    ]
    assert overlap_counts(prediction.T, truth.T, 4).tolist() == expected


def test_iou_of_a_hand_made_case():
    assert iou_from_counts((2, 3, 5)) == 2 / 6
    assert iou_from_counts((0, 0, 4)) == 0
    assert iou_from_counts((0, 0, 0)) is None


def test_result_is_plain_json():
    text = json.dumps(score((volume(1, 0), volume(1, 2))), allow_nan=False)
    assert json.loads(text)["dice_per_class"] == {"liver": 1.0, "spleen": 0.0}


def test_shapes_that_differ_are_named():
    with pytest.raises(ValueError, match=r"shape \(1, 1, 2\), truth has \(1, 1, 3\)"):
        overlap_counts(volume(0, 0), volume(0, 0, 0), 3)


def test_index_beyond_the_classes_is_named():
    with pytest.raises(ValueError, match="truth must hold classes 0 to 2, got 0 to 7"):
        overlap_counts(volume(0, 0), volume(0, 7), 3)
