"""The volumes of a slice cache as columns, memory-mapped: nothing grows with the slices."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

NUMBERS = [
    ("shape", np.int64, 3),
    ("spacing", np.float64, 3),
    ("shard", np.int32),
    ("start", np.int64),
]
NAMES = ("case", "patient", "path")


@dataclass(frozen=True)
class VolumeEntry:
    """One cached volume: stack shape (n, h, w), spacing in mm (between slices, rows, columns)."""

    case: str
    patient: str
    path: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]


class VolumeTable(Sequence[VolumeEntry]):
    """Volumes in the order of their slices, which are numbered through.

    Attributes:
        shape: (volumes, 3) int64, of each stack (n, h, w).
        spacing: (volumes, 3) float64 in mm.
        shard, start: (volumes,), where each stack lies: the shard, and voxels in it before.
        ends: (volumes,) int64, the number of slices up to and with each volume.
    """

    def __init__(self, rows: np.ndarray) -> None:
        """Takes a structured array as `load` reads it."""
        self._rows = rows = np.asarray(rows)  # still mapped, but without memmap's slow indexing
        self.shape: np.ndarray = rows["shape"]
        self.spacing: np.ndarray = rows["spacing"]
        self.shard: np.ndarray = rows["shard"]
        self.start: np.ndarray = rows["start"]
        self.ends = np.cumsum(self.shape[:, 0])

    @classmethod
    def of(
        cls, entries: Sequence[VolumeEntry], shard: np.ndarray | int, start: np.ndarray | int
    ) -> "VolumeTable":
        """A table of entries whose stacks lie in these shards, after so many voxels each."""
        names = {name: [_encoded(getattr(e, name)) for e in entries] for name in NAMES}
        widths = {name: max(map(len, values), default=0) for name, values in names.items()}
        texts = [(name, f"S{max(widths[name], 1)}") for name in NAMES]
        rows = np.zeros(len(entries), [*NUMBERS, *texts])
        for name in NAMES:
            rows[name] = names[name]
        rows["shape"] = np.reshape([entry.shape for entry in entries], (-1, 3))
        rows["spacing"] = np.reshape([entry.spacing for entry in entries], (-1, 3))
        rows["shard"], rows["start"] = shard, start
        return cls(rows)

    @classmethod
    def load(cls, path: Path) -> "VolumeTable":
        """Maps the table of a file.

        Raises:
            OSError, ValueError: the file cannot be read, or is no such table.
        """
        rows = np.lib.format.open_memmap(path, mode="r")
        if rows.ndim != 1 or {name for name, *_ in NUMBERS} - set(rows.dtype.names or ()):
            raise ValueError(f"{path}: expected a table of volumes, got an array of {rows.dtype}")
        return cls(rows)

    @property
    def rows(self) -> np.ndarray:
        """The structured array, to be written with np.save."""
        return self._rows

    @property
    def slices(self) -> int:
        """Of all volumes."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def locate(self, index: Any) -> tuple[Any, Any]:
        """The volume of a slice, and the slice's place in its stack.

        Args:
            index: the slice's number, or an array of them; not negative.

        Returns:
            volume and position, int64, of the shape of `index`.

        Raises:
            IndexError: the cache has fewer slices.
        """
        volume = np.searchsorted(self.ends, index, side="right")
        if np.size(volume) and np.max(volume) == len(self.ends):
            raise IndexError(f"expected a slice below {self.slices}, got {np.max(index)}")
        return volume, index - (self.ends[volume] - self.shape[volume, 0])

    def slices_where(self, chosen: np.ndarray) -> np.ndarray:
        """(slices,) int64, rising: those of the volumes for which `chosen` (volumes,) is true."""
        return np.flatnonzero(np.repeat(chosen, self.shape[:, 0]))

    def names(self, column: str) -> list[str]:
        """One text a volume: "case", "patient" or "path"."""
        return [_decoded(name) for name in self._rows[column].tolist()]

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, number: int) -> VolumeEntry: ...
    @overload
    def __getitem__(self, number: slice) -> "VolumeTable": ...
    def __getitem__(self, number: int | slice) -> "VolumeEntry | VolumeTable":
        if isinstance(number, slice):
            return VolumeTable(self._rows[number])
        row = self._rows[number]
        case, patient, path = (_decoded(row[name].item()) for name in NAMES)
        (n, h, w), (between, rows, columns) = row["shape"].tolist(), row["spacing"].tolist()
        return VolumeEntry(case, patient, path, (n, h, w), (between, rows, columns))

    def __iter__(self) -> Iterator[VolumeEntry]:
        return (self[number] for number in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VolumeTable) and np.array_equal(self._rows, other._rows)

    __hash__ = None  # type: ignore[assignment]


def _encoded(name: str) -> bytes:
    """Names of files need not be valid UTF-8: Python stands surrogates for what is not."""
    return name.encode("utf-8", "surrogatepass")


def _decoded(name: bytes) -> str:
    return name.decode("utf-8", "surrogatepass")
