"""The files that hold the stacks of a slice cache: shards of some GiB, a volume whole in one.

Images lie in images-00000.u16, images-00001.u16, ..., label maps at the same voxels of
labels-00000.u8, ...: plain little-endian numbers.
"""

import os
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from pathlib import Path

import numpy as np

from medmoco.data.index import CacheDamage
from medmoco.errors import UserError

SHARD_VOXELS = 1 << 31  # 4 GiB of images: what file systems, copies and archives of all kinds take
OPEN_FILES = 64  # at a time and of a kind; a process may commonly open 1,024


def place(
    shapes: np.ndarray, limit: int = SHARD_VOXELS
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Where stacks go: one after another, in a new shard where one would pass the limit.

    Args:
        shapes: (volumes, 3) of the stacks.
        limit: voxels of a shard; a larger volume has a shard of its own.

    Returns:
        shard (volumes,) int32; voxels before each in its shard (volumes,) int64; voxels of each
        shard.
    """
    shard, start = np.zeros(len(shapes), np.int32), np.zeros(len(shapes), np.int64)
    sizes = [0]
    for number, shape in enumerate(shapes.tolist()):
        voxels = prod(shape)
        if sizes[-1] and sizes[-1] + voxels > limit:
            sizes.append(0)
        shard[number], start[number] = len(sizes) - 1, sizes[-1]
        sizes[-1] += voxels
    return shard, start, sizes


class Shards:
    """The files of one kind, images or labels, in a folder.

    Args:
        folder: of the cache.
        name: "images" or "labels".
        kind: of a voxel.
        sizes: voxels of each file.
    """

    def __init__(self, folder: Path, name: str, kind: type[np.generic], sizes: Sequence[int]):
        self._folder = folder
        self._name = name
        self.kind = np.dtype(kind).newbyteorder("<")
        self._sizes = sizes
        self._opened = lru_cache(OPEN_FILES)(_Descriptor)

    def path(self, shard: int) -> Path:
        return self._folder / f"{self._name}-{shard:05}.{self.kind.kind}{8 * self.kind.itemsize}"

    def create(self) -> None:
        """Makes the files in their full length, as holes to be filled; those that exist stay."""
        for shard, size in enumerate(self._sizes):
            with open(self.path(shard), "ab") as file:
                file.truncate(size * self.kind.itemsize)

    def check(self) -> None:
        """Raises CacheDamage unless all files are there in their length; OSError if it cannot."""
        for shard, size in enumerate(self._sizes):
            path, expected = self.path(shard), size * self.kind.itemsize
            got = path.stat().st_size if path.is_file() else 0
            if expected != got:
                raise CacheDamage(f"{path}: expected {expected:,} bytes, got {got:,}")

    def write(self, shard: int, start: int, stack: np.ndarray) -> None:
        """Puts a stack in its place; threads may do so at once in different places."""
        content = np.ascontiguousarray(stack, self.kind).data.cast("B")
        with open(self.path(shard), "r+b", buffering=0) as file:
            file.seek(start * self.kind.itemsize)
            while content:
                content = content[file.write(content) :]

    def sync(self) -> None:
        """Returns when all files are on the disk."""
        for shard in range(len(self._sizes)):
            with open(self.path(shard), "rb") as file:
                os.fsync(file.fileno())

    def read(self, shard: int, start: int, shape: tuple[int, ...]) -> np.ndarray:
        """A copy of a few slices.

        Read, not mapped: mapped pages would count as memory of every process that ever touched
        them, and an error of the disk would be a signal that ends the process, not an exception.

        Raises:
            UserError: the file is gone, was cut, or cannot be read.
        """
        voxels = np.empty(shape, self.kind)
        buffer, position = voxels.data.cast("B"), start * self.kind.itemsize
        try:
            file = self._opened(self.path(shard))
            while buffer:
                count = os.preadv(file.number, [buffer], position)
                if not count:
                    raise UserError(
                        f"{self.path(shard)}: the slice cache was cut while it was in use: "
                        f"expected {len(buffer):,} bytes more at {position:,}; start again, and it "
                        "is built anew"
                    )
                buffer, position = buffer[count:], position + count
        except OSError as error:
            raise UserError(
                f"{self.path(shard)}: the slice cache cannot be read: {error.strerror}"
            ) from error
        return voxels

    def map(self, shard: int, start: int, shape: tuple[int, ...]) -> np.memmap:
        """A stack, memory-mapped for reading as long as the array lives."""
        offset = start * self.kind.itemsize
        return np.memmap(self.path(shard), self.kind, "r", offset, shape)


class _Descriptor:
    """An open file that is closed with the last reference to it, so also while others read it."""

    def __init__(self, path: Path) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)
