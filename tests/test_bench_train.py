"""The benchmark of the training step: what it compares, measures and writes."""

import csv
import importlib
import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bench_train
import train_contest
import training
from medmoco.models import local_loss, moco, whitening
from train_contest import ENCODERS, run_case
from training import OPERATORS, TrainCase, Trainer, eager_operators

CPU = torch.device("cpu")
QUICK = ["--quick", "--device", "cpu"]
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 24.50 GiB.")


def small(method: str) -> TrainCase:
    return TrainCase(method, "resnet18", 0.125, 32, 8, 16, 64, CPU, torch.float32)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder that a quick run wrote."""
    folder = tmp_path_factory.mktemp("train")
    files = [f"--{kind}={folder}/train.{kind}" for kind in ("csv", "json")]
    assert bench_train.main([*QUICK, *files]) == 0
    return folder


@pytest.fixture(scope="module")
def rows(written) -> list[dict]:
    return json.loads((written / "train.json").read_text())["rows"]


def test_every_method_is_timed_with_our_operators_and_with_eager_ones(rows):
    timed = [(row["method"], row["contestant"]) for row in rows if row["median_ms"] > 0]
    contestants = ("medmoco", "eager", "encoders alone")
    assert timed == [(method, name) for method in OPERATORS for name in contestants]
    for row in rows:
        assert (row["status"], row["note"]) == ("ok", "")
        assert row["repeats"] >= 3 and row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]


def test_figures_follow_from_the_times(rows):
    medians = {(row["method"], row["contestant"]): row["median_ms"] for row in rows}
    for row in rows:
        assert row["images_per_s"] == pytest.approx(16 / row["median_ms"] * 1e3)
        ours, encoders = medians[row["method"], "medmoco"], medians[row["method"], ENCODERS]
        assert row["times_medmoco"] == pytest.approx(row["median_ms"] / ours)
        if row["contestant"] == ENCODERS:
            assert row["outside_encoders"] is None
        else:
            share = 1 - encoders / row["median_ms"]
            assert row["outside_encoders"] == pytest.approx(share)


def test_memory_between_steps_and_beyond_is_told(rows):
    assert all(row["peak_mib"] > 0 for row in rows)
    # Two encoders and heads, gradients and momentum of one, two queues of 256 x 128.
    held = {row["method"]: row["held_mib"] for row in rows}
    assert held["densecl"] > held["mocov2"] + 256 * 128 * 4 / 2**20


def test_both_give_the_same_loss_on_the_first_step(rows):
    for row in rows:
        if row["contestant"] == "medmoco":
            eager = next(
                r for r in rows if (r["method"], r["contestant"]) == (row["method"], "eager")
            )
            assert row["loss"] == pytest.approx(eager["loss"], rel=1e-5)
            assert row["loss_error"] <= row["loss_error_allowed"] == 1e-4
            assert row["gradient_error"] <= row["gradient_error_allowed"] == 1e-3


def test_csv_holds_the_same_rows_with_the_environment(written, rows):
    with (written / "train.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows) and set(rows[0]) < set(lines[0])
    for line, row in zip(lines, rows, strict=True):
        assert line["contestant"] == row["contestant"] and line["torch"] == torch.__version__
        assert float(line["median_ms"]) == row["median_ms"]


@pytest.mark.parametrize("method", OPERATORS)
def test_operators_run_on_one_side_alone(method):
    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            if function.namespace == "medmoco":
                called.add(function._schema.name.removeprefix("medmoco::"))
            return function(*arguments, **(keywords or {}))

    trainer = Trainer(small(method))
    called: set[str] = set()
    with Spy(), eager_operators():
        trainer.step(0)
    assert called == set()
    with Spy():
        trainer.step(0)
    assert {name for name in called if not name.endswith("_backward")} == set(OPERATORS[method])


def test_steps_leave_the_weights_and_move_the_queues():
    trainer = Trainer(small("densecl"))
    weights = [tensor.clone() for tensor in trainer.model.query.parameters()]
    for number in range(2):
        trainer.step(number)
    assert all(map(torch.equal, weights, trainer.model.query.parameters()))
    for queue in (trainer.model.queue, trainer.model.local_queue):
        assert queue.cursor == 64 + 2 * 16 and queue.ids[:32].tolist() == list(range(32))


def drops_a_key(right):
    return lambda query, key, queue, t, ids, queue_ids: right(
        query, key, queue[1:], t, ids, queue_ids[1:]
    )


def doubles_the_gradient(right):
    def wrong(*operands):
        loss, rank = right(*operands)
        return 2 * loss - loss.detach(), rank

    return wrong


@pytest.mark.parametrize(
    ("method", "module", "op", "wrong"),
    [
        ("mocov2", moco, "queue_info_nce", drops_a_key),
        ("mocov2", moco, "queue_info_nce", doubles_the_gradient),
        ("densecl", local_loss, "queue_info_nce", drops_a_key),
        ("densecl", local_loss, "dense_match", lambda right: lambda a, b: (right(a, b)[0] * 0, 0)),
        ("medmoco", whitening, "zca_whiten", lambda right: lambda x, *a: (x, *right(x, *a)[1:])),
        ("medmoco", whitening, "zca_whiten", lambda right: lambda x, *a: right(x * torch.nan, *a)),
    ],
)
def test_a_broken_operator_is_found_before_it_is_timed(
    method, module, op, wrong, monkeypatch, capsys
):
    monkeypatch.setattr(module, op, wrong(getattr(module, op)))
    assert bench_train.main([*QUICK, "--queue-size", "64", "--methods", method]) == 1
    captured = capsys.readouterr()
    assert f"FAILED: {method}: " in captured.err and " allowed" in captured.err
    ours = next(line for line in captured.out.splitlines() if line.startswith("  medmoco "))
    assert "FAILED" in ours and "[" not in ours


def test_an_operator_that_raises_fails_and_the_others_are_timed(monkeypatch):
    def raises(*_):
        raise RuntimeError("an illegal memory access\nand more")

    monkeypatch.setattr(moco, "queue_info_nce", raises)
    ours, eager, encoders = run_case(small("mocov2"), seconds=0)
    assert (ours.status, ours.note) == ("FAILED", "RuntimeError: an illegal memory access")
    assert eager.median_ms > 0 and encoders.median_ms > 0 and eager.times_medmoco is None


@pytest.mark.parametrize("call", [1, 2, 4], ids=["checked", "weighed", "timed"])
def test_eager_without_memory_is_a_row_that_says_so(call, monkeypatch, capsys):
    module = importlib.import_module("medmoco.ops.queue_info_nce")
    right, calls = module.queue_info_nce_reference, []

    def needs_too_much(*operands):
        calls.append(torch.ones(2**23))  # so that it is the one that needs most
        if len(calls) >= call:
            raise OUT_OF_MEMORY
        return right(*operands)

    monkeypatch.setattr(module, "queue_info_nce_reference", needs_too_much)
    assert bench_train.main([*QUICK, "--methods", "mocov2"]) == 0
    text = capsys.readouterr().out
    assert "eager           error: out of memory" in text
    assert text.splitlines()[-1].endswith("out of memory")
    assert ("unchecked, as eager could not run" in text) == (call == 1)


def test_a_model_without_memory_is_rows_that_say_so(monkeypatch):
    def build_model(config):
        raise OUT_OF_MEMORY

    monkeypatch.setattr(training, "build_model", build_model)
    found = run_case(small("medmoco"), seconds=0)
    assert {(row.status, row.note) for row in found} == {("error", "out of memory")}


def test_a_row_says_what_runs_in_pytorch(monkeypatch):
    monkeypatch.setattr(train_contest, "has_kernel", lambda name, device: name != "zca_whiten")
    ours, *_ = run_case(small("medmoco"), seconds=0)
    assert ours.note == "zca_whiten in PyTorch; see MEDMOCO_UNVERIFIED=1" and ours.median_ms > 0


def test_defaults_are_those_of_a_large_training():
    _, cases = bench_train.parse_flags(["--device", "cpu", "--dtype", "bfloat16"])
    assert [case.method for case in cases] == list(OPERATORS)
    for case in cases:
        assert (case.arch, case.width, case.output_stride) == ("resnet50", 1.0, 32)
        assert (case.image_size, case.batch_size, case.queue_size) == (224, 256, 65536)
        assert case.config().amp_dtype == "bfloat16"
    _, (case,) = bench_train.parse_flags([*QUICK, "--methods", "densecl", "--output-stride", "4"])
    assert (case.output_stride, case.image_size) == (4, 32)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--methods paper", "invalid choice: 'paper'"),
        ("--arch vit", "invalid choice: 'vit'"),
        ("--output-stride 2", "invalid choice: 2"),
        ("--batch-size 4", "medmoco: --batch-size 4: whitening needs at least 8 slices, got 4"),
        ("--batch-size 0", "--batch-size: expected at least 2, got 0"),
        ("--image-size 3", "--image-size: expected at least 4, got 3"),
        ("--queue-size 0", "--queue-size: expected at least 1, got 0"),
        ("--width 0", "width must be above 0 and at most 16, got 0.0"),
        ("--threads 0", "--threads: expected at least 1, got 0"),
        ("--dtype float16", "invalid choice: 'float16'"),
        ("--device tpu", "--device: expected cpu or cuda, got tpu"),
        ("--csv no/such/folder/x.csv", "--csv: expected a file in an existing folder"),
    ],
)
def test_flags_that_make_no_sense_are_named(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_train.parse_flags(["--quick", *flags.split()])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
