"""InfoNCE against a queue of negatives, without the (batch, queue_size) logits in memory."""

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint

from medmoco.ops.checks import (
    FLOATING,
    check_floating,
    check_same_kind,
    check_temperature,
    dtype_text,
    shape_text,
)
from medmoco.ops.dispatch import (
    CHUNK_BYTES,
    autocast_off,
    autocast_operands,
    has_kernel,
    refuse_forward_mode,
    refuse_second_derivative,
    register_autocast,
    tf32_allowed,
    wide_dtype,
)

OP = "queue_info_nce"
MOST_EMBED_DIM_ON_CUDA = 256  # of the kernel; accumulators of more would not fit its registers


def queue_info_nce(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: float = 0.2,
    query_ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """InfoNCE of each query against its key and a queue of negatives [1, eq. 1].

    loss_i = -log(e^{p_i} / (e^{p_i} + sum_j e^{s_ij})) with p_i = query_i . key_i / temperature and
    s_ij = query_i . queue_j / temperature, j over the queue entries whose id is not that of i.
    Rows need not have unit length. A NaN reaches the rows that it touches, and those alone; one in
    an entry that an id leaves out spares the loss, but not the gradient, as 0 * NaN is NaN.
    Infinite operands or logits may give NaN.

    Args:
        query: (batch, embed_dim), float32, float64, bfloat16 or float16; accumulated in float32
            (float64 for float64). On CUDA the kernel takes up to 256 dimensions and no float64;
            the rest runs in PyTorch, more dimensions with a warning. There float32 keeps its
            accuracy unless torch.backends.cuda.matmul.fp32_precision is "tf32". Operands whose
            rows are not of 16-byte multiples, or not aligned to 16 bytes, are copied.
        key: (batch, embed_dim), the positive of each query.
        queue: (queue_size, embed_dim), the negatives, a constant.
        temperature: divides the logits; > 0, a constant.
        query_ids: (batch,) int64, such as the slice or volume that a query comes from.
        queue_ids: (queue_size,) int64. A queue entry with the id of the query is left out of its
            sum; negative ids match nothing. Both or neither.

    Returns:
        loss (batch,) in nats, float32 (float64 for float64); rank (batch,) int32, the negatives
        that do not score below the key: 0 is a hit of top-1 accuracy.

    Raises:
        RuntimeError: shapes, dtypes or devices disagree, temperature is not positive, or queue
            or temperature requires a gradient; a second or a forward-mode derivative is asked for.

    [1] He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", 2020,
        arXiv:1911.05722.
    """
    if torch.is_grad_enabled():
        _check_constant("queue", queue)
        _check_constant("temperature", temperature)  # a tensor would pass for a float
    if _kernel_takes(query):
        refuse_forward_mode(OP, query, key, queue)
        loss, rank, _ = torch.ops.medmoco.queue_info_nce(
            query,
            key,
            queue,
            temperature,
            query_ids,
            queue_ids,
            torch.is_grad_enabled() and query.requires_grad,
            query.is_cuda and tf32_allowed(),
        )
        return loss, rank
    query, key, queue = autocast_operands(query.device.type, (query, key, queue))
    _check(query, key, queue, temperature, query_ids, queue_ids)
    with autocast_off(query.device.type):
        return _chunked_reference(query, key, queue, temperature, query_ids, queue_ids)


def _kernel_takes(query: Tensor) -> bool:
    if not has_kernel(OP, query.device):
        return False
    if query.device.type != "cuda" or query.dim() != 2:
        return True
    if query.shape[1] > MOST_EMBED_DIM_ON_CUDA:
        return not _warn_of_embed_dim()
    return query.dtype != torch.float64


@torch.compiler.assume_constant_result
@cache
def _warn_of_embed_dim() -> bool:
    """Warns once, and returns True."""
    warnings.warn(
        f"{OP}: on CUDA the kernel takes at most {MOST_EMBED_DIM_ON_CUDA} dimensions; more run in "
        "PyTorch, in chunks, which takes several times as long",
        stacklevel=4,
    )
    return True


def queue_info_nce_reference(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: float = 0.2,
    query_ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch, holding all logits at once."""
    query, key, queue = (t.to(wide_dtype(query)) for t in (query, key, queue))
    positive = (query * key).sum(1) / temperature
    logits = query @ queue.T / temperature
    not_below = ~(logits < positive[:, None])  # so that NaN or a collapsed row is no hit
    if query_ids is not None and queue_ids is not None:
        same = (query_ids[:, None] == queue_ids) & (queue_ids >= 0)
        logits = logits.masked_fill(same, -torch.inf)
        not_below &= ~same
    # softplus(lse - positive); logaddexp(lse, positive) - positive would lose the digits of a
    # small loss.
    loss = -logsigmoid(positive - logits.logsumexp(1))
    return loss, not_below.sum(1, dtype=torch.int32)


def _chunked_reference(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: float,
    query_ids: Tensor | None,
    queue_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The reference over chunks of rows, recomputed in the backward pass."""
    row_bytes = max(1, queue.shape[0]) * wide_dtype(query).itemsize
    rows = max(1, CHUNK_BYTES // row_bytes)
    losses, ranks = [], []
    for start in range(0, max(1, query.shape[0]), rows):
        part = slice(start, start + rows)
        ids = None if query_ids is None else query_ids[part]
        loss, rank = checkpoint(
            queue_info_nce_reference,
            query[part],
            key[part],
            queue,
            temperature,
            ids,
            queue_ids,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing is random; keeping it would not do in a CUDA graph
        )
        losses.append(loss)
        ranks.append(rank)
    return torch.cat(losses), torch.cat(ranks)


def _check_constant(name: str, value: object) -> None:
    if isinstance(value, Tensor) and value.requires_grad:
        _raise_constant(name)


def _raise_constant(name: str) -> None:
    raise RuntimeError(f"{OP}: {name} must not require a gradient, it is a constant")


def _check(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: float,
    query_ids: Tensor | None,
    queue_ids: Tensor | None,
) -> None:
    if query.dim() != 2:
        raise RuntimeError(f"{OP}: query must be (batch, embed_dim), got {shape_text(query)}")
    check_floating(OP, "query", query)
    if key.shape != query.shape:
        raise RuntimeError(
            f"{OP}: key must be {shape_text(query)} to match query, got {shape_text(key)}"
        )
    if queue.dim() != 2 or queue.shape[1] != query.shape[1]:
        raise RuntimeError(
            f"{OP}: queue must be (queue_size, {query.shape[1]}) to match query, "
            f"got {shape_text(queue)}"
        )
    check_same_kind(OP, "key", key, "query", query)
    check_same_kind(OP, "queue", queue, "query", query)
    check_temperature(OP, temperature)
    if (query_ids is None) != (queue_ids is None):
        given = "queue_ids" if query_ids is None else "query_ids"
        raise RuntimeError(
            f"{OP}: query_ids and queue_ids must be given together, got only {given}"
        )
    _check_ids("query_ids", query_ids, query)
    _check_ids("queue_ids", queue_ids, queue)


def _check_ids(name: str, ids: Tensor | None, rows: Tensor) -> None:
    if ids is None:
        return
    if ids.dtype != torch.int64 or ids.shape != rows.shape[:1]:
        raise RuntimeError(
            f"{OP}: {name} must be int64 ({rows.shape[0]},), "
            f"got {dtype_text(ids)} {shape_text(ids)}"
        )
    if ids.device != rows.device:
        raise RuntimeError(
            f"{OP}: {name} must be on {rows.device} to match query, got {ids.device}"
        )


@torch.library.register_fake("medmoco::queue_info_nce")
def _fake(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: float = 0.2,
    query_ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
    compute_direction: bool = True,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(query, key, queue, temperature, query_ids, queue_ids)
    batch, embed_dim = query.shape
    dtype = wide_dtype(query)
    loss = query.new_empty(batch, dtype=dtype)
    rank = query.new_empty(batch, dtype=torch.int32)
    direction = query.new_empty(batch if compute_direction else 0, embed_dim, dtype=dtype)
    return loss, rank, direction


@torch.library.register_fake("medmoco::queue_info_nce_backward")
def _fake_backward(
    grad_loss: Tensor,
    query: Tensor,
    loss: Tensor,
    direction: Tensor,
    temperature: float,
    compute_grad_query: bool,
    compute_grad_key: bool,
) -> tuple[Tensor, Tensor]:
    _check_backward(grad_loss, query, loss, direction, temperature, compute_grad_query)
    batch, embed_dim = query.shape
    grad_query = query.new_empty(batch if compute_grad_query else 0, embed_dim)
    grad_key = query.new_empty(batch if compute_grad_key else 0, embed_dim)
    return grad_query, grad_key


def _check_backward(
    grad_loss: Tensor,
    query: Tensor,
    loss: Tensor,
    direction: Tensor,
    temperature: float,
    compute_grad_query: bool,
) -> None:
    op = f"{OP}_backward"
    if query.dim() != 2 or query.dtype not in FLOATING:
        raise RuntimeError(
            f"{op}: query must be a floating (batch, embed_dim), "
            f"got {dtype_text(query)} {shape_text(query)}"
        )
    dtype = wide_dtype(query)
    expected = str(dtype).removeprefix("torch.")
    for name, rows in (("grad_loss", grad_loss), ("loss", loss)):
        if rows.dtype != dtype or rows.shape != query.shape[:1]:
            raise RuntimeError(
                f"{op}: {name} must be {expected} ({query.shape[0]},), "
                f"got {dtype_text(rows)} {shape_text(rows)}"
            )
    if compute_grad_query and (direction.dtype != dtype or direction.shape != query.shape):
        raise RuntimeError(
            f"{op}: direction must be {expected} {shape_text(query)}, "
            f"got {dtype_text(direction)} {shape_text(direction)}"
        )
    check_temperature(op, temperature)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, _, _, temperature, _, _, compute_direction, _ = inputs
    loss, rank, direction = output
    if ctx.needs_input_grad[2]:
        _raise_constant("queue")
    if ctx.needs_input_grad[0] and not compute_direction:
        raise RuntimeError(f"{OP}: compute_direction must be True for a gradient of query")
    ctx.mark_non_differentiable(rank, direction)
    ctx.save_for_backward(query, loss, direction)
    ctx.temperature = temperature


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    query, loss, direction = ctx.saved_tensors
    need_query, need_key = ctx.needs_input_grad[:2]
    grad_query, grad_key = torch.ops.medmoco.queue_info_nce_backward(
        grad_loss, query, loss, direction, ctx.temperature, need_query, need_key
    )
    constants = (None,) * 6
    return grad_query if need_query else None, grad_key if need_key else None, *constants


torch.library.register_autograd("medmoco::queue_info_nce", _backward, setup_context=_setup_context)
refuse_second_derivative(OP)
register_autocast(OP, 3, autocast_operands)
