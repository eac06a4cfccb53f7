"""metrics.csv: a row an epoch, for spreadsheets; metrics.jsonl holds every step."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medmoco.output import write_text
from medmoco.printing import visible

PLACE = ("stage", "encoder", "epoch", "step")  # where a record belongs; the rest is measured


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record: those of nested objects as "object/number", no lists, no words."""
    found: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{inner}": number for inner, number in scalars(value).items()}
        elif name not in PLACE and isinstance(value, (int, float)) and not isinstance(value, bool):
            found[name] = value
    return found


class EpochTable:
    """Means over the steps of each epoch, by stage and encoder; the step is the epoch's last."""

    def __init__(self) -> None:
        self._steps: dict[tuple[Any, ...], Any] = {}
        self._sums: dict[tuple[Any, ...], dict[str, tuple[float, int]]] = {}

    def add(self, record: Mapping[str, Any]) -> None:
        row = tuple(record.get(name) for name in PLACE[:-1])
        self._steps[row] = record.get("step")
        sums = self._sums.setdefault(row, {})
        for name, value in scalars(record).items():
            total, count = sums.get(name, (0.0, 0))
            sums[name] = total + value, count + 1

    def write(self, path: Path) -> None:
        """Writes the whole table; a number that an epoch lacks is an empty cell."""
        names = list(dict.fromkeys(name for sums in self._sums.values() for name in sums))
        text = io.StringIO()
        rows = csv.DictWriter(text, [*PLACE, *names], lineterminator="\n")
        rows.writeheader()
        for row, sums in self._sums.items():
            means = {name: f"{total / count:.7g}" for name, (total, count) in sums.items()}
            rows.writerow(dict(zip(PLACE, (*row, self._steps[row]), strict=True)) | means)
        # A broken record may hold lone surrogates, which no encoding writes.
        write_text(path, visible(text.getvalue(), keep="\n"))
