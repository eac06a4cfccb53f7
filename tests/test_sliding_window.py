"""Windows over large images: held to a plain float64 sum over every pixel of every window."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from medmoco.sliding_window import gaussian, sliding_window, window_starts

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("length", "starts"),
    [(8, [0]), (9, [0, 1]), (12, [0, 4]), (13, [0, 2, 5]), (16, [0, 4, 8]), (17, [0, 3, 6, 9])],
)
def test_windows_cover_everything_and_overlap_by_half(length, starts):
    assert window_starts(length, 8) == starts


@pytest.mark.parametrize("size", [1, 2, 7, 48])
@pytest.mark.parametrize("length", range(48, 180, 11))
def test_no_window_leaves_the_image_and_none_is_missing(size, length):
    starts = window_starts(length, size)
    assert starts[0] == 0 and starts[-1] == length - size
    assert max(np.diff(starts), default=0) <= max(1, size / 2 + 0.5)


def test_weights_are_the_gaussian_of_nnunet():
    """There a point is filtered, which for an even side stands half a pixel off the middle."""
    point = np.zeros((63, 63))
    point[31, 31] = 1
    filtered = gaussian_filter(point, 63 / 8, mode="constant", cval=0)
    got = gaussian(63, CPU)
    np.testing.assert_allclose(got, filtered / filtered.max(), atol=2e-4)
    assert got.min() > 0


@pytest.mark.parametrize("shape", [(8, 8), (8, 13), (20, 9)])
def test_overlapping_logits_are_averaged_with_the_weights(shape):
    torch.manual_seed(0)
    images, size = torch.rand(2, 1, *shape), 8
    place = torch.rand(3, size, size)  # a model that depends on the place in the window
    got = sliding_window(lambda window: window * place, images, size)

    total = np.zeros((2, 3, *shape))
    weights = np.zeros(shape)
    weight = gaussian(size, CPU).double().numpy()
    for top in window_starts(shape[0], size):
        for left in window_starts(shape[1], size):
            for i in range(size):
                for j in range(size):
                    value = images[:, :, top + i, left + j].double() * place[:, i, j]
                    total[:, :, top + i, left + j] += weight[i, j] * value.numpy()
                    weights[top + i, left + j] += weight[i, j]
    np.testing.assert_allclose(got, total / weights, rtol=1e-5)


def test_model_that_looks_at_single_pixels_gives_the_same_as_on_the_whole_image():
    images = torch.rand(1, 1, 40, 33)
    got = sliding_window(lambda window: torch.cat([window, 1 - window], 1), images, 16)
    torch.testing.assert_close(got, torch.cat([images, 1 - images], 1))
