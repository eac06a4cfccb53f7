"""A contest: all contestants of one case, checked against float64, then timed in turns.

What does not fit into a GPU's memory is a row that says so, at whatever point it shows.
"""

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor

from baselines import Peer
from gpu import captured
from harness import Rates, Work, Yardsticks, extra_memory, quantiles, time_interleaved
from medmoco.ops.dispatch import has_kernel
from operation import PEER_ALLOWED, Errors, Inputs, Operation, Outcome, Size, run_pass
from reporting import OURS, Row, error_text

MIB = 2**20
NO_KERNEL = "PyTorch; kernels that no GPU has run yet need MEDMOCO_UNVERIFIED=1"
INPUT_BYTES = 256 * MIB  # for the sets of inputs that a case rotates through, at least two


@dataclass(frozen=True)
class Case:
    operation: Operation
    size: Size
    dtype: torch.dtype
    device: torch.device
    backward: bool
    graph: bool = False  # replay CUDA graphs, as launching takes longer than few rows do
    part: str = "cases"  # of the benchmark, see Row
    contestants: tuple[str, ...] = ("*",)  # their names, or patterns of them

    def shape(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.size.items())

    def pass_name(self) -> str:
        name = "forward+backward" if self.backward else "forward"
        return f"{name} graph" if self.graph else name

    def row(self, peer: Peer) -> Row:
        return Row(
            part=self.part,
            op=self.operation.name,
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            shape=self.shape(),
            pass_name=self.pass_name(),
            contestant=peer.name,
            status=peer.status,
            note=peer.reason,
        )


Call = Callable[[], Outcome]


@dataclass
class Contest:
    """One case while it is measured."""

    case: Case
    inputs: list[Inputs]
    calls: dict[str, list[Call]] = field(default_factory=dict)  # for each of the inputs
    rows: dict[str, Row] = field(default_factory=dict)
    returned_bytes: int = 0  # by medmoco: outputs and gradient

    def run(self, name: str, number: int) -> Outcome:
        calls = self.calls[name]
        return calls[number % len(calls)]()

    def returned(self, name: str) -> list[Tensor]:
        return self.run(name, 0).tensors()

    def passed(self) -> list[str]:
        return [name for name, row in self.rows.items() if row.status == "ok"]


def run_case(case: Case, *, quick: bool) -> list[Row]:
    """Checks, then measures, all contestants of a case."""
    torch.compiler.reset()  # a compiled peer is compiled for this case alone
    yardsticks = Yardsticks(case.dtype, case.device, quick=quick)
    contest = Contest(case, _input_sets(case))
    for peer in _contestants(case, quick=quick):
        contest.rows[peer.name] = case.row(peer)
        if peer.function is not None:
            _enter(contest, peer.name, peer.function)
    _check(contest)
    gc.collect()
    if not case.graph:  # what a graph needs stays allocated between its replays
        _measure_memory(contest)
    _time(contest, yardsticks, seconds=0.1 if quick else 2.0)
    return list(contest.rows.values())


def _enter(contest: Contest, name: str, function: Callable[..., object]) -> None:
    """Makes a contestant's calls; captures them where graphs are to be replayed."""
    case = contest.case
    calls: list[Call] = [
        partial(run_pass, function, inputs, backward=case.backward) for inputs in contest.inputs
    ]
    if case.graph:
        try:
            calls = [captured(call, case.device) for call in calls]
        except Exception as error:  # whatever is raised by what a graph cannot hold
            must = name == OURS and has_kernel(case.operation.name, case.device)
            row = contest.rows[name]
            row.status = "FAILED" if must else "n/a"
            first = error.__context__ or error  # that the capture failed is said after why
            row.note = f"cannot be captured: {error_text(first)}"
            return
    contest.calls[name] = calls


def _contestants(case: Case, *, quick: bool) -> list[Peer]:
    operation = case.operation
    kernel = has_kernel(operation.name, case.device)
    ours = Peer(OURS, operation.medmoco, reason="" if kernel else NO_KERNEL)
    peers = operation.peers(case.size, case.dtype, case.device, quick=quick)
    wanted = (OURS, *case.contestants)
    return [p for p in (ours, *peers) if any(fnmatchcase(p.name, name) for name in wanted)]


