"""InfoNCE through attention kernels, with the queue as keys and values."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest
from torch.nn.functional import softplus

# (query (b,1,N,C), queue (b,1,K,C), scale) -> softmax-weighted queue (b,1,N,C), lse (b,1,N)
Attention = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]


class AttentionInfoNCE(torch.autograd.Function):
    """Attention with K = V = queue gives the lse of the negatives and the gradient's sum."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, queue: Tensor, temperature: float, attention: Any
    ) -> Tensor:
        mean_negative, lse = attention(query.detach(), queue, 1 / temperature)
        positive = (query.float() * key.float()).sum(1) / temperature
        ctx.save_for_backward(mean_negative, key, torch.sigmoid(lse - positive))
        ctx.temperature = temperature
        return softplus(lse - positive)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        mean_negative, key, weight = ctx.saved_tensors
        scale = (grad_loss * weight / ctx.temperature)[:, None]
        return (scale * (mean_negative - key)).to(key.dtype), None, None, None, None


def info_nce_attention(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: float,
    *,
    kernel: Attention,
    splits: int = 1,
) -> Tensor:
    """Through an attention kernel; `splits` parts of the queue make a batch for it."""

    def attention(query: Tensor, queue: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        rows, embed_dim = query.shape
        repeated = query.expand(splits, 1, rows, embed_dim).contiguous()
        out, lse = kernel(repeated, queue.view(splits, 1, -1, embed_dim), scale)
        out, lse = out[:, 0], lse.reshape(splits, -1)[:, :rows]  # some kernels pad their lse
        if splits == 1:
            return out[0], lse[0]
        total = lse.logsumexp(0)
        return ((lse - total).exp()[:, :, None] * out).sum(0), total

    return AttentionInfoNCE.apply(query, key, queue, temperature, attention)


def cpu_flash(query: Tensor, queue: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, queue, queue, 0.0, False, scale=scale
    )


def cuda_flash(query: Tensor, queue: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention(
        query, queue, queue, 0.0, False, False, scale=scale
    )[:2]


def cuda_efficient(query: Tensor, queue: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, queue, queue, None, True, 0.0, False, scale=scale
    )[:2]


def cuda_cudnn(query: Tensor, queue: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, queue, queue, None, True, 0.0, False, False, scale=scale
    )[:2]


def flash_attn_package(query: Tensor, queue: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from flash_attn import flash_attn_func

    rows, keys = query.transpose(1, 2), queue.transpose(1, 2)  # heads come third
    out, lse, _ = flash_attn_func(rows, keys, keys, softmax_scale=scale, return_attn_probs=True)
    return out.transpose(1, 2), lse


def info_nce_flex(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: float,
    query_ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
    *,
    flex: Callable[..., Any],
) -> Tensor:
    def leave_out(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, entry: Tensor) -> Tensor:
        assert query_ids is not None and queue_ids is not None
        return torch.where(query_ids[row] == queue_ids[entry], -torch.inf, score)

    def kernel(query: Tensor, queue: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        modification = None if query_ids is None else leave_out
        lse = AuxRequest(lse=True)
        out, aux = flex(query, queue, queue, modification, scale=scale, return_aux=lse)
        return out, aux.lse

    return info_nce_attention(query, key, queue, temperature, kernel=kernel)
