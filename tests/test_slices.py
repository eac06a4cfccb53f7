import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medmoco.data.cache import CacheSettings, build_cache, task_sources
from medmoco.data.slices import (
    PixelGrid,
    SliceDataset,
    choose_grid,
    fit_slice,
    fit_stack,
    unfit,
)
from medmoco.data.table import VolumeEntry, VolumeTable
from medmoco.data.task import read_task


@pytest.fixture(scope="module")
def cache(tiny_task, tmp_path_factory):
    task = read_task(tiny_task)
    root = tmp_path_factory.mktemp("cache")
    labels = {"classes": task.classes, "values": task.values}
    return build_cache(task_sources(task), CacheSettings(), root, **labels)


def volumes(*entries):
    table = [VolumeEntry("", "", "", shape, spacing) for shape, spacing in entries]
    return SimpleNamespace(volumes=VolumeTable.of(table, 0, 0))


def disc(size: int, radius: float) -> np.ndarray:
    axis = np.arange(size) - (size - 1) / 2
    return (np.hypot(axis[:, None], axis) < radius).astype(np.float32)


def test_grid_has_the_median_spacing_where_slices_fit():
    cache = volumes(((9, 50, 50), (5.0, 1.0, 1.0)), ((9, 40, 40), (5.0, 1.2, 1.2)))
    assert choose_grid(cache, 64) == PixelGrid(64, 1.1)


def test_grid_is_coarser_where_the_largest_slice_would_not_fit():
    cache = volumes(((9, 50, 50), (5.0, 1.0, 1.0)), ((9, 128, 100), (5.0, 1.0, 1.0)))
    assert choose_grid(cache, 64) == PixelGrid(64, 2.0)
    assert choose_grid(cache, 64).content((128, 100), (1.0, 1.0)) == (64, 50)


def test_given_spacing_is_taken_as_it_is():
    assert choose_grid(volumes(((9, 50, 50), (5.0, 1.0, 1.0))), 64, 0.5) == PixelGrid(64, 0.5)


def test_slice_on_the_grid_is_centred_and_unchanged():
    array = np.random.default_rng(0).random((5, 8), np.float32)
    canvas = fit_slice(array, (1.0, 1.0), PixelGrid(10, 1.0))
    np.testing.assert_array_equal(canvas[2:7, 1:9], array)
    assert canvas.sum() == pytest.approx(array.sum(), rel=1e-6)


def test_slice_larger_than_the_canvas_is_cropped_around_its_centre():
    array = np.arange(36, dtype=np.float32).reshape(6, 6)
    canvas = fit_slice(array, (1.0, 1.0), PixelGrid(4, 1.0))
    np.testing.assert_array_equal(canvas, array[1:5, 1:5])


def test_anisotropic_pixels_become_square():
    canvas = fit_slice(np.ones((10, 20), np.float32), (2.0, 1.0), PixelGrid(32, 1.0))
    assert canvas.sum() == pytest.approx(20 * 20)


def test_shrinking_averages_instead_of_dropping_pixels():
    stripes = np.tile(np.array([0, 1], np.float32), (32, 16))
    canvas = fit_slice(stripes, (1.0, 1.0), PixelGrid(8, 4.0))
    np.testing.assert_allclose(canvas[1:-1, 1:-1], 0.5, atol=0.05)


def test_labels_take_the_nearest_and_mix_no_classes():
    labels = np.zeros((20, 20), np.uint8)
    labels[5:15, 5:15] = 7
    canvas = fit_slice(labels, (1.0, 1.0), PixelGrid(16, 1.7))
    assert canvas.dtype == np.uint8
    assert set(np.unique(canvas)) == {0, 7}
    assert (canvas == 7).sum() == pytest.approx(100 / 1.7**2, rel=0.2)


@pytest.mark.parametrize("shape", [(48, 48), (37, 52), (20, 61)])
@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.7, 1.3)])
@pytest.mark.parametrize("grid", [PixelGrid(64, 1.0), PixelGrid(64, 0.8), PixelGrid(40, 2.1)])
def test_unfit_undoes_the_geometry_of_fit(shape, spacing, grid):
    rows, columns = np.meshgrid(*(np.linspace(0, 1, n) for n in shape), indexing="ij")
    smooth = np.stack([rows, columns]).astype(np.float32)  # each pixel says where it is
    canvas = torch.from_numpy(np.stack([fit_slice(part, spacing, grid) for part in smooth]))
    back = unfit(canvas, shape, spacing, grid).numpy()
    assert back.shape == (2, *shape)
    inner = np.s_[:, 3:-3, 3:-3]  # the canvas's zeros and cropped edges are another matter
    if min(grid.size - n for n in grid.content(shape, spacing)) >= 0:
        tolerance = 1.5 / min(grid.content(shape, spacing)) if grid.spacing > 1 else 0.02
        np.testing.assert_allclose(back[inner], smooth[inner], atol=tolerance)


