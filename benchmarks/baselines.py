"""What a skilled user would write without medmoco, each as a plain function.

InfoNCE peers take (query, key, queue, temperature, query_ids, queue_ids) and return the loss of
each row. A `Peer` without a function says why it is absent.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import cross_entropy, normalize, softplus
from torch.utils.checkpoint import checkpoint

from attention import (
    Attention,
    cpu_flash,
    cuda_cudnn,
    cuda_efficient,
    cuda_flash,
    flash_attn_package,
    info_nce_attention,
    info_nce_flex,
)
from medmoco.ops.zca_whiten import zca_whiten_reference

FEW_ROWS = 1024


@dataclass(frozen=True)
class Peer:
    name: str
    function: Callable[..., Any] | None = None
    status: str = "ok"  # or "missing" (could be installed), "n/a" (cannot do this)
    reason: str = ""


def compiled(function: Callable[..., Any], *, skip: bool, name: str = "torch.compile") -> Peer:
    if skip:
        return Peer(name, status="n/a", reason="compiling takes longer than --quick")
    return Peer(name, torch.compile(function, dynamic=False))


# --- queue_info_nce


def info_nce_eager(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: float,
    query_ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
) -> Tensor:
    """As in MoCo: all logits, cross-entropy with the positive as class 0."""
    positive = (query * key).sum(1) / temperature
    negatives = query @ queue.T / temperature
    if query_ids is not None and queue_ids is not None:
        negatives = negatives.masked_fill(query_ids[:, None] == queue_ids, -torch.inf)
    logits = torch.cat([positive[:, None], negatives], 1)
    target = torch.zeros(len(query), dtype=torch.long, device=query.device)
    return cross_entropy(logits.float(), target, reduction="none")


def info_nce_autocast(query: Tensor, *operands: Any) -> Tensor:
    """The same as it is trained with on CUDA: products in 16 bits, cross-entropy in float32."""
    with torch.autocast(query.device.type, query.dtype):
        return info_nce_eager(query, *operands)


def info_nce_chunked(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: float,
    query_ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
    *,
    eager: Callable[..., Tensor],
    chunk: int,
) -> Tensor:
    """The same over chunks of rows, computed again in the backward pass."""
    losses = []
    for start in range(0, len(query), chunk):
        rows = slice(start, start + chunk)
        ids = None if query_ids is None else query_ids[rows]
        operands = (query[rows], key[rows], queue, temperature, ids, queue_ids)
        # The state of the random numbers, of which there are none, would keep it from a CUDA graph.
        losses.append(checkpoint(eager, *operands, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(losses)


def from_cross_entropy(loss: Tensor, query: Tensor, key: Tensor, queue: Tensor, t: float) -> Tensor:
    """InfoNCE from the cross-entropy of query @ queue.T / t with target 0, which is lse - s_0."""
    lse = loss + (query.float() @ queue[0].float()) / t
    return softplus(lse - (query.float() * key.float()).sum(1) / t)


def info_nce_liger(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    target = torch.zeros(len(query), dtype=torch.long, device=query.device)
    loss = LigerFusedLinearCrossEntropyLoss(reduction="none")(queue, query / temperature, target)
    return from_cross_entropy(loss, query, key, queue, temperature)


def info_nce_cce(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    target = torch.zeros(len(query), dtype=torch.long, device=query.device)
    loss = linear_cross_entropy(
        query / temperature, queue, target, reduction="none", impl="cce_exact"
    )
    return from_cross_entropy(loss, query, key, queue, temperature)


def queue_splits(rows: int, device: torch.device) -> tuple[int, ...]:
    """In how many parts of the queue attention is tried: few rows need many to fill a GPU."""
    if device.type == "cpu":
        return (1, 8)
    return (1, 16, 32, 64, 128) if rows <= FEW_ROWS else (1, 2, 4, 8)


def info_nce_peers(
    rows: int,
    queue_size: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    with_ids: bool,
    quick: bool,
) -> list[Peer]:
    cuda = device.type == "cuda"
    sixteen_bit = dtype in (torch.float16, torch.bfloat16)
    kernels: dict[str, Attention] = {"attention": cpu_flash}
    if cuda:
        kernels = {"attention (efficient)": cuda_efficient}
        if sixteen_bit:
            kernels |= {"attention (flash)": cuda_flash, "attention (cudnn)": cuda_cudnn}
    eager = info_nce_autocast if cuda and sixteen_bit else info_nce_eager
    chunked = partial(info_nce_chunked, eager=eager, chunk=1024 if cuda else 64)
    peers = [
        Peer("eager", eager),
        compiled(eager, skip=quick),
        Peer("chunked, checkpoint", chunked),
    ]
    for name, kernel in kernels.items():
        for splits in queue_splits(rows, device):
            title = name if splits == 1 else f"{name}, {splits} splits"
            function = partial(info_nce_attention, kernel=kernel, splits=splits)
            peer = Peer(title, function)
            if with_ids:
                peer = Peer(title, status="n/a", reason="takes no ids, only a mask of all logits")
            elif queue_size % splits:
                peer = Peer(title, status="n/a", reason=f"{splits} does not divide the queue")
            peers.append(peer)
    return peers + _optional_info_nce_peers(cuda, sixteen_bit, with_ids)


def _optional_info_nce_peers(cuda: bool, sixteen_bit: bool, with_ids: bool) -> list[Peer]:
    flex = Peer("flex_attention", status="n/a", reason="gives no lse on the CPU")
    if cuda:
        compiled_flex = torch.compile(flex_attention, dynamic=False)
        flex = Peer("flex_attention", partial(info_nce_flex, flex=compiled_flex))
    peers = [flex]
    packages: dict[str, tuple[str, Callable[..., Any], bool]] = {
        "flash-attn": (
            "flash_attn",
            partial(info_nce_attention, kernel=flash_attn_package),
            sixteen_bit,
        ),
        "liger-kernel": ("liger_kernel", info_nce_liger, True),
        "cut-cross-entropy": ("cut_cross_entropy", info_nce_cce, True),
    }
    for name, (module, function, takes_dtype) in packages.items():
        if find_spec(module) is None:
            peers.append(Peer(name, status="missing", reason="not installed"))
        elif not cuda:
            peers.append(Peer(name, status="n/a", reason="needs CUDA"))
        elif with_ids:
            peers.append(Peer(name, status="n/a", reason="takes no ids"))
        elif not takes_dtype:
            peers.append(Peer(name, status="n/a", reason="takes 16-bit operands only"))
        else:
            peers.append(Peer(name, function))
    return peers


# --- dense_match


def match_eager(query_map: Tensor, key_map: Tensor) -> tuple[Tensor, Tensor]:
    cosine = normalize(query_map, dim=1).mT @ normalize(key_map, dim=1)
    similarity, index = cosine.max(2)
    return index, similarity


def match_peers(*, quick: bool) -> list[Peer]:
    return [Peer("eager", match_eager), compiled(match_eager, skip=quick)]


# --- covariance_loss


def covariance_eager(features: Tensor) -> Tensor:
    """As in VICReg, through the (D, D) covariance."""
    features = _wide(features)
    samples, dims = features.shape
    centred = features - features.mean(0)
    covariance = centred.T @ centred / (samples - 1)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / dims


def covariance_gram(features: Tensor) -> Tensor:
    """The same through the (N, N) Gram matrix: cheaper for N < D."""
    features = _wide(features)
    samples, dims = features.shape
    centred = features - features.mean(0)
    gram = centred @ centred.T
    diagonal = centred.square().sum(0).square().sum()
    return (gram.square().sum() - diagonal) / ((samples - 1) ** 2 * dims)


def covariance_peers(samples: int, dims: int, *, quick: bool) -> list[Peer]:
    peers = [Peer("eager", covariance_eager), compiled(covariance_eager, skip=quick)]
    if samples >= dims:
        return [*peers, Peer("Gram form", status="n/a", reason="no smaller than the covariance")]
    gram = compiled(covariance_gram, skip=quick, name="Gram form, compiled")
    return [*peers, Peer("Gram form", covariance_gram), gram]


# --- zca_whiten


def whiten_peers(*, quick: bool) -> list[Peer]:
    """Autograd through torch.linalg.eigh: what the reference is."""
    return [
        Peer("eager", zca_whiten_reference),
        compiled(zca_whiten_reference, skip=quick),
    ]


def _wide(tensor: Tensor) -> Tensor:
    """What 16-bit features have to be summed in: float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
