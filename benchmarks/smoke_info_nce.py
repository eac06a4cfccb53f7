"""The smoke checks of queue_info_nce: shapes and layouts, more than 2^31 elements."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from medmoco.ops import queue_info_nce
from medmoco.ops.queue_info_nce import queue_info_nce_reference
from smoke_behaviour import DTYPES, Check
from smoke_large import need

Function = Callable[..., tuple[Tensor, Tensor]]

TEMPERATURE = 0.2
# Batch, queue size and dimensions: around tiles, in several splits of the queue, with rows that
# are no multiple of 16 bytes, and empty.
SHAPES = (
    (1, 1, 1),
    (3, 1100, 36),
    (17, 33, 8),
    (65, 300, 20),
    (130, 70, 128),
    (9, 513, 200),
    (5, 129, 256),
    (0, 5, 8),
    (4, 0, 8),
)
VARIANTS = ("plain", "ids", "forward", "guarded", "offset")
# Of the loss, and of gradients over their largest entry, by what unit rows are rounded to.
ALLOWED = {
    "float32": (1e-5, 1e-5),
    "float16": (1e-3, 5e-3),
    "bfloat16": (5e-3, 3e-2),
    "tf32": (5e-3, 5e-3),
}
OUTPUTS = ("loss", "rank", "grad_query", "grad_key")


def rows(count: int, dim: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Rows of unit length, on the CPU, the same in every run."""
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(count, dim, generator=generator), dim=1).to(dtype)


