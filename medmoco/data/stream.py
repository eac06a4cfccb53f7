"""The order in which slices are seen: shuffled anew each epoch, resumable at any batch."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from medmoco.data.cache import SliceCache
from medmoco.data.slices import SliceDataset

MAX_HELD_OUT_SLICES = 4096


class EpochSampler(Sampler[list[int]]):
    """Batches of positions; a function of seed, epoch and first batch alone.

    Nothing is remembered between epochs, so a resumed run sees what the unbroken one would have.
    The last, incomplete batch of an epoch is left out.
    """

    def __init__(self, length: int, batch_size: int, seed: int) -> None:
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.first_batch = 0

    @property
    def batches(self) -> int:
        """Batches in a whole epoch."""
        return self.length // self.batch_size

    def start(self, epoch: int, first_batch: int = 0) -> None:
        self.epoch, self.first_batch = epoch, first_batch

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        for batch in range(self.first_batch, self.batches):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()

    def __len__(self) -> int:
        return self.batches - self.first_batch


def make_loader(
    dataset: SliceDataset, sampler: EpochSampler, workers: int, device: torch.device
) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )


def hold_out_patients(
    cache: SliceCache, seed: int, fraction: float = 0.1
) -> tuple[np.ndarray, np.ndarray]:
    """Slice numbers to learn from, and of patients kept for the diagnostics.

    A tenth of the patients, at least one, is held out; of their slices at most 4096, evenly spaced.
    With a single patient there is nobody to hold out, and the diagnostics see the training slices.
    """
    patients = sorted({volume.patient for volume in cache.volumes})
    shuffled = np.random.default_rng(seed).permutation(patients)
    held = set(shuffled[: max(1, round(fraction * len(patients)))])
    is_held = np.array([volume.patient in held for volume in cache.volumes])[cache.slice_volume]
    learned, kept = np.flatnonzero(~is_held), np.flatnonzero(is_held)
    if len(learned) == 0:
        learned = kept
    step = math.ceil(len(kept) / MAX_HELD_OUT_SLICES)
    return learned, kept[::step]