def _input_sets(case: Case) -> list[Inputs]:
    draw = partial(case.operation.inputs, case.size, case.dtype, case.device)
    first = draw(seed=0)
    count = max(2, min(4, INPUT_BYTES // first.nbytes))
    return [first, *(draw(seed=seed) for seed in range(1, count))]


def _check(contest: Contest) -> None:
    """Compares each contestant with float64; marks those that are off, or that cannot run."""
    case = contest.case
    errors_of = case.operation.checker(contest.inputs[0], backward=case.backward)
    sane = dict.fromkeys(("value", "gradient"), PEER_ALLOWED[case.dtype])
    eager = sane
    # Eager first: what it gets wrong measures what is allowed.
    for name in sorted(contest.calls, key=lambda name: name != "eager"):
        row = contest.rows[name]
        try:
            outcome = contest.run(name, 0)
            errors = errors_of(outcome)
        except Exception as error:  # whatever a peer raises where it does not apply
            row.status = "FAILED" if name == OURS else "error"
            row.note = error_text(error)
        if row.status != "ok":
            gc.collect()  # what it has left in cycles is not to crowd out the next
            continue
        if name == "eager":
            eager = errors
        allowed = {kind: sane[kind] for kind in errors}
        if name == OURS:
            allowed = case.operation.allowed(
                outcome, {kind: eager[kind] for kind in errors}, case.dtype, case.device
            )
            contest.returned_bytes = sum(t.nbytes for t in outcome.tensors())
        _judge(row, errors, allowed)


def _judge(row: Row, errors: Errors, allowed: Errors) -> None:
    row.value_error, row.value_error_allowed = errors["value"], allowed["value"]
    row.gradient_error = errors.get("gradient")
    row.gradient_error_allowed = allowed.get("gradient")
    beyond = [
        f"{kind} error {error:.1e}, {allowed[kind]:.1e} allowed"
        for kind, error in errors.items()
        if not error <= allowed[kind]  # NaN too
    ]
    if beyond:
        row.status, row.note = "FAILED", "; ".join(beyond)


def _measure_memory(contest: Contest) -> None:
    for name in contest.passed():
        row = contest.rows[name]
        try:
            memory = extra_memory(partial(contest.returned, name), contest.case.device)
        except torch.OutOfMemoryError as error:
            row.status, row.note = "error", error_text(error)
        else:
            row.peak_mib = None if memory is None else memory / MIB


def _time(contest: Contest, yardsticks: Yardsticks, *, seconds: float) -> None:
    case = contest.case
    times: dict[str, list[float]] = {}
    while not times and (names := contest.passed()):
        calls: dict[str, Callable[[int], object]] = {n: partial(contest.run, n) for n in names}
        try:
            times = time_interleaved(calls | yardsticks.calls, case.device, seconds)
        except torch.OutOfMemoryError as error:  # the one that needs most has to go
            row = max((contest.rows[name] for name in names), key=lambda row: row.peak_mib or 0)
            row.status, row.note = "error", error_text(error)
    if not times:
        return
    rates = yardsticks.rates(times)
    moved = contest.inputs[0].nbytes + contest.returned_bytes
    for name in names:
        _fill(contest.rows[name], times[name], case, rates, moved)
    if OURS in names:
        ours = statistics.median(times[OURS])
        for name in names:
            contest.rows[name].times_medmoco = statistics.median(times[name]) / ours


def _fill(row: Row, times: Sequence[float], case: Case, rates: Rates, moved: int) -> None:
    p20, median, p80 = quantiles(times)
    flop = case.operation.flop(case.size, backward=case.backward)
    work = Work(flop, moved, case.operation.exponentials(case.size))
    floors = rates.floors(work)
    row.median_ms, row.p20_ms, row.p80_ms = median * 1e3, p20 * 1e3, p80 * 1e3
    row.repeats = len(times)
    row.gflop_per_s, row.gbyte_per_s = flop / median / 1e9, moved / median / 1e9
    row.floor_ms, row.times_floor = floors.largest * 1e3, median / floors.largest
    row.product_floor_ms, row.copy_floor_ms = floors.product * 1e3, floors.copy * 1e3
    if floors.exponentials is not None:
        row.exponential_floor_ms = floors.exponentials * 1e3
    row.product_gflop_per_s = rates.flop_per_s / 1e9
    row.copy_gbyte_per_s = rates.bytes_per_s / 1e9
