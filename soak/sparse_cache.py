"""Slice caches of any size on little disk: files of holes, which read as zeros."""

import os
from pathlib import Path

import numpy as np

from medmoco.data.cache import build_cache
from medmoco.data.index import write_index
from medmoco.data.key import cache_key
from medmoco.data.shards import place
from medmoco.data.sources import folder_sources
from medmoco.data.store import CacheSettings, SliceCache, image_shards
from medmoco.data.table import VolumeEntry, VolumeTable

SIDE = 512  # pixels of a slice
SLICES = 282  # of a volume: AbdomenCT-1K has 1,062 volumes of 300,000 slices together
SLICE_BYTES = 2 * SIDE * SIDE
SETTINGS = CacheSettings("ct", 2)
SOURCE_BYTES = 256 << 10  # more than what a cache's key reads of a file
LINKS = 10_000  # names of one file; file systems allow some ten thousands


def make_sparse_cache(folder: Path, slices: int) -> None:
    """Writes what a build would have left of so many slices of 512 x 512, and its sources.

    Args:
        folder: gets volumes/, whose files are names of a few, and cache/.
    """
    volumes = -(-slices // SLICES)
    _make_sources(folder / "volumes", volumes)
    sources = folder_sources(folder / "volumes")
    shape = (SLICES, SIDE, SIDE)
    entries = [
        VolumeEntry(s.case, s.patient, os.path.abspath(s.image), shape, (2.5, 0.8, 0.8))
        for s in sources
    ]
    shard, start, sizes = place(np.tile(shape, (volumes, 1)))
    cache = folder / "cache" / cache_key(sources, SETTINGS, None, None)
    cache.mkdir(parents=True)
    image_shards(cache, sizes).create()
    settings = {"modality": "ct", "slice_axis": 2, "window": SETTINGS.window, "channel": 0}
    index = {"settings": settings, "bad": [], "classes": [], "values": [], "shards": sizes}
    write_index(cache, index, VolumeTable.of(entries, shard, start))


def _make_sources(folder: Path, volumes: int) -> None:
    folder.mkdir(parents=True)
    content = np.random.default_rng(0).bytes(SOURCE_BYTES)
    for number in range(volumes):
        path = folder / f"case_{number:07}.nii.gz"
        if number % LINKS == 0:
            first = path
            path.write_bytes(content)
        else:
            path.hardlink_to(first)


def open_sparse_cache(folder: Path) -> SliceCache:
    """As a run opens it: the volumes are listed, their ends are read, the cache is found."""
    return build_cache(folder_sources(folder / "volumes"), SETTINGS, folder / "cache")