def test_label_survives_the_way_to_the_canvas_and_back():
    truth = disc(60, 20)
    grid = PixelGrid(48, 1.5)
    canvas = torch.from_numpy(fit_slice(truth, (1.0, 1.0), grid))
    back = unfit(canvas[None], (60, 60), (1.0, 1.0), grid)[0].numpy() > 0.5
    dice = 2 * (back & (truth > 0)).sum() / (back.sum() + truth.sum())
    assert dice > 0.97


def test_unfit_repeats_the_edge_where_the_slice_was_cropped():
    back = unfit(torch.ones(3, 2, 8, 8), (12, 12), (1.0, 1.0), PixelGrid(8, 1.0))
    assert back.shape == (3, 2, 12, 12)
    torch.testing.assert_close(back, torch.ones(3, 2, 12, 12))


def test_item_has_image_extent_index_and_label(cache):
    grid = choose_grid(cache, 64)
    indices = cache.indices_of([cache.volumes[2].case])
    item = SliceDataset(cache, indices, grid, with_labels=True)[3]
    assert item["image"].shape == (1, 64, 64)
    assert item["image"].dtype == torch.float32
    assert 0 <= item["image"].min() < item["image"].max() <= 1
    assert item["label"].shape == (64, 64)
    assert item["label"].dtype == torch.int64
    assert item["label"].max() < len(cache.classes)
    assert item["index"].item() == indices[3]
    assert item["extent"].tolist() == list(grid.content((48, 48), cache.volumes[2].spacing[1:]))


def test_image_and_label_stay_aligned(cache):
    """Liver is soft tissue: a label moved by some pixels would lie on fat or air."""
    dataset = SliceDataset(cache, np.arange(len(cache)), choose_grid(cache, 64), with_labels=True)
    liver = cache.classes.index("liver")
    levels = torch.cat([item["image"][0][item["label"] == liver] for item in dataset])
    assert 0.3 < levels.median() < 0.8
    assert (levels < 0.15).float().mean() < 0.05


def test_dataset_without_labels_has_none(cache):
    assert "label" not in SliceDataset(cache, np.arange(3), choose_grid(cache, 32))[0]


def test_extent_is_at_most_the_canvas(cache):
    item = SliceDataset(cache, np.arange(3), choose_grid(cache, 16, 1.0))[0]
    assert item["extent"].tolist() == [16, 16]


def test_workers_get_the_place_of_the_cache_instead_of_its_content(cache):
    dataset = SliceDataset(cache, np.arange(3), choose_grid(cache, 32), with_labels=True)
    content = pickle.dumps(dataset)
    assert len(content) < 2000
    torch.testing.assert_close(pickle.loads(content)[1], dataset[1])


@pytest.mark.parametrize("shape", [(20, 20), (7, 31), (40, 12)])
@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.6, 1.3)])
def test_stack_is_fitted_slice_by_slice(shape, spacing):
    slices = torch.rand(3, *shape)
    for grid in (PixelGrid(64, 1.0), PixelGrid(53, 0.9)):
        fitted = fit_stack(slices, spacing, grid)
        expected = [fit_slice(one.numpy(), spacing, grid) for one in slices]
        np.testing.assert_allclose(fitted[:, 0], expected, atol=1e-6)


def test_stack_that_is_larger_than_the_grid_is_kept_whole():
    slices, grid = torch.rand(2, 20, 31), PixelGrid(16, 1.0)
    assert torch.equal(fit_stack(slices, (1.0, 1.0), grid)[:, 0], slices)
    wide = fit_stack(slices, (0.5, 1.0), grid)
    assert wide.shape == (2, 1, 16, 31)
    assert not wide[:, :, :3].any() and not wide[:, :, 13:].any()  # 10 rows in the middle


def test_linear_ramp_comes_back_from_a_canvas_that_is_larger_than_the_grid():
    rows, columns = torch.arange(20.0)[:, None], torch.arange(32.0)
    ramp, grid = (3 * rows + columns)[None], PixelGrid(16, 1.0)
    back = unfit(fit_stack(ramp, (2.0, 1.0), grid), (20, 32), (2.0, 1.0), grid)[:, 0]
    inside = (slice(None), slice(2, -2), slice(2, -2))
    torch.testing.assert_close(back[inside], ramp[inside], atol=1e-3, rtol=0)
