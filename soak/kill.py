"""Kills runs with SIGKILL at random moments, starts them again, and compares what they end with.

A run of the main job on phantoms is killed again and again until it comes to its end, then the next
one begins. Moments are drawn over the length of the run, and aimed at: the first bytes of a
checkpoint, changes of the slice cache while it is built, a new line of the metrics. Whatever the
run ends with must be that of a run which nobody killed: weights, metrics and predictions bit for
bit, but for durations, and no temporary file may be left.
"""

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from medmoco import finetune, pretrain, pretraining, train
from medmoco.command import run_command
from medmoco.data.phantom import generate_phantom
from same_run import differences

FLAGS = ["--width", "0.125", "--image-size", "32", "--output-stride", "8", "--batch-size", "8"]
FLAGS += ["--epochs", "3", "--device", "cpu"]
POLL_SECONDS = 0.002
KINDS = ("moment", "checkpoint", "cache", "metrics")


@dataclass
class Job:
    """A run in a folder of its own, cache included.

    Attributes:
        task: the phantom.
        folder: holds run/, cache/ and log.txt.
        pretraining_only: leave out the segmentation that follows.
    """

    task: Path
    folder: Path
    pretraining_only: bool

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def start(self) -> multiprocessing.process.BaseProcess:
        """A new process group that starts the run, or goes on with it."""
        # Forked, so that kills fall upon the run and not upon the import of torch.
        process = multiprocessing.get_context("fork").Process(target=self._work)
        process.start()
        return process

    def _work(self) -> None:
        os.setsid()
        log = os.open(self.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        # After every step, so that kills meet it everywhere.
        pretraining.CHECKPOINT_SECONDS = finetune.CHECKPOINT_SECONDS = 0
        os._exit(run_command(pretrain.main if self.pretraining_only else train.main, self._flags()))

    def _flags(self) -> list[str]:
        folders = ["--output", str(self.run), "--cache", str(self.folder / "cache")]
        if (self.run / "config.json").exists():
            return [*folders, "--resume"]
        if self.pretraining_only:
            return [*FLAGS, *folders, "--data", str(self.task / "imagesTr")]
        return [*FLAGS, *folders, "--task", str(self.task), "--finetune-epochs", "2"]


@dataclass
class Watch:
    """Counts, from outside, what a run has written since the watch began."""

    job: Job
    counts: Counter[str] = field(default_factory=Counter)
    _seen: dict[str, object] = field(default_factory=dict)

    def look(self) -> None:
        states: dict[str, object] = {
            "checkpoint": sorted(self.job.run.glob("checkpoints/.*.pt.*")),
            "cache": _sizes(self.job.folder / "cache"),
            "metrics": _sizes(self.job.run / "metrics.jsonl"),
        }
        for kind, state in states.items():
            if self._seen.get(kind, state) != state and state:
                self.counts[kind] += 1
        self._seen = states


def _sizes(path: Path) -> list[tuple[str, int]]:
    found = []
    for file in (path, *path.rglob("*")):
        try:
            found.append((str(file), file.stat().st_size))
        except FileNotFoundError:
            continue  # renamed between the two calls
    return found


class KillRun:
    """The soak: `kill_until_finished` a run at a time until there were enough kills."""

    def __init__(self, task: Path, root: Path, seed: int, pretraining_only: bool) -> None:
        self.root = root
        self.task = task
        self.pretraining_only = pretraining_only
        self.random = random.Random(seed)
        self.kills: Counter[str] = Counter()
        self.runs = 0
        self.unbroken = self._job("unbroken")
        started = time.monotonic()
        watch = Watch(self.unbroken)
        process = self.unbroken.start()
        while process.is_alive():
            watch.look()
            time.sleep(POLL_SECONDS)
        if process.exitcode != 0:
            raise RuntimeError(f"the unbroken run failed:\n{_tail(self.unbroken)}")
        self.seconds, self.events = time.monotonic() - started, watch.counts
        print(f"unbroken: {self.seconds:.1f} s; seen from outside: {dict(self.events)}", flush=True)

    def _job(self, name: str) -> Job:
        folder = self.root / name
        folder.mkdir()
        return Job(self.task, folder, self.pretraining_only)

    def kill_until_finished(self, most: int) -> list[str]:
        """Kills one run up to `most` times, lets it finish, and says what is wrong with it."""
        self.runs += 1
        job = self._job(f"killed-{self.runs}")
        for _ in range(most):
            process = job.start()
            if not self._kill(job, process):
                break
        else:
            process = job.start()
            process.join()
        if process.exitcode != 0:
            return [f"{job.folder}: exit status {process.exitcode}\n{_tail(job)}"]
        return differences(self.unbroken.run, job.run)

    def _kill(self, job: Job, process: multiprocessing.process.BaseProcess) -> bool:
        """At a moment that is drawn here; False if the run was over before."""
        kind = self.random.choice([k for k in KINDS if k == "moment" or self.events[k]])
        after = self.random.uniform(0, self.seconds)
        count = self.random.randint(1, max(1, self.events[kind]))
        watch, started = Watch(job), time.monotonic()
        while process.is_alive():
            watch.look()
            if kind == "moment" and time.monotonic() - started > after:
                break
            if watch.counts[kind] >= count:
                break
            time.sleep(POLL_SECONDS)
        else:
            process.join()
            return False
        try:
            os.killpg(process.pid or 0, signal.SIGKILL)
        except ProcessLookupError:  # not yet a group of its own, or over by now
            process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            return False
        self.kills[kind] += 1
        return True


def _tail(job: Job) -> str:
    return (job.folder / "log.txt").read_text("utf-8")[-3000:]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--pretraining-only", action="store_true")
    parser.add_argument("--folder", type=Path, help="of the runs; default a temporary one")
    flags = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        root = Path(folder)
        task = generate_phantom(root / "task", patients=10, size=48, slices=6, seed=0)
        soak = KillRun(task, root, flags.seed, flags.pretraining_only)
        runs = 0
        while (done := sum(soak.kills.values())) < flags.kills:
            runs += 1
            wrong = soak.kill_until_finished(flags.kills - done)
            if wrong:
                print(f"FOUND after {sum(soak.kills.values())} kills ({dict(soak.kills)}):")
                print("\n".join(wrong))
                return 1
            print(
                f"run {runs}: {sum(soak.kills.values())} kills so far, all as unbroken", flush=True
            )
        kinds = ", ".join(f"{count} at a {kind}" for kind, count in sorted(soak.kills.items()))
    print(f"{done} of {flags.kills} kills survived in {runs} runs ({kinds})")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RuntimeError:
        traceback.print_exc()
        sys.exit(1)
