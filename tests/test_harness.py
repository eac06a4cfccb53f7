"""The benchmark's measuring: turns, memory, and the machine's own rates."""

import ctypes
import gc
from functools import partial

import pytest
import torch

import harness

CPU = torch.device("cpu")
MIB = 2**20


@pytest.fixture(autouse=True)
def garbage_is_collected():
    """What earlier tests left would else be freed while memory is measured."""
    gc.collect()


def test_yardsticks_rates_are_those_of_their_product_and_copy():
    yardsticks = harness.Yardsticks(torch.float32, CPU, quick=True)
    rates = yardsticks.rates({"large product": [0.1, 9, 0.1], "large copy": [0.5, 0.5, 9]})
    # How large a product is affordable, the machine's load decides.
    size = len(yardsticks.calls["large product"](0))
    assert rates.flop_per_s == pytest.approx(2 * size**3 / 0.1)
    assert rates.bytes_per_s == pytest.approx(2 * 8 * MIB / 0.5)  # read and written


@pytest.mark.parametrize("can_reset", [True, False])
@pytest.mark.parametrize("allocator", ["torch", "malloc"])
def test_memory_meter_finds_what_was_allocated(allocator, can_reset, tmp_path, monkeypatch):
    if not can_reset:
        monkeypatch.setattr(harness, "CLEAR_REFS", tmp_path / "no/such/file")
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p

    def call() -> list[torch.Tensor]:
        output = torch.ones(5 * MIB, dtype=torch.uint8)
        if allocator == "torch":
            torch.ones(20 * MIB, dtype=torch.uint8)
        else:
            block = ctypes.c_void_p(libc.malloc(20 * MIB))
            ctypes.memset(block, 1, 20 * MIB)
            libc.free(block)
        return [output]

    call()
    assert harness.extra_memory(call, CPU) == pytest.approx(20 * MIB, abs=MIB)


def test_memory_meter_does_not_count_what_was_freed_before():
    def call() -> list[torch.Tensor]:
        for size in (3, 5, 4, 7):
            torch.ones(size * MIB, dtype=torch.uint8)
        return []

    call()
    assert harness.extra_memory(call, CPU) == pytest.approx(7 * MIB, abs=MIB)


def test_memory_meter_leaves_out_what_is_returned():
    def call() -> list[torch.Tensor]:
        output = torch.ones(8 * MIB, dtype=torch.uint8)
        return [output, output.view(2, -1)]  # one storage

    call()
    assert harness.extra_memory(call, CPU) <= MIB


def test_floor_is_the_slower_of_arithmetic_and_memory():
    rates = harness.Rates(flop_per_s=2e9, bytes_per_s=1e9)
    assert rates.floors(harness.Work(flop=4e9, moved=1e9)).largest == 2.0
    assert rates.floors(harness.Work(flop=1e9, moved=3e9)).largest == 3.0


def test_floor_counts_exponentials_where_their_rate_is_known():
    work = harness.Work(flop=4e9, moved=1e9, exponentials=5e9)
    assert harness.Rates(2e9, 1e9).floors(work) == harness.Floors(2.0, 1.0, None)
    floors = harness.Rates(2e9, 1e9, exponentials_per_s=1e9).floors(work)
    assert floors.exponentials == floors.largest == 5.0


def test_contestants_take_turns_on_changing_inputs():
    calls = []
    functions = {name: partial(lambda name, i: calls.append((name, i)), name) for name in "abc"}
    times = harness.time_interleaved(functions, CPU, seconds=0)
    assert [name for name, _ in calls] == list("abcbcacab")
    assert [i for name, i in calls if name == "b"] == [1, 2, 3]
    assert {name: len(seconds) for name, seconds in times.items()} == dict.fromkeys("abc", 3)
