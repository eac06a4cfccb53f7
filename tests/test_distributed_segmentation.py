"""Segmentation on two processes gives what one gives, and goes on from a signal to either."""

import json
from pathlib import Path

import numpy as np
import pytest
from rank_processes import run_on_two_ranks

from medmoco import segment
from medmoco.data.volumes import read_volume
from medmoco.metrics import dice_from_counts, overlap_counts

PROGRAM = Path(__file__).with_name("segment_ranks_program.py")
# Batches of 7: no rank's part is as large as the other's, and the last one is smaller.
FLAGS = [*("--width", "0.125", "--image-size", "48", "--output-stride", "8", "--batch-size", "7")]
FLAGS += ["--device", "cpu"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def flags(tiny_task, tmp_path_factory) -> list[str]:
    cache = str(tmp_path_factory.mktemp("cache"))
    return ["--task", str(tiny_task), "--cache", cache, *FLAGS, "--epochs", "6"]


@pytest.fixture(scope="module")
def one_rank(flags, runs) -> Path:
    segment.main([*flags, "--output", str(runs / "one")])
    return runs / "one"


@pytest.fixture(scope="module")
def two_ranks(flags, one_rank, runs) -> Path:
    """The folder of runs by two processes: a whole one, one that is stopped, and two folds."""
    folder = runs / "two"
    finetuning = [*flags, "--mode", "finetune"]
    folds = ["--folds", "2", "--epochs", "1", "--output", str(folder / "folds")]
    calls = [
        {"argv": [*flags, "--output", str(folder / "whole")]},
        {"argv": [*finetuning, "--output", str(folder / "stopped")], "stopped_rank": 1},
        {"argv": [*finetuning, *folds]},
        {"argv": ["--resume", "--output", str(folder / "whole")]},
        {"argv": [*finetuning, "--output", str(folder / "early")], "stopped_before": True},
    ]
    (runs / "calls.json").write_text(json.dumps(calls))
    written = run_on_two_ranks(PROGRAM, str(runs / "calls.json"))
    assert [json.loads(output.splitlines()[-1]) for output, _ in written] == [[0] * len(calls)] * 2
    assert len(written[1][0].splitlines()) == 1, "the second rank speaks"
    assert "finished before" in written[0][0]
    return folder


def records(run: Path) -> list[dict]:
    """Of fine-tuning."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["stage"] == "finetune"]


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())["controls"]


def assert_same_finetuning(one: Path, other: Path) -> None:
    """Losses and Dice of every epoch, but for rounding, which AdamW magnifies."""
    pairs = list(zip(records(one), records(other), strict=True))
    assert len(pairs) == 6
    for ours, theirs in pairs:
        assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-2)
        assert theirs["dice"] == pytest.approx(ours["dice"], abs=0.1)


def test_two_ranks_finetune_as_one(one_rank, two_ranks):
    """In float64 two epochs with a validation agree to 1e-6, or these processes fail."""
    assert_same_finetuning(one_rank, two_ranks / "whole")


def test_linear_decoder_is_the_same(one_rank, two_ranks):
    ours, theirs = (summary(run)["linear_random"] for run in (one_rank, two_ranks / "whole"))
    assert theirs["dice_mean"] > 0.1
    assert theirs["dice_per_volume"] == ours["dice_per_volume"]


def test_test_cases_are_shared_out(tiny_task, two_ranks):
    """Each rank writes a label map; the scores are of both, and as the maps are."""
    result = summary(two_ranks / "whole")["finetune_scratch"]
    assert len(result["dice_per_volume"]) == 2
    for case, scores in result["dice_per_volume"].items():
        written = two_ranks / "whole" / "predictions" / "finetune-scratch" / f"{case}.nii.gz"
        prediction, truth = (
            read_volume(path, label=True).voxels.astype(np.int64)
            for path in (written, tiny_task / "labelsTr" / f"{case}.nii.gz")
        )
        counts = overlap_counts(prediction, truth, len(scores) + 1)
        assert list(scores.values()) == [dice_from_counts(row) for row in counts[1:]]
        assert scores["liver"] > 0.05


def test_signal_to_the_second_rank_stops_both_and_one_rank_goes_on(one_rank, two_ranks):
    stopped = two_ranks / "stopped"
    assert not (stopped / "segmenters").exists()
    assert (stopped / "checkpoints" / "finetune-scratch.pt").is_file()
    segment.main(["--resume", "--output", str(stopped)])
    assert_same_finetuning(one_rank, stopped)


def test_signal_to_both_before_the_first_step_stops_both(two_ranks):
    """Also the rank that waits in the training for the one that is still outside of it: or its
    processes would have ended with another status."""
    assert {path.name for path in (two_ranks / "early").iterdir()} == {"config.json", "split.json"}


def test_folds_on_two_ranks(two_ranks):
    assert len(summary(two_ranks / "folds")["finetune_scratch"]["dice_per_volume"]) == 10
    for fold in ("fold_0", "fold_1"):
        assert (two_ranks / "folds" / fold / "summary.json").is_file()
