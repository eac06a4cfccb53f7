"""A cache larger than what may be resident: the short form of soak/scale.py."""

import argparse

from scale import SLICE_BYTES, Measured, draw, measure_apart


def test_memory_does_not_grow_with_the_cache_or_with_what_was_read_of_it(tmp_path):
    touched = 400  # 200 MiB
    arguments = argparse.Namespace(folder=tmp_path, touched=touched, workers=[1])
    measured = measure_apart(20_000 * SLICE_BYTES / 2**30, arguments)
    assert measured.slices >= 20_000
    before, after = measured.resident_mib
    assert after - before < 0.3 * touched * SLICE_BYTES / 2**20
    assert max(after, measured.workers_mib[1]) < 1024


def test_findings_are_what_passes_the_limits(tmp_path):
    good = Measured(10, 1.0, 0.1, 5000.0, 900.0, (500.0, 510.0), {1: 300.0})
    assert list(good.findings()) == []
    bad = Measured(10, 2.0, 11.0, 1500.0, 900.0, (500.0, 510.0), {1: 1300.0})
    first, second, third = bad.findings()
    assert first.startswith("a process of 1300 MiB")
    assert second.startswith("1500 slices/s a core")
    assert third.startswith("a start of 11.0 s")
    draw([good, bad], tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
