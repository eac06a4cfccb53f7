"""Scores of two label maps: the policy for empty masks, classes apart, volumes of one slice."""

import numpy as np
import pytest

from medmoco.scores import absent, score_labels
from medmoco.surface_distance import (
    average_symmetric_surface_distance,
    hausdorff_95,
    normalised_surface_dice,
    surface_distances,
)

AXES = np.diag([1.0, 2.0, 3.0])
SHAPE = (10, 12, 8)
DIAGONAL = np.sqrt(10**2 + 24**2 + 24**2)


def labels(**boxes):
    """labels(v3=(2, 5)) holds value 3 in a cube from 2 to 5."""
    volume = np.zeros(SHAPE, np.uint8)
    for name, (low, high) in boxes.items():
        volume[low:high, low:high, low:high] = int(name[1:])
    return volume


def random_labels(seed, values=(0, 1, 2, 5), size=3):
    coarse = np.random.default_rng(seed).choice(np.array(values, np.uint8), (5, 4, 4))
    return np.kron(coarse, np.ones((size, size, size), np.uint8))


def test_equal_maps_score_perfectly():
    scores = score_labels(labels(v1=(2, 5)), labels(v1=(2, 5)), AXES, 0.0)[1]
    assert (scores.dice, scores.iou, scores.nsd) == (1, 1, 1)
    assert (scores.hd95, scores.assd) == (0, 0)
    assert scores.outcome == "found"


def test_missed_class_has_the_worst_distance():
    scores = score_labels(labels(), labels(v1=(2, 5)), AXES, 2.0)[1]
    assert (scores.dice, scores.iou, scores.nsd) == (0, 0, 0)
    assert scores.hd95 == scores.assd == pytest.approx(DIAGONAL)
    assert scores.outcome == "missed"


def test_invented_class_has_the_worst_distance():
    scores = score_labels(labels(v1=(2, 5)), labels(), AXES, 2.0)[1]
    assert (scores.dice, scores.iou, scores.nsd) == (0, 0, 0)
    assert scores.hd95 == scores.assd == pytest.approx(DIAGONAL)
    assert scores.outcome == "invented"


def test_absent_class_has_no_scores():
    assert score_labels(labels(), labels(), AXES, 2.0) == {}
    scores = absent(960)
    assert (scores.dice, scores.iou, scores.hd95, scores.nsd, scores.assd) == (None,) * 5
    assert scores.outcome == "absent"


def test_worst_distance_is_worse_than_the_farthest_prediction():
    prediction, truth = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    prediction[0, 0, 0] = truth[-1, -1, -1] = 1
    assert score_labels(prediction, truth, AXES, 2.0)[1].hd95 < DIAGONAL


def test_overlap_of_a_hand_made_case():
    # Cubes of 4 and 3 to a side, 2 x 2 x 2 in common.
    scores = score_labels(labels(v4=(1, 5)), labels(v4=(3, 6)), AXES, 2.0)[4]
    assert (scores.n_both, scores.n_pred, scores.n_ref) == (8, 64, 27)
    assert scores.n_voxels == np.prod(SHAPE)
    assert scores.dice == pytest.approx(16 / 91)
    assert scores.iou == pytest.approx(8 / 83)


@pytest.mark.parametrize("seed", range(3))
def test_each_class_scores_as_its_mask_alone(seed):
    prediction, truth = random_labels(seed), random_labels(seed + 50)
    got = score_labels(prediction, truth, AXES, 2.0)
    assert sorted(got) == [1, 2, 5]
    for value, scores in got.items():
        ours, theirs = prediction == value, truth == value
        distances = surface_distances(ours, theirs, AXES)
        assert scores.hd95 == pytest.approx(hausdorff_95(distances))
        assert scores.nsd == pytest.approx(normalised_surface_dice(distances, 2.0))
        assert scores.assd == pytest.approx(average_symmetric_surface_distance(distances))
        assert scores.dice == pytest.approx(2 * (ours & theirs).sum() / (ours.sum() + theirs.sum()))
        assert scores.iou == pytest.approx((ours & theirs).sum() / (ours | theirs).sum())


def test_the_tolerance_counts():
    prediction, truth = random_labels(1), random_labels(2)
    scores = [score_labels(prediction, truth, AXES, mm)[1].nsd for mm in (0, 1, 3, 1000)]
    assert scores == sorted(scores)
    assert scores[0] < scores[2] and scores[3] == 1


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_volume_of_one_slice_has_contours(axis):
    truth, prediction = np.zeros((12, 12), np.uint8), np.zeros((12, 12), np.uint8)
    truth[2:10, 2:10], prediction[3:9, 3:9] = 1, 1
    plane = [other for other in range(3) if other != axis]
    contours = surface_distances(prediction > 0, truth > 0, AXES[:, plane])
    one_slice = (np.expand_dims(labels, axis) for labels in (prediction, truth))
    scores = score_labels(*one_slice, AXES, 2.0)[1]
    assert scores.assd == pytest.approx(average_symmetric_surface_distance(contours))
    assert scores.hd95 > 0  # with the slice's own faces as surface all of it would lie at 0


def test_a_class_one_slice_thick_in_a_thick_volume_has_two_faces():
    truth = labels()
    truth[2:8, 2:8, 4] = 1
    prediction = np.roll(truth, 1, 2)
    assert score_labels(prediction, truth, AXES, 1.0)[1].assd == 3


def test_a_volume_of_one_voxel():
    one = np.ones((1, 1, 1), np.uint8)
    assert score_labels(one, one, AXES, 1.0)[1].assd == 0
    assert score_labels(one * 0, one, AXES, 1.0)[1].hd95 == pytest.approx(np.sqrt(14))
