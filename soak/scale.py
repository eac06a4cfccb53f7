"""How the slice cache behaves as it grows past the memory: start, random access, resident memory.

Caches of slices of 512 x 512 are made of holes, so that 145 GiB, the size of AbdomenCT-1K, need no
more disk than the pages that are looked at. Each is opened as a run opens it, in a process of its
own. A subset that fits the memory is drawn over the whole cache, read once, and then read at random
from the page cache. Exits with 1 where a process is larger than 1 GiB, a core reads less than 2,000
slices a second, or a start takes more than 10 s.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.utils.data import DataLoader

from medmoco.data.slices import SliceDataset, choose_grid
from medmoco.data.stream import EpochSampler, hold_out_patients, make_loader
from medmoco.output import atomic_file
from sparse_cache import SLICE_BYTES, make_sparse_cache, open_sparse_cache

MAX_RESIDENT_MIB = 1024
MIN_SLICES_PER_SECOND = 2000
MAX_START_SECONDS = 10
BATCH = 32
IMAGE_SIZE = 224


@dataclass(frozen=True)
class Measured:
    """One cache.

    Attributes:
        slices: of the cache.
        gib: of its images.
        start_seconds: until the first batch can be drawn, the imports left out.
        reads: slices from the cache per second of one core.
        items: the same, resampled to tensors of 224 x 224.
        resident_mib: of the process before the cache was opened, and at the end.
        workers_mib: of the largest loader process, by the number of them.
    """

    slices: int
    gib: float
    start_seconds: float
    reads: float
    items: float
    resident_mib: tuple[float, float]
    workers_mib: dict[int, float]

    def findings(self) -> Iterator[str]:
        largest = max(self.resident_mib[1], *self.workers_mib.values())
        if largest > MAX_RESIDENT_MIB:
            yield f"a process of {largest:.0f} MiB, expected at most {MAX_RESIDENT_MIB}"
        if self.reads < MIN_SLICES_PER_SECOND:
            yield f"{self.reads:.0f} slices/s a core, expected {MIN_SLICES_PER_SECOND}"
        if self.start_seconds > MAX_START_SECONDS:
            yield f"a start of {self.start_seconds:.1f} s, expected at most {MAX_START_SECONDS}"

    def __str__(self) -> str:
        workers = ", ".join(f"{mib:.0f} of {n}" for n, mib in self.workers_mib.items())
        return (
            f"{self.gib:10,.1f} GiB {self.slices:13,} slices: start {self.start_seconds:.2f} s, "
            f"{self.reads:,.0f} slices/s a core, {self.items:,.0f} resampled, resident "
            f"{self.resident_mib[0]:.0f} -> {self.resident_mib[1]:.0f} MiB, largest worker "
            f"{workers} (MiB)"
        )


def measure(folder: Path, touched: int, workers: Sequence[int]) -> Measured:
    """Looks at the cache of `make_sparse_cache` in a process that has done nothing else.

    Args:
        touched: slices that are read, at random over the cache.
        workers: numbers of loader processes to try.
    """
    torch.set_num_threads(1)
    # More loaders than cores are slow, but no larger.
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
    before = resident_mib(os.getpid())
    begin = time.perf_counter()
    cache = open_sparse_cache(folder)
    learned, _ = hold_out_patients(cache, seed=0)
    sampler = EpochSampler(len(learned), BATCH, seed=0)
    next(iter(sampler))
    start_seconds = time.perf_counter() - begin

    chosen = np.random.default_rng(1).choice(learned, min(touched, len(learned)), replace=False)
    dataset = SliceDataset(cache, chosen, choose_grid(cache, IMAGE_SIZE))

    def read(item: int) -> None:
        volume, position = cache.locate(int(chosen[item]))
        cache.image(int(volume), int(position))

    per_second(read, len(chosen))  # into the page cache
    reads = per_second(read, len(chosen))
    items = per_second(dataset.__getitem__, min(len(chosen), 500))
    workers_mib = {n: largest_worker(dataset, n) for n in workers}
    resident = (before, resident_mib(os.getpid()))
    gib = len(cache) * SLICE_BYTES / 2**30
    return Measured(len(cache), gib, start_seconds, reads, items, resident, workers_mib)


def per_second(function: Callable[[int], object], count: int) -> float:
    """Calls in random order per second of processor time: others on the machine do not count."""
    order = np.random.default_rng(2).permutation(count).tolist()
    begin = time.process_time()
    for item in order:
        function(item)
    return count / (time.process_time() - begin)


def largest_worker(dataset: SliceDataset, workers: int) -> float:
    """MiB of the largest loader process at the end of an epoch over `dataset`."""
    sampler = EpochSampler(len(dataset), min(BATCH, len(dataset)), seed=0)
    loader = make_loader(dataset, sampler, workers, torch.device("cpu"))
    assert isinstance(loader, DataLoader)
    largest = 0.0
    for _ in loader:
        largest = max(largest, *map(resident_mib, children(os.getpid())))
    return largest


def children(process: int) -> list[int]:
    listed = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="ascii")
    return [int(child) for child in listed.split()]


def resident_mib(process: int) -> float:
    """Everything that a process has in memory, what it shares with others included."""
    pages = int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure_apart(gib: float, arguments: argparse.Namespace) -> Measured:
    """Makes a cache, and measures it in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="medmoco-scale-", dir=arguments.folder) as folder:
        make_sparse_cache(Path(folder), math.ceil(gib * 2**30 / SLICE_BYTES))
        command = [sys.executable, __file__, "--measure", folder]
        command += ["--touched", str(arguments.touched)]
        command += ["--workers", *map(str, arguments.workers)]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    values = json.loads(printed.splitlines()[-1])
    workers_mib = {int(number): mib for number, mib in values.pop("workers_mib").items()}
    return Measured(**values | {"workers_mib": workers_mib})


