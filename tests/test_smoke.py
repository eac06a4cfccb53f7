"""The checks that are made on a GPU before anything is timed, tried on the CPU's kernels."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import smoke
import smoke_info_nce
from cases import OPERATIONS
from medmoco import ops

CPU = torch.device("cpu")
right = ops.queue_info_nce
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_kernels_of_the_cpu_pass_all_checks(capsys):
    status = smoke.main(["--device", "cpu", "--elements", "300000"])
    text = capsys.readouterr().out
    assert status == 0, text
    for name in (*OPERATIONS, "queue_info_nce_backward"):
        assert text.count(f"  {name} ") >= 3
    for part in ("repeats give the same bits", "fullgraph", "batch of more", "queue of more"):
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


def test_bits_that_change_are_found(monkeypatch):
    calls = []

    def changes(*operands):
        calls.append(None)
        loss, rank = right(*operands)
        return loss * (1 + 1e-7 * (len(calls) == 20)), rank

    monkeypatch.setattr(smoke_info_nce, "queue_info_nce", changes)
    with pytest.raises(AssertionError, match="in repeat 19"):
        smoke_info_nce._check_repeats("float32", CPU)


@pytest.mark.parametrize("stale", [False, True])
def test_a_graph_has_to_see_new_operands(stale, monkeypatch):
    def captured(call, device):
        first = call()
        return (lambda: first) if stale else call

    monkeypatch.setattr(smoke_info_nce, "captured", captured)
    with pytest.raises(AssertionError, match="loss differs") if stale else nullcontext():
        smoke_info_nce._check_graph(CPU)


@pytest.mark.parametrize("late", [False, True])
def test_a_side_stream_has_to_be_kept_to(late, monkeypatch):
    before = [t.clone() for t in smoke_info_nce.operands((70, 900, 64), torch.bfloat16, 0)]
    fakes = {
        "synchronize": lambda device: None,
        "Stream": lambda device: None,
        "stream": lambda stream: nullcontext(),
        "_sleep": lambda clocks: None,
        "current_stream": lambda device: SimpleNamespace(synchronize=lambda: None),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    calls = []

    def reads_early(query, key, queue, *others):
        calls.append(None)
        if len(calls) == 2:
            queue = before[2]
        return right(query, key, queue, *others)

    if late:
        monkeypatch.setattr(smoke_info_nce, "queue_info_nce", reads_early)
    with pytest.raises(AssertionError, match="on a side stream") if late else nullcontext():
        smoke_info_nce._check_stream(CPU)


def test_what_does_not_fit_into_memory_is_left_out_visibly(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20e9, 80e9))
    cuda = torch.device("cuda")
    for name, check in smoke_info_nce.large_checks(cuda, 2**31):
        if "batch" in name:
            assert smoke._passes(name, check)
    assert "left out: 20 GB are free, 34 needed" in capsys.readouterr().out


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
