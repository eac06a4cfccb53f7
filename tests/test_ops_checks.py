"""Every wrong argument is named in a message that says what was expected and what came."""

import importlib

import pytest
import torch

from medmoco.ops import (
    covariance_loss,
    dense_match,
    iternorm_whiten,
    queue_info_nce,
    zca_whiten,
)

raw = torch.ops.medmoco.queue_info_nce
raw_backward = torch.ops.medmoco.queue_info_nce_backward
queue_info_nce_module = importlib.import_module("medmoco.ops.queue_info_nce")


def queue_info_nce_arguments(device: str) -> dict[str, object]:
    """Of the raw forward and backward operators, all in order."""
    ones = torch.ones(4, 5, device=device)
    return {
        "query": ones,
        "key": ones,
        "queue": torch.ones(7, 5, device=device),
        "temperature": 0.2,
        "query_ids": torch.arange(4, device=device),
        "queue_ids": torch.arange(7, device=device),
        "grad_loss": ones[:, 0],
        "loss": ones[:, 0],
        "direction": ones,
    }


FORWARD = ("query", "key", "queue", "temperature", "query_ids", "queue_ids")
BACKWARD = ("grad_loss", "query", "loss", "direction", "temperature")
WRONG_FORWARD = [
    ({"query": lambda t: t[0]}, "query must be (batch, embed_dim), got (5,)"),
    ({"query": lambda t: t[0, 0]}, "query must be (batch, embed_dim), got ()"),
    (
        {"query": lambda t: t.int()},
        "query must be float32, float64, bfloat16 or float16, got int32",
    ),
    (
        {"query": lambda t: t.cfloat()},
        "query must be float32, float64, bfloat16 or float16, got complex64",
    ),
    (
        {"query": lambda t: t.to(torch.float8_e4m3fn)},
        "query must be float32, float64, bfloat16 or float16, got float8_e4m3fn",
    ),
    ({"key": lambda t: t[:3]}, "key must be (4, 5) to match query, got (3, 5)"),
    ({"key": lambda t: t[:, :4]}, "key must be (4, 5) to match query, got (4, 4)"),
    ({"key": lambda t: t.double()}, "key must be float32 to match query, got float64"),
    ({"queue": lambda t: t[:, :3]}, "queue must be (queue_size, 5) to match query, got (7, 3)"),
    ({"queue": lambda t: t[None]}, "queue must be (queue_size, 5) to match query, got (1, 7, 5)"),
    ({"queue": lambda t: t.bfloat16()}, "queue must be float32 to match query, got bfloat16"),
    ({"temperature": lambda t: 0.0}, "temperature must be positive and finite, got 0"),
    ({"temperature": lambda t: -0.07}, "temperature must be positive and finite, got -0.07"),
    ({"temperature": lambda t: float("nan")}, "temperature must be positive and finite, got nan"),
    ({"temperature": lambda t: float("inf")}, "temperature must be positive and finite, got inf"),
    (
        {"queue_ids": lambda t: None},
        "query_ids and queue_ids must be given together, got only query_ids",
    ),
    (
        {"query_ids": lambda t: None},
        "query_ids and queue_ids must be given together, got only queue_ids",
    ),
    ({"query_ids": lambda t: t.int()}, "query_ids must be int64 (4,), got int32 (4,)"),
    ({"queue_ids": lambda t: t[:6]}, "queue_ids must be int64 (7,), got int64 (6,)"),
]
WRONG_BACKWARD = [
    (
        {"query": lambda t: t[0]},
        "query must be a floating (batch, embed_dim), got float32 (5,)",
    ),
    (
        {"query": lambda t: t.to(torch.float8_e4m3fn)},
        "query must be a floating (batch, embed_dim), got float8_e4m3fn (4, 5)",
    ),
    ({"direction": lambda t: t[0]}, "direction must be float32 (4, 5), got float32 (5,)"),
    ({"grad_loss": lambda t: t[:2]}, "grad_loss must be float32 (4,), got float32 (2,)"),
    ({"loss": lambda t: t.half()}, "loss must be float32 (4,), got float16 (4,)"),
    ({"direction": lambda t: t[:0]}, "direction must be float32 (4, 5), got float32 (0, 5)"),
    ({"temperature": lambda t: 0.0}, "temperature must be positive and finite, got 0"),
]


def messages(function, names, change, *flags) -> set[str]:
    """What `function` says, compiled (cpu) and traced (meta)."""
    found = set()
    for device in ("cpu", "meta"):
        values = queue_info_nce_arguments(device)
        values.update({name: wrong(values[name]) for name, wrong in change.items()})
        with pytest.raises(RuntimeError) as error:
            function(*(values[name] for name in names), *flags)
        found.add(str(error.value))
    return found


