"""Small pretraining runs: their flags, what they write, and whether two ended with the same."""

import json
from pathlib import Path

import torch

from medmoco.models.encoder import load_encoder

TINY = ["--width", "0.125", "--image-size", "32", "--output-stride", "8", "--batch-size", "8"]


def records(output: Path, stage: str = "pretrain") -> list[dict]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["stage"] == stage]


def state(output: Path) -> dict:
    """The last checkpoint, less the global random numbers, which no step of ours draws."""
    state = torch.load(output / "checkpoints" / "last.pt", weights_only=True)["state"]
    return {name: value for name, value in state.items() if name != "random"}


def timeless(rows: list[dict]) -> list[dict]:
    """All that is not a matter of the machine's speed."""
    times = {"images_per_second", "data_wait"}
    return [{name: value for name, value in row.items() if name not in times} for row in rows]


def assert_identical(one, other) -> None:
    """Equal bit for bit, however tensors are nested."""
    if isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_identical(one[name], other[name])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_identical(*pair)
    else:
        assert one == other


def assert_same_end(one: Path, other: Path) -> None:
    """The whole state, the exported weights, every loss and every diagnosis are the same."""
    assert_identical(state(one), state(other))
    weights = [load_encoder(run / "encoder.pt")[0].state_dict() for run in (one, other)]
    assert_identical(*(dict(weight) for weight in weights))
    assert timeless(records(one)) == timeless(records(other))
    assert records(one, "diagnostics") == records(other, "diagnostics")
