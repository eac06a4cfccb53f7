"""Where each volume of a slice cache goes, decided before the first is read."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

import numpy as np

from medmoco.data.convert import coarsest_axis
from medmoco.data.nifti import ReadFault, VolumeError
from medmoco.data.shards import Shards, place
from medmoco.data.sources import Source
from medmoco.data.store import CacheSettings, image_shards, label_shards
from medmoco.data.volumes import Grid, read_grid, stack_axes

HEADER_READERS = 16  # threads; they wait for the disk


@dataclass(frozen=True)
class Plan:
    """What is to be built: where each volume goes. Arrays have one row a source.

    Attributes:
        sources: in the order of the cache.
        settings: with the axis chosen.
        classes, values: of the labels; empty without labels.
        grids: None where the header cannot be read.
        shapes: (sources, 3) of the stacks; zeros where the header cannot be read.
        shard, start: as `place` gives them.
        sizes: voxels of the shards.
    """

    sources: Sequence[Source]
    settings: CacheSettings
    classes: tuple[str, ...]
    values: tuple[int, ...]
    grids: Sequence[Grid | None]
    shapes: np.ndarray
    shard: np.ndarray
    start: np.ndarray
    sizes: list[int]

    @property
    def axis(self) -> int:
        assert self.settings.slice_axis is not None  # chosen by `make_plan`
        return self.settings.slice_axis

    @property
    def voxel_bytes(self) -> int:
        return 3 if self.classes else 2

    def digest(self) -> str:
        """Of places and shapes; content and settings are in the name of the cache."""
        content = blake2b(json.dumps([self.axis, self.sizes]).encode(), digest_size=16)
        for array in (self.shapes, self.shard, self.start):
            content.update(array.tobytes())
        return content.hexdigest()

    def shards(self, folder: Path) -> list[Shards]:
        """Of the images and, for labelled sets, of the labels."""
        kinds = [image_shards, label_shards] if self.classes else [image_shards]
        return [of(folder, self.sizes) for of in kinds]


def make_plan(
    sources: Sequence[Source],
    settings: CacheSettings,
    classes: tuple[str, ...],
    values: tuple[int, ...],
) -> Plan:
    """From the headers alone; files that cannot be read are reported by the conversion.

    Raises:
        ReadFault: a header cannot be read now.
    """
    with ThreadPoolExecutor(HEADER_READERS) as pool:
        grids = list(pool.map(_grid, sources))
    readable = [grid for grid in grids if grid is not None]
    if settings.slice_axis is None:
        settings = replace(settings, slice_axis=coarsest_axis(readable) if readable else 2)
    assert settings.slice_axis is not None
    axes = list(stack_axes(settings.slice_axis))
    shapes = np.array([grid.shape if grid else (0, 0, 0) for grid in grids], np.int64)[:, axes]
    return Plan(sources, settings, classes, values, grids, shapes, *place(shapes))


def _grid(source: Source) -> Grid | None:
    try:
        return read_grid(source.image)
    except ReadFault:
        raise
    except VolumeError:
        return None
