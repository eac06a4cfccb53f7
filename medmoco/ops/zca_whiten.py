"""ZCA whitening of features, group by group, with a gradient that survives equal eigenvalues."""

from typing import Any

import torch
from torch import Tensor

from medmoco.ops.checks import check_features, check_whitening, dtype_text, shape_text
from medmoco.ops.dispatch import (
    autocast_enabled,
    autocast_off,
    has_kernel,
    raise_second_derivative,
    refuse_forward_mode,
    refuse_second_derivative,
    register_autocast,
    tf32_allowed,
    wide_dtype,
    wide_operands,
)

OP = "zca_whiten"
MOST_GROUP_SIZE_ON_CUDA = 128  # of the kernel; its eigensolver works in shared memory


def zca_whiten(features: Tensor, group_size: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Removes the correlation within each group of features, moving them as little as possible [1].

    For each group S = Z_c^T Z_c / N = U diag(l) U^T and W = U diag((max(l, 0) + eps)^{-1/2}) U^T;
    the output is W z_c. The gradient runs through W by divided differences, which need no
    1 / (l_i - l_j): equal and zero eigenvalues are harmless.

    Constant and duplicate features and fewer samples than a group has features are allowed. A NaN
    or an infinity makes its whole group NaN, and that group alone.

    Args:
        features: (samples, features), float32, float64, bfloat16 or float16. Computed in float32
            (float64 for float64); autocast hands them over in float32. On CUDA the kernel takes
            groups of up to 128 features and no float64; the rest runs in PyTorch. There float32
            keeps its accuracy unless torch.backends.cuda.matmul.fp32_precision is "tf32".
        group_size: features whitened together; divides their number.
        eps: added to the eigenvalues, in units of variance; > 0.

    Returns:
        whitened (samples, features) in the dtype of features; mean (features,) and matrix
        (features / group_size, group_size, group_size), float32 (float64 for float64), constants
        to autograd.

    Raises:
        RuntimeError: features is not 2-D, floating and non-empty, group_size does not divide its
            features, or eps is not positive; a second or a forward-mode derivative is asked for.

    [1] Huang et al., "Decorrelated Batch Normalization", 2018, arXiv:1804.08450.
    """
    if _kernel_takes(features, group_size):
        refuse_forward_mode(OP, features)
        whitened, mean, matrix, _, _ = torch.ops.medmoco.zca_whiten(
            features, group_size, eps, features.is_cuda and tf32_allowed()
        )
        return whitened, mean, matrix
    check_whitening(OP, features, group_size, eps)
    if autocast_enabled(features.device.type):
        features = features.to(wide_dtype(features))
    with autocast_off(features.device.type):
        wide = features.to(wide_dtype(features))
        whitened, mean, matrix, _, _ = _ZcaWhiten.apply(wide, group_size, eps)
    return whitened.to(features.dtype), mean, matrix


def _kernel_takes(features: Tensor, group_size: int) -> bool:
    if not has_kernel(OP, features.device):
        return False
    if features.device.type != "cuda":
        return True
    return group_size <= MOST_GROUP_SIZE_ON_CUDA and features.dtype != torch.float64


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
    """The operator in PyTorch's own, where no kernel of ours runs."""

    @staticmethod
    def forward(features: Tensor, group_size: int, eps: float) -> tuple[Tensor, ...]:
        mean = features.mean(0)
        groups = _group(features - mean, group_size)
        covariance = groups.mT @ groups / features.shape[0]
        # A decomposition of what is not finite fails, for all groups together.
        finite = covariance.isfinite().all(2).all(1)[:, None, None]
        eigenvalues, vectors = torch.linalg.eigh(covariance.where(finite, 0))
        vectors = vectors.where(finite, torch.nan)
        scale = (eigenvalues.clamp(min=0) + eps).rsqrt().where(finite[:, 0], torch.nan)
        matrix = (vectors * scale[:, None, :]) @ vectors.mT
        return _ungroup(groups @ matrix), mean, matrix, scale, vectors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, mean, matrix, scale, vectors = output
        ctx.mark_non_differentiable(mean, matrix, scale, vectors)
        ctx.save_for_backward(inputs[0], mean, matrix, scale, vectors)

    @staticmethod
    def backward(ctx: Any, grad_whitened: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        return _ZcaWhitenBackward.apply(grad_whitened, *ctx.saved_tensors), None, None


class _ZcaWhitenBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        grad_whitened: Tensor,
        features: Tensor,
        mean: Tensor,
        matrix: Tensor,
        scale: Tensor,
        vectors: Tensor,
    ) -> Tensor:
        groups = _group(features - mean, matrix.shape[1])
        grad = _group(grad_whitened, matrix.shape[1])
        # Of l^{-1/2}, at scale_i = l_i^{-1/2}: -1 / (sqrt l_i sqrt l_j (sqrt l_i + sqrt l_j)), with
        # the derivative on the diagonal.
        left, right = scale[:, :, None], scale[:, None, :]
        divided_difference = -left * right * (left * right / (left + right))
        grad_matrix = groups.mT @ grad
        grad_matrix = vectors.mT @ (grad_matrix + grad_matrix.mT) @ vectors
        grad_covariance = vectors @ (divided_difference * grad_matrix) @ vectors.mT
        grad_centred = _ungroup(grad @ matrix + groups @ grad_covariance / features.shape[0])
        return grad_centred - grad_centred.mean(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise_second_derivative(OP)


def _group(features: Tensor, group_size: int) -> Tensor:
    """(samples, features) -> (groups, samples, group_size)."""
    return features.unflatten(1, (-1, group_size)).transpose(0, 1)


def _ungroup(groups: Tensor) -> Tensor:
    return groups.transpose(0, 1).flatten(1)


@torch.library.register_fake("medmoco::zca_whiten")
def _fake(
    features: Tensor, group_size: int, eps: float, allow_tf32: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_whitening(OP, features, group_size, eps)
    count, dtype = features.shape[1], wide_dtype(features)
    groups = count // group_size
    return (
        features.new_empty(features.shape),
        features.new_empty(count, dtype=dtype),
        features.new_empty(groups, group_size, group_size, dtype=dtype),
        features.new_empty(groups, group_size, dtype=dtype),
        features.new_empty(groups, group_size, group_size, dtype=dtype),
    )


@torch.library.register_fake("medmoco::zca_whiten_backward")
def _fake_backward(
    grad_whitened: Tensor,
    features: Tensor,
    mean: Tensor,
    matrix: Tensor,
    scale: Tensor,
    vectors: Tensor,
    allow_tf32: bool = False,
) -> Tensor:
    _check_backward(grad_whitened, features, mean, matrix, scale, vectors)
    return features.new_empty(features.shape)


def _check_backward(
    grad_whitened: Tensor,
    features: Tensor,
    mean: Tensor,
    matrix: Tensor,
    scale: Tensor,
    vectors: Tensor,
) -> None:
    op = f"{OP}_backward"
    check_features(op, features, least_samples=1)

    def check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        if tensor.dtype != dtype or tensor.shape != shape:
            raise RuntimeError(
                f"{op}: {name} must be {str(dtype).removeprefix('torch.')} {tuple(shape)}, "
                f"got {dtype_text(tensor)} {shape_text(tensor)}"
            )

    check("grad_whitened", grad_whitened, features.dtype, features.shape)
    dtype, count = wide_dtype(features), features.shape[1]
    if (
        matrix.dtype != dtype
        or matrix.dim() != 3
        or matrix.shape[1] < 1
        or matrix.shape[1] != matrix.shape[2]
        or matrix.shape[0] * matrix.shape[1] != count
    ):
        raise RuntimeError(
            f"{op}: matrix must be {str(dtype).removeprefix('torch.')} "
            f"(groups, group_size, group_size) of {count} features, "
            f"got {dtype_text(matrix)} {shape_text(matrix)}"
        )
    check("mean", mean, dtype, (count,))
    check("scale", scale, dtype, matrix.shape[:2])
    check("vectors", vectors, dtype, matrix.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, _, _, ctx.allow_tf32 = inputs
    _, mean, matrix, scale, vectors = output
    ctx.mark_non_differentiable(mean, matrix, scale, vectors)
    ctx.save_for_backward(features, mean, matrix, scale, vectors)


def _backward(ctx: Any, grad_whitened: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grad_features = torch.ops.medmoco.zca_whiten_backward(
        grad_whitened, *ctx.saved_tensors, ctx.allow_tf32
    )
    return grad_features, None, None, None


torch.library.register_autograd("medmoco::zca_whiten", _backward, setup_context=_setup_context)
refuse_second_derivative(OP)
register_autocast(OP, 1, wide_operands)
