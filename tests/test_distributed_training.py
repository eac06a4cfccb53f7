"""Pretraining on two processes gives what one gives, and survives the end of either."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rank_processes import run_on_two_ranks

from medmoco import pretrain
from medmoco.command import run_command
from medmoco.pretraining import Pretraining

PROGRAM = Path(__file__).with_name("ranks_program.py")
# 48 slices: the last 8 of an epoch fill no batch.
TINY = [*("--width", "0.125", "--image-size", "32", "--output-stride", "8", "--batch-size", "10")]
# Of how ranks may differ most: each with its own statistics, which the key branch then averages.
OWN = ["--method", "mocov2", "--statistics", "rank", "--key-norm", "ema"]


@pytest.fixture(scope="module", autouse=True)
def without_plots():
    """They are slow, and no matter of ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "write_plots", lambda folder: None)
        patch.setattr(pretrain, "write_report", lambda folders, path: path)
        yield


@pytest.fixture(scope="module")
def flags(tiny_task, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    data = ["--data", str(tiny_task / "imagesTr"), "--cache", str(cache), "--device", "cpu"]
    return [*data, *TINY, "--epochs", "1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def one_rank(flags, runs) -> Path:
    """An epoch and two by this process, and one run that was stopped after its second step."""
    folder = runs / "one"
    take_step = Pretraining._train_step

    def stop_at_third(self, batch):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(self, batch)

    pretrain.main([*flags, "--output", str(folder / "whole")])
    pretrain.main([*flags, "--epochs", "2", "--output", str(folder / "longer")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pretraining, "_train_step", stop_at_third)
        assert run_command(pretrain.main, [*flags, "--output", str(runs / "moved")]) == 0
    assert records(runs / "moved")[-1]["step"] == 3
    return folder


@pytest.fixture(scope="module")
def two_ranks(flags, one_rank, runs) -> Path:
    """The same by two processes; the run that was stopped goes on, and another one is stopped."""
    folder = runs / "two"
    calls = [
        {"argv": [*flags, "--output", str(folder / "whole")]},
        {"argv": ["--output", str(runs / "moved"), "--resume"]},
        {"argv": [*flags, "--output", str(folder / "stopped")], "stopped_rank": 1},
        {"argv": [*flags, "--batch-size", "11", "--output", str(folder / "odd")]},
    ]
    calls += [
        {"argv": [*flags, *OWN, "--output", str(folder / "own statistics")]},
        {"argv": [*flags, "--output", str(folder / "spoiled")], "spoiled": True},
    ]
    (runs / "calls.json").write_text(json.dumps(calls))
    written = run_on_two_ranks(PROGRAM, "runs", str(runs / "calls.json"))
    for _, errors in written:
        assert "--batch-size 11: expected a multiple of the 2 ranks" in errors
    told = [re.search("the loss is nan at step 2, .*", errors).group() for _, errors in written]
    assert told[0] == told[1]  # and it names the whole batch
    assert sum(len(s.split(",")) for s in re.findall(r"slices? ([\d, ]+)", told[0])) == 10
    statuses = [json.loads(output.splitlines()[-1]) for output, _ in written]
    assert statuses == [[0, 0, 0, 2, 0, 2]] * 2
    assert len(written[1][0].splitlines()) == 1, "the second rank speaks"
    return folder


def records(output: Path, stage: str = "pretrain") -> list[dict]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["stage"] == stage]


def assert_same_training(one: Path, other: Path) -> None:
    """Every loss and diagnosis once, and the same queue at the end, but for rounding."""
    for stage in ("pretrain", "diagnostics"):
        steps = [[record["step"] for record in records(run, stage)] for run in (one, other)]
        assert steps[0] == steps[1] and len(set(steps[0])) == len(steps[0])
    for name in ("loss", "loss_global", "acc1"):
        losses = [[record[name] for record in records(run)] for run in (one, other)]
        assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    states = [
        torch.load(run / "checkpoints" / "last.pt", weights_only=True)["state"]["model"]
        for run in (one, other)
    ]
    queues = [{n: v for n, v in s.items() if "queue" in n or "running" in n} for s in states]
    shared = {name for name in queues[0] if not name.startswith("key.")}
    for name in shared:
        torch.testing.assert_close(queues[1][name], queues[0][name], rtol=1e-3, atol=1e-3)


def test_two_ranks_at_half_the_batch_train_as_one(one_rank, two_ranks):
    """So do the steps of rank_steps.py, to 1e-9, without which these processes fail."""
    assert len(records(one_rank / "whole")) == 4
    assert_same_training(one_rank / "whole", two_ranks / "whole")


def test_run_of_one_rank_goes_on_with_two(one_rank, two_ranks, runs):
    assert_same_training(one_rank / "whole", runs / "moved")


def test_signal_to_one_rank_stops_both_at_a_saved_step_and_one_rank_goes_on(one_rank, two_ranks):
    stopped = two_ranks / "stopped"
    assert [record["step"] for record in records(stopped)] == [1, 2, 3]
    assert not (stopped / "encoder.pt").exists()
    pretrain.main(["--output", str(stopped), "--resume"])
    assert_same_training(one_rank / "whole", stopped)


def test_statistics_may_stay_with_each_rank(two_ranks):
    own = records(two_ranks / "own statistics")
    assert len(own) == 4 and own[0]["loss"] != records(two_ranks / "whole")[0]["loss"]


def test_killed_rank_ends_the_job_and_restarts_go_on_from_the_checkpoint(flags, one_rank, runs):
    output = runs / "killed"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    call = [*flags, "--epochs", "2", "--output", str(output), "--resume"]
    started = time.monotonic()
    ended = subprocess.run(
        [sys.executable, *torchrun, "--max-restarts", "1", str(PROGRAM), "killed", *call],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 1, ended.stderr
    # Neither attempt waited for the 10 minutes that a message may take.
    assert time.monotonic() - started < 240
    assert "rank 0 lost the others" in ended.stderr
    cause = ended.stderr.partition("Root Cause")[2]
    assert "rank      : 1" in cause and "SIGKILL" in cause
    # The second attempt went on after the checkpoint of the first epoch.
    assert ended.stdout.count("pretrain: medmoco") == 2
    assert [record["step"] for record in records(output)] == [1, 2, 3, 4]
    pretrain.main(["--output", str(output), "--resume"])
    assert_same_training(one_rank / "longer", output)
