"""The benchmark on a GPU, as far as that can be tested without one.

Kernels are not run, but all around them is: which cases and peers there are, what becomes of
replayed graphs and of what does not fit into memory, and the operators' signatures.
"""

import math
import subprocess
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import baselines
import bench_loss
import contest
import gpu
from baselines import Peer
from cases import OPERATIONS
from contest import Case, run_case
from reporting import Row, case_text
from summary import summary_text

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
INFO_NCE = OPERATIONS["queue_info_nce"]
SIZE = {"N": 32, "K": 1024, "C": 64}
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 24.50 GiB.")


def peers(size, dtype=torch.bfloat16) -> dict[str, Peer]:
    return {peer.name: peer for peer in INFO_NCE.peers(size, dtype, CUDA, quick=True)}


def run_with(peer: Peer, monkeypatch, **case) -> dict[str, Row]:
    """Rows of a small case on the CPU whose peers are eager and the one given."""
    eager = Peer("eager", baselines.info_nce_eager)
    monkeypatch.setattr(baselines, "info_nce_peers", lambda *_, **__: [eager, peer])
    rows = run_case(Case(INFO_NCE, SIZE, torch.float32, CPU, True, **case), quick=True)
    return {row.contestant: row for row in rows}


def failing_from(call: int):
    """Eager InfoNCE, which takes 32 MiB more, and finds none from its nth call on."""
    calls = []

    def function(*operands):
        calls.append(None)
        if len(calls) >= call:
            raise OUT_OF_MEMORY
        torch.ones(2**23)
        return baselines.info_nce_eager(*operands)

    return function


# --- which cases and peers there are


