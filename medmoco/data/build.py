"""Converts volumes into the shards of a cache, several at once, on from where it was killed.

Every volume has its place before the first is read, from the headers alone. So the result is the
same whatever the order, and a build that goes on writes only what is missing.
"""

import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from medmoco.data.convert import guess_modality, to_classes, to_pixels
from medmoco.data.index import INDEX_NAME, write_index
from medmoco.data.journal import Converted, Journal
from medmoco.data.memory import available_memory
from medmoco.data.nifti import ReadFault, VolumeError
from medmoco.data.plan import Plan
from medmoco.data.shards import Shards
from medmoco.data.sources import Source
from medmoco.data.store import CacheSettings
from medmoco.data.table import VolumeEntry, VolumeTable
from medmoco.data.volumes import BadFile, Grid, read_volume, stack_axes, to_stack
from medmoco.errors import UserError
from medmoco.output import remove_leftovers, sync_folder
from medmoco.printing import say

JOURNAL_NAME = "journal.jsonl"
MEMORY_SHARE = 0.5  # of what is free, for the volumes that are converted at once
BYTES_PER_VOXEL = 24  # of a volume that is converted: 6 without labels, more by type of labels

Item = TypeVar("Item")
Result = TypeVar("Result")


def build(plan: Plan, directory: Path, partial: Path, workers: int, skip_bad: bool) -> None:
    """Writes the cache to `partial`, which is renamed to `directory` when it is whole.

    A build that is killed, stopped, or fails for want of disk or memory leaves `partial`, where the
    next one goes on. So does one that ends with bad files, for a start with `skip_bad` if it has
    converted any; mended files have another key.

    Args:
        workers: volumes at once, at most; fewer where they would not fit the memory.

    Raises:
        UserError: bad files, all together; CT and MR are mixed; or there is too little disk.
        ReadFault: a file cannot be read now.
        OSError: a file cannot be written.
    """
    journal = Journal(partial / JOURNAL_NAME, plan.digest(), len(plan.sources))
    if not journal.found:
        shutil.rmtree(partial, ignore_errors=True)  # of another plan, or before its first volume
    _announce(plan, directory.parent, journal)
    partial.mkdir(exist_ok=True)
    for name in (JOURNAL_NAME, INDEX_NAME):
        remove_leftovers(partial / name)
    with journal:
        shards = plan.shards(partial)
        for kind in shards:
            kind.create()
        volumes, bad = _convert_all(plan, shards, journal, workers)
    if bad and not (skip_bad and volumes):
        if not volumes:
            shutil.rmtree(partial)
        raise bad_files(bad, len(plan.sources), skip_bad)
    try:
        settings = replace(plan.settings, modality=_agreed(plan, volumes))
    except UserError:
        shutil.rmtree(partial)  # another --modality has another key
        raise
    _write_index(plan, settings, [volume.number for volume in volumes], bad, partial)
    for kind in shards:
        kind.sync()  # the rename must not outlive the data
    sync_folder(partial)
    os.rename(partial, directory)
    (directory / JOURNAL_NAME).unlink()
    sync_folder(directory.parent)


def _announce(plan: Plan, root: Path, journal: Journal) -> None:
    """Says what is to come, and refuses what the disk cannot hold."""
    done = list(journal.found)
    if done:
        say(f"cache: goes on after {len(done):,} of {len(plan.sources):,} volumes")
    needed = plan.voxel_bytes * (sum(plan.sizes) - int(plan.shapes[done].prod(axis=1).sum()))
    free = shutil.disk_usage(root).free
    if needed > free:
        raise UserError(
            f"{root}: the slice cache needs {needed / 2**30:.1f} GiB of disk, "
            f"{free / 2**30:.1f} GiB are free"
        )
    say(
        f"cache: {len(plan.sources):,} volumes, {plan.shapes[:, 0].sum():,} slices, "
        f"{_size(needed)} to write below {root}, {_size(free)} free"
    )


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def _convert_all(
    plan: Plan, shards: Sequence[Shards], journal: Journal, workers: int
) -> tuple[list[Converted], list[BadFile]]:
    """Good volumes and bad files, in the order of the sources."""

    def convert(number: int) -> tuple[int, Converted | list[BadFile]]:
        before = journal.found.get(number)
        if before and _checksums(plan, shards, number) == before.checksums:
            return number, before
        return number, _convert(plan, shards, number)

    results = {}
    numbers = range(len(plan.sources))
    with tqdm(total=len(numbers), desc="cache", unit="volume", disable=None) as bar:
        converted = _in_threads(convert, numbers, _at_once(plan, workers))
        with closing(converted):
            for number, result in converted:
                if isinstance(result, Converted):
                    journal.add(result)
                results[number] = result
                bar.update()
    ordered = [results[number] for number in numbers]
    volumes = [result for result in ordered if isinstance(result, Converted)]
    return volumes, [file for result in ordered if isinstance(result, list) for file in result]


def _at_once(plan: Plan, workers: int) -> int:
    """Each thread holds one volume; together they must leave room for others."""
    largest = int(plan.shapes.prod(axis=1).max())
    fit = int(MEMORY_SHARE * available_memory()) // (BYTES_PER_VOXEL * max(largest, 1))
    return max(1, min(workers, fit, len(plan.sources)))


