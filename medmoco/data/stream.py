"""The order in which slices are seen: shuffled anew each epoch, resumable at any batch."""

import math
from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

from medmoco.data.delivery import delivered
from medmoco.data.slices import SliceDataset, number_type
from medmoco.data.store import SliceCache
from medmoco.distributed import own_part, rank
from medmoco.signals import leave_stopping_to_the_trainer

RESIDENT_SHARE = 0.25  # of the free memory of a GPU, which slices may fill before training
MIN_HELD_OUT_SLICES, MAX_HELD_OUT_SLICES = 256, 4096


class EpochSampler(Sampler[list[int]]):
    """Batches of positions; a function of seed, epoch and first batch alone.

    Nothing is remembered between epochs, so a resumed run sees what the unbroken one would have.
    The last, incomplete batch of an epoch is left out. `batch_size` is that of all ranks together,
    a multiple of their number; each is given its own part of every batch.
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
        numbers = np.arange(self.length, dtype=number_type(self.length))
        order = np.random.default_rng((self.seed, self.epoch)).permutation(numbers)
        for batch in range(self.first_batch, self.batches):
            rows = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield own_part(rows).tolist()

    def __len__(self) -> int:
        return self.batches - self.first_batch


class ResidentLoader:
    """The batches of a DataLoader, gathered from slices that are read once and stay on a device.

    Args:
        dataset: every item a dictionary of tensors.
        sampler: of the batches.
        workers: processes that read.
        device: where the slices stay.
    """

    def __init__(
        self, dataset: SliceDataset, sampler: EpochSampler, workers: int, device: torch.device
    ) -> None:
        self.sampler = sampler
        self.device = device
        batches = DataLoader(
            dataset,
            sampler.batch_size,
            num_workers=workers,
            worker_init_fn=leave_stopping_to_the_trainer,
            generator=torch.Generator().manual_seed(sampler.seed),
        )
        parts: dict[str, list[Tensor]] = {}
        bar = tqdm(
            total=len(batches), desc=f"slices to {device}", unit="batch", disable=rank() > 0 or None
        )
        for batch in delivered(batches):
            bar.update()
            for name, values in batch.items():
                parts.setdefault(name, []).append(values.to(device))
        bar.close()
        self.slices = {name: torch.cat(values) for name, values in parts.items()}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for positions in self.sampler:
            rows = torch.tensor(positions, device=self.device)
            yield {name: values[rows] for name, values in self.slices.items()}


def make_loader(
    dataset: SliceDataset, sampler: EpochSampler, workers: int, device: torch.device
) -> DataLoader | ResidentLoader:
    """Batches from the cache or, where a GPU has room for all slices, from its memory.

    Seeds of the workers come from a generator of the loader's own: that a resumed run makes its
    loader once more moves no random number of the training.
    """
    if device.type == "cuda":
        size = sum(values.nbytes for values in dataset[0].values()) * len(dataset)
        free, _ = torch.cuda.mem_get_info(device)
        if size <= RESIDENT_SHARE * free:
            return ResidentLoader(dataset, sampler, workers, device)
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_stopping_to_the_trainer,
        generator=torch.Generator().manual_seed(sampler.seed),
    )


def hold_out_patients(cache: SliceCache, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Slice numbers to learn from, and of patients kept for the diagnostics.

    A tenth of the patients is held out, or as many as give 256 slices, for an effective rank needs
    more samples than dimensions; but at least one and at most a quarter of them. Of their slices at
    most 4096 are used, evenly spaced. A single patient serves both ends.
    """
    patients = cache.volumes.names("patient")
    slices_of: Counter[str] = Counter()
    for patient, slices in zip(patients, cache.volumes.shape[:, 0].tolist(), strict=True):
        slices_of[patient] += slices
    shuffled = np.random.default_rng(seed).permutation(sorted(slices_of))
    reached = np.cumsum([slices_of[patient] for patient in shuffled])
    enough = int(np.searchsorted(reached, MIN_HELD_OUT_SLICES)) + 1
    count = max(math.ceil(0.1 * len(shuffled)), min(enough, len(shuffled) // 4))
    held = set(shuffled[:count])
    is_held = np.array([patient in held for patient in patients])
    learned, kept = (cache.volumes.slices_where(chosen) for chosen in (~is_held, is_held))
    if len(learned) == 0:
        learned = kept
    step = math.ceil(len(kept) / MAX_HELD_OUT_SLICES)
    return learned, kept[::step]
