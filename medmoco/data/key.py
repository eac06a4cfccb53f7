"""The name of a cache: a digest of what would change its content."""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from hashlib import blake2b
from pathlib import Path

from medmoco.data.nifti import ReadFault, read_error
from medmoco.data.sources import Source
from medmoco.data.store import CacheSettings
from medmoco.regular_file import open_regular

VERSION = 3  # of the cache's files and of the conversion
READERS = 16  # threads; they wait for the disk
BATCH = 16  # volumes that a thread takes at a time
EDGE_BYTES = 64 << 10  # of each end of a file; a .gz ends with CRC and length


def cache_key(
    sources: Sequence[Source],
    settings: CacheSettings,
    classes: Sequence[str] | None,
    values: Sequence[int] | None,
) -> str:
    """Changes with whatever would change the cache: settings, names, and the files' content.

    Raises:
        ReadFault: a file cannot be read now.
    """
    digest = blake2b(digest_size=10)
    described = [VERSION, astuple(settings), classes, values]
    digest.update(json.dumps(described).encode())
    for source in sources:
        digest.update(json.dumps([source.case, source.patient]).encode())
    batches = [sources[start : start + BATCH] for start in range(0, len(sources), BATCH)]
    with ThreadPoolExecutor(READERS) as pool:
        for fingerprints in pool.map(_fingerprints, batches):
            digest.update(fingerprints)
    return digest.hexdigest()


def _fingerprints(sources: Sequence[Source]) -> bytes:
    paths = [path for source in sources for path in (source.image, source.label)]
    return b"".join(_fingerprint(path) if path else b"no label" for path in paths)


def _fingerprint(path: Path) -> bytes:
    """Path, size, both ends; also the time of a file that is not compressed: it has no checksum."""
    name = os.fsencode(os.path.abspath(path))
    try:
        with open_regular(path) as file:
            state = os.fstat(file.fileno())
            head = file.read(EDGE_BYTES)
            file.seek(max(len(head), state.st_size - EDGE_BYTES))
            tail = file.read(EDGE_BYTES)
    except OSError as error:
        if isinstance(fault := read_error(path, error), ReadFault):
            raise fault from None  # another time the key would be another one
        return name + b" " + type(error).__name__.encode()
    changed = 0 if path.name.endswith(".gz") else state.st_mtime_ns
    return name + f" {state.st_size} {changed} ".encode() + blake2b(head + tail).digest()
