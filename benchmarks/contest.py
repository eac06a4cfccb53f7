"""A contest: all contestants of one case, checked against float64, then timed in turns."""

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from baselines import Peer
from harness import Rates, Yardsticks, extra_memory, time_interleaved
from medmoco.ops.dispatch import has_kernel
from operation import PEER_ALLOWED, Errors, Inputs, Operation, Outcome, Size, run_pass
from reporting import OURS, Row

MIB = 2**20
INPUT_BYTES = 256 * MIB  # for the sets of inputs that a case rotates through, at least two


@dataclass(frozen=True)
class Case:
    operation: Operation
    size: Size
    dtype: torch.dtype
    device: torch.device
    backward: bool
    part: str = "cases"  # of the benchmark, see Row
    contestants: tuple[str, ...] | None = None  # None: all

    def shape(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.size.items())

    def row(self, peer: Peer) -> Row:
        return Row(
            part=self.part,
            op=self.operation.name,
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            shape=self.shape(),
            pass_name="forward+backward" if self.backward else "forward",
            contestant=peer.name,
            status=peer.status,
            note=peer.reason,
        )


@dataclass
class Contest:
    """One case while it is measured."""

    case: Case
    inputs: list[Inputs]
    functions: dict[str, Callable[..., object]] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)
    returned_bytes: int = 0  # by medmoco: outputs and gradient

    def run(self, name: str, number: int) -> Outcome:
        inputs = self.inputs[number % len(self.inputs)]
        return run_pass(self.functions[name], inputs, backward=self.case.backward)

    def returned(self, name: str) -> list[Tensor]:
        return self.run(name, 0).tensors()


def run_case(case: Case, *, quick: bool) -> list[Row]:
    """Checks, then measures, all contestants of a case."""
    torch.compiler.reset()  # a compiled peer is compiled for this case alone
    contest = Contest(case, _input_sets(case))
    contestants = _contestants(case, quick=quick)
    for peer in contestants:
        contest.rows[peer.name] = case.row(peer)
        if peer.function is not None:
            contest.functions[peer.name] = peer.function
    _check(contest)
    gc.collect()
    passed = [name for name, row in contest.rows.items() if row.status == "ok"]
    for name in passed:
        memory = extra_memory(partial(contest.returned, name), case.device)
        contest.rows[name].peak_mib = None if memory is None else memory / MIB
    if passed:
        _time(contest, passed, seconds=0.1 if quick else 2.0, quick=quick)
    return list(contest.rows.values())


def _contestants(case: Case, *, quick: bool) -> list[Peer]:
    operation = case.operation
    kernel = has_kernel(operation.name, case.device)
    ours = Peer(OURS, operation.medmoco, reason="" if kernel else "no kernel: PyTorch")
    peers = operation.peers(case.size, case.dtype, case.device, quick=quick)
    return [p for p in (ours, *peers) if case.contestants is None or p.name in case.contestants]


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
    for name in sorted(contest.functions, key=lambda name: name != "eager"):
        row = contest.rows[name]
        try:
            outcome = contest.run(name, 0)
            errors = errors_of(outcome)
        except Exception as error:  # whatever a peer raises where it does not apply
            row.status = "FAILED" if name == OURS else "error"
            row.note = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
            continue
        if name == "eager":
            eager = errors
        allowed = {kind: sane[kind] for kind in errors}
        if name == OURS:
            allowed = case.operation.allowed(
                outcome, {kind: eager[kind] for kind in errors}, case.device
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


def _time(contest: Contest, names: Sequence[str], *, seconds: float, quick: bool) -> None:
    case = contest.case
    yardsticks = Yardsticks(case.dtype, case.device, quick=quick)
    calls: dict[str, Callable[[int], object]] = {n: partial(contest.run, n) for n in names}
    times = time_interleaved(calls | yardsticks.calls, case.device, seconds)
    rates = yardsticks.rates(times)
    moved = contest.inputs[0].nbytes + contest.returned_bytes
    for name in names:
        _fill(contest.rows[name], times[name], case, rates, moved)
    if OURS in names:
        ours = statistics.median(times[OURS])
        for name in names:
            contest.rows[name].times_medmoco = statistics.median(times[name]) / ours


def _fill(row: Row, times: Sequence[float], case: Case, rates: Rates, moved: int) -> None:
    p20, median, p80 = (
        torch.tensor(times, dtype=torch.float64)
        .quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
        .tolist()
    )
    flop = case.operation.flop(case.size, backward=case.backward)
    floor = rates.floor(flop, moved)
    row.median_ms, row.p20_ms, row.p80_ms = median * 1e3, p20 * 1e3, p80 * 1e3
    row.repeats = len(times)
    row.gflop_per_s, row.gbyte_per_s = flop / median / 1e9, moved / median / 1e9
    row.floor_ms, row.times_floor = floor * 1e3, median / floor
    row.product_gflop_per_s = rates.flop_per_s / 1e9
    row.copy_gbyte_per_s = rates.bytes_per_s / 1e9
