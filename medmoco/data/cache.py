"""Opens the slice cache, or builds it first: volumes become 16-bit slices once.

A cache is a folder of index.json, volumes.npy (the table of the volumes) and shards: files of some
GiB that hold the volumes one after another as stacks (n, h, w), 16-bit images and, for labelled
sets, 8-bit labels. It is built in a hidden sibling and renamed when it is whole, under a lock that
the system releases if the process dies. A build that was killed goes on where it was.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from medmoco.data.build import bad_files, build
from medmoco.data.index import CacheDamage
from medmoco.data.key import cache_key
from medmoco.data.lock import locked
from medmoco.data.nifti import ReadFault
from medmoco.data.plan import make_plan
from medmoco.data.sources import Source, folder_sources, task_sources
from medmoco.data.store import CacheSettings, SliceCache
from medmoco.data.table import VolumeEntry
from medmoco.data.volumes import AXIS_NAMES
from medmoco.errors import Fault, UserError
from medmoco.printing import say

MAX_AT_ONCE = 8  # volumes that are converted, where nobody says how many

__all__ = [
    "CacheSettings",
    "SliceCache",
    "Source",
    "VolumeEntry",
    "build_cache",
    "folder_sources",
    "task_sources",
]


def build_cache(
    sources: Sequence[Source],
    settings: CacheSettings,
    root: Path,
    *,
    classes: Sequence[str] | None = None,
    values: Sequence[int] | None = None,
    skip_bad: bool = False,
    workers: int | None = None,
) -> SliceCache:
    """Opens the cache of these volumes and settings below `root`, after building it if need be.

    Every file is read to its end and checked before anything is published. Processes that start at
    once build once: the others wait and open.

    Args:
        classes: names of the label classes, for sources with labels.
        values: the value that stands for each class in the label files.
        skip_bad: leave bad volumes out (they are listed in `SliceCache.bad`) instead of stopping.
        workers: volumes that are converted at once, as far as the memory allows, at least one;
            default: cores, 8 at most.

    Raises:
        UserError: names all bad files together, each with its reason; CT and MR are mixed; or
            `root` cannot be made.
        Fault: the cache cannot be written, or a file cannot be read now, which says nothing of the
            file. It is not left out by `skip_bad` either: the cache would lack it for good.
    """
    if not sources:
        raise UserError("slice cache: expected at least one volume, got none")
    root = Path(root)
    key = cache_key(sources, settings, classes, values)
    directory = root / key
    found = _open(directory)  # published whole, so that no lock is needed to read it
    if found is None:
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{root}: the slice cache cannot be written: {error.strerror}"
            ) from error
        try:
            with locked(root / f".{key}.lock", "cache"):
                found = _open(directory)  # the process that was waited for may have built it
                if found is None:
                    if directory.exists():
                        say(f"cache: {directory} is damaged, it is built again")
                        shutil.rmtree(directory)
                    labelled = (tuple(classes), tuple(values)) if classes and values else ((), ())
                    plan = make_plan(sources, settings, *labelled)
                    partial = root / f".{key}.partial"
                    if workers is None:
                        workers = min(MAX_AT_ONCE, _cores())
                    build(plan, directory, partial, workers, skip_bad)
        except ReadFault as fault:
            raise Fault(
                f"{fault}; the same command goes on with the slice cache, --exclude leaves out "
                "the case of a file that never can be read"
            ) from fault
        except OSError as error:
            raise Fault(f"{root}: the slice cache cannot be written: {error}") from error
    cache = SliceCache(directory) if found is None else found
    if cache.bad and not skip_bad:
        raise bad_files(cache.bad, len(sources))
    say(f"cache: {directory} ({'built' if found is None else 'found'}), {_summary(cache)}")
    return cache


def _open(directory: Path) -> SliceCache | None:
    """None if there is no cache, or it was damaged since it was published.

    Raises:
        UserError: it cannot be read. That is no damage, and no reason to delete it.
    """
    try:
        return SliceCache(directory)
    except CacheDamage:
        return None
    except OSError as error:
        raise UserError(f"{directory}: the slice cache cannot be read: {error.strerror}") from error


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _summary(cache: SliceCache) -> str:
    scale = "MR percentiles"
    if cache.modality == "ct":
        low, high = cache.settings.window
        scale = f"CT window {low:g} to {high:g} HU"
    left_out = f", {len(cache.bad)} bad files left out" if cache.bad else ""
    return (
        f"{len(cache.volumes):,} volumes, {len(cache):,} {AXIS_NAMES[cache.axis]} slices, "
        f"{scale}{left_out}"
    )