@pytest.mark.parametrize(("change", "message"), WRONG_FORWARD, ids=[m for _, m in WRONG_FORWARD])
def test_wrong_arguments_are_named_alike_compiled_and_traced(change, message, monkeypatch):
    expected = {f"queue_info_nce: {message}"}
    assert messages(raw, FORWARD, change) == expected
    assert messages(queue_info_nce, FORWARD, change) == expected
    monkeypatch.setattr(queue_info_nce_module, "has_kernel", lambda *_: False)
    assert messages(queue_info_nce, FORWARD, change) == expected


@pytest.mark.parametrize(("change", "message"), WRONG_BACKWARD, ids=[m for _, m in WRONG_BACKWARD])
def test_wrong_arguments_of_the_backward_are_named_alike(change, message):
    expected = {f"queue_info_nce_backward: {message}"}
    assert messages(raw_backward, BACKWARD, change, True, True) == expected


@pytest.mark.parametrize("name", ["key", "queue", "query_ids", "queue_ids"])
def test_operands_on_different_devices_are_named(name, monkeypatch):
    monkeypatch.setattr(queue_info_nce_module, "has_kernel", lambda *_: False)
    values = queue_info_nce_arguments("cpu")
    values[name] = values[name].to("meta")
    message = f"^queue_info_nce: {name} must be on cpu to match query, got meta$"
    with pytest.raises(RuntimeError, match=message):
        queue_info_nce(*(values[name] for name in FORWARD))


