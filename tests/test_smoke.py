"""The checks that are made on a GPU before anything is timed, tried on the CPU's kernels."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import smoke
import smoke_behaviour
import smoke_info_nce
import smoke_large
from cases import OPERATIONS
from medmoco import ops
from smoke_behaviour import SUBJECTS

CPU = torch.device("cpu")
right = ops.queue_info_nce
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_kernels_of_the_cpu_pass_all_checks(capsys):
    status = smoke.main(["--device", "cpu", "--elements", "300000"])
    text = capsys.readouterr().out
    assert status == 0, text
    for name in (*OPERATIONS, "queue_info_nce_backward"):
        assert text.count(f"  {name} ") >= 3
    for name in SUBJECTS:
        for part in ("30 repeats give the same bits", "torch.compile(fullgraph)", "autocast"):
            assert f"  {name}: {part}" in text
    for name in OPERATIONS:
        for part in ("shapes", "large") if name != "queue_info_nce" else ():
            assert f"  {name}{', ' if part == 'large' else ' '}" in text
    for part in ("batch of more", "queue of more"):
        assert part in text


def test_parts_are_run_as_asked(capsys):
    assert smoke.main(["--device", "cpu", "--part", "large", "--elements", "200000"]) == 0
    text = capsys.readouterr().out
    assert "batch of more than 200000 elements: ok" in text and "1x1x1" not in text


def drops_a_key(query, key, queue, *others):
    return right(query, key, queue[1:], *others)  # only without ids


def counts_one_too_many(*operands):
    loss, rank = right(*operands)
    return loss, rank + 2


def reads_beside_the_rows(query, key, queue, *others):
    below = torch.as_strided(queue, (1, queue.shape[1]), queue.stride(), queue.storage_offset())
    if queue.stride(0) != queue.shape[1]:
        below = torch.as_strided(queue, (1, 1), (1, 1), queue.storage_offset() - 1)
    loss, rank = right(query, key, queue, *others)
    return loss + 0 * below.sum(), rank


@pytest.mark.parametrize(
    ("wrong", "shape", "message"),
    [
        (drops_a_key, (17, 33, 8), "plain: loss is off by"),
        (counts_one_too_many, (17, 33, 8), "plain: rank is off by"),
        (reads_beside_the_rows, (17, 33, 8), "offset: loss is off by nan"),
    ],
)
def test_a_wrong_kernel_is_found(wrong, shape, message, monkeypatch):
    monkeypatch.setattr(smoke_info_nce, "queue_info_nce", wrong)
    with pytest.raises(AssertionError, match=message):
        smoke_info_nce._check_shape(shape, "float32", CPU)


def test_a_wrong_gradient_is_found(monkeypatch):
    def wrong(query, *others):
        return right(query * 1.0001, *others)

    monkeypatch.setattr(smoke_info_nce, "queue_info_nce", wrong)
    with pytest.raises(AssertionError, match=r"plain: (loss|grad_query) is off by"):
        smoke_info_nce._check_shape((65, 300, 20), "float32", CPU)


def test_a_failure_is_named_and_the_others_go_on(monkeypatch, capsys):
    monkeypatch.setattr(smoke_info_nce, "queue_info_nce", counts_one_too_many)
    assert smoke.main(["--device", "cpu", "--part", "shapes"]) == 1
    text = capsys.readouterr().out
    assert "queue_info_nce 17x33x8 float32: FAILED: AssertionError: plain: rank is off" in text
    assert "queue_info_nce 0x5x8 float32: ok" in text  # no row is wrong
    assert "zca_whiten N=40 D=36 group=12 float32: ok" in text
    assert text.splitlines()[-1].startswith("FAILED: queue_info_nce 1x1x1 float32, ")


def every_subject(test):
    return pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)(test)


def replace(monkeypatch, subject, wrong):
    """The operator by wrong(values, operands), its own outputs and what it was called with."""
    correct = getattr(ops, subject.op)

    def function(*operands):
        values = correct(*operands)
        changed = wrong(values if isinstance(values, tuple) else (values,), operands)
        return changed if len(changed) > 1 else changed[0]

    monkeypatch.setattr(ops, subject.op, function)


def test_every_operator_is_looked_at_in_its_behaviour_and_on_large_operands():
    assert {subject.op for subject in SUBJECTS.values()} == set(OPERATIONS)
    for name in OPERATIONS:
        checks = smoke_info_nce if name == "queue_info_nce" else smoke_large
        named = () if checks is smoke_info_nce else (name,)
        assert list(checks.large_checks(*named, CPU, 2**31))


@every_subject
def test_bits_that_change_are_found(subject, monkeypatch):
    calls = []

    def changes(values, operands):
        calls.append(None)
        return (values[0] + (len(calls) == 20), *values[1:])

    replace(monkeypatch, subject, changes)
    with pytest.raises(AssertionError, match=f"{subject.outputs[0]} differs in repeat 19"):
        smoke_behaviour._check_repeats(subject, torch.float32, CPU)


@every_subject
def test_what_autocast_should_have_cast_is_found(subject, monkeypatch):
    def looks_at_the_dtype(values, operands):
        return (values[0] + (operands[0].dtype == torch.bfloat16), *values[1:])

    replace(monkeypatch, subject, looks_at_the_dtype)
    with pytest.raises(AssertionError, match=f"{subject.outputs[0]} differs under autocast"):
        smoke_behaviour._check_autocast(subject, CPU)


def test_a_graph_break_is_found(monkeypatch):
    def breaks(values, operands):
        torch._dynamo.graph_break()
        return values

    replace(monkeypatch, SUBJECTS["zca_whiten"], breaks)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        smoke_behaviour._check_compiled(SUBJECTS["zca_whiten"], CPU)


@every_subject
@pytest.mark.parametrize("stale", [False, True])
def test_a_graph_has_to_see_new_operands(stale, subject, monkeypatch):
    def captured(call, device):
        first = call()
        return (lambda: first) if stale else call

    monkeypatch.setattr(smoke_behaviour, "captured", captured)
    differs = pytest.raises(AssertionError, match=f"{subject.outputs[0]} differs")
    with differs if stale else nullcontext():
        smoke_behaviour._check_graph(subject, CPU)


@every_subject
@pytest.mark.parametrize("late", [False, True])
def test_a_side_stream_has_to_be_kept_to(late, subject, monkeypatch):
    before = [tensor.clone() for tensor in subject.operands(torch.bfloat16, CPU, 0)]
    fakes = {
        "synchronize": lambda device: None,
        "Stream": lambda device: None,
        "stream": lambda stream: nullcontext(),
        "_sleep": lambda clocks: None,
        "current_stream": lambda device: SimpleNamespace(synchronize=lambda: None),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    calls, correct = [], getattr(ops, subject.op)

    def reads_early(*operands):
        calls.append(None)
        first = before[0] + 0 * operands[0] if len(calls) == 2 else operands[0]
        return correct(first, *operands[1:])

    if late:
        monkeypatch.setattr(ops, subject.op, reads_early)
    differs = pytest.raises(AssertionError, match="on a side stream")
    with differs if late else nullcontext():
        smoke_behaviour._check_stream(subject, CPU)


@pytest.mark.parametrize(
    ("op", "wrong", "message"),
    [
        ("dense_match", lambda v: (v[0] % 40, v[1]), "the cosine at the index is off"),
        ("dense_match", lambda v: (v[0], v[1] * 1.01), "similarity is off"),
        ("dense_match", lambda v: (v[0] + 1000, v[1]), "an index is out of range"),
        ("covariance_loss", lambda v: (v[0] * 1.01,), "loss is off"),
        ("covariance_loss", lambda v: (1.1 * v[0] - 0.1 * v[0].detach(),), "gradient is off"),
        ("zca_whiten", lambda v: (v[0] * 1.1, *v[1:]), "whitened is off"),
        ("zca_whiten", lambda v: (1.1 * v[0] - 0.1 * v[0].detach(), *v[1:]), "gradient is off"),
        ("zca_whiten", lambda v: (*v[:2], v[2] * 1.01), "matrix is off"),
    ],
)
def test_a_wrong_result_on_large_operands_is_found(op, wrong, message, monkeypatch):
    correct = getattr(ops, op)

    def function(*operands):
        values = correct(*operands)
        changed = wrong(values if isinstance(values, tuple) else (values,))
        return changed if len(changed) > 1 else changed[0]

    monkeypatch.setattr(smoke_large, op, function)
    for _, check in smoke_large.large_checks(op, CPU, 200000):
        with pytest.raises(AssertionError, match=message):
            check()


def test_a_key_beyond_the_range_of_a_kernel_is_missed(monkeypatch):
    def reads_the_first_keys(query_map, key_map):
        return ops.dense_match(query_map, key_map[:, :, :-1])

    monkeypatch.setattr(smoke_large, "dense_match", reads_the_first_keys)
    with pytest.raises(AssertionError, match="the last key is not found"):
        smoke_large._check_key_positions(CPU, 200000)


@pytest.mark.parametrize("part", ["shapes", "behaviour", "large"])
def test_operators_without_a_kernel_are_left_out(part, monkeypatch, capsys):
    monkeypatch.setattr(smoke, "registered", lambda device: ["dense_match"])
    assert smoke.main(["--device", "cpu", "--part", part, "--elements", "200000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "kernels on cpu: dense_match" and lines[-1] == "all ok"
    assert len(lines) > 4 and all(line.startswith("  dense_match") for line in lines[1:-1])


def test_what_does_not_fit_into_memory_is_left_out_visibly(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20e9, 80e9))
    cuda = torch.device("cuda")
    for name, check in smoke_info_nce.large_checks(cuda, 2**31):
        if "batch" in name:
            assert smoke._passes(name, check)
    assert "left out: 20 GB are free, 34 needed" in capsys.readouterr().out
    for name, check in smoke_large.large_checks("zca_whiten", cuda, 2**31):
        assert smoke._passes(name, check)
    assert "left out: 20 GB are free, 26 needed" in capsys.readouterr().out


def test_no_kernel_is_a_failure(monkeypatch, capsys):
    monkeypatch.setattr(smoke, "registered", lambda device: [])
    assert smoke.main(["--device", "cpu"]) == 1
    assert "MEDMOCO_UNVERIFIED=1" in capsys.readouterr().out


@no_gpu
def test_a_missing_gpu_is_named(capsys):
    with pytest.raises(SystemExit) as stopped:
        smoke.main([])
    assert stopped.value.code == 2
    assert "torch sees no GPU" in capsys.readouterr().err
