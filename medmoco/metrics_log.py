"""metrics.jsonl and the clock of the training loop."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from medmoco.errors import UserError
from medmoco.output import append_jsonl, write_text


class MetricsLog:
    """Collects a record a step and writes them together.

    Losses stay on the device until `flush`, so that logging waits for it once in a while only.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held: list[dict[str, Any]] = []

    def hold(self, record: dict[str, Any]) -> None:
        self._held.append(record)

    def flush(self, **common: Any) -> list[dict[str, Any]]:
        """Writes what is held, `common` added to each record, and returns it.

        Raises:
            UserError: a loss is not finite.
        """
        held, self._held = self._held, []
        records = [{name: _plain(v) for name, v in (record | common).items()} for record in held]
        for record in records:
            if not math.isfinite(record["loss"]):
                raise UserError(
                    f"the loss is {record['loss']} at step {record['step']}: start again with a "
                    "lower --lr, or with --amp-dtype float32"
                )
            append_jsonl(self.path, record)
        return records

    def write(self, record: dict[str, Any]) -> None:
        append_jsonl(self.path, record)

    def forget_after(self, step: int, diagnosed: int) -> None:
        """Drops what a resumed run writes again: steps beyond `step`, diagnoses beyond that of step
        `diagnosed`."""
        last = {"pretrain": step, "diagnostics": diagnosed}
        self._keep(lambda record: record["step"] <= last.get(record["stage"], math.inf))

    def forget_training(self, stage: str, encoder: str) -> None:
        """Drops the records of a segmentation model that is trained anew."""
        self._keep(lambda record: (record["stage"], record.get("encoder")) != (stage, encoder))

    def _keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """A line that was cut off by a kill is no record, and goes too."""
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text("utf-8").splitlines():
            try:
                if wanted(json.loads(line)):
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        write_text(self.path, "".join(kept))


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


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value