ONES = torch.ones(6, 8)
IMAGE = torch.ones(2, 4, 3, 3)
MAP = IMAGE.flatten(2)
raw_dense_match = torch.ops.medmoco.dense_match  # takes no (height, width)
zca_whiten_backward = torch.ops.medmoco.zca_whiten_backward
covariance_loss_backward = torch.ops.medmoco.covariance_loss_backward
# Gradient of the loss, features with fewer samples than dimensions, their mean and matrix.
COVARIANCE = ONES[0, 0], ONES, torch.ones(8, dtype=torch.float64), torch.ones(6, 6)
# Mean, matrix, scale and vectors of ONES in two groups.
WHITENING = torch.ones(8), torch.ones(2, 4, 4), torch.ones(2, 4), torch.ones(2, 4, 4)
WRONG_CALLS = [
    (covariance_loss, (ONES[0],), "features must be (samples, features), got (8,)"),
    (
        covariance_loss,
        (ONES.int(),),
        "features must be float32, float64, bfloat16 or float16, got int32",
    ),
    (covariance_loss, (ONES[:1],), "features must have at least 2 samples, got 1"),
    (
        covariance_loss_backward,
        (ONES[0], *COVARIANCE[1:]),
        "grad_loss must be float32 (), got float32 (8,)",
    ),
    (
        covariance_loss_backward,
        (COVARIANCE[0].double(), *COVARIANCE[1:]),
        "grad_loss must be float32 (), got float64 ()",
    ),
    (
        covariance_loss_backward,
        (COVARIANCE[0], ONES[:1], *COVARIANCE[2:]),
        "features must have at least 2 samples, got 1",
    ),
    (
        covariance_loss_backward,
        (*COVARIANCE[:2], ONES[0], COVARIANCE[3]),
        "mean must be float64 (8,), got float32 (8,)",
    ),
    (
        covariance_loss_backward,
        (*COVARIANCE[:3], torch.ones(8, 8)),
        "matrix must be float32 (6, 6), got float32 (8, 8)",
    ),
    (
        covariance_loss_backward,
        (COVARIANCE[0].double(), ONES.double(), *COVARIANCE[2:]),
        "matrix must be float64 (6, 6), got float32 (6, 6)",
    ),
    (zca_whiten, (ONES[:0], 4, 1e-3), "features must have at least 1 sample, got 0"),
    (zca_whiten, (ONES, 3, 1e-3), "group_size must divide the 8 features, got 3"),
    (zca_whiten, (ONES, 0, 1e-3), "group_size must divide the 8 features, got 0"),
    (zca_whiten, (ONES, 4, 0.0), "eps must be positive and finite, got 0"),
    (zca_whiten, (ONES, 4, float("nan")), "eps must be positive and finite, got nan"),
    (zca_whiten, (ONES[0], 4, 1e-3), "features must be (samples, features), got (8,)"),
    (
        zca_whiten,
        (ONES.int(), 4, 1e-3),
        "features must be float32, float64, bfloat16 or float16, got int32",
    ),
    (
        zca_whiten_backward,
        (ONES[:3], ONES, *WHITENING),
        "grad_whitened must be float32 (6, 8), got float32 (3, 8)",
    ),
    (
        zca_whiten_backward,
        (ONES.half(), ONES, *WHITENING),
        "grad_whitened must be float32 (6, 8), got float16 (6, 8)",
    ),
    (
        zca_whiten_backward,
        (ONES, ONES, WHITENING[0][:7], *WHITENING[1:]),
        "mean must be float32 (8,), got float32 (7,)",
    ),
    (
        zca_whiten_backward,
        (ONES, ONES, WHITENING[0], WHITENING[1][:1], *WHITENING[2:]),
        "matrix must be float32 (groups, group_size, group_size) of 8 features, "
        "got float32 (1, 4, 4)",
    ),
    (
        zca_whiten_backward,
        (ONES, ONES, *WHITENING[:2], WHITENING[2].double(), WHITENING[3]),
        "scale must be float32 (2, 4), got float64 (2, 4)",
    ),
    (
        zca_whiten_backward,
        (ONES, ONES, *WHITENING[:3], WHITENING[3][..., :3]),
        "vectors must be float32 (2, 4, 4), got float32 (2, 4, 3)",
    ),
    (
        iternorm_whiten,
        (ONES[None], 4, 1e-5, 5),
        "features must be (samples, features), got (1, 6, 8)",
    ),
    (iternorm_whiten, (ONES, 5, 1e-5, 5), "group_size must divide the 8 features, got 5"),
    (iternorm_whiten, (ONES, 4, -1.0, 5), "eps must be positive and finite, got -1"),
    (iternorm_whiten, (ONES, 4, 1e-5, 0), "iterations must be at least 1, got 0"),
    (
        dense_match,
        (ONES, IMAGE),
        "query_map must be (batch, channels, height, width) or (batch, channels, positions), "
        "got (6, 8)",
    ),
    (
        dense_match,
        (IMAGE, ONES),
        "key_map must be (batch, channels, height, width) or (batch, channels, positions), "
        "got (6, 8)",
    ),
    (
        dense_match,
        (IMAGE.long(), IMAGE.long()),
        "query_map must be float32, float64, bfloat16 or float16, got int64",
    ),
    (
        dense_match,
        (IMAGE, IMAGE[:1]),
        "key_map must be (2, 4, ...) to match query_map, got (1, 4, 3, 3)",
    ),
    (dense_match, (IMAGE, IMAGE.half()), "key_map must be float32 to match query_map, got float16"),
    (dense_match, (IMAGE, IMAGE.to("meta")), "key_map must be on cpu to match query_map, got meta"),
    (
        dense_match,
        (IMAGE[:, :0], IMAGE),
        "query_map must have at least one channel, got (2, 0, 3, 3)",
    ),
    (
        dense_match,
        (IMAGE, IMAGE[:, :, :0]),
        "key_map must have at least one position, got (2, 4, 0, 3)",
    ),
    (raw_dense_match, (MAP[0], MAP), "query_map must be (batch, channels, positions), got (4, 9)"),
    (
        raw_dense_match,
        (MAP, MAP[None]),
        "key_map must be (batch, channels, positions), got (1, 2, 4, 9)",
    ),
    (
        raw_dense_match,
        (MAP.int(), MAP),
        "query_map must be float32, float64, bfloat16 or float16, got int32",
    ),
    (raw_dense_match, (MAP[:, :0], MAP), "query_map must have at least one channel, got (2, 0, 9)"),
    (
        raw_dense_match,
        (MAP, MAP[:1]),
        "key_map must be (2, 4, ...) to match query_map, got (1, 4, 9)",
    ),
    (
        raw_dense_match,
        (MAP, MAP[:, :3]),
        "key_map must be (2, 4, ...) to match query_map, got (2, 3, 9)",
    ),
    (
        raw_dense_match,
        (MAP, MAP.double()),
        "key_map must be float32 to match query_map, got float64",
    ),
    (
        raw_dense_match,
        (MAP, MAP[:, :, :0]),
        "key_map must have at least one position, got (2, 4, 0)",
    ),
]


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    WRONG_CALLS,
    ids=[f"{function.__name__}: {message}" for function, _, message in WRONG_CALLS],
)
def test_wrong_arguments_are_named(function, arguments, message, monkeypatch):
    """Compiled, traced, and where no kernel runs."""
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    calls = [arguments]
    if not any(t.is_meta for t in tensors):
        calls.append([a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments])
    expected = f"{function.__name__}: {message}"
    for call in calls:
        with pytest.raises(RuntimeError) as error:
            function(*call)
        assert str(error.value) == expected
    if function.__module__.startswith("medmoco.ops."):
        module = importlib.import_module(function.__module__)
        monkeypatch.setattr(module, "has_kernel", lambda *_: False, raising=False)
        with pytest.raises(RuntimeError) as error:
            function(*arguments)
        assert str(error.value) == expected