def draw(results: Sequence[Measured], path: Path) -> None:
    """Resident memory and slices per second against the size of the cache."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    memory, speed = figure.subplots(1, 2)
    sizes = [result.gib for result in results]
    memory.plot(sizes, [r.resident_mib[1] for r in results], "o-", label="trainer")
    for number in results[0].workers_mib:
        values = [r.workers_mib[number] for r in results]
        memory.plot(sizes, values, ".--", label=f"largest of {number} loaders")
    memory.axhline(MAX_RESIDENT_MIB, color="grey", linewidth=1)
    memory.set_ylabel("resident MiB")
    speed.plot(sizes, [r.reads for r in results], "o-", label="read")
    speed.plot(sizes, [r.items for r in results], "o-", label="read and resampled")
    speed.axhline(MIN_SLICES_PER_SECOND, color="grey", linewidth=1)
    speed.set_ylabel("slices per second of a core")
    for axes in (memory, speed):
        axes.set(xscale="log", xlabel="GiB of images in the cache", ylim=(0, None))
        axes.legend()
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, nargs="+", default=[1, 10, 145, 1450])
    parser.add_argument("--touched", type=int, default=2000, help="slices read, 0.5 MiB each")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--folder", type=Path, help="for the caches; default that of the system")
    parser.add_argument("--plot", type=Path, help="a PNG of the figures")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # one cache, in a process
    arguments = parser.parse_args(argv)
    if arguments.measure:
        measured = measure(arguments.measure, arguments.touched, arguments.workers)
        print(json.dumps(asdict(measured)))
        return 0
    results = []
    for gib in arguments.gib:
        results.append(measure_apart(gib, arguments))
        print(results[-1], flush=True)
    if arguments.plot:
        draw(results, arguments.plot)
    findings = [f"{r.gib:.0f} GiB: {finding}" for r in results for finding in r.findings()]
    for finding in findings:
        print(f"finding: {finding}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
