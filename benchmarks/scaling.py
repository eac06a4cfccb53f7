"""How time and memory of queue_info_nce grow with batch and queue, beside eager and attention."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cases import OPERATIONS
from contest import Case
from medmoco.output import write_bytes_atomic
from operation import Size
from reporting import OURS, Row

OPERATION = OPERATIONS["queue_info_nce"]
EAGER_BYTES = 2 * 2**30  # eager is left out where its logits would take more
EAGER_COPIES = 3  # of the logits, in float32: the product, divided, and its gradient
COLOURS = ("#00609c", "#b86e00", "#007a59")


def scaling_cases(dtype: torch.dtype, device: torch.device, *, quick: bool) -> list[Case]:
    """Forward and backward over N at K=65536, and over K at N=256."""
    batch, queue_size, embed_dim = (32, 2048, 32) if quick else (256, 65536, 128)
    batches = [16, 64] if quick else [2**n for n in range(6, 14)]
    queue_sizes = [256, 1024] if quick else [2**k for k in range(10, 19)]
    sizes = [("over N", n, queue_size) for n in batches]
    sizes += [("over K", batch, k) for k in queue_sizes]
    cases = []
    for part, rows, entries in sizes:
        size = {"N": rows, "K": entries, "C": embed_dim}
        contestants = _contestants(size, dtype, device)
        cases.append(Case(OPERATION, size, dtype, device, True, part=part, contestants=contestants))
    return cases


def _contestants(size: Size, dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
    """medmoco, the attention that suits the dtype best, and eager where it fits."""
    attention = "attention"
    if device.type == "cuda":
        attention += " (efficient)" if dtype == torch.float32 else " (flash)"
    fits = size["N"] * size["K"] * 4 * EAGER_COPIES <= EAGER_BYTES
    return (OURS, attention, "eager") if fits else (OURS, attention)


def draw_scaling(
    file: Path, environment: dict[str, Any], results: Sequence[tuple[Case, Sequence[Row]]]
) -> None:
    """Time and peak memory against N and against K, log-log, with a line of slope 1."""
    figure = Figure(figsize=(10, 8), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    for column, (name, other) in enumerate((("N", "K"), ("K", "N"))):
        swept = [(case.size, rows) for case, rows in results if case.part == f"over {name}"]
        points = [(size[name], row) for size, rows in swept for row in rows]
        _draw(panels[0, column], points, "median_ms")
        _draw(panels[1, column], points, "peak_mib")
        panels[1, column].set_xlabel(f"{name} ({other} = {swept[0][0][other]})")
    panels[0, 0].set_ylabel("time [ms]")
    panels[1, 0].set_ylabel("peak extra memory [MiB]")
    e = environment
    figure.suptitle(
        f"queue_info_nce, {swept[0][1][0].dtype}, forward + backward, C = {swept[0][0]['C']}; "
        f"eager up to {EAGER_BYTES // 2**30} GiB\n{e['device_name']}, {e['threads']} threads, "
        f"torch {e['torch']}, medmoco {e['commit']}",
        fontsize=10,
    )
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    write_bytes_atomic(file, content.getvalue())


def _draw(axes: Axes, points: Sequence[tuple[int, Row]], quantity: str) -> None:
    """A curve for each contestant, its fitted slope in the legend."""
    for colour, name in zip(COLOURS, (OURS, "eager", "attention"), strict=True):
        values = [
            (x, value)
            for x, row in points
            if row.contestant.startswith(name) and (value := getattr(row, quantity))
        ]
        if not values:  # what failed is not timed, and small sizes may take no memory
            continue
        x, y = np.array(values, dtype=np.float64).T
        label = name
        if len(x) > 1:
            label += f", slope {np.polyfit(np.log(x), np.log(y), 1)[0]:.2f}"
        axes.loglog(x, y, "o-", color=colour, markersize=4, label=label)
    sizes = [x for x, _ in points]
    ends = np.array([min(sizes), max(sizes)])
    low, _ = axes.get_ylim()
    axes.loglog(ends, low * ends / ends[0], "--", color="#808080", linewidth=1, label="slope 1")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=9)
