"""For each position of one feature map, the position of another that resembles it most."""

import torch
from torch import Tensor

from medmoco.ops.checks import check_floating, check_same_kind, shape_text
from medmoco.ops.dispatch import autocast_off, autocast_operands, wide_dtype

OP = "dense_match"
CHUNK_BYTES = 16 * 2**20  # of similarities at a time


@torch.no_grad()
def dense_match(query_map: Tensor, key_map: Tensor) -> tuple[Tensor, Tensor]:
    """The best match by cosine similarity of each query position among the keys [1, eq. 3].

    index_bi = argmax_j cos(query_map[b, :, i], key_map[b, :, j]) with positions numbered row by
    row. Ties go to the lowest j, NaN wins as in torch.max, and a zero vector has cosine 0. The
    (query, key) similarities are never held whole. Not differentiable.

    Args:
        query_map: (batch, channels, height, width) or (batch, channels, positions).
        key_map: likewise; only batch and channels have to agree.

    Returns:
        index (batch, query positions) int64; similarity (batch, query positions) in [-1, 1],
        float32 (float64 for float64).

    Raises:
        RuntimeError: shapes, dtypes or devices disagree, or key_map has no position.

    [1] Wang et al., "Dense Contrastive Learning for Self-Supervised Visual Pre-Training", 2021,
        arXiv:2011.09157.
    """
    query_map, key_map = autocast_operands(query_map.device.type, (query_map, key_map))
    _check(query_map, key_map)
    query, key = query_map.flatten(2), key_map.flatten(2)
    batch, _, positions = query.shape
    row_bytes = max(1, batch * key.shape[2]) * wide_dtype(query).itemsize
    rows = max(1, CHUNK_BYTES // row_bytes)
    with autocast_off(query.device.type):
        parts = [
            dense_match_reference(query[:, :, start : start + rows], key)
            for start in range(0, max(1, positions), rows)
        ]
    return torch.cat([i for i, _ in parts], 1), torch.cat([s for _, s in parts], 1)


def dense_match_reference(query_map: Tensor, key_map: Tensor) -> tuple[Tensor, Tensor]:
    """The same, holding all similarities at once."""
    query = _unit(query_map.flatten(2).to(wide_dtype(query_map)))
    key = _unit(key_map.flatten(2).to(wide_dtype(key_map)))
    cosine = query.mT @ key
    similarity = cosine.amax(2)
    # torch.max promises no order among equals.
    best = (cosine == similarity[:, :, None]) | cosine.isnan()
    positions = torch.arange(cosine.shape[2], device=cosine.device)
    index = torch.where(best, positions, cosine.shape[2]).amin(2)
    return index, similarity


def _unit(vectors: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / length.where(length != 0, 1)


def _check(query_map: Tensor, key_map: Tensor) -> None:
    for name, tensor in (("query_map", query_map), ("key_map", key_map)):
        if tensor.dim() not in (3, 4):
            raise RuntimeError(
                f"{OP}: {name} must be (batch, channels, height, width) or "
                f"(batch, channels, positions), got {shape_text(tensor)}"
            )
    check_floating(OP, "query_map", query_map)
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
