"""Smoke checks of how operators behave: repeats, streams, CUDA graphs, torch.compile, autocast."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gpu import captured
from medmoco import ops

Check = tuple[str, Callable[[], None]]  # raises AssertionError where something is wrong

REPEATS = 30
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class LeftOut(Exception):
    """A check does not apply to this machine."""


@dataclass(frozen=True)
class Subject:
    """An operator, called in one way, while its behaviour is checked."""

    op: str
    draw: Callable[[torch.Generator], tuple[Tensor, ...]]  # operands on the CPU, float32 or ids
    outputs: tuple[str, ...]  # and gradients after them, by the first operands
    call: Callable[..., Any]  # of a function and the operands
    learned: int = 0  # how many operands the first output has a gradient by
    narrow: bool = False  # whether autocast hands it operands in 16 bits

    def function(self) -> Callable[..., Any]:
        return getattr(ops, self.op)

    def operands(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> list[Tensor]:
        drawn = self.draw(torch.Generator().manual_seed(seed))
        return [tensor.to(device) for tensor in in_dtype(drawn, dtype)]

    def run(self, function: Callable[..., Any], operands: Sequence[Tensor]) -> list[Tensor]:
        """Outputs, and gradients of a weighted sum of the first."""
        leaves = [tensor.detach().requires_grad_() for tensor in operands[: self.learned]]
        values = self.call(function, *leaves, *operands[self.learned :])
        values = values if isinstance(values, tuple) else (values,)
        if not leaves:
            return list(values)
        first = values[0]
        weights = torch.linspace(0.5, 1.5, first.numel(), device=first.device, dtype=first.dtype)
        gradients = torch.autograd.grad(first, leaves, weights.view_as(first))
        return [*(value.detach() for value in values), *gradients]

    def equal(self, found: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
        for name, a, b in zip(self.outputs, found, expected, strict=True):
            assert torch.equal(a, b), f"{name} differs {what}"


def in_dtype(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [t.to(dtype) if t.is_floating_point() else t for t in tensors]


def _rows(generator: torch.Generator) -> tuple[Tensor, ...]:
    query, key, queue = (
        normalize(torch.randn(count, 128, generator=generator), dim=1) for count in (257, 257, 4099)
    )
    return query, key, queue


def _rows_with_ids(generator: torch.Generator) -> tuple[Tensor, ...]:
    """A seventh of the entries is left out for most queries, and -1 matches nothing."""
    return *_rows(generator), torch.arange(257) % 5 - 1, torch.arange(4099) % 7 - 1


def _features(samples: int, dims: int) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    return lambda generator: (torch.randn(samples, dims, generator=generator),)


INFO_NCE = ("loss", "rank", "grad_query", "grad_key")
COVARIANCE = ("loss", "grad_features")
SUBJECTS = {
    "queue_info_nce": Subject(
        "queue_info_nce",
        _rows,
        INFO_NCE,
        lambda function, query, key, queue: function(query, key, queue, 0.2),
        learned=2,
        narrow=True,
    ),
    "queue_info_nce with ids": Subject(
        "queue_info_nce",
        _rows_with_ids,
        INFO_NCE,
        lambda function, query, key, queue, *ids: function(query, key, queue, 0.2, *ids),
        learned=2,
        narrow=True,
    ),
    "dense_match": Subject(
        "dense_match",
        lambda generator: (
            torch.randn(3, 72, 19, 17, generator=generator),
            torch.randn(3, 72, 23, 11, generator=generator),
        ),
        ("index", "similarity"),
        lambda function, query_map, key_map: function(query_map, key_map),
        narrow=True,
    ),
    "covariance_loss": Subject(
        "covariance_loss",
        _features(523, 200),
        COVARIANCE,
        lambda function, features: function(features),
        learned=1,
    ),
    "covariance_loss, Gram form": Subject(
        "covariance_loss",
        _features(131, 600),
        COVARIANCE,
        lambda function, features: function(features),
        learned=1,
    ),
    "zca_whiten": Subject(
        "zca_whiten",
        _features(300, 192),
        ("whitened", "mean", "matrix", "grad_features"),
        lambda function, features: function(features, 64, 1e-3),
        learned=1,
    ),
}


def behaviour_checks(name: str, device: torch.device) -> Iterator[Check]:
    """Of an operator, in each of the ways in which it is called."""
    for title, subject in SUBJECTS.items():
        if subject.op != name:
            continue
        for dtype in DTYPES:
            yield (
                f"{title}: {REPEATS} repeats give the same bits, {dtype}",
                partial(_check_repeats, subject, DTYPES[dtype], device),
            )
        yield f"{title}: torch.compile(fullgraph)", partial(_check_compiled, subject, device)
        yield f"{title}: autocast", partial(_check_autocast, subject, device)
        if device.type == "cuda":
            yield f"{title}: a side stream is kept to", partial(_check_stream, subject, device)
            yield f"{title}: a CUDA graph replays", partial(_check_graph, subject, device)


def _check_repeats(subject: Subject, dtype: torch.dtype, device: torch.device) -> None:
    operands = subject.operands(dtype, device)
    first = subject.run(subject.function(), operands)
    for number in range(1, REPEATS):
        again = subject.run(subject.function(), operands)
        subject.equal(again, first, f"in repeat {number}")


def _check_compiled(subject: Subject, device: torch.device) -> None:
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(subject.function(), fullgraph=True, backend=backend)
    operands = subject.operands(torch.bfloat16, device)
    expected = subject.run(subject.function(), operands)
    subject.equal(subject.run(compiled, operands), expected, "from that of an eager call")


def _check_autocast(subject: Subject, device: torch.device) -> None:
    """Operands of the other dtype are as if they had come in the one that autocast wants."""
    wanted, other = torch.float32, torch.bfloat16
    if subject.narrow:
        wanted, other = other, wanted
    given = subject.operands(other, device)
    with torch.autocast(device.type, torch.bfloat16):
        found = subject.run(subject.function(), given)
    expected = subject.run(subject.function(), in_dtype(given, wanted))
    # Gradients come back in the dtype of what was given.
    alike = [b.to(a.dtype) for a, b in zip(found, expected, strict=True)]
    subject.equal(found, alike, "under autocast")


def _check_stream(subject: Subject, device: torch.device) -> None:
    """Operands arrive late on the side stream: a kernel on another one would miss them."""
    old, new = (subject.operands(torch.bfloat16, device, seed) for seed in (0, 1))
    expected = subject.run(subject.function(), new)
    torch.cuda.synchronize(device)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        torch.cuda._sleep(100_000_000)  # clocks: tens of milliseconds
        for buffer, tensor in zip(old, new, strict=True):
            buffer.copy_(tensor)
        found = subject.run(subject.function(), old)
        torch.cuda.current_stream(device).synchronize()
    subject.equal(found, expected, "on a side stream")


def _check_graph(subject: Subject, device: torch.device) -> None:
    buffers = subject.operands(torch.bfloat16, device)
    replay = captured(partial(subject.run, subject.function(), buffers), device)
    for seed in range(1, 4):
        for buffer, tensor in zip(
            buffers, subject.operands(torch.bfloat16, device, seed), strict=True
        ):
            buffer.copy_(tensor)
        found = [tensor.clone() for tensor in replay()]
        expected = subject.run(subject.function(), buffers)
        subject.equal(found, expected, "from that of an eager call")
