"""Slices on one pixel grid: from the cache to square canvases, and from canvases back."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from medmoco.data.store import FULL_SCALE, SliceCache

OVERSAMPLING = 1.5  # finer pixels than the image's are kept up to here, for crops that zoom in
CANVAS_STEP = 32  # pixels: where the data decides a canvas's side, it is a multiple


@dataclass(frozen=True)
class PixelGrid:
    """Square canvases of `size` x `size` pixels, `spacing` millimetres apart in both axes."""

    size: int
    spacing: float

    def content(self, shape: tuple[int, int], spacing: tuple[float, float]) -> tuple[int, int]:
        """Rows and columns of a slice (h, w) once resampled; they may exceed the canvas."""
        rows, columns = (
            max(1, round(count * step / self.spacing))
            for count, step in zip(shape, spacing, strict=True)
        )
        return rows, columns


def choose_grid(cache: SliceCache, image_size: int, spacing: float | None = None) -> PixelGrid:
    """One isotropic pixel size for a whole set.

    The median in-plane spacing, made coarser where the largest slice would not fit the canvas.

    Args:
        image_size: pixels of the canvas's side.
        spacing: millimetres; taken as it is, and slices that do not fit are cropped around their
            centre.
    """
    if spacing is not None:
        return PixelGrid(image_size, float(spacing))
    median = float(np.median(cache.volumes.spacing[:, 1:]))
    return PixelGrid(image_size, max(median, _longest(cache) / image_size))


def holding_all(cache: SliceCache, spacing: float) -> int:
    """Side of a canvas that holds every slice at `spacing` mm a pixel, a multiple of 32 pixels."""
    pixels = math.ceil(_longest(cache) / spacing - 1e-3)
    return CANVAS_STEP * math.ceil(pixels / CANVAS_STEP)


def oversampled(grid: PixelGrid, cache: SliceCache) -> PixelGrid:
    """The same field of view in finer pixels, as far as the volumes have them."""
    finest = float(np.median(cache.volumes.spacing[:, 1:].min(axis=1)))
    factor = min(max(grid.spacing / finest, 1.0), OVERSAMPLING)
    return PixelGrid(
        round(grid.size * factor), grid.spacing * grid.size / round(grid.size * factor)
    )


def _longest(cache: SliceCache) -> float:
    """Millimetres of the longest side of a slice."""
    return float((cache.volumes.shape[:, 1:] * cache.volumes.spacing[:, 1:]).max())


def fit_slice(array: np.ndarray, spacing: tuple[float, float], grid: PixelGrid) -> np.ndarray:
    """Resamples a slice and centres it on a canvas of zeros.

    Args:
        array: (h, w); floating point is interpolated, antialiased where it shrinks; integers are
            labels and take the nearest.
        spacing: millimetres between rows and between columns.

    Returns:
        (size, size), of the array's type.
    """
    content = grid.content(array.shape, spacing)
    if content != array.shape:
        array = _resample(array, content)
    canvas = np.zeros((grid.size, grid.size), array.dtype)
    (to_row, from_row), (to_column, from_column) = (_centred(grid.size, n) for n in content)
    canvas[to_row, to_column] = array[from_row, from_column]
    return canvas


def fit_stack(slices: Tensor, spacing: tuple[float, float], grid: PixelGrid) -> Tensor:
    """Resamples slices as `fit_slice` does, and centres each on a canvas that holds all of it.

    Args:
        slices: (B, h, w), floating point.
        spacing: millimetres between rows and between columns.

    Returns:
        (B, 1, H, W) with H and W at least `grid.size`.
    """
    shape = (slices.shape[1], slices.shape[2])
    content = grid.content(shape, spacing)
    images = slices[:, None]
    if content != shape:
        images = functional.interpolate(images, content, mode="bilinear", antialias=True)
    height, width = (max(grid.size, count) for count in content)
    if (height, width) == content:
        return images
    canvas = images.new_zeros(len(images), 1, height, width)
    (to_row, _), (to_column, _) = _centred(height, content[0]), _centred(width, content[1])
    canvas[..., to_row, to_column] = images
    return canvas


def unfit(
    maps: Tensor, shape: tuple[int, int], spacing: tuple[float, float], grid: PixelGrid
) -> Tensor:
    """Brings maps from a canvas back to a slice's own pixels: undoes `fit_slice` and `fit_stack`.

    Args:
        maps: (..., H, W), logits or probabilities.
        shape: (h, w) of the slice.
        spacing: millimetres between its rows and between its columns.

    Returns:
        (..., h, w), interpolated bilinearly; where the slice was cropped, the edge is repeated.
    """
    content = grid.content(shape, spacing)
    height, width = maps.shape[-2:]
    to_row, from_row = _centred(height, content[0])
    to_column, from_column = _centred(width, content[1])
    lead = maps.shape[:-2]
    inside = maps[..., to_row, to_column].reshape(1, -1, *_lengths(to_row, to_column))
    if content != tuple(inside.shape[-2:]):
        edges = [
            from_column.start,
            content[1] - from_column.stop,
            from_row.start,
            content[0] - from_row.stop,
        ]
        inside = functional.pad(inside, edges, mode="replicate")
    if content != tuple(shape):
        inside = functional.interpolate(inside, shape, mode="bilinear", antialias=True)
    return inside.reshape(*lead, *shape)


class SliceDataset(Dataset[dict[str, Any]]):
    """Slices of a cache on one canvas.

    Item: "image" float32 (1, size, size) in [0, 1]; "extent" float32 (2,), rows and columns of the
    content in pixels; "index" int64, the slice's number in the cache; and "label" int64
    (size, size), class indices, if asked for.
    """

    def __init__(
        self, cache: SliceCache, indices: np.ndarray, grid: PixelGrid, with_labels: bool = False
    ):
        self.cache = cache
        self.indices = np.asarray(indices, number_type(len(cache)))
        self.grid = grid
        self.with_labels = with_labels

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> dict[str, Any]:
        index = int(self.indices[item])
        number, position = (int(part) for part in self.cache.locate(index))
        row, column = self.cache.volumes.spacing[number, 1:].tolist()
        spacing = (row, column)
        stored = self.cache.image(number, position)
        pixels = stored.astype(np.float32) / FULL_SCALE
        rows, columns = self.grid.content(stored.shape, spacing)
        sample = {
            "image": torch.from_numpy(fit_slice(pixels, spacing, self.grid))[None],
            "extent": torch.tensor([rows, columns]).clamp(max=self.grid.size).float(),
            "index": torch.tensor(index),
        }
        if self.with_labels:
            classes = fit_slice(self.cache.label(number, position), spacing, self.grid)
            sample["label"] = torch.from_numpy(classes.astype(np.int64))
        return sample


def number_type(count: int) -> type[np.integer]:
    """Of the numbers of so many slices: 4 bytes where they suffice, for there may be very many."""
    return np.int32 if count <= 2**31 else np.int64


def _resample(array: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    source = torch.from_numpy(np.array(array))[None, None]  # a copy: the cache is read-only
    if source.is_floating_point():
        resampled = functional.interpolate(source, shape, mode="bilinear", antialias=True)
    else:
        resampled = functional.interpolate(source.float(), shape, mode="nearest-exact")
    return resampled[0, 0].numpy().astype(array.dtype, copy=False)


def _centred(canvas: int, content: int) -> tuple[slice, slice]:
    """Where content of this length lies on the canvas, and which part of it does."""
    shared = min(canvas, content)
    start, cut = (canvas - shared) // 2, (content - shared) // 2
    return slice(start, start + shared), slice(cut, cut + shared)


def _lengths(*ranges: slice) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in ranges)