def _in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Generator[Result, None, None]:
    """Results as they come. Threads, for zlib and NumPy let go of the interpreter.

    An exception, also one of the caller, waits for the items that are under way and drops the rest.
    """
    pool = ThreadPoolExecutor(threads)
    try:
        pending: set[Future[Result]] = set()
        for item in items:
            pending.add(pool.submit(function, item))
            if len(pending) > threads:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        yield from (future.result() for future in wait(pending).done)
    finally:
        pool.shutdown(cancel_futures=True)


def _convert(plan: Plan, shards: Sequence[Shards], number: int) -> Converted | list[BadFile]:
    """Puts one volume in its place, or tells all that is wrong with its files."""
    source, bad = plan.sources[number], []
    image = label = grid = None
    modality = ""
    try:
        image, grid, modality = _convert_image(plan, number)
    except ReadFault:
        raise
    except VolumeError as error:
        bad.append(BadFile(error.path, error.reason))
    if plan.classes:
        try:
            label = _convert_label(plan, source, grid)
        except ReadFault:
            raise
        except VolumeError as error:
            bad.append(BadFile(error.path, error.reason))
    stacks = [stack for stack in (image, label) if stack is not None]
    if bad or len(stacks) < len(shards):
        return bad
    for kind, stack in zip(shards, stacks, strict=True):
        kind.write(int(plan.shard[number]), int(plan.start[number]), stack)
    return Converted(number, modality, tuple(zlib.crc32(stack.data) for stack in stacks))


def _convert_image(plan: Plan, number: int) -> tuple[np.ndarray, Grid, str]:
    """(n, h, w) uint16, its grid, its modality."""
    path, settings = plan.sources[number].image, plan.settings
    volume = read_volume(path, settings.channel)
    auto = settings.modality == "auto"
    modality = guess_modality(volume.voxels) if auto else settings.modality
    pixels = to_pixels(path, volume.voxels, modality, settings.window, plan.axis)
    if pixels.shape != tuple(plan.shapes[number]):
        raise VolumeError(path, "changed while the slice cache was built")
    return pixels, volume.grid, modality


def _convert_label(plan: Plan, source: Source, image: Grid | None) -> np.ndarray | None:
    """(n, h, w) uint8; None where there is no readable image to hold the label against."""
    if source.label is None or not source.label.is_file():
        raise VolumeError(source.image, f"expected its label at {source.label}, got no such file")
    label = read_volume(source.label, label=True)
    if image is None:
        return None
    classes = to_classes(source.label, label, image, plan.values)
    return np.ascontiguousarray(to_stack(classes, plan.axis))


def _checksums(plan: Plan, shards: Sequence[Shards], number: int) -> tuple[int, ...]:
    """Of what lies in the place of a volume."""
    shard, start = int(plan.shard[number]), int(plan.start[number])
    shape = tuple(plan.shapes[number].tolist())
    return tuple(zlib.crc32(kind.map(shard, start, shape).data) for kind in shards)


def _write_index(
    plan: Plan, settings: CacheSettings, good: list[int], bad: Sequence[BadFile], folder: Path
) -> None:
    entries = [_entry(plan, number) for number in good]
    table = VolumeTable.of(entries, plan.shard[good], plan.start[good])
    index = {
        "settings": asdict(settings),
        "bad": [asdict(file) for file in bad],
        "classes": plan.classes,
        "values": plan.values,
        "shards": plan.sizes,
    }
    write_index(folder, index, table)


def _entry(plan: Plan, number: int) -> VolumeEntry:
    source, grid = plan.sources[number], plan.grids[number]
    assert grid is not None  # it was converted
    between, row, column = grid.spacing[list(stack_axes(plan.axis))].tolist()
    n, h, w = plan.shapes[number].tolist()
    path = os.path.abspath(source.image)
    return VolumeEntry(source.case, source.patient, path, (n, h, w), (between, row, column))


def _agreed(plan: Plan, volumes: Sequence[Converted]) -> str:
    """One modality for the set: CT and MR scaled each in its way would not be one data set."""
    counts = Counter(volume.modality for volume in volumes).most_common()
    if len(counts) == 1:
        return counts[0][0]
    (major, many), (minor, few) = counts
    odd = [plan.sources[volume.number].case for volume in volumes if volume.modality == minor]
    raise UserError(
        f"--modality auto: expected one modality, got {many} volumes that look like "
        f"{major.upper()} and {few} like {minor.upper()} (CT has values below -200 HU): "
        f"{_some(odd)}; say --modality ct or mr, or leave some out with --exclude"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def bad_files(bad: Sequence[BadFile], volumes: int, skip_bad: bool = False) -> UserError:
    """One error that names them all, each with its reason."""
    lines = "".join(f"\n  {file.path}: {file.reason}" for file in bad)
    way_out = "none is left" if skip_bad else "mend them, or add --skip-bad to go on without them"
    files = "1 bad file" if len(bad) == 1 else f"{len(bad)} bad files"
    return UserError(f"{files} among {volumes} volumes ({way_out}):{lines}")
