"""The benchmark of the operators: what it checks, measures and writes."""

import csv
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import cross_entropy, normalize

import baselines
import bench_loss
from attention import info_nce_flex
from cases import OPERATIONS
from contest import Case, run_case
from medmoco import ops
from medmoco._C import build_info
from reporting import Row

ROOT = Path(__file__).resolve().parents[1]
SCHEMAS = re.findall(r'"(\w+)\(Tensor', (ROOT / "csrc/medmoco.cpp").read_text())
OPERATORS = {name for name in SCHEMAS if not name.endswith("_backward")}
CPU = torch.device("cpu")


def quick_rows(op: str, capsys, *peers: str) -> tuple[int, str]:
    """Exit status and output of a quick run of one operator beside these peers."""
    status = bench_loss.main(["--quick", "--device", "cpu", "--op", op, "--peers", *peers])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The folder that a quick run of everything wrote, and what it printed."""
    folder = tmp_path_factory.mktemp("bench")
    files = [f"--{kind}={folder}/quick.{kind}" for kind in ("csv", "json")]
    command = [sys.executable, "benchmarks/bench_loss.py", "--quick", "--device=cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    result = subprocess.run(
        [*command, "--threads=2", *files, f"--plot={folder}/scaling.png"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, result.stdout


@pytest.fixture(scope="module")
def rows(quick) -> list[dict]:
    return json.loads((quick[0] / "quick.json").read_text())["rows"]


def test_only_the_files_asked_for_are_written(quick):
    assert sorted(path.name for path in quick[0].iterdir()) == [
        "quick.csv",
        "quick.json",
        "scaling.png",
    ]
    assert (quick[0] / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_every_operator_is_benchmarked_in_every_pass(rows):
    assert set(OPERATIONS) >= OPERATORS
    timed = {
        (row["op"], row["pass_name"])
        for row in rows
        if row["contestant"] == "medmoco" and row["median_ms"] > 0
    }
    for name, operation in OPERATIONS.items():
        assert (name, "forward") in timed
        assert ((name, "forward+backward") in timed) == operation.differentiable


def test_peers_agree_with_float64_or_say_why_not(rows):
    for row in rows:
        assert row["status"] in ("ok", "missing", "n/a"), row
        assert (row["status"] == "ok") == (row["note"] == ""), row
        if row["status"] == "ok":
            assert row["value_error"] <= row["value_error_allowed"]
            assert (row["gradient_error"] is None) == (row["pass_name"] == "forward")
            assert row["repeats"] >= 3


def test_ratios_follow_from_the_times(rows):
    ours = {
        (row["part"], row["op"], row["shape"], row["pass_name"]): row["median_ms"]
        for row in rows
        if row["contestant"] == "medmoco"
    }
    for row in rows:
        if row["status"] != "ok":
            continue
        case = (row["part"], row["op"], row["shape"], row["pass_name"])
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["times_medmoco"] == pytest.approx(row["median_ms"] / ours[case])
        assert row["times_floor"] == pytest.approx(row["median_ms"] / row["floor_ms"])
        shares = (
            row["gflop_per_s"] / row["product_gflop_per_s"],
            row["gbyte_per_s"] / row["copy_gbyte_per_s"],
        )
        assert row["times_floor"] == pytest.approx(1 / max(shares))


def test_rates_are_of_the_least_work_and_of_inputs_outputs_and_gradients_once(rows):
    work = next(
        row
        for row in rows
        if (row["op"], row["contestant"], row["pass_name"], row["shape"])
        == ("covariance_loss", "eager", "forward+backward", "N=32 D=128")
    )
    seconds = work["median_ms"] / 1e3
    assert work["gflop_per_s"] * 1e9 * seconds == pytest.approx(3 * 32 * 32 * 128)
    # Features and their gradient, and the loss and what comes back to it.
    assert work["gbyte_per_s"] * 1e9 * seconds == pytest.approx(4 * (2 * 32 * 128 + 2))


def test_the_largest_sizes_are_run_in_the_last_pass_alone():
    _, cases = bench_loss.parse_flags(["--op", "covariance_loss", "--device", "cpu"])
    passes = [(case.shape(), case.backward) for case in cases]
    assert passes[-1] == ("N=256 D=8192", True) and len(passes) == len(set(passes)) == 5


def test_csv_holds_the_same_rows_with_the_environment(quick, rows):
    with (quick[0] / "quick.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows)
    assert list(rows[0]) == [field.name for field in dataclasses.fields(Row)]
    for line, row in zip(lines, rows, strict=True):
        assert line["contestant"] == row["contestant"]
        assert line["torch"] == torch.__version__
        if row["status"] == "ok":
            assert float(line["median_ms"]) == row["median_ms"]


def test_results_say_where_they_come_from(quick):
    environment = json.loads((quick[0] / "quick.json").read_text())["environment"]
    assert environment["threads"] == 2
    assert environment["cpu_kernels"] == build_info()["cpu_kernels"]
    assert environment["command"].startswith("python benchmarks/bench_loss.py --quick")
    assert environment["torch"] == torch.__version__
    assert environment["device_name"] and environment["commit"] and environment["date"]


def test_the_table_names_what_is_missing(quick, monkeypatch, capsys):
    packages = ("flash-attn", "liger-kernel", "cut-cross-entropy")
    monkeypatch.setattr(baselines, "find_spec", lambda module: None)
    _, text = quick_rows("queue_info_nce", capsys, *packages)
    assert "missing: flash-attn (not installed); liger-kernel (not installed)" in text
    monkeypatch.setattr(baselines, "find_spec", lambda module: object())
    _, text = quick_rows("queue_info_nce", capsys, *packages)
    assert "missing" not in text
    assert "flash-attn (needs CUDA)" in " ".join(text.split())


def test_ids_are_no_case_for_plain_attention(rows):
    absent = {row["contestant"] for row in rows if "ids" in row["shape"] and row["status"] == "n/a"}
    assert {"attention", "attention, 8 splits"} <= absent


@pytest.mark.parametrize(
    ("op", "wrong"),
    [
        ("covariance_loss", lambda right: lambda features: right(features) * 1.0001),
        ("zca_whiten", lambda right: lambda features, *a: right(features.detach() * 2, *a)),
        ("dense_match", lambda right: lambda a, b: (right(a, b)[0] * 0, right(a, b)[1])),
        ("queue_info_nce", lambda right: lambda *a: (right(*a)[0], right(*a)[1] + 2)),
        ("queue_info_nce", lambda right: lambda *a: (right(*a)[0] * torch.nan, right(*a)[1])),
    ],
)
def test_a_wrong_operator_is_found_before_it_is_timed(op, wrong, monkeypatch, capsys):
    monkeypatch.setattr(ops, op, wrong(getattr(ops, op)))
    status, text = quick_rows(op, capsys, "eager")
    assert status == 1
    line = next(line for line in text.splitlines() if line.strip().startswith("medmoco  "))
    assert "FAILED" in line and "[" not in line
    assert f"FAILED: {op}" in text


def test_an_error_that_is_no_number_can_be_written(tmp_path, monkeypatch, capsys):
    right = ops.covariance_loss
    monkeypatch.setattr(ops, "covariance_loss", lambda features: right(features) * torch.nan)
    file = tmp_path / "rows.json"
    flags = ["--quick", "--op", "covariance_loss", "--peers", "eager", "--device", "cpu"]
    assert bench_loss.main([*flags, "--json", str(file)]) == 1
    ours, *_ = json.loads(file.read_text())["rows"]
    assert ours["status"] == "FAILED" and ours["value_error"] == "nan"


def test_a_wrong_gradient_is_found(monkeypatch):
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, grad):
            return 1.001 * grad

    right = ops.covariance_loss
    monkeypatch.setattr(ops, "covariance_loss", lambda features: Doubled.apply(right(features)))
    case = Case(OPERATIONS["covariance_loss"], {"N": 32, "D": 128}, torch.float32, CPU, True)
    ours, eager, *_ = run_case(case, quick=True)
    assert ours.status == "FAILED" and "gradient error 1.0e-03" in ours.note
    assert ours.median_ms is None and ours.value_error < 1e-5
    assert eager.status == "ok" and eager.times_medmoco is None


def test_a_peer_that_raises_is_shown_with_its_error(monkeypatch, capsys):
    def raises(*_):
        raise ValueError("no such kernel\nand more")

    peer = baselines.Peer("broken", raises)
    monkeypatch.setattr(baselines, "match_peers", lambda *, quick: [peer])
    status, text = quick_rows("dense_match", capsys, "broken")
    assert status == 0
    assert re.search(r"broken +error: ValueError: no such kernel\n", text)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("op", OPERATIONS)
def test_16_bit_operands_pass_the_check(op, dtype):
    operation = OPERATIONS[op]
    size = operation.quick_sizes[0]
    for backward in operation.passes():
        rows = run_case(Case(operation, size, getattr(torch, dtype), CPU, backward), quick=True)
        assert {row.status for row in rows} <= {"ok", "missing", "n/a"}, rows


@pytest.mark.parametrize(
    ("op", "size", "forward", "backward"),
    [
        ("queue_info_nce", {"N": 2, "K": 3, "C": 5}, 60, 120),  # one product, then another
        ("dense_match", {"B": 2, "C": 3, "S": 5}, 300, None),
        ("covariance_loss", {"N": 3, "D": 10}, 90, 270),  # half of a 3 x 3 product, then a whole
        ("covariance_loss", {"N": 10, "D": 3}, 90, 270),
        ("zca_whiten", {"N": 5, "D": 4, "group": 2}, 120, 360),
    ],
)
def test_least_work_worked_out_by_hand(op, size, forward, backward):
    operation = OPERATIONS[op]
    assert operation.flop(size, backward=False) == forward
    if backward is not None:
        assert operation.flop(size, backward=True) == backward


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("with_ids", [False, True])
def test_flex_attention_computes_the_same_loss(with_ids):
    operation = OPERATIONS["queue_info_nce"]
    size = {"N": 6, "K": 40, "C": 16} | ({"ids": 1} if with_ids else {})
    inputs = operation.inputs(size, torch.float32, CPU, seed=0)
    with torch.no_grad():
        found = info_nce_flex(*inputs.operands, flex=flex_attention)
        expected = baselines.info_nce_eager(*inputs.operands)
    torch.testing.assert_close(found, expected)


def test_cross_entropy_over_the_queue_gives_the_loss():
    query, key, queue = (normalize(torch.randn(n, 8)) for n in (5, 5, 30))
    over_queue = cross_entropy(query @ queue.T / 0.1, torch.zeros(5).long(), reduction="none")
    found = baselines.from_cross_entropy(over_queue, query, key, queue, 0.1)
    torch.testing.assert_close(found, baselines.info_nce_eager(query, key, queue, 0.1))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--sizes N=8,D=8", "--sizes: expected a single --op, got queue_info_nce dense_match"),
        ("--op covariance_loss --sizes N=8", "covariance_loss takes N=...,D=..., got 'N=8'"),
        ("--op covariance_loss --sizes N=8,D=8,D=9", "got 'N=8,D=8,D=9'"),
        ("--op covariance_loss --sizes N=8,D=x", "sizes must be whole numbers, got 'N=8,D=x'"),
        ("--op covariance_loss --sizes N=1,D=8", "expected at least 2 samples, got N=1"),
        ("--op dense_match --sizes B=0,C=2,S=3", "expected sizes of at least 1, got B=0"),
        ("--op zca_whiten --sizes N=8,D=8,group=3", "group must divide D, got D=8 and group=3"),
        ("--op queue_info_nce --sizes N=8,K=8", "takes N=...,K=...,C=... (optionally ids=1)"),
        ("--op queue_info_nce --sizes N=8,K=8,C=8,ids=2", "got ids=2"),
        ("--op conv2d", "invalid choice: 'conv2d'"),
        ("--dtype int8", "invalid choice: 'int8'"),
        ("--device tpu", "--device: expected cpu or cuda, got tpu"),
        ("--device cuda:99", "--device: torch sees no cuda:99"),
        ("--threads 0", "--threads: expected at least 1, got 0"),
        ("--json no/such/folder/x.json", "--json: expected a file in an existing folder"),
        ("--plot x.jpg", "--plot: expected a name that ends in .png, got x.jpg"),
        ("--plot x.png --dtype float32 bfloat16", "--plot: expected a single --dtype"),
        ("--graph --device cpu", "--graph: expected --device cuda, got cpu"),
    ],
)
def test_flags_that_make_no_sense_are_named(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_loss.main(flags.split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
