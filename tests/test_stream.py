"""The order of slices, and who is held out."""

import multiprocessing
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medmoco.data.stream import EpochSampler, ResidentLoader, hold_out_patients, make_loader
from medmoco.data.table import VolumeEntry, VolumeTable


def cache_of(slices_per_volume: list[int], volumes_a_patient: int = 1) -> SimpleNamespace:
    entries = [
        VolumeEntry(str(i), f"patient{i // volumes_a_patient:03}", "", (n, 8, 8), (1.0, 1.0, 1.0))
        for i, n in enumerate(slices_per_volume)
    ]
    return SimpleNamespace(volumes=VolumeTable.of(entries, 0, 0))


def patients_of(cache: SimpleNamespace, slices: np.ndarray) -> set[str]:
    return {cache.volumes[v].patient for v in np.unique(cache.volumes.locate(slices)[0])}


def test_an_epoch_shows_every_slice_once_up_to_the_last_batch():
    sampler = EpochSampler(length=23, batch_size=5, seed=0)
    seen = [i for batch in sampler for i in batch]
    assert len(sampler) == 4 and len(seen) == len(set(seen)) == 20
    assert set(seen) < set(range(23))


def test_epochs_differ_and_repeat_by_seed():
    def epoch(seed, number):
        sampler = EpochSampler(100, 10, seed)
        sampler.start(number)
        return list(sampler)

    assert epoch(0, 1) == epoch(0, 1)
    assert epoch(0, 1) != epoch(0, 2)
    assert epoch(0, 1) != epoch(1, 1)


def test_starting_in_the_middle_gives_the_rest_of_the_epoch():
    sampler = EpochSampler(30, 5, seed=3)
    sampler.start(7)
    whole = list(sampler)
    sampler.start(7, first_batch=4)
    assert list(sampler) == whole[4:] and len(sampler) == 2


@pytest.mark.parametrize(
    ("volumes", "held_patients"),
    [
        ([30] * 200, 20),  # a tenth has more than 256 slices
        ([10] * 100, 25),  # 256 slices would need 26 patients: a quarter at most
        ([40] * 40, 7),  # 280 slices
        ([300] * 2, 1),
    ],
)
def test_a_tenth_or_256_slices_are_held_out(volumes, held_patients):
    cache = cache_of(volumes)
    learned, held = hold_out_patients(cache, seed=0)
    patients = patients_of(cache, held)
    assert len(patients) == held_patients
    assert not patients & patients_of(cache, learned)
    assert len(learned) + len(held) == sum(volumes)


def test_all_volumes_of_a_patient_stay_together():
    cache = cache_of([10] * 40, volumes_a_patient=4)
    learned, held = hold_out_patients(cache, seed=1)
    assert not patients_of(cache, learned) & patients_of(cache, held)


def test_many_held_out_slices_are_thinned_evenly():
    _, held = hold_out_patients(cache_of([1000] * 100), seed=0)
    assert 4096 / 2 < len(held) <= 4096


def test_a_single_patient_serves_both_ends():
    learned, held = hold_out_patients(cache_of([12]), seed=0)
    assert learned.tolist() == held.tolist() == list(range(12))


@pytest.mark.parametrize("name", ["TERM", "USR1"])
def test_loaders_go_on_when_the_scheduler_asks_every_process_to_stop(name):
    loader = make_loader(Numbers(), EpochSampler(40, 4, seed=0), 1, torch.device("cpu"))
    batches = iter(loader)
    seen = next(batches).tolist()
    for worker in multiprocessing.active_children():
        # From another process: PyTorch's own handler lets a parent end its workers.
        send = f"import os, signal; os.kill({worker.pid}, signal.SIG{name})"
        subprocess.run([sys.executable, "-c", send], check=True)
    for batch in batches:
        seen += batch.tolist()
    assert sorted(seen) == list(range(40))


@pytest.mark.parametrize("workers", [0, 2])
def test_slices_in_memory_come_in_the_same_batches(workers):
    sampler = EpochSampler(23, 4, seed=5)
    sampler.start(2, first_batch=1)
    cpu = torch.device("cpu")
    resident = list(ResidentLoader(Squares(), sampler, workers, cpu))
    read = list(make_loader(Squares(), sampler, 0, cpu))
    assert len(resident) == len(read) == 4
    for ours, theirs in zip(resident, read, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)


@pytest.mark.parametrize("free", [10**6, 10**2])
def test_a_gpu_keeps_the_slices_that_it_has_room_for(device, free, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**9))
    sampler = EpochSampler(23, 4, seed=5)
    loader = make_loader(Squares(), sampler, 0, torch.device(device))
    resident = device == "cuda" and free == 10**6
    assert isinstance(loader, ResidentLoader) == resident
    for batch, positions in zip(loader, sampler, strict=True):
        assert batch["image"].device.type == ("cuda" if resident else "cpu")
        assert batch["index"].tolist() == positions


class Squares(torch.utils.data.Dataset):
    def __len__(self):
        return 23

    def __getitem__(self, item):
        return {"image": torch.full((1, 2, 2), item**2), "index": torch.tensor(item)}


class Numbers(torch.utils.data.Dataset):
    def __getitem__(self, item):
        time.sleep(0.01)
        return item
