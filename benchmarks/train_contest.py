"""A contest of training steps: with our operators, and with their references in PyTorch.

Both train one model with the trainer's own code: only what its modules call is replaced. What the
encoders take by themselves is measured in the same rounds; the rest is spent outside of them.
"""

import contextlib
import dataclasses
import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from harness import extra_memory, quantiles, time_interleaved
from medmoco.ops.dispatch import has_kernel
from reporting import OURS, error_text
from training import OPERATORS, TrainCase, Trainer, eager_operators

MIB = 2**20
EAGER, ENCODERS = "eager", "encoders alone"
# Of each loss of the first step, relative to it, and of the gradient, relative to its length. With
# bfloat16 up to 2e-3 and 1e-1 were seen: eager rounds logits and similarities to 8 bits, and so
# takes another one of the cells that are about equally alike.
ALLOWED = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (1e-2, 2e-1)}


@dataclass
class TrainRow:
    """One contestant in one case. What was not measured is None."""

    method: str
    arch: str
    width: float
    image_size: int
    output_stride: int
    batch_size: int
    queue_size: int
    device: str
    dtype: str
    contestant: str  # medmoco, eager, or the encoders without all else
    status: str = "ok"  # or FAILED (wrong: not timed), error
    note: str = ""
    median_ms: float | None = None  # of a step
    p20_ms: float | None = None
    p80_ms: float | None = None
    repeats: int = 0
    images_per_s: float | None = None
    outside_encoders: float | None = None  # share of the step; below 0 it is noise
    peak_mib: float | None = None  # beyond what stays between steps
    held_mib: float | None = None  # what stays: weights, gradients, momentum, queues, images
    loss: float | None = None  # of the first step
    loss_error: float | None = None  # the largest of its parts, against eager
    loss_error_allowed: float | None = None
    gradient_error: float | None = None  # length of the difference, against eager
    gradient_error_allowed: float | None = None
    times_medmoco: float | None = None  # median over that of medmoco


Step = Callable[[int], object]


def run_case(case: TrainCase, *, seconds: float) -> list[TrainRow]:
    """Checks the first step, then measures memory and time of all contestants in turns.

    Args:
        case: one method at one size.
        seconds: of timing altogether.
    """
    rows = {name: _row(case, name) for name in (OURS, EAGER, ENCODERS)}
    absent = [name for name in OPERATORS[case.method] if not has_kernel(name, case.device)]
    if absent:
        rows[OURS].note = f"{', '.join(absent)} in PyTorch; see MEDMOCO_UNVERIFIED=1"
    try:
        trainer = Trainer(case)
    except torch.OutOfMemoryError as error:
        for row in rows.values():
            _fail(row, error)
        return list(rows.values())
    steps: dict[str, Step] = {
        OURS: trainer.step,
        EAGER: partial(_eagerly, trainer.step),
        ENCODERS: trainer.encode,
    }
    _check(trainer, rows)
    _release()
    for name, step in steps.items():
        if rows[name].status == "ok":
            _measure_memory(trainer, step, rows[name])
    _time(case, steps, rows, seconds)
    return list(rows.values())


def _row(case: TrainCase, contestant: str) -> TrainRow:
    flags = dataclasses.asdict(case)
    described = {"device": str(case.device), "dtype": case.dtype_name()}
    return TrainRow(**(flags | described), contestant=contestant)


def _eagerly(function: Callable[..., object], *arguments: int) -> object:
    with eager_operators():
        return function(*arguments)


def _fail(row: TrainRow, error: Exception) -> None:
    memory = isinstance(error, torch.OutOfMemoryError)
    row.status = "FAILED" if row.contestant == OURS and not memory else "error"
    row.note = error_text(error)


def _release() -> None:
    """What one that failed has left is not to crowd out the next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check(trainer: Trainer, rows: dict[str, TrainRow]) -> None:
    """Losses and gradients of the first step, against eager; they are off where they differ."""
    found: dict[str, tuple[dict[str, float], list[Tensor]]] = {}
    for name in (EAGER, OURS):
        try:
            with eager_operators() if name == EAGER else contextlib.nullcontext():
                found[name] = trainer.first_step()
            rows[name].loss = found[name][0]["loss"]
        except Exception as error:  # whatever a broken operator brings about
            _fail(rows[name], error)
        if rows[name].status != "ok":
            _release()
    ours = rows[OURS]
    if OURS in found and EAGER not in found:
        ours.note = "; ".join(filter(None, (ours.note, "unchecked, as eager could not run")))
    if len(found) < 2:
        return
    (losses, gradients), (expected, right) = found[OURS], found[EAGER]
    ours.loss_error = max(
        abs(losses[name] - value) / abs(value) if math.isfinite(losses[name]) else math.inf
        for name, value in expected.items()
        if name.startswith("loss")
    )
    ours.gradient_error = _distance(gradients, right)
    ours.loss_error_allowed, ours.gradient_error_allowed = ALLOWED[trainer.case.dtype]
    beyond = [
        f"{kind} error {error:.1e}, {allowed:.1e} allowed"
        for kind, error, allowed in (
            ("loss", ours.loss_error, ours.loss_error_allowed),
            ("gradient", ours.gradient_error, ours.gradient_error_allowed),
        )
        if not error <= allowed  # NaN too
    ]
    if beyond:
        ours.status, ours.note = "FAILED", "; ".join(beyond)


def _distance(found: list[Tensor], right: list[Tensor]) -> float:
    """Length of the difference over that of the right gradient."""
    difference = [a.float() - b.float() for a, b in zip(found, right, strict=True)]
    lengths = [torch.stack(torch._foreach_norm(g)).norm() for g in (difference, right)]
    return float(lengths[0] / lengths[1])


def _measure_memory(trainer: Trainer, step: Step, row: TrainRow) -> None:
    def again() -> list[Tensor]:
        step(1)
        return []

    try:
        step(0)  # gradients and momentum are there, and libraries have what they keep
        peak = extra_memory(again, trainer.case.device)
    except Exception as error:  # out of memory, or what eager's eigh does not solve
        _fail(row, error)
    if row.status != "ok":
        _release()
        return
    row.peak_mib = None if peak is None else peak / MIB
    row.held_mib = trainer.held_bytes() / MIB


def _time(
    case: TrainCase, steps: dict[str, Step], rows: dict[str, TrainRow], seconds: float
) -> None:
    times: dict[str, list[float]] = {}
    while not times and (timed := {n: s for n, s in steps.items() if rows[n].status == "ok"}):
        try:
            times = time_interleaved(timed, case.device, seconds)
        except torch.OutOfMemoryError as error:  # the one that needs most has to go
            _fail(max((rows[name] for name in timed), key=lambda row: row.peak_mib or 0), error)
            _release()
    medians = {name: quantiles(values)[1] for name, values in times.items()}
    for name, values in times.items():
        row = rows[name]
        p20, median, p80 = quantiles(values)
        row.median_ms, row.p20_ms, row.p80_ms = median * 1e3, p20 * 1e3, p80 * 1e3
        row.repeats, row.images_per_s = len(values), case.batch_size / median
        if name != ENCODERS and ENCODERS in medians:
            row.outside_encoders = 1 - medians[ENCODERS] / median
        if OURS in medians:
            row.times_medmoco = median / medians[OURS]
