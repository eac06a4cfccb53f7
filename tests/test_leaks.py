"""Nothing grows with the steps: a short run of soak/leaks.py, and that it would find what does."""

import subprocess
import sys
from pathlib import Path

import pytest

import leaks
from leaks import Sample, growth


def test_memory_files_and_processes_stay_as_they_are():
    command = [sys.executable, leaks.__file__, "--steps", "96", "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing grew" in done.stdout


@pytest.mark.parametrize(
    ("name", "by"), [("memory", 0.1), ("files", 1), ("processes", 1)], ids=lambda value: str(value)
)
def test_what_grows_is_found(name, by):
    steady = {"memory": 500.0, "files": 30, "processes": 3}
    samples = [
        Sample(step=step, **steady | {name: steady[name] + by * step}) for step in range(1, 1001)
    ]
    (found,) = growth(samples, 1000)
    assert found.startswith(f"{name} grew")
    assert growth([Sample(step=step, **steady) for step in range(1, 1001)], 1000) == []


def test_what_ends_after_the_last_step_hides_no_growth():
    samples = [Sample(step, 500.0, step, 3) for step in range(1, 1001)]
    assert growth([*samples, Sample(1000, 400.0, 0, 1)], 1000)


def test_descendants_are_counted_with_their_files():
    command = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    parent = subprocess.Popen([sys.executable, "-c", command], stdin=subprocess.PIPE)
    with parent:
        while len(leaks.descendants(parent.pid)) < 2:
            assert parent.poll() is None
        assert all(Path(f"/proc/{pid}").exists() for pid in leaks.descendants(parent.pid))
        parent.stdin.close()
