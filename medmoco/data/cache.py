"""Builds the slice cache: volumes become 16-bit memory-mapped slices once.

A cache is a folder of index.json, images.u16 and, for labelled sets, labels.u8, which hold the
volumes one after another as stacks (n, h, w). It is built in a temporary sibling and renamed when
it is whole, under a lock that the system releases if the process dies.
"""

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path

import numpy as np
from tqdm import tqdm

from medmoco.data.convert import coarsest_axis, guess_modality, to_classes, to_pixels
from medmoco.data.key import cache_key
from medmoco.data.lock import locked
from medmoco.data.nifti import VolumeError
from medmoco.data.sources import Source, folder_sources, task_sources
from medmoco.data.store import (
    IMAGES_NAME,
    INDEX_NAME,
    LABELS_NAME,
    CacheSettings,
    SliceCache,
    VolumeEntry,
)
from medmoco.data.volumes import (
    AXIS_NAMES,
    BadFile,
    Grid,
    read_grid,
    read_volume,
    stack_axes,
    to_stack,
)
from medmoco.errors import UserError
from medmoco.output import write_json

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
) -> SliceCache:
    """Opens the cache of these volumes and settings below `root`, after building it if need be.

    Every file is read to its end and checked before anything is published. Processes that start at
    once build once: the others wait and open.

    Args:
        classes: names of the label classes, for sources with labels.
        values: the value that stands for each class in the label files.
        skip_bad: leave bad volumes out (they are listed in `SliceCache.bad`) instead of stopping.

    Raises:
        UserError: names all bad files together, each with its reason; CT and MR are mixed; or the
            cache cannot be written.
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
            with locked(root / f".{key}.lock", "cache"):
                found = _open(directory)  # the process that was waited for may have built it
                if found is None:
                    labelled = (tuple(classes), tuple(values)) if classes and values else ((), ())
                    _build(sources, settings, directory, *labelled, skip_bad=skip_bad)
        except OSError as error:
            raise UserError(f"{root}: the slice cache cannot be written: {error}") from error
    cache = SliceCache(directory) if found is None else found
    if cache.bad and not skip_bad:
        raise _all_bad(cache.bad, len(sources))
    print(f"cache: {directory} ({'built' if found is None else 'found'}), {_summary(cache)}")
    return cache


def _open(directory: Path) -> SliceCache | None:
    """None if there is no cache, or it was damaged since it was published."""
    try:
        return SliceCache(directory)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _build(
    sources: Sequence[Source],
    settings: CacheSettings,
    directory: Path,
    classes: tuple[str, ...],
    values: tuple[int, ...],
    *,
    skip_bad: bool,
) -> None:
    for stale in directory.parent.glob(f".{directory.name}.*.partial"):
        shutil.rmtree(stale)  # of a build that was killed: the lock is ours
    if directory.exists():
        print(f"cache: {directory} is damaged, it is built again")
        shutil.rmtree(directory)
    grids = _readable_grids(sources)
    settings = _with_axis(settings, grids)
    _require_space(directory.parent, grids, bool(classes))
    partial = Path(tempfile.mkdtemp(".partial", f".{directory.name}.", directory.parent))
    try:
        done = _convert_all(sources, settings, partial, values)
        if done.bad and (not skip_bad or not done.volumes):
            raise _all_bad(done.bad, len(sources), skip_bad)
        index = {
            "settings": asdict(replace(settings, modality=_agreed(done))),
            "volumes": [asdict(volume) for volume in done.volumes],
            "bad": [asdict(file) for file in done.bad],
            "classes": classes,
            "values": values,
        }
        write_json(partial / INDEX_NAME, index)
        os.chmod(partial, 0o755)  # mkdtemp gives 0700, too narrow for shared folders
        os.rename(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _readable_grids(sources: Sequence[Source]) -> list[Grid]:
    """From the headers alone; files that cannot be read are reported by the conversion."""
    grids = []
    for source in sources:
        try:
            grids.append(read_grid(source.image))
        except VolumeError:
            continue
    return grids


def _with_axis(settings: CacheSettings, grids: Sequence[Grid]) -> CacheSettings:
    if settings.slice_axis is not None:
        return settings
    axis = coarsest_axis(grids) if grids else 2
    return replace(settings, slice_axis=axis)


def _require_space(root: Path, grids: Sequence[Grid], labelled: bool) -> None:
    needed = sum(prod(grid.shape) for grid in grids) * (3 if labelled else 2)
    free = shutil.disk_usage(root).free
    if needed > free:
        raise UserError(
            f"{root}: the slice cache needs {needed / 2**30:.1f} GiB of disk, "
            f"{free / 2**30:.1f} GiB are free"
        )


@dataclass(frozen=True)
class _Image:
    pixels: np.ndarray  # (n, h, w) uint16
    grid: Grid
    modality: str


@dataclass
class _Converted:
    """What came of the sources so far: good volumes, the modality of each, and bad files."""

    volumes: list[VolumeEntry] = field(default_factory=list)
    modalities: list[str] = field(default_factory=list)
    bad: list[BadFile] = field(default_factory=list)


def _convert_all(
    sources: Sequence[Source], settings: CacheSettings, partial: Path, values: tuple[int, ...]
) -> _Converted:
    """Writes the good volumes one after another."""
    done = _Converted()
    with ExitStack() as files:
        images = files.enter_context(open(partial / IMAGES_NAME, "wb"))
        labels = files.enter_context(open(partial / LABELS_NAME, "wb")) if values else None
        for source in tqdm(sources, desc="cache", unit="volume", disable=None):
            image = label = None
            with _collecting(done.bad):
                image = _convert_image(source, settings)
            if labels:
                grid = image.grid if image else None
                with _collecting(done.bad):
                    label = _convert_label(source, settings, grid, values)
            if image is None or (labels and label is None):
                continue
            images.write(image.pixels.data)
            if labels and label is not None:
                labels.write(label.data)
            done.volumes.append(_entry(source, image, settings))
            done.modalities.append(image.modality)
        for file in filter(None, (images, labels)):
            file.flush()
            os.fsync(file.fileno())  # the rename must not outlive the data
    return done


@contextmanager
def _collecting(bad: list[BadFile]) -> Iterator[None]:
    try:
        yield
    except VolumeError as error:
        bad.append(BadFile(error.path, error.reason))


def _convert_image(source: Source, settings: CacheSettings) -> _Image:
    volume = read_volume(source.image, settings.channel)
    auto = settings.modality == "auto"
    modality = guess_modality(volume.voxels) if auto else settings.modality
    assert settings.slice_axis is not None  # chosen before the conversion
    pixels = to_pixels(source.image, volume.voxels, modality, settings.window, settings.slice_axis)
    return _Image(pixels, volume.grid, modality)


def _convert_label(
    source: Source, settings: CacheSettings, image: Grid | None, values: Sequence[int]
) -> np.ndarray | None:
    """(n, h, w) uint8; None where there is no readable image to hold the label against."""
    if source.label is None or not source.label.is_file():
        raise VolumeError(source.image, f"expected its label at {source.label}, got no such file")
    label = read_volume(source.label, label=True)
    if image is None:
        return None
    assert settings.slice_axis is not None  # chosen before the conversion
    classes = to_classes(source.label, label, image, values)
    return np.ascontiguousarray(to_stack(classes, settings.slice_axis))


def _entry(source: Source, image: _Image, settings: CacheSettings) -> VolumeEntry:
    assert settings.slice_axis is not None
    between, row, column = image.grid.spacing[list(stack_axes(settings.slice_axis))].tolist()
    n, h, w = image.pixels.shape
    path = os.path.abspath(source.image)
    return VolumeEntry(source.case, source.patient, path, (n, h, w), (between, row, column))


def _agreed(done: _Converted) -> str:
    """One modality for the set: CT and MR scaled each in its way would not be one data set."""
    counts = Counter(done.modalities).most_common()
    if len(counts) == 1:
        return counts[0][0]
    (major, many), (minor, few) = counts
    pairs = zip(done.volumes, done.modalities, strict=True)
    odd = [volume.case for volume, modality in pairs if modality == minor]
    raise UserError(
        f"--modality auto: expected one modality, got {many} volumes that look like "
        f"{major.upper()} and {few} like {minor.upper()} (CT has values below -200 HU): "
        f"{_some(odd)}; say --modality ct or mr, or leave some out with --exclude"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _all_bad(bad: Sequence[BadFile], volumes: int, skip_bad: bool = False) -> UserError:
    lines = "".join(f"\n  {file.path}: {file.reason}" for file in bad)
    way_out = "none is left" if skip_bad else "mend them, or add --skip-bad to go on without them"
    files = "1 bad file" if len(bad) == 1 else f"{len(bad)} bad files"
    return UserError(f"{files} among {volumes} volumes ({way_out}):{lines}")


def _summary(cache: SliceCache) -> str:
    scale = "MR percentiles"
    if cache.modality == "ct":
        low, high = cache.settings.window
        scale = f"CT window {low:g} to {high:g} HU"
    left_out = f", {len(cache.bad)} bad files left out" if cache.bad else ""
    return (
        f"{len(cache.volumes)} volumes, {len(cache):,} {AXIS_NAMES[cache.axis]} slices, "
        f"{scale}{left_out}"
    )
