"""Measuring: time in interleaved rounds, peak memory, and the machine's own rates."""

import ctypes
import itertools
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu import exponentials_per_s

LEAST_REPEATS, MOST_REPEATS = 3, 100
CLEAR_REFS = Path("/proc/self/clear_refs")
BALLAST_BYTES = 2**18
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGE_BLOCK = 2**16
LONGEST_PRODUCT = 1.0  # seconds


def time_interleaved(
    calls: Mapping[str, Callable[[int], object]], device: torch.device, seconds: float
) -> dict[str, list[float]]:
    """Times calls in rounds, so that whatever slows the machine down slows all of them.

    In each round the calls take turns, another one first each time. A slow call sits out some
    rounds, evenly spread, so that it takes about its share of the time.

    Args:
        calls: by name; each is given a running number, to choose among several sets of inputs.
        device: what the calls compute on.
        seconds: of measuring altogether, within 3 to 100 repeats of each call.

    Returns:
        Seconds of each call's repeats, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}

    def one_round(number: int, names: Sequence[str]) -> None:
        first = number % len(names)
        turn = [*names[first:], *names[:first]]
        places = list(calls)
        queue = [partial(calls[name], number + places.index(name)) for name in turn]
        for name, elapsed in zip(turn, _time_each(queue, device), strict=True):
            times[name].append(elapsed)

    one_round(0, list(calls))
    repeats = {}  # besides the first
    for name in calls:
        share = int(seconds / len(calls) / max(times[name][0], 1e-9))
        repeats[name] = min(MOST_REPEATS, max(LEAST_REPEATS, share)) - 1
    rounds = max(repeats.values())
    for number in range(rounds):
        names = [n for n, r in repeats.items() if (number + 1) * r // rounds > number * r // rounds]
        one_round(number + 1, names)
    return times


def _time_each(calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Seconds of each call. On CUDA all are queued before any is waited for, so that launching
    one overlaps with running the one before."""
    if device.type != "cuda":
        clock = [time.perf_counter()]
        for call in calls:
            call()
            clock.append(time.perf_counter())
        return [end - start for start, end in itertools.pairwise(clock)]
    with torch.cuda.device(device):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * len(calls))]
        for call, start, end in zip(calls, events[::2], events[1::2], strict=True):
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [s.elapsed_time(e) / 1e3 for s, e in zip(events[::2], events[1::2], strict=True)]


def quantiles(times: Sequence[float]) -> tuple[float, float, float]:
    """The times that 20, 50 and 80 % of all do not exceed."""
    probabilities = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    low, median, high = torch.tensor(times, dtype=torch.float64).quantile(probabilities).tolist()
    return low, median, high


def extra_memory(call: Callable[[], Iterable[Tensor]], device: torch.device) -> int | None:
    """Bytes that a call holds at most, beyond what was there before and what it returns.

    On CUDA by the allocator's count. On the CPU by the resident pages of the process, so that
    nothing escapes, whoever allocates it; large blocks are mapped on their own meanwhile, else what
    is freed would often stay. Call it once before: what a library sets up for good at first use is
    not part of it. Collect garbage before, lest it be freed meanwhile.

    Returns:
        Bytes; None where the system does not tell.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        returned = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with _blocks_mapped_apart():
            ballast = _lower_high_water()
            before = _high_water()
            returned = call()
            peak = _high_water() - before
            del ballast
        if not before:
            return None
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in returned}
    return max(0, peak - sum(storage.nbytes() for storage in storages.values()))


@contextmanager
def _blocks_mapped_apart() -> Iterator[None]:
    """Makes glibc map every large block on its own, and unmap it as soon as it is freed.

    Else blocks up to 32 MiB come from a heap with holes, whose size counts more than theirs.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield
        return
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    libc.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
    libc.malloc_trim(ctypes.c_size_t(0))
    plugs, end = [], libc.sbrk(0)
    while libc.sbrk(0) == end:  # what fits into no hole makes the heap grow
        plugs.append(libc.malloc(ctypes.c_size_t(LARGE_BLOCK - 64)))
    try:
        yield
    finally:
        for plug in plugs:
            libc.free(plug)
        # Where glibc's own adjustment of the thresholds ends once large blocks were freed.
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(M_TRIM_THRESHOLD, 2**26)


def _lower_high_water() -> list[bytes]:
    """Makes the most memory that this process ever had resident equal to what it has now.

    Linux resets the mark on request. Elsewhere memory is filled up to it; what is returned has to
    be kept while measuring.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))  # what was freed and kept would serve the call unseen
    try:
        CLEAR_REFS.write_text("5")
        return []
    except OSError:
        ballast: list[bytes] = []
        mark = _high_water()
        while mark and _high_water() == mark:
            ballast.append(b"\1" * BALLAST_BYTES)
        return ballast


def _high_water() -> int:
    """Bytes that this process had resident at most; 0 if unknown."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(frozen=True)
class Work:
    """The least that has to be done, whoever does it."""

    flop: float  # of matrix products
    moved: float  # bytes read and written
    exponentials: float = 0


@dataclass(frozen=True)
class Floors:
    """Seconds below which each part of the work cannot be done."""

    product: float
    copy: float
    exponentials: float | None

    @property
    def largest(self) -> float:
        """The floor of all: at best the parts overlap."""
        return max(self.product, self.copy, self.exponentials or 0)


@dataclass(frozen=True)
class Rates:
    """What the machine does at best, measured beside the contestants."""

    flop_per_s: float  # of a large matrix product
    bytes_per_s: float  # read and written by a large copy
    exponentials_per_s: float | None = None  # by the clock; None where they are no bound

    def floors(self, work: Work) -> Floors:
        rate = self.exponentials_per_s
        return Floors(
            product=work.flop / self.flop_per_s,
            copy=work.moved / self.bytes_per_s,
            exponentials=None if rate is None else work.exponentials / rate,
        )


class Yardsticks:
    """A large matrix product and a large copy, to be timed in the contestants' rounds."""

    def __init__(self, dtype: torch.dtype, device: torch.device, *, quick: bool) -> None:
        cuda = device.type == "cuda"
        largest = 256 if quick else 8192 if cuda else 2048
        size, seconds = 64, 0.0
        generator = torch.Generator(device).manual_seed(0)
        # Some products have no fast path (float16 on most CPUs): those are measured on small ones.
        while size < largest and 8 * seconds < LONGEST_PRODUCT:
            size *= 2
            # Random: GPUs multiply constant matrices faster, as they draw less power.
            matrix = torch.randn(size, size, generator=generator, device=device)
            self._matrix = matrix.to(dtype)
            seconds = min(_time_each([partial(self._product, 0)] * 3, device))
        megabytes = 8 if quick else 1024 if cuda else 128
        self._exponentials_per_s = exponentials_per_s(device)
        self._source = torch.ones(megabytes * 2**20, dtype=torch.uint8, device=device)
        self._target = torch.empty_like(self._source)
        self.calls: dict[str, Callable[[int], object]] = {
            "large product": self._product,
            "large copy": self._copy,
        }

    def rates(self, times: Mapping[str, list[float]]) -> Rates:
        product, copy = (statistics.median(times[name]) for name in self.calls)
        return Rates(
            flop_per_s=2 * len(self._matrix) ** 3 / product,
            bytes_per_s=2 * self._source.nbytes / copy,
            exponentials_per_s=self._exponentials_per_s,
        )

    def _product(self, _: int) -> Any:
        return self._matrix @ self._matrix

    def _copy(self, _: int) -> Any:
        return self._target.copy_(self._source)
