"""The main job on several processes for longer: as one process, as fast as may be, under kills.

Three parts on phantoms, each with its figures: one rank and RANKS ranks pretrain and fine-tune the
same epochs, and their losses are compared; steps a second of pretraining of both; a job under
torchrun whose ranks are killed at random KILLS times, and whose losses are compared with those of
the job that was left alone. Exits 1 where losses differ by more than TOLERANCE, or a job does not
come to its end.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from medmoco.data.phantom import generate_phantom

STAGES = ("pretrain", "finetune")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--finetune-epochs", type=int, default=10)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--tolerance", type=float, default=0.01, help="nats, over the first epoch")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    flags = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="medmoco-ranks-"))
    try:
        return run(flags, folder)
    finally:
        shutil.rmtree(folder)


def run(flags: argparse.Namespace, folder: Path) -> int:
    data = generate_phantom(folder / "phantom", patients=12, size=flags.image_size, slices=16)
    common = [
        *("--task", str(data), "--cache", str(folder / "cache"), "--device", "cpu"),
        *("--finetune-epochs", str(flags.finetune_epochs)),
        *("--width", "0.25", "--image-size", str(flags.image_size), "--output-stride", "8"),
        *("--batch-size", str(flags.batch_size), "--epochs", str(flags.epochs)),
        # Whitening multiplies rounding within a few steps; the tests compare it over four.
        *("--method", "mocov2"),
    ]
    found = 0
    for ranks, name in ((1, "one"), (flags.ranks, "several")):
        ended, _ = train([*common, "--output", str(folder / name)], ranks, 0, [])
        found += ended != 0
        rates = [r["images_per_second"] for r in records(folder / name, "pretrain")]
        speed = statistics.median(rates) / flags.batch_size
        print(f"{ranks} ranks: exit {ended}, {speed:.2f} steps/s, median of {len(rates)}")
    # Rounding grows as pretraining goes on, and fine-tuning begins with other encoders.
    found += compare(folder / "one", folder / "several", {"pretrain": flags.tolerance})
    chosen = random.Random(flags.seed)
    whole = sum(len(records(folder / "several", stage)) for stage in STAGES)
    due = sorted(chosen.randrange(1, whole) for _ in range(flags.kills))
    output = folder / "killed"
    ended, kills = train([*common, "--output", str(output)], flags.ranks, flags.kills, due, chosen)
    print(f"{flags.ranks} ranks, {kills} of {flags.kills} kills: exit {ended}")
    found += ended != 0 or kills != flags.kills
    found += compare(folder / "several", output, dict.fromkeys(STAGES, flags.tolerance))
    return 1 if found else 0


def train(
    flags: list[str], ranks: int, restarts: int, due: list[int], chosen: random.Random | None = None
) -> tuple[int, int]:
    """Trains under torchrun; kills a rank when metrics.jsonl has each number of lines in `due`.

    Returns:
        The exit status of torchrun, and how many ranks were killed.
    """
    call = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    call += ["--max-restarts", str(restarts), "-m", "medmoco.train", *flags]
    job = subprocess.Popen(
        [sys.executable, *call],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics, killed = Path(flags[-1]) / "metrics.jsonl", 0
    before: list[int] = []
    while job.poll() is None and killed < len(due):
        time.sleep(0.05)
        lines = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
        workers = children(job.pid)
        # All ranks of the next attempt, not those of the last one that are about to end.
        ready = len(workers) == ranks and not set(workers) & set(before)
        if lines > due[killed] and ready and chosen is not None:
            os.kill(chosen.choice(workers), signal.SIGKILL)
            killed, before = killed + 1, workers
    _, errors = job.communicate()
    if job.returncode:
        print(errors, file=sys.stderr)
    return job.returncode, killed


def children(process: int) -> list[int]:
    """Processes that a process has started, of its main thread."""
    listed = Path(f"/proc/{process}/task/{process}/children")
    return [int(number) for number in listed.read_text().split()] if listed.is_file() else []


def records(output: Path, stage: str) -> list[dict[str, Any]]:
    """Of the steps of pretraining, or of the epochs of fine-tuning."""
    lines = (output / "metrics.jsonl").read_text("utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["stage"] == stage]


def compare(one: Path, other: Path, tolerances: dict[str, float]) -> int:
    """Prints how far the losses are apart; the number of findings.

    Args:
        one: a run.
        other: a run of the same flags.
        tolerances: nats of the first epoch, of the stages that are to agree.
    """
    found = 0
    for stage in STAGES:
        ours, theirs = records(one, stage), records(other, stage)
        pairs = list(zip(ours, theirs, strict=False))
        apart = [abs(a["loss"] - b["loss"]) for a, b in pairs]
        first = max(far for far, (a, _) in zip(apart, pairs, strict=True) if a["epoch"] == 1)
        print(
            f"{one.name} and {other.name}, {stage}: {len(pairs)} losses, they differ by at most "
            f"{first:.1e} in the first epoch, {max(apart):.1e} over all"
        )
        found += len(ours) != len(theirs) or first > tolerances.get(stage, math.inf)
    return found


if __name__ == "__main__":
    sys.exit(main())