def test_cases_on_a_gpu_are_those_of_dense_contrast(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    flags = ["--device", "cuda", "--op", "queue_info_nce", "--peers", "eager"]
    flags += ["--dtype", "bfloat16", "float32"]
    _, cases = bench_loss.parse_flags(flags)
    assert {case.contestants for case in cases} == {("eager",)}
    assert [case.size["N"] for case in cases] == 2 * [256, 256, 256, 256, 12544, 100352]
    assert [case.dtype for case in cases] == 6 * [torch.bfloat16] + 6 * [torch.float32]
    assert all(case.backward for case in cases if case.size["N"] > 256)
    assert all(case.size["K"] == 65536 and case.size["C"] == 128 for case in cases)
    _, cases = bench_loss.parse_flags([*flags, "--graph", "--sizes", "N=256,K=65536,C=128"])
    names = [case.pass_name() for case in cases]
    assert names == 2 * ["forward graph", "forward+backward graph"]


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("dense_match", ["B=256 C=2048 S=49", "B=64 C=256 S=3136"]),
        ("covariance_loss", ["N=256 D=2048", "N=256 D=2048", "N=256 D=8192", "N=12544 D=2048"]),
        ("zca_whiten", ["N=256 D=2048 group=64", "N=256 D=2048 group=64"]),
    ],
)
def test_other_operators_are_timed_at_the_sizes_of_resnet_50(op, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    _, cases = bench_loss.parse_flags(["--device", "cuda", "--op", op])
    assert [case.shape() for case in cases] == expected
    assert cases[-1].backward == OPERATIONS[op].differentiable
    assert all(case.backward for case in cases[2:])


@pytest.mark.parametrize(
    ("rows", "splits"), [(256, (1, 16, 32, 64, 128)), (12544, (1, 2, 4, 8)), (100352, (1, 2, 4, 8))]
)
def test_attention_is_tried_with_the_queue_split_as_few_rows_need_it(rows, splits):
    found = peers({"N": rows, "K": 65536, "C": 128})
    for kernel in ("efficient", "flash", "cudnn"):
        for count in splits:
            name = f"attention ({kernel})" + (f", {count} splits" if count > 1 else "")
            assert found.pop(name).status == "ok"
    assert not [name for name in found if name.startswith("attention")]


@pytest.mark.filterwarnings("ignore:(?s).*CUDA is not available")  # autocast says
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peers_call_kernels_by_their_signatures(dtype):
    """On tensors without memory: names, arguments and shapes are checked, values are not."""
    ran = set()
    with FakeTensorMode(), torch.no_grad():
        query, key = torch.empty(2, 40, 32, device="cuda", dtype=dtype)
        queue = torch.empty(1024, 32, device="cuda", dtype=dtype)
        for name, peer in peers({"N": 40, "K": 1024, "C": 32}, dtype).items():
            if peer.function is None or name == "flex_attention":
                continue
            loss = peer.function(query, key, queue, 0.2)
            assert loss.shape == (40,) and loss.dtype == torch.float32, name
            assert loss.device.type == "cuda"
            ran.add(name.partition(",")[0])
    assert ran >= {"eager", "chunked", "attention (efficient)"}
    assert ("attention (flash)" in ran) == ("attention (cudnn)" in ran) == (dtype != torch.float32)


def test_eager_on_a_gpu_takes_its_products_in_16_bits_and_its_loss_in_float32():
    assert peers(SIZE)["eager"].function is baselines.info_nce_autocast
    assert peers(SIZE, torch.float32)["eager"].function is baselines.info_nce_eager
    inputs = INFO_NCE.inputs(SIZE, torch.bfloat16, CPU, seed=0)
    with torch.no_grad():
        loss = baselines.info_nce_autocast(*inputs.operands)
    wide = INFO_NCE.checker(inputs, backward=False)
    assert loss.dtype == torch.float32
    assert wide(contest.Outcome((loss,), None))["value"] < 5e-2  # logits were rounded


def test_chunks_take_any_rows():
    query, key, queue, *others = INFO_NCE.inputs(SIZE, torch.float32, CPU, seed=0).operands
    eager = baselines.info_nce_eager
    found = baselines.info_nce_chunked(query, key, queue, *others, eager=eager, chunk=5)
    torch.testing.assert_close(found, eager(query, key, queue, *others))


def test_a_row_says_when_it_measures_pytorch(monkeypatch):
    monkeypatch.setattr(contest, "has_kernel", lambda *_: False)
    rows = run_with(Peer("absent", status="missing"), monkeypatch)
    assert "PyTorch" in rows["medmoco"].note and "MEDMOCO_UNVERIFIED=1" in rows["medmoco"].note
    assert "MEDMOCO_UNVERIFIED=1" in summary_text(list(rows.values()))


# --- what does not fit into memory


@pytest.mark.parametrize("call", [1, 2, 3], ids=["checked", "weighed", "timed"])
def test_what_finds_no_memory_is_a_row_that_says_so(call, monkeypatch):
    rows = run_with(Peer("eager, large", failing_from(call)), monkeypatch)
    assert (rows["eager, large"].status, rows["eager, large"].note) == ("error", "out of memory")
    assert rows["eager, large"].median_ms is None
    assert rows["medmoco"].status == rows["eager"].status == "ok"
    assert rows["medmoco"].median_ms > 0 and rows["eager"].times_medmoco > 0
    assert "error: out of memory" in case_text(list(rows.values()))


def test_results_are_written_after_each_case(tmp_path, monkeypatch):
    file = tmp_path / "rows.csv"
    written = []

    def stops_after_two(case, *, quick):
        written.append(file.read_text().count("\n") if file.exists() else 0)
        if len(written) == 3:
            raise KeyboardInterrupt
        return [case.row(Peer("medmoco", status="n/a"))]

    monkeypatch.setattr(bench_loss, "run_case", stops_after_two)
    with pytest.raises(KeyboardInterrupt):
        bench_loss.main(["--quick", "--device", "cpu", "--csv", str(file)])
    assert written == [0, 2, 3]  # a line of names, then one a row


# --- graphs that are replayed


def record(call, device):
    """Stands in for a capture: what a call returned comes back with each replay's values."""
    result = call()

    def replay():
        for old, new in zip(result.tensors(), call().tensors(), strict=True):
            old.copy_(new)
        return result

    return replay


def test_graphs_are_captured_for_each_of_the_inputs_and_checked_when_replayed(monkeypatch):
    captured = []
    monkeypatch.setattr(
        contest, "captured", lambda call, device: captured.append(call) or record(call, device)
    )
    rows = run_with(Peer("same", baselines.info_nce_eager), monkeypatch, graph=True)
    assert len(captured) == 3 * 4  # contestants, sets of inputs
    for row in rows.values():
        assert row.status == "ok" and row.pass_name == "forward+backward graph"
        assert row.median_ms > 0 and row.value_error <= row.value_error_allowed
        assert row.peak_mib is None


def test_a_graph_that_is_replayed_wrongly_is_found(monkeypatch):
    def stale(call, device):
        result = call()
        result.values[0].zero_()
        return lambda: result

    monkeypatch.setattr(contest, "captured", stale)
    rows = run_with(Peer("same", baselines.info_nce_eager), monkeypatch, graph=True)
    assert {row.status for row in rows.values()} == {"FAILED"}


def test_what_a_graph_cannot_hold_is_a_row_that_says_so(monkeypatch):
    def refuse_one(call, device):
        if call.args[0] is refused:
            try:
                raise RuntimeError("operation not permitted when stream is capturing\nand more")
            finally:
                raise ValueError("what ends the capture fails, too")
        return record(call, device)

    monkeypatch.setattr(contest, "captured", refuse_one)
    refused = baselines.info_nce_chunked
    rows = run_with(Peer("chunked", refused), monkeypatch, graph=True)
    assert rows["chunked"].status == "n/a" and rows["medmoco"].status == "ok"
    expected = "cannot be captured: RuntimeError: operation not permitted when stream is capturing"
    assert rows["chunked"].note == expected


def test_medmoco_has_to_be_captured_where_it_has_a_kernel(monkeypatch):
    def refuse(call, device):
        raise RuntimeError("not permitted")

    monkeypatch.setattr(contest, "captured", refuse)
    rows = run_with(Peer("same", baselines.info_nce_eager), monkeypatch, graph=True)
    assert rows["medmoco"].status == "FAILED" and "cannot be captured" in rows["medmoco"].note


def test_a_capture_is_warmed_up_beside_the_current_stream_and_then_replayed(monkeypatch):
    events = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self):
            events.append("replay")

    fakes = {
        "device": lambda device: nullcontext(),
        "Stream": Stream,
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda: Stream("current"),
        "CUDAGraph": Graph,
        "graph": lambda graph, stream: nullcontext(events.append("capture")),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    replay = gpu.captured(lambda: events.append("call") or "result", CUDA)
    warm_ups = ["side waits for current", *gpu.WARM_UPS * ["call"]]
    assert events == [*warm_ups, "capture", "call", "current waits for side"]
    assert replay() == "result" and events[-1] == "replay"


# --- the floor and the summary


def test_exponentials_are_counted_by_the_clock(monkeypatch):
    properties = SimpleNamespace(multi_processor_count=132, uuid="12ab")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    commands = []

    def run(command, **_):
        commands.append(command)
        return SimpleNamespace(stdout="1980\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert gpu.exponentials_per_s(CUDA) == pytest.approx(16 * 132 * 1.98e9)
    assert commands[0][:3] == ("nvidia-smi", "--id=GPU-12ab", "--query-gpu=clocks.max.sm")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="[N/A]\n"))
    assert gpu.exponentials_per_s(CUDA) is None
    assert gpu.exponentials_per_s(CPU) is None


