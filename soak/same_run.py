"""Whether two runs ended with the same: bit for bit, but for durations."""

import json
from pathlib import Path
from typing import Any

import torch

from medmoco.tensor_file import load_tensors

# Parts of the names of what is each process's own: durations.
OWN = ("seconds", "per_second", "data_wait")


def differences(expected: Path, found: Path) -> list[str]:
    """What of the run in folder `found` is not as in `expected`; empty if all is.

    Compares the weights, metrics.jsonl, summary.json and label maps, and names temporary files that
    were left behind.
    """
    wrong = [f"left behind: {path}" for path in sorted(found.rglob(".*"))]
    for pattern in ("encoder.pt", "segmenters/*.pt"):
        for one, other in _pairs(expected, found, pattern):
            if not _same(load_tensors(one), load_tensors(other)):
                wrong.append(f"{other}: other weights than {one}")
    for one, other in _pairs(expected, found, "*.json*"):
        if one.name != "config.json" and _records(one) != _records(other):
            wrong.append(f"{other}: other content than {one}")
    for one, other in _pairs(expected, found, "predictions/**/*.nii.gz"):
        if one.read_bytes() != other.read_bytes():
            wrong.append(f"{other}: another label map than {one}")
    names = [{str(p.relative_to(run)) for p in run.rglob("*")} for run in (expected, found)]
    return wrong + [f"missing: {found / name}" for name in sorted(names[0] - names[1])]


def _pairs(expected: Path, found: Path, pattern: str) -> list[tuple[Path, Path]]:
    paths = [(path, found / path.relative_to(expected)) for path in sorted(expected.glob(pattern))]
    return [(one, other) for one, other in paths if other.is_file()]


def _same(one: Any, other: Any) -> bool:
    """Equal bit for bit, however tensors are nested."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def _records(path: Path) -> list[Any]:
    """The objects of a JSON or JSON-lines file, without what is a process's own."""
    text = path.read_text("utf-8")
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    return [_comparable(json.loads(line)) for line in lines]


def _comparable(value: Any) -> Any:
    if isinstance(value, list):
        return [_comparable(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {name: v for name, v in value.items() if not any(own in name for own in OWN)}
    return {name: _comparable(v) for name, v in kept.items()}
