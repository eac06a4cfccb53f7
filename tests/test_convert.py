"""From voxels to pixels: the same in any order of the memory, and with little of it."""

import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medmoco.data import convert
from medmoco.data.convert import to_pixels
from medmoco.data.volumes import read_volume, to_stack

WINDOW = (-175.0, 250.0)
FILE = Path("volume.nii")


def in_float64(voxels, modality):
    low, high = WINDOW if modality == "ct" else np.percentile(voxels, (0.5, 99.5))
    return 65535 * (np.clip(voxels.astype(np.float64), low, high) - low) / (high - low)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("modality", ["ct", "mr"])
@pytest.mark.parametrize("order", ["C", "F", "turned"])
def test_pixels_are_a_contiguous_stack_of_the_scaled_voxels(axis, modality, order):
    voxels = np.random.default_rng(0).normal(50, 200, (7, 9, 5)).astype(np.float32)
    voxels = voxels.transpose(2, 0, 1)[::-1, :, ::-1] if order == "turned" else voxels
    voxels = np.asfortranarray(voxels) if order == "F" else voxels
    pixels = to_pixels(FILE, voxels, modality, WINDOW, axis)
    assert pixels.dtype == np.uint16 and pixels.flags.c_contiguous
    assert np.abs(pixels - to_stack(in_float64(voxels, modality), axis)).max() < 0.6


@pytest.mark.parametrize("turn", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_percentiles_are_of_every_nth_voxel_in_the_order_of_the_memory(monkeypatch, turn, order):
    monkeypatch.setattr(convert, "PERCENTILE_VOXELS", 100)
    voxels = np.arange(9 * 8 * 7, dtype=np.float32).reshape((9, 8, 7), order=order)
    view = voxels.transpose(turn)[::-1, :, ::-1]
    np.testing.assert_array_equal(convert._sample(view), view.ravel(order="K")[::5])


@pytest.mark.parametrize("kind", [np.int16, np.float32, np.float64])
def test_reading_and_scaling_take_less_than_twice_the_voxels_in_float32(
    tmp_path, monkeypatch, kind
):
    monkeypatch.setattr(convert, "PERCENTILE_VOXELS", 2**16)
    shape = (128, 128, 96)
    voxels = np.random.default_rng(0).normal(0, 300, shape).astype(np.float32)
    image = nib.Nifti1Image(voxels, np.diag([-1.0, -1, 1, 1]))
    image.header.set_data_dtype(kind)
    image.header.set_slope_inter(0.5, -100)
    nib.save(image, tmp_path / "volume.nii")
    del image, voxels
    tracemalloc.start()
    volume = read_volume(tmp_path / "volume.nii")
    for modality in ("ct", "mr"):
        to_pixels(FILE, volume.voxels, modality, WINDOW, 2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * 4 * np.prod(shape)
