"""Watches a pretraining with loader processes from outside: memory, open files and processes.

After a warm-up, the first quarter of the steps, nothing may grow: the second and the last quarter
are compared, medians of the memory and minima of the counts. Batches on their way hold a handle for
each of their tensors, so that a few samples may all have seen some. Memory is the anonymous part
(RssAnon) of the trainer and its workers, to which mapped files do not count.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from medmoco.data.phantom import generate_phantom

FLAGS = ["--width", "0.125", "--image-size", "32", "--output-stride", "8", "--batch-size", "8"]
FLAGS += ["--device", "cpu"]
STEPS_AN_EPOCH = 6  # of ten phantoms, of which two are held out
MEMORY_MAY_GROW = 24.0  # MiB, between the two quarters: less than 16 KiB a step of 1,500
FILES_MAY_GROW = 12  # two batches of a worker, three tensors each, at both ends
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Sample:
    """What a trainer and its workers hold at a step.

    Attributes:
        step: recorded last.
        memory: MiB, of all processes.
        files: open handles of all processes.
        processes: the trainer and its descendants.
    """

    step: int
    memory: float
    files: int
    processes: int


def watch(trainer: subprocess.Popen[str], metrics: Path) -> list[Sample]:
    """Samples until the trainer ends."""
    samples = []
    while trainer.poll() is None:
        time.sleep(POLL_SECONDS)
        step = last_step(metrics)
        try:
            family = descendants(trainer.pid)
            memory = sum(anonymous_memory(pid) for pid in family)
            files = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in family)
        except (FileNotFoundError, ProcessLookupError):
            continue  # one ended meanwhile
        if step:
            samples.append(Sample(step, memory, files, len(family)))
    return samples


def last_step(metrics: Path) -> int:
    """Of a step that metrics.jsonl tells of; 0 without one."""
    if not metrics.is_file():
        return 0
    with open(metrics, "rb") as file:
        file.seek(max(0, metrics.stat().st_size - 20_000))
        lines = file.read().splitlines()[1:-1]  # whole ones
    return max((json.loads(line)["step"] for line in lines), default=0)


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(found for child in children for found in descendants(int(child)))]


def anonymous_memory(pid: int) -> float:
    """MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(s.split()[1]) / 1024 for s in lines if s.startswith("RssAnon:")), 0.0)


def growth(samples: Sequence[Sample], steps: int) -> list[str]:
    """What grew from the second to the last quarter of the steps; empty if nothing did."""
    quarters = [
        # Without the last step, after which the workers end.
        [s for s in samples if first * steps < s.step < last * steps]
        for first, last in ((0.25, 0.5), (0.75, 1.0))
    ]
    if not all(quarters):
        return [f"expected samples of both quarters of {steps} steps, got {len(samples)} in all"]
    before, after = map(_summary, quarters)
    print(
        f"second quarter: {before.memory:.1f} MiB, {before.files} files, {before.processes} "
        f"processes; last quarter: {after.memory:.1f} MiB, {after.files} files, "
        f"{after.processes} processes; {len(samples)} samples of {steps} steps"
    )
    grown = []
    if after.memory - before.memory > MEMORY_MAY_GROW:
        grown.append(f"memory grew by {after.memory - before.memory:.1f} MiB")
    for name, allowed in (("files", FILES_MAY_GROW), ("processes", 0)):
        if getattr(after, name) > getattr(before, name) + allowed:
            grown.append(f"{name} grew from {getattr(before, name)} to {getattr(after, name)}")
    return grown


def _summary(samples: Sequence[Sample]) -> Sample:
    return Sample(
        step=samples[-1].step,
        memory=median(s.memory for s in samples),
        files=min(s.files for s in samples),
        processes=min(s.processes for s in samples),
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=2)
    flags = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        task = generate_phantom(root / "task", patients=10, size=48, slices=6, seed=0)
        epochs = max(1, flags.steps // STEPS_AN_EPOCH)
        command = [sys.executable, "-m", "medmoco.pretrain", *FLAGS]
        command += ["--data", str(task / "imagesTr"), "--output", str(root / "run")]
        command += ["--epochs", str(epochs), "--workers", str(flags.workers)]
        with open(root / "log.txt", "w+", encoding="utf-8") as log:
            trainer = subprocess.Popen(command, stdout=log, stderr=log, text=True)
            samples = watch(trainer, root / "run" / "metrics.jsonl")
            log.seek(0)
            printed = log.read()
    if trainer.returncode != 0:
        print(f"FOUND: exit status {trainer.returncode}\n{printed[-3000:]}")
        return 1
    grown = growth(samples, epochs * STEPS_AN_EPOCH)
    print("\n".join(f"FOUND: {text}" for text in grown) or "nothing grew")
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