def row(contestant, times=None, **other) -> Row:
    described = ("cases", "queue_info_nce", "cuda", "bfloat16", "N=256", "forward", contestant)
    return Row(*described, **{"status": "ok", "times_medmoco": times, **other})


def test_the_summary_shows_the_best_of_each_peer():
    lines = summary_text(
        [
            row("medmoco", 1.0, median_ms=2.5, times_floor=1.75, peak_mib=3.0),
            row("eager", status="error", note="out of memory"),
            row("attention (flash)", 2.0),
            row("attention (flash), 8 splits", 1.25),
            row("attention (flash), 16 splits", 1.5),
            row("attention (cudnn)", 1.125),
        ]
    ).splitlines()
    assert len(lines) == 2
    heads, cells = (line.split("  ") for line in lines)
    heads, cells = ([cell.strip() for cell in line if cell.strip()] for line in (heads, cells))
    assert heads[-3:] == ["x eager", "x attention (flash)", "x attention (cudnn)"]
    assert cells[:4] == ["queue_info_nce N=256 bfloat16 forward", "2.500", "1.75", "3.0"]
    assert cells[-3:] == ["out of memory", "1.25 (8 splits)", "1.12"]


def test_the_floor_is_shown_with_its_parts():
    timed = row("medmoco", 1.0, floor_ms=0.5, product_floor_ms=0.5, copy_floor_ms=0.125)
    timed.product_gflop_per_s, timed.copy_gbyte_per_s = 8e5, 4e3
    timed.exponential_floor_ms = 0.25
    timed.median_ms = timed.p20_ms = timed.p80_ms = 1.0
    timed.value_error = math.ulp(1.0)
    text = case_text([timed])
    assert "floor 0.5000 ms (product 0.5000 at 800000 GFLOP/s" in text
    assert "exponentials 0.2500)" in text
