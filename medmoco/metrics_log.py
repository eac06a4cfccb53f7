"""metrics.jsonl, what is made of it for spreadsheets and TensorBoard, and the loop's clock."""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from medmoco.divergence import NonFiniteLoss
from medmoco.epoch_table import EpochTable
from medmoco.errors import UserError
from medmoco.event_files import EventFiles, run_of
from medmoco.json_file import parse_object
from medmoco.output import append_jsonl, write_text, writing

CSV_SECONDS = 10.0  # between two writings of metrics.csv, which is written whole


class MetricsLog:
    """Collects a record a step and writes them together.

    Losses stay on the device until `flush`, so that logging waits for it once in a while only.
    Beside metrics.jsonl lie metrics.csv, complete once the log is closed, and, if asked for, the
    folder tensorboard/; both are made from the same records.
    """

    def __init__(self, path: Path, tensorboard: bool = False) -> None:
        self.path = path
        self._held: list[dict[str, Any]] = []
        self._epochs = EpochTable()
        self._csv_due = time.monotonic() + CSV_SECONDS
        self._events = EventFiles(path.parent / "tensorboard") if tensorboard else None

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Writes what lies beside metrics.jsonl; the log may be written to again."""
        if self.path.is_file():
            self._epochs.write(self.path.with_suffix(".csv"))
        if self._events is not None:
            self._events.close()

    def hold(self, record: dict[str, Any]) -> None:
        self._held.append(record)

    def holds_any(self) -> bool:
        return bool(self._held)

    def flush(self, **common: Any) -> list[dict[str, Any]]:
        """Writes what is held, `common` added to each record, and returns it.

        Raises:
            NonFiniteLoss: a loss is not finite; the records before it are written.
        """
        held, self._held = self._held, []
        records = [{name: _plain(v) for name, v in (record | common).items()} for record in held]
        for record in records:
            if not math.isfinite(record["loss"]):
                raise NonFiniteLoss(record["step"], record["loss"])
            self._append(record)
        self._update()
        return records

    def write(self, record: dict[str, Any]) -> None:
        self._append(record)
        self._update()

    def _append(self, record: dict[str, Any]) -> None:
        append_jsonl(self.path, record)
        self._epochs.add(record)
        if self._events is not None:
            self._events.add(record)

    def _update(self) -> None:
        if self._events is not None:
            self._events.flush()
        if time.monotonic() > self._csv_due:
            self._epochs.write(self.path.with_suffix(".csv"))
            self._csv_due = time.monotonic() + CSV_SECONDS

    def sync(self) -> None:
        """Waits until metrics.jsonl is on the disk, as a checkpoint that counts on it must."""
        if self.path.is_file():
            with writing(self.path), open(self.path, "rb") as file:
                os.fsync(file.fileno())

    def forget_after(self, step: int, diagnosed: int) -> None:
        """Drops what a resumed run writes again: steps beyond `step`, diagnoses beyond that of step
        `diagnosed`."""
        last = {"pretrain": step, "diagnostics": diagnosed}
        self._keep(
            lambda record: record["step"] <= last.get(record["stage"], math.inf), run="pretrain"
        )

    def forget_training(self, stage: str, encoder: str, after: int = 0) -> None:
        """Drops the records of a segmentation model that is trained anew after epoch `after`."""
        model = {"stage": stage, "encoder": encoder}
        self._keep(
            lambda record: (
                not model.items() <= record.items() or record.get("epoch", math.inf) <= after
            ),
            run=run_of(model),
        )

    def _keep(self, wanted: Callable[[dict[str, Any]], bool], run: str) -> None:
        """Drops records of `run`. A line that was cut off by a kill is no record, and goes too."""
        if not self.path.is_file():
            return
        kept = [(line + "\n", record) for line, record in read_records(self.path) if wanted(record)]
        write_text(self.path, "".join(line for line, _ in kept))
        self._epochs = EpochTable()
        for _, record in kept:
            self._epochs.add(record)
        if self._events is not None:
            self._events.rebuild(run, (record for _, record in kept))


class SilentLog(MetricsLog):
    """Reads and checks the losses as the log of rank 0 does, and writes nothing."""

    def __init__(self, path: Path, tensorboard: bool = False) -> None:
        super().__init__(path, tensorboard=False)

    def close(self) -> None:
        pass

    def sync(self) -> None:
        pass

    def _append(self, record: dict[str, Any]) -> None:
        pass

    def _update(self) -> None:
        pass

    def _keep(self, wanted: Callable[[dict[str, Any]], bool], run: str) -> None:
        pass


class StepClock:
    """Speed, and the share of time that the loop waited for data, since the last reading."""

    def __init__(self) -> None:
        self._images = 0
        self._restart()

    def data_ready(self) -> None:
        self._waited += time.perf_counter() - self._step_end

    def step_done(self, images: int) -> None:
        self._images += images
        self._step_end = time.perf_counter()

    def read(self) -> dict[str, float]:
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        reading = {
            "images_per_second": round(self._images / elapsed, 1),
            "data_wait": round(self._waited / elapsed, 4),
        }
        self._restart()
        return reading

    def _restart(self) -> None:
        self._start = self._step_end = time.perf_counter()
        self._waited = 0.0
        self._images = 0


def read_records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Lines of metrics.jsonl with what they say; lines that are no records are left out.

    None of a run that has written none yet.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return []
    return [(line, record) for line in lines if (record := _record(path, line)) is not None]


def _record(path: Path, line: str) -> dict[str, Any] | None:
    try:
        record = parse_object(path, line)
    except UserError:
        return None
    placed = isinstance(record.get("stage"), str) and isinstance(record.get("step"), int)
    named = isinstance(record.get("encoder"), str | None)
    timed = isinstance(record.get("epoch"), int | float | None)
    return record if placed and named and timed else None


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value
