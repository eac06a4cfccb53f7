"""The opened slice cache: memory-mapped stacks and an index of volumes, patients and slices."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from medmoco.data.volumes import BadFile
from medmoco.errors import UserError

FULL_SCALE = 65535  # the pixel value that stands for 1
INDEX_NAME, IMAGES_NAME, LABELS_NAME = "index.json", "images.u16", "labels.u8"


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


@dataclass(frozen=True)
class VolumeEntry:
    """One cached volume: stack shape (n, h, w), spacing in mm (between slices, rows, columns)."""

    case: str
    patient: str
    path: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]


class SliceCache:
    """An opened cache; `len` counts slices.

    Attributes:
        directory: where it lies.
        settings: with the modality and axis that were chosen.
        volumes: one entry a volume, in the order of the sources.
        bad: files that were left out.
        classes, values: of the labels; empty without labels. Labels are stored as class indices.
        slice_volume: (slices,) int32, the volume of each slice.
        slice_position: (slices,) int32, its place in the volume's stack.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        index = json.loads((self.directory / INDEX_NAME).read_text(encoding="utf-8"))
        settings = index["settings"] | {"window": tuple(index["settings"]["window"])}
        self.settings = CacheSettings(**settings)
        self.volumes = tuple(
            VolumeEntry(
                **entry | {"shape": tuple(entry["shape"]), "spacing": tuple(entry["spacing"])}
            )
            for entry in index["volumes"]
        )
        self.bad = tuple(BadFile(**entry) for entry in index["bad"])
        self.classes: tuple[str, ...] = tuple(index["classes"])
        self.values: tuple[int, ...] = tuple(index["values"])
        counts = np.array([volume.shape[0] for volume in self.volumes])
        self.slice_volume = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        first = np.repeat(np.cumsum(counts) - counts, counts)
        self.slice_position = (np.arange(len(first)) - first).astype(np.int32)
        self._starts = np.cumsum([0, *(prod(volume.shape) for volume in self.volumes)])
        self._images = self._map(IMAGES_NAME, np.uint16)
        self._labels = self._map(LABELS_NAME, np.uint8) if self.classes else None

    def _map(self, name: str, kind: type) -> np.memmap:
        voxels = np.memmap(self.directory / name, kind, mode="r")
        if len(voxels) != self._starts[-1]:
            raise ValueError(f"{name} holds {len(voxels)} voxels, the index {self._starts[-1]}")
        return voxels

    def __len__(self) -> int:
        return len(self.slice_volume)

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        """Workers open the maps again rather than receive their content."""
        return SliceCache, (self.directory,)

    @property
    def modality(self) -> str:
        return self.settings.modality

    @property
    def axis(self) -> int:
        assert self.settings.slice_axis is not None  # the builder has chosen one
        return self.settings.slice_axis

    def images(self, volume: int) -> np.ndarray:
        """(n, h, w) uint16, memory-mapped: 0 to 65535 is the clipped window."""
        return self._stack(self._images, volume)

    def labels(self, volume: int) -> np.ndarray:
        """(n, h, w) uint8 class indices, memory-mapped."""
        if self._labels is None:
            raise ValueError(f"{self.directory} was built without labels")
        return self._stack(self._labels, volume)

    def _stack(self, voxels: np.memmap, volume: int) -> np.ndarray:
        part = voxels[self._starts[volume] : self._starts[volume + 1]]
        return part.reshape(self.volumes[volume].shape)

    def indices_of(self, cases: Sequence[str]) -> np.ndarray:
        """(slices,) int64: the slices of these cases in the cache's order."""
        wanted = set(cases)
        chosen = np.array([volume.case in wanted for volume in self.volumes])
        return np.flatnonzero(chosen[self.slice_volume])
