"""Slice caches that were damaged since they were published, and builds that were killed."""

import io
import shutil
from contextlib import redirect_stdout
from pathlib import Path
from random import Random

import numpy as np

from fuzz_files import put
from fuzz_values import damaged, json_bytes
from fuzz_volumes import valid_nifti
from medmoco.data import index
from medmoco.data.cache import CacheSettings, SliceCache, Source, build_cache
from medmoco.data.journal import Converted, Journal
from medmoco.data.plan import make_plan

SETTINGS = CacheSettings("mr", 2)
PIXELS = 3  # values of the first ones that are compared


def write_cache(random: Random, folder: Path) -> Path:
    """A cache below a folder, of which one file is not as it was; returns that file."""
    image = put(folder / "image.nii", valid_nifti())
    cache = _build(image, folder / "caches")
    name = random.choice(("index.json", "volumes.npy", "images-00000.u16", "journal.jsonl"))
    path = cache.directory / name
    if name == "journal.jsonl":  # of a build that was killed before it published
        plan = make_plan(_sources(image), SETTINGS, (), ())
        with Journal(path, plan.digest(), 1) as journal:
            journal.add(Converted(0, "mr", (0,)))
        (cache.directory / index.INDEX_NAME).unlink()
        cache.directory.rename(folder / "caches" / f".{cache.directory.name}.partial")
        path = folder / "caches" / f".{cache.directory.name}.partial" / name
    if name == "index.json" and random.random() < 0.5:
        put(path, json_bytes(random, index.read_index(cache.directory)[0]))
    elif name == "images-00000.u16":  # its length alone is checked at a start
        put(path, path.read_bytes()[: -random.randrange(1, 9)])
    else:
        put(path, damaged(random, path.read_bytes()))
    return path


def read_cache(path: Path, output: Path) -> None:
    """Whatever was damaged, the cache is there again and whole."""
    image = path.parents[2] / "image.nii"
    shutil.copytree(path.parents[1], output / "caches")
    cache = _build(image, output / "caches")
    whole = _build(image, output / "whole")
    if not np.array_equal(cache.images(0), whole.images(0)) or cache.volumes != whole.volumes:
        raise AssertionError("a damaged cache was opened")


def _sources(image: Path) -> list[Source]:
    return [Source("a", "a", image)]


def _build(image: Path, root: Path) -> SliceCache:
    with redirect_stdout(io.StringIO()):
        return build_cache(_sources(image), SETTINGS, root, workers=1)
