"""What says what is in a slice cache: index.json and the table of its volumes, with a checksum."""

import json
import os
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from medmoco.data.table import VolumeTable
from medmoco.output import write_json

INDEX_NAME, TABLE_NAME = "index.json", "volumes.npy"
CHUNK_BYTES = 1 << 20


class CacheDamage(Exception):
    """A slice cache that is not as it was published."""


def write_index(folder: Path, index: dict[str, Any], table: VolumeTable) -> None:
    """Writes both files; they are on the disk when it returns.

    Args:
        folder: of the cache.
        index: what JSON holds.
        table: of the volumes.
    """
    with open(folder / TABLE_NAME, "wb") as file:
        np.save(file, table.rows)
        file.flush()
        os.fsync(file.fileno())
    write_json(folder / INDEX_NAME, index | {"checksum": _checksum(folder, index)})


def read_index(folder: Path) -> tuple[dict[str, Any], VolumeTable]:
    """What `write_index` was given; the table is memory-mapped.

    Raises:
        CacheDamage: a file is gone, or one of the two was changed.
        OSError: a file cannot be read.
    """
    try:
        index = json.loads((folder / INDEX_NAME).read_bytes())
        checksum = index.pop("checksum")
        if checksum != _checksum(folder, index):
            raise CacheDamage(f"{folder}: {INDEX_NAME} and {TABLE_NAME} do not fit their checksum")
        return index, VolumeTable.load(folder / TABLE_NAME)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise CacheDamage(f"{error.filename}: {error.strerror}") from None
    # No JSON, nested too deep, or not such an object.
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError) as error:
        raise CacheDamage(f"{folder / INDEX_NAME}: {error}") from None


def _checksum(folder: Path, index: dict[str, Any]) -> str:
    """Of the table's file and of the index, however it is laid out."""
    digest = blake2b(json.dumps(index, sort_keys=True).encode(), digest_size=16)
    with open(folder / TABLE_NAME, "rb") as file:  # in parts: it may be large
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
