"""Damaged and malicious files: some hundreds of them, and that the fuzzer would notice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).resolve().parents[1] / "soak"
# Targets whose every third reader does what no reader should, run by the fuzzer itself.
PLANTED = """
import json, os, pickle, subprocess, sys, time
from fuzz_runner import Target, run

def write(random, folder):
    path = folder / "file.bin"
    path.write_bytes(random.randbytes(20))
    return path

def refuse(path):
    raise ValueError(f"{path}: refused")

def outside(path):
    (path.parents[1] / "elsewhere" / "file").write_text("x")

bugs = {
    "good": refuse,
    "raises": lambda path: 1 / 0,
    "nameless": lambda path: int("x"),
    "wordy": lambda path: refuse(f"{path}" * 1000),
    "crashes": lambda path: os.abort(),
    "hangs": lambda path: [0 for _ in iter(int, 1)],
    "sleeps": lambda path: time.sleep(1000),
    "large": lambda path: bytearray(b"x") * (200 << 20),
    "writes": outside,
    "deletes": lambda path: path.unlink(),
    "system": lambda path: os.system("true"),
    "program": lambda path: subprocess.run(["true"]),
    "pickle": lambda path: pickle.loads(pickle.dumps(ZeroDivisionError())),
}
targets = {
    name: Target(
        write, lambda path, output, bug=bug: bug(path), 1 if name in ("hangs", "sleeps") else 3
    )
    for name, bug in bugs.items()
}
found = run(targets, ValueError, inputs=60, seed=9, workers=2, seconds=1, memory=100 << 20)
kinds = {}
for finding in found.findings:
    number_and_reader, what = finding.split(": ", 1)
    kinds.setdefault(number_and_reader.split()[1], []).append(what)
print(json.dumps({"kinds": kinds, "inputs": dict(found.inputs)}))
"""


@pytest.fixture(scope="module")
def planted():
    done = subprocess.run(
        [sys.executable, "-c", PLANTED], capture_output=True, text=True, cwd=SOAK, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("reader", "finding"),
    [
        ("raises", "ZeroDivisionError: division by zero"),
        ("nameless", "message without file.bin"),
        ("wordy", "message of"),
        ("crashes", "ends the process, status -6"),
        ("hangs", "hangs, computes for more than 1 s"),
        ("sleeps", "hangs, computes for more than 1 s or sleeps"),
        ("large", "takes "),
        ("writes", "does what no reader should: open"),
        ("deletes", "does what no reader should: os.remove"),
        ("system", "does what no reader should: os.system"),
        ("program", "does what no reader should: "),
        ("pickle", "does what no reader should: pickle.find_class"),
    ],
)
def test_the_fuzzer_finds_a_planted_bug(planted, reader, finding):
    found = planted["kinds"][reader]
    assert found and all(what.startswith(finding) for what in found)


def test_the_fuzzer_goes_on_behind_a_finding_and_spares_a_good_reader(planted):
    assert "good" not in planted["kinds"] and planted["inputs"]["good"] > 1


def test_five_hundred_inputs_leave_nothing_to_find():
    command = [sys.executable, "fuzz.py", "--inputs", "500", "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=SOAK, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "500 inputs, 0 findings" in done.stdout
