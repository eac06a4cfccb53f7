"""ZCA whitening of features, group by group, with a gradient that survives equal eigenvalues."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from medmoco.ops.checks import check_whitening
from medmoco.ops.dispatch import autocast_off, wide_dtype

OP = "zca_whiten"


def zca_whiten(features: Tensor, group_size: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Removes the correlation within each group of features, moving them as little as possible [1].

    For each group S = Z_c^T Z_c / N = U diag(l) U^T and W = U diag((max(l, 0) + eps)^{-1/2}) U^T;
    the output is W z_c. The gradient runs through W by divided differences, which need no
    1 / (l_i - l_j): equal and zero eigenvalues are harmless.

    Args:
        features: (samples, features). Computed in float32, also under autocast (float64 for
            float64).
        group_size: features whitened together; divides their number.
        eps: added to the eigenvalues, in units of variance; > 0.

    Returns:
        whitened (samples, features) in the dtype of features; mean (features,) and matrix
        (features / group_size, group_size, group_size), float32 (float64 for float64), constants
        to autograd.

    Raises:
        RuntimeError: features is not 2-D, floating and non-empty, group_size does not divide its
            features, or eps is not positive; a second derivative is asked for.

    [1] Huang et al., "Decorrelated Batch Normalization", 2018, arXiv:1804.08450.
    """
    check_whitening(OP, features, group_size, eps)
    with autocast_off(features.device.type):
        wide = features.to(wide_dtype(features))
        whitened, mean, matrix, _, _ = _ZcaWhiten.apply(wide, group_size, eps)
    return whitened.to(features.dtype), mean, matrix


def zca_whiten_reference(
    features: Tensor, group_size: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with autograd through eigh: its gradient needs distinct eigenvalues."""
    wide = features.to(wide_dtype(features))
    mean = wide.mean(0)
    groups = _group(wide - mean, group_size)
    eigenvalues, vectors = torch.linalg.eigh(groups.mT @ groups / wide.shape[0])
    scale = (eigenvalues.clamp(min=0) + eps).rsqrt()
    matrix = (vectors * scale[:, None, :]) @ vectors.mT
    whitened = _ungroup(groups @ matrix)
    return whitened.to(features.dtype), mean.detach(), matrix.detach()


class _ZcaWhiten(torch.autograd.Function):
    @staticmethod
    def forward(features: Tensor, group_size: int, eps: float) -> tuple[Tensor, ...]:
        mean = features.mean(0)
        groups = _group(features - mean, group_size)
        eigenvalues, vectors = torch.linalg.eigh(groups.mT @ groups / features.shape[0])
        scale = (eigenvalues.clamp(min=0) + eps).rsqrt()
        matrix = (vectors * scale[:, None, :]) @ vectors.mT
        return _ungroup(groups @ matrix), mean, matrix, scale, vectors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        features, ctx.group_size, _ = inputs
        _, mean, matrix, scale, vectors = output
        ctx.mark_non_differentiable(mean, matrix, scale, vectors)
        ctx.save_for_backward(features, mean, matrix, scale, vectors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_whitened: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        features, mean, matrix, scale, vectors = ctx.saved_tensors
        groups = _group(features - mean, ctx.group_size)
        grad = _group(grad_whitened, ctx.group_size)
        # Of l^{-1/2}, at scale_i = l_i^{-1/2}: -1 / (sqrt l_i sqrt l_j (sqrt l_i + sqrt l_j)), with
        # the derivative on the diagonal.
        left, right = scale[:, :, None], scale[:, None, :]
        divided_difference = -(left * right).square() / (left + right)
        grad_matrix = groups.mT @ grad
        grad_matrix = vectors.mT @ (grad_matrix + grad_matrix.mT) @ vectors
        grad_covariance = vectors @ (divided_difference * grad_matrix) @ vectors.mT
        grad_centred = _ungroup(grad @ matrix + groups @ grad_covariance / features.shape[0])
        return grad_centred - grad_centred.mean(0), None, None


def _group(features: Tensor, group_size: int) -> Tensor:
    """(samples, features) -> (groups, samples, group_size)."""
    return features.unflatten(1, (-1, group_size)).transpose(0, 1)


def _ungroup(groups: Tensor) -> Tensor:
    return groups.transpose(0, 1).flatten(1)
