"""The opened slice cache: stacks in shards, and a table of their volumes."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medmoco.data.index import read_index
from medmoco.data.shards import Shards
from medmoco.data.volumes import BadFile
from medmoco.errors import UserError

FULL_SCALE = 65535  # the pixel value that stands for 1


@dataclass(frozen=True)
class CacheSettings:
    """What decides how voxels become pixels.

    Attributes:
        modality: "ct", "mr", or "auto" to judge by sign and range of the values.
        slice_axis: canonical axis (0 sagittal, 1 coronal, 2 axial); None for the coarsest one.
        window: HU that become 0 and 1 in CT.
        channel: which volume of 4-D files.
    """

    modality: str = "auto"
    slice_axis: int | None = None
    window: tuple[float, float] = (-175.0, 250.0)
    channel: int = 0

    def __post_init__(self) -> None:
        if self.modality not in ("auto", "ct", "mr"):
            raise UserError(f"--modality: expected auto, ct or mr, got {self.modality}")
        if self.slice_axis not in (None, 0, 1, 2):
            raise UserError(f"--slice-axis: expected 0, 1 or 2, got {self.slice_axis}")
        low, high = self.window
        if not low < high:
            raise UserError(f"window: expected two rising numbers of HU, got {low:g} to {high:g}")


class SliceCache:
    """An opened cache; `len` counts slices.

    What it holds in memory grows with the volumes, by some bytes each, and not with the slices.

    Attributes:
        directory: where it lies.
        settings: with the modality and axis that were chosen.
        volumes: one entry a volume, in the order of the sources.
        bad: files that were left out.
        classes, values: of the labels; empty without labels. Labels are stored as class indices.

    Raises:
        CacheDamage: it is not as it was published. Voxels are not compared: of the shards, only the
            lengths are.
        OSError: a file cannot be read.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        index, self.volumes = read_index(self.directory)
        settings = index["settings"] | {"window": tuple(index["settings"]["window"])}
        self.settings = CacheSettings(**settings)
        self.bad = tuple(BadFile(**entry) for entry in index["bad"])
        self.classes: tuple[str, ...] = tuple(index["classes"])
        self.values: tuple[int, ...] = tuple(index["values"])
        self._images = image_shards(self.directory, index["shards"])
        self._labels = label_shards(self.directory, index["shards"]) if self.classes else None
        for shards in filter(None, (self._images, self._labels)):
            shards.check()

    def __len__(self) -> int:
        return self.volumes.slices

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        """Workers open the files again rather than receive their content."""
        return SliceCache, (self.directory,)

    @property
    def modality(self) -> str:
        return self.settings.modality

    @property
    def axis(self) -> int:
        assert self.settings.slice_axis is not None  # the builder has chosen one
        return self.settings.slice_axis

    def locate(self, index: Any) -> tuple[Any, Any]:
        """Volume and position in its stack of a slice's number, or of an array of them."""
        return self.volumes.locate(index)

    def image(self, volume: int, position: int) -> np.ndarray:
        """(h, w) uint16, a copy of one slice: 0 to 65535 is the clipped window.

        Raises:
            UserError: the cache was damaged since it was opened.
        """
        return self._slice(self._images, volume, position)

    def label(self, volume: int, position: int) -> np.ndarray:
        """(h, w) uint8 class indices, a copy of one slice; raises as `image`."""
        return self._slice(self._labelled(), volume, position)

    def images(self, volume: int) -> np.ndarray:
        """(n, h, w) uint16, memory-mapped as long as the array lives."""
        return self._stack(self._images, volume)

    def labels(self, volume: int) -> np.ndarray:
        """(n, h, w) uint8 class indices, memory-mapped as long as the array lives."""
        return self._stack(self._labelled(), volume)

    def _labelled(self) -> Shards:
        if self._labels is None:
            raise ValueError(f"{self.directory} was built without labels")
        return self._labels

    def _slice(self, shards: Shards, volume: int, position: int) -> np.ndarray:
        n, h, w = self.volumes.shape[volume].tolist()
        if not 0 <= position < n:
            raise IndexError(f"expected a position below {n}, got {position}")
        start = int(self.volumes.start[volume]) + position * h * w
        return shards.read(int(self.volumes.shard[volume]), start, (h, w))

    def _stack(self, shards: Shards, volume: int) -> np.ndarray:
        shard, start = int(self.volumes.shard[volume]), int(self.volumes.start[volume])
        return shards.map(shard, start, tuple(self.volumes.shape[volume].tolist()))

    def indices_of(self, cases: Collection[str]) -> np.ndarray:
        """(slices,) int64: the slices of these cases in the cache's order."""
        wanted = set(cases)
        chosen = np.array([case in wanted for case in self.volumes.names("case")], bool)
        return self.volumes.slices_where(chosen)


def image_shards(folder: Path, sizes: Sequence[int]) -> Shards:
    """Those of a cache in this folder, with so many voxels each."""
    return Shards(folder, "images", np.uint16, sizes)


def label_shards(folder: Path, sizes: Sequence[int]) -> Shards:
    """As `image_shards`."""
    return Shards(folder, "labels", np.uint8, sizes)
