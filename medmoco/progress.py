"""progress.png: loss and Dice by class of a fine-tuning, drawn while it goes on."""

import time
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from medmoco.metrics_log import read_records
from medmoco.output import write_bytes_atomic
from medmoco.report.plots import short
from medmoco.report.rendering import LIGHT, Plot, Theme, render

PROGRESS_NAME = "progress.png"
SECONDS = 3.0  # at least, between two drawings
MAX_CLASSES = 12  # that a legend names

Record = dict[str, Any]


class ProgressPlot:
    """Redraws RUN/progress.png after an epoch, at most every few seconds and after the last one.

    Args:
        output: folder of the run; of its metrics.jsonl come the curves of models trained before,
            and what a resumed training has behind it.
    """

    def __init__(self, output: Path):
        self.path = output / PROGRESS_NAME
        self.records = _fine_tuning(output / "metrics.jsonl")
        self._drawn = -float("inf")
        self._added = False  # since the last drawing

    def add(self, record: Record) -> None:
        """Takes what metrics.jsonl says of an epoch."""
        self.records.append(record)
        self._added = True
        if time.monotonic() - self._drawn > SECONDS:
            self.draw()

    def draw(self) -> None:
        """Writes the picture, whole or not at all, if there is anything new to show."""
        if self._added:
            write_bytes_atomic(self.path, render(progress_plots(self.records), LIGHT, "png"))
            self._drawn = time.monotonic()
            self._added = False


def progress_plots(records: list[Record]) -> list[Plot]:
    """The loss of every model, and a plot of Dice by class for each of them."""
    models: dict[str, list[Record]] = {}
    for record in records:
        models.setdefault(str(record["encoder"]), []).append(record)

    def losses(axes: Axes, theme: Theme) -> None:
        for (name, rows), colour in zip(models.items(), theme.palette, strict=False):
            axes.plot(_column(rows, "epoch"), _column(rows, "loss"), color=colour, label=name)
        axes.set(xlabel="epoch", ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    plots = [Plot("Loss of fine-tuning", "Loss over the epochs.", losses)]
    for name, rows in models.items():
        if any("dice" in row for row in rows):
            plots.append(_dice_plot(name, rows))
    return plots


def _dice_plot(model: str, rows: list[Record]) -> Plot:
    """Solid: the validation, or the training batches where there is none. Dotted: the batches."""
    validated = any("dice_validation" in row for row in rows)
    main = "dice_validation" if validated else "dice"
    classes = list(dict.fromkeys(name for row in rows for name in row.get("dice", {})))

    def draw(axes: Axes, theme: Theme) -> None:
        epochs = _column(rows, "epoch")
        for i, name in enumerate(classes):
            style: Any = {"color": theme.palette[i % len(theme.palette)], "lw": 1.5}
            if i >= len(theme.palette):
                style["ls"] = "--"
            if validated:
                batches = [row.get("dice", {}).get(name) for row in rows]
                axes.plot(epochs, _numbers(batches), color=style["color"], lw=0.7, ls=":")
            shown = [row.get(main, {}).get(name) for row in rows]
            label = short(name) if i < MAX_CLASSES else "_"  # _: not in the legend
            axes.plot(epochs, _numbers(shown), label=label, **style)
        axes.set(xlabel="epoch", ylim=(0, 1))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    source = "validation; dotted: batches" if validated else "training batches"
    return Plot(f"Dice, {model} ({source})", f"Dice of {model} by class and epoch.", draw)


def _column(rows: list[Record], key: str) -> list[float]:
    return _numbers([row.get(key) for row in rows])


def _numbers(values: list[Any]) -> list[float]:
    return [float("nan") if value is None else float(value) for value in values]


def _fine_tuning(metrics: Path) -> list[Record]:
    records = (record for _, record in read_records(metrics))
    return [record for record in records if record["stage"] == "finetune"]