def operands(shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    batch, queue_size, dim = shape
    counts = (batch, batch, queue_size)
    return [rows(count, dim, dtype, 3 * seed + i) for i, count in enumerate(counts)]


def some_ids(batch: int, queue_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A seventh of the entries is left out for most queries, and -1 matches nothing."""
    query_ids = torch.arange(batch) % 5 - 1
    return query_ids.to(device), (torch.arange(queue_size) % 7 - 1).to(device)


def guarded(tensor: Tensor, device: torch.device, *, shift: int) -> Tensor:
    """The rows on a device amid NaN, so that reading beside them shows; `shift` columns in."""
    count, dim = tensor.shape
    around = tensor.new_full((count + 2, dim + 2 * shift), math.nan, device=device)
    inside = around[1 : count + 1, shift : shift + dim]
    return inside.copy_(tensor)


def loss_and_gradients(
    function: Function, query: Tensor, key: Tensor, queue: Tensor, *others: object
) -> list[Tensor]:
    """Loss, rank, and the gradient of a weighted sum of the loss by query and key."""
    query, key = query.detach().requires_grad_(), key.detach().requires_grad_()
    loss, rank = function(query, key, queue, TEMPERATURE, *others)
    weights = torch.linspace(0.5, 1.5, len(query), device=query.device, dtype=loss.dtype)
    return [loss.detach(), rank, *torch.autograd.grad(loss, (query, key), weights)]


def compare(found: Sequence[Tensor], truth: Sequence[Tensor], rounding: str) -> None:
    """Loss, rank and gradients (if any) against float64, where the truth lies."""
    of_loss, of_gradient = ALLOWED[rounding]
    for name, ours, right in zip(OUTPUTS, found, truth, strict=False):
        assert ours.shape == right.shape, f"{name} is {tuple(ours.shape)}"
        if not right.numel():
            continue
        error = float((ours.to(right.device).double() - right.double()).abs().max())
        largest = float(right.double().abs().max())
        allowed = of_gradient * largest + 1e-30
        if name == "loss":
            allowed = of_loss
        elif name == "rank":  # near ties
            allowed = 1 + (0.02 * largest if rounding == "tf32" else 0)
        assert error <= allowed, f"{name} is off by {error:.2e}, {allowed:.2e} allowed"


# --- shapes


def shape_checks(name: str, device: torch.device) -> Iterator[Check]:
    """Of the operator or of its backward pass, in each dtype."""
    for rounding, shape in product(DTYPES, SHAPES):
        title = f"{name} {'x'.join(map(str, shape))} {rounding}"
        if name == "queue_info_nce_backward":
            yield title, partial(_check_backward, shape, rounding, device)
            continue
        yield title, partial(_check_shape, shape, rounding, device)
        if rounding == "float32" and device.type == "cuda":
            yield f"{title} as tf32", partial(_check_tf32, shape, device)


def _check_shape(shape: tuple[int, int, int], rounding: str, device: torch.device) -> None:
    drawn = operands(shape, DTYPES[rounding])
    for variant in VARIANTS:
        ids = some_ids(*shape[:2], device) if variant in ("ids", "offset") else ()
        if variant in ("guarded", "offset"):
            shift = 3 if variant == "offset" else 0
            placed = [guarded(tensor, device, shift=shift) for tensor in drawn]
        else:
            placed = [tensor.to(device) for tensor in drawn]
        wide = [tensor.double() for tensor in drawn]
        truth = loss_and_gradients(queue_info_nce_reference, *wide, *(part.cpu() for part in ids))
        try:
            if variant == "forward":
                query, key, queue = placed
                found = queue_info_nce(query, key, queue, TEMPERATURE)  # no gradient is needed
                compare(found, truth[:2], rounding)
            else:
                compare(loss_and_gradients(queue_info_nce, *placed, *ids), truth, rounding)
        except AssertionError as error:
            raise AssertionError(f"{variant}: {error}") from None


def _check_tf32(shape: tuple[int, int, int], device: torch.device) -> None:
    drawn = operands(shape, torch.float32)
    query, key, queue = (tensor.double() for tensor in drawn)
    loss, rank = queue_info_nce_reference(query.requires_grad_(), key, queue, TEMPERATURE)
    (direction,) = torch.autograd.grad(loss.sum(), query)
    placed = [tensor.to(device) for tensor in drawn]
    found = torch.ops.medmoco.queue_info_nce(*placed, TEMPERATURE, None, None, True, True)
    compare(found, (loss.detach(), rank, direction), "tf32")


def _check_backward(shape: tuple[int, int, int], rounding: str, device: torch.device) -> None:
    """Scales what the forward pass left: here drawn at random, in any layout."""
    batch, _, dim = shape
    query = rows(batch, dim, DTYPES[rounding], 0)
    direction = rows(batch, dim, torch.float32, 1)
    loss, grad_loss = (torch.linspace(low, 2, batch) for low in (0.1, -1))
    for shift, needed in ((0, (True, True)), (3, (True, False)), (3, (False, True))):
        placed = (grad_loss.to(device), guarded(query, device, shift=shift), loss.to(device))
        grad_query, grad_key = torch.ops.medmoco.queue_info_nce_backward(
            *placed, guarded(direction, device, shift=shift), TEMPERATURE, *needed
        )
        scale = grad_loss.double() * torch.expm1(-loss.double()) / TEMPERATURE
        expected = (grad_loss[:, None] * direction.double(), scale[:, None] * query.double())
        wanted = [e if need else e[:0] for e, need in zip(expected, needed, strict=True)]
        nothing = [loss, torch.zeros(0)]  # neither loss nor rank comes from the backward pass
        compare([*nothing, grad_query, grad_key], [*nothing, *wanted], rounding)


# --- more than 2^31 elements


def large_checks(device: torch.device, elements: int) -> Iterator[Check]:
    """Repeats of few rows, so that the truth is known without a reference of that size."""
    yield f"batch of more than {elements} elements", partial(_check_batch, device, elements)
    yield f"queue of more than {elements} elements", partial(_check_queue, device, elements)


def _check_batch(device: torch.device, elements: int) -> None:
    block, dim = 1000, 128
    repeats = elements // (block * dim) + 2
    need(device, 16 * repeats * block * dim / 1e9)
    few = operands((block, 60, dim), torch.bfloat16)
    wide = [tensor.double() for tensor in few]
    truth = loss_and_gradients(queue_info_nce_reference, *wide)
    query, key = (t.to(device).repeat(repeats, 1).requires_grad_() for t in few[:2])
    loss, rank = queue_info_nce(query, key, few[2].to(device), TEMPERATURE)
    weights = torch.linspace(0.5, 1.5, block, device=device).repeat(repeats)
    gradients = torch.autograd.grad(loss, (query, key), weights)
    outputs = [t.view(repeats, block, *t.shape[1:]) for t in (loss.detach(), rank, *gradients)]
    truth = [right.to(device) for right in truth]
    for start in range(0, repeats, 64):
        parts = [output[start : start + 64] for output in outputs]
        expected = [t.expand_as(p) for t, p in zip(truth, parts, strict=True)]
        compare(parts, expected, "bfloat16")


def _check_queue(device: torch.device, elements: int) -> None:
    """Each entry is there r times: that adds log r to the sum of exponentials."""
    block, dim = 1000, 128
    repeats = elements // (block * dim) + 2
    need(device, 3 * repeats * block * dim / 1e9)
    few = operands((20, block, dim), torch.bfloat16)
    query, key, entries = (tensor.double() for tensor in few)
    query.requires_grad_()
    positive = (query * key).sum(1) / TEMPERATURE
    logits = query @ entries.T / TEMPERATURE
    loss = softplus(logits.logsumexp(1) + math.log(repeats) - positive)
    rank = repeats * (logits >= positive[:, None]).sum(1)
    (direction,) = torch.autograd.grad(loss.sum(), query)
    leaf, positives = (tensor.to(device) for tensor in few[:2])
    queue = few[2].to(device).repeat(repeats, 1)
    found, found_rank = queue_info_nce(leaf.requires_grad_(), positives, queue, TEMPERATURE)
    (gradient,) = torch.autograd.grad(found.sum(), leaf)
    near_ties = (found_rank.cpu() - rank).abs() > repeats  # an entry and its copies
    assert not near_ties.any(), "rank is off"
    compare([found.detach(), rank, gradient], [loss.detach(), rank, direction], "bfloat16")
