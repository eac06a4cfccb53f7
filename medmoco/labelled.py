"""From flags to labelled slices: the cases, their split, and the pixels of the images."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from medmoco.data.cache import build_cache
from medmoco.data.slices import PixelGrid, choose_grid, holding_all
from medmoco.data.sources import read_case_list, task_sources
from medmoco.data.splits import Split, split_task
from medmoco.data.store import CacheSettings, SliceCache
from medmoco.data.task import Task, read_task
from medmoco.errors import UserError

if TYPE_CHECKING:
    from medmoco.segment import SegmentConfig

WINDOW = (-175.0, 250.0)  # HU
MAX_CANVAS = 256  # pixels, where neither flags nor encoder decide the size of the images


def open_labelled(config: "SegmentConfig", metadata: dict[str, Any]) -> tuple[SliceCache, Split]:
    """Reads and checks every file of the task, and splits its cases by patient.

    Args:
        config: --cache is set.
        metadata: of the encoder's file; decides what the flags leave open.

    Raises:
        UserError: what is wrong with the folder, the split or any of the files.
    """
    task, split = read_split(config)
    cache = open_slices(config, task, metadata)
    return cache, without_bad(split, cache)


def open_slices(config: "SegmentConfig", task: Task, metadata: dict[str, Any]) -> SliceCache:
    """The slices of all cases of the task with their labels; arguments as `open_labelled`."""
    assert config.cache is not None
    return build_cache(
        task_sources(task),
        cache_settings(config, task, metadata),
        config.cache,
        classes=task.classes,
        values=task.values,
        skip_bad=config.skip_bad,
        workers=config.workers,
    )


def read_split(config: "SegmentConfig") -> tuple[Task, Split]:
    """The task without the cases of --exclude, and its split by patient; opens no volume.

    Raises:
        UserError: what is wrong with the folder or the split.
    """
    task = read_cases(config)
    split = split_task(task, config.split, config.label_fraction, config.seed, config.test_fraction)
    return task, split


def read_cases(config: "SegmentConfig") -> Task:
    """The task without the cases of --exclude; opens no volume.

    Raises:
        UserError: what is wrong with the folder.
    """
    if config.task is None:
        raise UserError("--task: expected the folder of a labelled data set, got none")
    task = read_task(config.task, config.patients)
    left_out = read_case_list(config.exclude) if config.exclude else frozenset()
    cases = tuple(case for case in task.cases if not {case.name, case.patient} & left_out)
    return dataclasses.replace(task, cases=cases)


def without_bad(split: Split, cache: SliceCache) -> Split:
    """The split without the cases that --skip-bad left out of the cache."""
    good = set(cache.volumes.names("case"))
    parts = {
        field.name: tuple(case for case in getattr(split, field.name) if case in good)
        for field in dataclasses.fields(split)
    }
    for name in ("train", "test"):
        if not parts[name]:
            count = len(getattr(split, name))
            raise UserError(
                f"--skip-bad: expected a readable case to {name} on, all {count} are bad"
            )
    return Split(**parts)


def pretraining_overlap(cache: SliceCache, split: Split, metadata: dict[str, Any]) -> list[str]:
    """A warning, as a list of one sentence or none, where the encoder has seen patients to test on.

    Args:
        metadata: of the encoder's file, whose "patients" are those that it was pretrained on.
    """
    tested = {volume.patient for volume in cache.volumes if volume.case in split.test}
    seen = sorted(tested.intersection(metadata.get("patients", ())))
    if not seen:
        return []
    return [
        f"{len(seen)} of the {len(tested)} test patients have the name of a patient that the "
        f"encoder was pretrained on, {seen[0]} for one: their Dice says little about new patients."
    ]


def cache_settings(config: "SegmentConfig", task: Task, metadata: dict[str, Any]) -> CacheSettings:
    """Flags win over the encoder's file, which wins over dataset.json."""
    modality = config.modality
    if modality == "auto":
        modality = metadata.get("modality") or task.modality or "auto"
    low, high = metadata.get("window", WINDOW)
    axis = metadata.get("slice_axis") if config.slice_axis is None else config.slice_axis
    return CacheSettings(
        modality=modality,
        slice_axis=axis,
        window=(
            low if config.window_low is None else config.window_low,
            high if config.window_high is None else config.window_high,
        ),
        channel=config.channel,
    )


def image_grid(cache: SliceCache, config: "SegmentConfig", metadata: dict[str, Any]) -> PixelGrid:
    """The pixels of the images: those that the encoder learned on, and enough for every slice."""
    if config.image_size is not None:
        spacing = config.spacing or _spacing_that_fits(cache, config.image_size, metadata)
        return choose_grid(cache, config.image_size, spacing)
    spacing = config.spacing or metadata.get("spacing")
    spacing = choose_grid(cache, MAX_CANVAS, spacing).spacing
    return PixelGrid(max(holding_all(cache, spacing), metadata.get("image_size", 0)), spacing)


def _spacing_that_fits(
    cache: SliceCache, image_size: int, metadata: dict[str, Any]
) -> float | None:
    """The encoder's spacing, unless slices would not fit the images with it."""
    fits = choose_grid(cache, image_size).spacing
    wanted = metadata.get("spacing")
    return None if wanted is None else max(wanted, fits)


def class_pixels(cache: SliceCache, indices: np.ndarray, grid: PixelGrid) -> Tensor:
    """(len(indices), classes) float64: how many pixels of its canvas each class covers in a slice.

    Counted on the slice's own pixels and scaled by their area; what is no part of the slice is
    background.
    """
    classes = len(cache.classes)
    pixels = np.zeros((len(indices), classes))
    volumes, positions = cache.locate(indices)
    for number in np.unique(volumes):
        rows = np.flatnonzero(volumes == number)
        labels = np.asarray(cache.labels(number))[positions[rows]]
        offset = classes * np.arange(len(rows))[:, None, None]
        counts = np.bincount((labels + offset).ravel(), minlength=classes * len(rows))
        area = math.prod(cache.volumes.spacing[number, 1:].tolist()) / grid.spacing**2
        pixels[rows] = area * counts.reshape(len(rows), classes)
    pixels[:, 0] = np.maximum(0, grid.size**2 - pixels[:, 1:].sum(axis=1))
    return torch.from_numpy(pixels)
