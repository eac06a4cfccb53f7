"""Feeds damaged and malicious files to the readers: `python soak/fuzz.py --inputs 20000`.

An input is decided by --seed and its number; `--only NUMBER` runs one again, without the guard.
"""

import argparse
import os
import re
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads do not survive the fork of the workers
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import torch

from fuzz_runner import describe, run
from fuzz_targets import TARGETS
from medmoco.errors import UserError

DIGITS = re.compile(r"\d+|/tmp/\S+")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=5, help="that an input may take")
    parser.add_argument("--memory", type=float, default=1, help="GiB that an input may take")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="run this input alone")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.only is not None:
        return run_one(given.seed, given.only)
    started = time.perf_counter()
    outcome = run(
        TARGETS,
        UserError,
        inputs=given.inputs,
        seed=given.seed,
        workers=given.workers,
        seconds=given.seconds,
        memory=int(given.memory * 2**30),
    )
    seconds = time.perf_counter() - started
    for kind, numbers in grouped(outcome.findings).items():
        print(f"finding: {kind}, {len(numbers)} times: input {', '.join(numbers[:5])}")
    for name, count in sorted(outcome.inputs.items()):
        print(f"{name:16} {count:6}")
    print(
        f"{sum(outcome.inputs.values()):,} inputs, {len(outcome.findings)} findings, "
        f"{seconds:.0f} s by {given.workers} processes, {given.inputs / processor_seconds():.0f} "
        "for a second of a processor; "
        f"at most {outcome.slowest:.1f} s and {outcome.memory >> 20:,} MiB an input"
    )
    return 1 if outcome.findings else 0


def processor_seconds() -> float:
    """That the workers have computed for, whatever else the machine did."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def grouped(findings: Sequence[str]) -> dict[str, list[str]]:
    """Numbers of the inputs by what was found, whatever the figures in it."""
    kinds: dict[str, list[str]] = {}
    for finding in findings:
        number, _, words = finding.partition(" ")
        alike = [kind for kind in kinds if DIGITS.sub("", kind) == DIGITS.sub("", words)]
        kinds.setdefault(alike[0] if alike else words, []).append(number)
    return kinds


def run_one(seed: int, number: int) -> int:
    name, random = describe(TARGETS, seed, number)
    with tempfile.TemporaryDirectory() as scratch:
        folder, output = Path(scratch, "input"), Path(scratch, "output")
        folder.mkdir()
        output.mkdir()
        path = TARGETS[name].write(random, folder)
        print(f"{name}: {path.name}, {path.stat().st_size:,} bytes: {path.read_bytes()[:400]!r}")
        try:
            TARGETS[name].read(path, output)
            print("read without complaint")
        except UserError as error:
            print(f"refused: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
