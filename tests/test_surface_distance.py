"""Distances in mm against values known by hand, brute force in float64, and MONAI."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from volume_files import OBLIQUE

from medmoco.surface_distance import (
    average_symmetric_surface_distance,
    bounding_box,
    diagonal,
    hausdorff_95,
    normalised_surface_dice,
    surface,
    surface_distances,
)

SPACINGS = [(1.0, 1.0, 1.0), (0.7, 0.7, 3.0), (2.5, 1.0, 0.4)]


def box(shape, *slices):
    mask = np.zeros(shape, bool)
    mask[slices] = True
    return mask


def blobs(shape, seed, share=0.4):
    """Some lumps of different sizes, some of them at the border of the volume."""
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.2)
    return noise > np.quantile(noise, 1 - share)


def brute_force(prediction, truth, axes):
    """By the definition: face neighbours one by one, then every distance of every pair."""

    def points(mask):
        found = []
        for index in np.argwhere(mask):
            steps = np.concatenate([np.eye(mask.ndim, dtype=int), -np.eye(mask.ndim, dtype=int)])
            near = index + steps
            within = ((near >= 0) & (near < mask.shape)).all(axis=1)
            if not within.all() or not mask[tuple(near.T)].all():
                found.append(axes @ index)
        return np.array(found)

    ours, theirs = points(prediction), points(truth)
    pairs = np.sqrt(((ours[:, None] - theirs[None]) ** 2).sum(axis=2))
    return pairs.min(axis=1), pairs.min(axis=0)


def spread(distances):
    return [np.sort(one_way) for one_way in distances]


# Surfaces


def test_surface_of_a_cube_is_its_outermost_voxels():
    cube = box((7, 7, 7), slice(1, 6), slice(1, 6), slice(1, 6))
    assert surface(cube).sum() == 5**3 - 3**3
    assert not surface(cube)[2:5, 2:5, 2:5].any()


def test_outside_of_the_volume_is_background():
    full = np.ones((4, 5, 6), bool)
    assert surface(full).sum() == full.size - 2 * 3 * 4


def test_voxels_that_lack_a_diagonal_neighbour_alone_are_no_surface():
    mask = np.ones((3, 3), bool)
    mask[0, 0] = False
    padded = np.pad(mask, 2, constant_values=True)
    assert surface(padded)[2:-2, 2:-2].sum() == 2  # the two that share a side with the hole


def test_bounding_box_is_the_smallest():
    mask = box((9, 8, 7), slice(2, 5), slice(0, 1), slice(6, 7))
    mask[7, 3, 6] = True
    assert bounding_box(mask) == (slice(2, 8), slice(0, 4), slice(6, 7))


# Distances worked out by hand


def test_two_voxels_are_as_far_apart_as_their_centres():
    one, other = box((9, 9, 9), 1, 1, 1), box((9, 9, 9), 4, 5, 6)
    distances = surface_distances(one, other, np.diag([1.0, 2.0, 0.5]))
    expected = np.sqrt(3**2 + 8**2 + 2.5**2)
    assert hausdorff_95(distances) == pytest.approx(expected)
    assert average_symmetric_surface_distance(distances) == pytest.approx(expected)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_parallel_plates_are_their_gap_apart_in_mm(axis):
    shape = [8, 8, 8]
    shape[axis] = 12
    plates = [box(shape, *[slice(None)] * axis, at) for at in (2, 7)]
    distances = surface_distances(*plates, np.diag([0.5, 0.8, 3.0]))
    gap = 5 * (0.5, 0.8, 3.0)[axis]
    assert hausdorff_95(distances) == pytest.approx(gap)
    assert average_symmetric_surface_distance(distances) == pytest.approx(gap)
    assert normalised_surface_dice(distances, gap) == 1
    assert normalised_surface_dice(distances, 0.99 * gap) == 0


def test_a_cube_grown_by_one_voxel():
    small = box((12, 12, 12), slice(3, 9), slice(3, 9), slice(3, 9))
    large = box((12, 12, 12), slice(2, 10), slice(2, 10), slice(2, 10))
    to_large, to_small = surface_distances(small, large, np.eye(3))
    assert (to_large == 1).all()  # face to face
    # 6 faces of 6 x 6 lie at 1, 12 edges of 6 at sqrt 2, 8 corners at sqrt 3.
    expected = [*[1.0] * 216, *[np.sqrt(2)] * 72, *[np.sqrt(3)] * 8]
    np.testing.assert_allclose(np.sort(to_small), expected)
    distances = surface_distances(small, large, np.eye(3))
    assert hausdorff_95(distances) == pytest.approx(np.sqrt(2))
    n_small, n_large = 6**3 - 4**3, 8**3 - 6**3
    assert normalised_surface_dice(distances, 1.0) == pytest.approx(
        (n_small + 216) / (n_small + n_large)
    )
    assert average_symmetric_surface_distance(distances) == pytest.approx(
        (n_small + sum(expected)) / (n_small + n_large)
    )


@pytest.mark.parametrize("spacing", SPACINGS)
def test_concentric_spheres_are_apart_by_the_difference_of_their_radii(spacing):
    radii = (9.0, 13.0)
    shape = [int(2 * 15 / step) for step in spacing]
    centres = [(np.arange(n) - n / 2 + 0.5) * step for n, step in zip(shape, spacing, strict=True)]
    radius = np.sqrt(sum(x**2 for x in np.meshgrid(*centres, indexing="ij")))
    distances = surface_distances(radius < radii[0], radius < radii[1], np.diag(spacing))
    # A surface voxel's centre lies up to one step below the sphere.
    step = max(spacing)
    assert hausdorff_95(distances) == pytest.approx(4, abs=step)
    assert average_symmetric_surface_distance(distances) == pytest.approx(4, abs=step / 2)
    assert normalised_surface_dice(distances, 4 + step) == 1
    assert normalised_surface_dice(distances, 4 - step) == 0


def test_hd95_is_the_larger_of_the_two_directions_not_of_both_pooled():
    truth = box((100, 4, 4), slice(None), 1, 1)
    prediction = truth.copy()
    prediction[60:, 1, 1] = False  # to_truth is 0 throughout, to_prediction up to 40
    distances = surface_distances(prediction, truth, np.eye(3))
    assert not distances.to_truth.any()
    assert hausdorff_95(distances) == np.percentile(distances.to_prediction, 95)
    assert hausdorff_95(distances) > np.percentile(np.concatenate(distances), 95)


def test_equal_masks_have_distance_zero_and_nsd_one():
    mask = blobs((9, 8, 7), 0)
    distances = surface_distances(mask, mask, np.eye(3))
    assert hausdorff_95(distances) == average_symmetric_surface_distance(distances) == 0
    assert normalised_surface_dice(distances, 0) == 1


@pytest.mark.parametrize("spacing", [0.3, 0.7, 1.1])
def test_a_surface_at_the_tolerance_is_within_it_whatever_float32_made_of_the_spacing(spacing):
    axes = np.diag([float(np.float32(spacing))] * 3)
    distances = surface_distances(box((5, 5, 5), 1, 1, 1), box((5, 5, 5), 2, 1, 1), axes)
    assert normalised_surface_dice(distances, spacing) == 1
    assert normalised_surface_dice(distances, 0.999 * spacing) == 0


# Against other computations


@pytest.mark.parametrize("shape", [(7, 6, 5), (1, 9, 8), (12, 11)])
@pytest.mark.parametrize("seed", range(3))
def test_brute_force_agrees_on_any_axes(shape, seed):
    prediction, truth = blobs(shape, seed), blobs(shape, seed + 100, 0.2)
    axes = OBLIQUE[:3, : len(shape)]
    got = surface_distances(prediction, truth, axes)
    for one_way, expected in zip(
        spread(got), spread(brute_force(prediction, truth, axes)), strict=True
    ):
        np.testing.assert_allclose(one_way, expected, rtol=1e-12)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of MONAI, about calls of its own
def test_monai_agrees(spacing, seed):
    metrics = pytest.importorskip("monai.metrics")
    import torch

    shape = (14, 17, 11)
    prediction, truth = blobs(shape, seed), blobs(shape, seed + 100, 0.1)
    y_pred, y = (torch.from_numpy(mask)[None, None].float() for mask in (prediction, truth))
    got = surface_distances(prediction, truth, np.diag(spacing))
    options = {"include_background": True, "spacing": spacing}
    hd95 = metrics.compute_hausdorff_distance(y_pred, y, percentile=95, **options)
    assert hausdorff_95(got) == pytest.approx(hd95.item(), rel=1e-5)
    assd = metrics.compute_average_surface_distance(y_pred, y, symmetric=True, **options)
    assert average_symmetric_surface_distance(got) == pytest.approx(assd.item(), rel=1e-5)
    for tolerance in (0.0, 0.8, 1.9):
        nsd = metrics.compute_surface_dice(y_pred, y, [tolerance], **options)
        assert normalised_surface_dice(got, tolerance) == pytest.approx(nsd.item(), rel=1e-5)


def test_turning_the_patient_changes_no_distance():
    prediction, truth = blobs((8, 9, 10), 1), blobs((8, 9, 10), 2)
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    straight = np.diag([1.0, 1.5, 4.0])
    for one_way, turned in zip(
        surface_distances(prediction, truth, straight),
        surface_distances(prediction, truth, turn @ straight),
        strict=True,
    ):
        np.testing.assert_allclose(turned, one_way, rtol=1e-9, atol=1e-9)


# Limits and errors


def test_diagonal_is_longer_than_any_distance_in_the_volume():
    shape, axes = (3, 4, 12), np.eye(3)
    assert diagonal(shape, axes) == 13
    assert diagonal((3, 2, 3), np.diag([1.0, 2.0, 4.0])) == 13
    corners = box(shape, 0, 0, 0), box(shape, 2, 3, 11)
    assert hausdorff_95(surface_distances(*corners, axes)) < 13


def test_diagonal_of_a_sheared_volume_is_its_longest():
    shear = np.array([[1.0, 0.9, 0], [0, 1, 0], [0, 0, 1]])
    assert diagonal((10, 10, 1), shear) == pytest.approx(np.sqrt(19**2 + 10**2 + 1))
    shear[0, 1] = -0.9
    assert diagonal((10, 10, 1), shear) == pytest.approx(np.sqrt(19**2 + 10**2 + 1))


def test_shapes_that_differ_are_named():
    with pytest.raises(ValueError, match=r"shape \(2, 2, 2\), truth has \(2, 2, 3\)"):
        surface_distances(np.ones((2, 2, 2), bool), np.ones((2, 2, 3), bool), np.eye(3))


@pytest.mark.parametrize("empty", [0, 1])
def test_an_empty_mask_has_no_distance(empty):
    masks = [np.ones((2, 2, 2), bool)] * 2
    masks[empty] = np.zeros((2, 2, 2), bool)
    with pytest.raises(ValueError, match="two masks with voxels"):
        surface_distances(*masks, np.eye(3))
