"""Runs that are killed and started again end as one that nobody killed; soak/kill.py does more."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from same_run import differences

SOAK = Path(__file__).resolve().parents[1] / "soak"


def test_every_killed_run_ends_as_the_unbroken_one():
    command = [sys.executable, str(SOAK / "kill.py"), "--kills", "3", "--pretraining-only"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 kills survived" in done.stdout


@pytest.fixture
def runs(tmp_path) -> tuple[Path, Path]:
    """Two runs that ended with the same."""
    for name in ("one", "other"):
        folder = tmp_path / name
        (folder / "predictions" / "linear").mkdir(parents=True)
        torch.save({"state_dict": {"weight": torch.ones(3)}}, folder / "encoder.pt")
        record = {"step": 1, "loss": 2.5, "images_per_second": float(len(name))}
        (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        (folder / "predictions" / "linear" / "a.nii.gz").write_bytes(b"labels")
    return tmp_path / "one", tmp_path / "other"


def test_durations_may_differ(runs):
    assert differences(*runs) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", b'{"step": 1, "loss": 2.5000001}\n'),
        ("predictions/linear/a.nii.gz", b"label$"),
        ("checkpoints.pt/.last.pt.abcdefgh", b"half"),
    ],
)
def test_whatever_else_differs_is_found(runs, name, content):
    path = runs[1] / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    (wrong,) = differences(*runs)
    assert str(path) in wrong


def test_a_last_bit_of_a_weight_is_found_and_a_missing_file(runs):
    weight = torch.ones(3).nextafter(torch.full((3,), 2.0))
    torch.save({"state_dict": {"weight": weight}}, runs[1] / "encoder.pt")
    (runs[1] / "metrics.jsonl").unlink()
    assert [text.split(":")[0] for text in differences(*runs)] == [
        str(runs[1] / "encoder.pt"),
        "missing",
    ]
