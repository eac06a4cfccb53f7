"""For each position of one feature map, the position of another that resembles it most."""

import torch
from torch import Tensor

from medmoco.ops.checks import check_floating, check_same_kind, shape_text
from medmoco.ops.dispatch import (
    autocast_off,
    autocast_operands,
    has_kernel,
    register_autocast,
    register_constant,
    tf32_allowed,
    wide_dtype,
)

OP = "dense_match"
CHUNK_BYTES = 16 * 2**20  # of similarities at a time, where the reference stands in for a kernel
LAYOUTS = {4: "(batch, channels, height, width)", 3: "(batch, channels, positions)"}


@torch.no_grad()
def dense_match(query_map: Tensor, key_map: Tensor) -> tuple[Tensor, Tensor]:
    """The best match by cosine similarity of each query position among the keys [1, eq. 4].

    index_bi = argmax_j cos(query_map[b, :, i], key_map[b, :, j]) with positions numbered row by
    row. Ties go to the lowest j, NaN wins as in torch.max, and a zero vector has cosine 0. The
    (query, key) similarities are never held whole, nor are normalised maps where there is a kernel.
    Not differentiable.

    Args:
        query_map: (batch, channels, height, width) or (batch, channels, positions), float32,
            float64, bfloat16 or float16; accumulated in float32 (float64 for float64). Contiguous
            and channels_last maps are read as they lie; one whose height and width do not share
            one stride is copied. On CUDA, where the kernel takes no float64 and PyTorch computes
            that, maps with gaps between positions are copied too, and channels_last ones unless
            both are and rows of channels are of 16-byte multiples; float32 keeps its accuracy
            unless torch.backends.cuda.matmul.fp32_precision is "tf32".
        key_map: likewise; only batch and channels have to agree.

    Returns:
        index (batch, query positions) int64; similarity (batch, query positions) in [-1, 1],
        float32 (float64 for float64). Both are constants to autograd.

    Raises:
        RuntimeError: shapes, dtypes or devices disagree, there are no channels, or key_map has no
            position.

    [1] Wang et al., "Dense Contrastive Learning for Self-Supervised Visual Pre-Training", 2021,
        arXiv:2011.09157.
    """
    query_map, key_map = autocast_operands(query_map.device.type, (query_map, key_map))
    _check(query_map, key_map, dims=(4, 3))
    query, key = query_map.flatten(2), key_map.flatten(2)
    if has_kernel(OP, query.device) and not (query.is_cuda and query.dtype == torch.float64):
        index, similarity = torch.ops.medmoco.dense_match(
            query, key, query.is_cuda and tf32_allowed()
        )
        return index, similarity
    with autocast_off(query.device.type):
        return _chunked_reference(query, key)


def dense_match_reference(query_map: Tensor, key_map: Tensor) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch, holding all similarities at once."""
    query = _unit(query_map.flatten(2).to(wide_dtype(query_map)))
    key = _unit(key_map.flatten(2).to(wide_dtype(key_map)))
    cosine = query.mT @ key
    similarity = cosine.amax(2)
    # torch.max promises no order among equals.
    best = (cosine == similarity[:, :, None]) | cosine.isnan()
    positions = torch.arange(cosine.shape[2], device=cosine.device)
    index = torch.where(best, positions, cosine.shape[2]).amin(2)
    return index, similarity.clamp(-1, 1)  # rounding may take it just beyond


def _unit(vectors: Tensor) -> Tensor:
    # First by the largest entry, whose square may overflow or vanish.
    largest = vectors.abs().amax(1, keepdim=True)
    vectors = vectors / largest.where(largest != 0, 1)
    length = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / length.where(length != 0, 1)


def _chunked_reference(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """The reference over chunks of query positions."""
    batch, _, positions = query.shape
    row_bytes = max(1, batch * key.shape[2]) * wide_dtype(query).itemsize
    rows = max(1, CHUNK_BYTES // row_bytes)
    parts = [
        dense_match_reference(query[:, :, start : start + rows], key)
        for start in range(0, max(1, positions), rows)
    ]
    return torch.cat([i for i, _ in parts], 1), torch.cat([s for _, s in parts], 1)


def _check(query_map: Tensor, key_map: Tensor, dims: tuple[int, ...]) -> None:
    for name, tensor in (("query_map", query_map), ("key_map", key_map)):
        if tensor.dim() not in dims:
            expected = " or ".join(LAYOUTS[dim] for dim in dims)
            raise RuntimeError(f"{OP}: {name} must be {expected}, got {shape_text(tensor)}")
    check_floating(OP, "query_map", query_map)
    if query_map.shape[1] == 0:
        raise RuntimeError(
            f"{OP}: query_map must have at least one channel, got {shape_text(query_map)}"
        )
    if key_map.shape[:2] != query_map.shape[:2]:
        batch, channels = query_map.shape[:2]
        raise RuntimeError(
            f"{OP}: key_map must be ({batch}, {channels}, ...) to match query_map, "
            f"got {shape_text(key_map)}"
        )
    check_same_kind(OP, "key_map", key_map, "query_map", query_map)
    if key_map.shape[2:].numel() == 0:
        raise RuntimeError(
            f"{OP}: key_map must have at least one position, got {shape_text(key_map)}"
        )


@torch.library.register_fake("medmoco::dense_match")
def _fake(query_map: Tensor, key_map: Tensor, allow_tf32: bool = False) -> tuple[Tensor, Tensor]:
    _check(query_map, key_map, dims=(3,))
    shape = query_map.shape[0], query_map.shape[2]
    similarity = query_map.new_empty(shape, dtype=wide_dtype(query_map))
    return query_map.new_empty(shape, dtype=torch.int64), similarity


register_constant(OP)
register_autocast(OP, 2, autocast_operands)
