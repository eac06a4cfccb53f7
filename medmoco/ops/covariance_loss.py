"""VICReg's covariance term: the off-diagonal covariance of the features, squared."""

from typing import Any

import torch
from torch import Tensor

from medmoco.ops.checks import check_features, dtype_text, shape_text
from medmoco.ops.dispatch import (
    autocast_off,
    has_kernel,
    refuse_forward_mode,
    refuse_second_derivative,
    register_autocast,
    tf32_allowed,
    wide_dtype,
    wide_operands,
)

OP = "covariance_loss"
DIRECT_COLUMNS = 16  # of largest variance, kept out of the Gram form's subtraction


def covariance_loss(features: Tensor) -> Tensor:
    """Sum of the squared off-diagonal entries of the features' covariance, over D [1, eq. 4].

    L = 1/D sum_{i != j} C_ij^2 with C = Z_c^T Z_c / (N - 1), Z_c the features less their mean. With
    fewer samples than features it is computed through the (N, N) Gram matrix, which costs N/D of
    the (D, D) covariance.

    Args:
        features: (samples, features), at least 2 samples. Computed in float32, also under
            autocast (float64 for float64). On CUDA float64 runs in PyTorch; float32 keeps its
            accuracy there unless torch.backends.cuda.matmul.fp32_precision is "tf32".

    Returns:
        The loss, a float32 scalar (float64 for float64).

    Raises:
        RuntimeError: features is not 2-D or not floating, or has fewer than 2 samples; a second
            or a forward-mode derivative is asked for.

    [1] Bardes et al., "VICReg: Variance-Invariance-Covariance Regularization", 2022,
        arXiv:2105.04906.
    """
    if _kernel_takes(features):
        refuse_forward_mode(OP, features)
        loss, _, _ = torch.ops.medmoco.covariance_loss(
            features, features.is_cuda and tf32_allowed()
        )
        return loss
    check_features(OP, features, least_samples=2)
    samples, dims = features.shape
    with autocast_off(features.device.type):
        if samples + DIRECT_COLUMNS < dims:
            return _gram_form(features.to(wide_dtype(features)))
        return covariance_loss_reference(features)


def _kernel_takes(features: Tensor) -> bool:
    on_cuda_in_float64 = features.device.type == "cuda" and features.dtype == torch.float64
    return has_kernel(OP, features.device) and not on_cuda_in_float64


def covariance_loss_reference(features: Tensor) -> Tensor:
    """The same through the (D, D) covariance."""
    samples, dims = features.shape
    features = features.to(wide_dtype(features))
    centred = features - features.mean(0)
    covariance = centred.T @ centred / (samples - 1)
    # Masked, not subtracted: a difference of sums of squares would lose the digits of the smaller.
    diagonal = torch.eye(dims, dtype=torch.bool, device=features.device)
    return covariance.masked_fill(diagonal, 0).square().sum() / dims


def _gram_form(features: Tensor) -> Tensor:
    """|Z_c Z_c^T|^2 is the sum of all squares of Z_c^T Z_c; its diagonal has to be subtracted.

    That costs digits when a few columns hold most of the variance. So the columns of largest
    variance are taken out: their rows of the covariance are summed directly, the diagonal masked.
    """
    samples, dims = features.shape
    centred = features - features.mean(0)
    largest = centred.detach().square().sum(0).topk(DIRECT_COLUMNS).indices
    is_direct = torch.zeros(dims, dtype=torch.bool, device=features.device)
    is_direct = is_direct.scatter(0, largest, True)

    direct_rows = centred[:, largest].T @ centred
    diagonal = largest[:, None] == torch.arange(dims, device=features.device)
    # The rest of the covariance holds the transpose of what lies outside the direct columns.
    twice = torch.where(is_direct, 1.0, 2.0).to(features.dtype)
    direct = (direct_rows.masked_fill(diagonal, 0).square() * twice).sum()

    rest = centred.masked_fill(is_direct, 0)
    rest_sum = (rest @ rest.T).square().sum() - rest.square().sum(0).square().sum()
    return (direct + rest_sum) / ((samples - 1) ** 2 * dims)


@torch.library.register_fake("medmoco::covariance_loss")
def _fake(features: Tensor, allow_tf32: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    check_features(OP, features, least_samples=2)
    dtype = wide_dtype(features)
    loss = features.new_empty((), dtype=dtype)
    mean = features.new_empty(features.shape[1], dtype=torch.float64)
    side = _side(features)
    return loss, mean, features.new_empty(side, side, dtype=dtype)


def _side(features: Tensor) -> int | torch.SymInt:
    """Of the matrix: the covariance, or the Gram matrix where there are fewer samples."""
    return torch.sym_min(*features.shape)


@torch.library.register_fake("medmoco::covariance_loss_backward")
def _fake_backward(
    grad_loss: Tensor, features: Tensor, mean: Tensor, matrix: Tensor, allow_tf32: bool = False
) -> Tensor:
    _check_backward(grad_loss, features, mean, matrix)
    return features.new_empty(features.shape)


def _check_backward(grad_loss: Tensor, features: Tensor, mean: Tensor, matrix: Tensor) -> None:
    op = f"{OP}_backward"
    check_features(op, features, least_samples=2)
    dtype, side = wide_dtype(features), _side(features)
    for name, tensor, expected_dtype, shape in (
        ("grad_loss", grad_loss, dtype, ()),
        ("mean", mean, torch.float64, features.shape[1:]),
        ("matrix", matrix, dtype, (side, side)),
    ):
        if tensor.dtype != expected_dtype or tensor.shape != shape:
            expected = str(expected_dtype).removeprefix("torch.")
            raise RuntimeError(
                f"{op}: {name} must be {expected} {tuple(shape)}, "
                f"got {dtype_text(tensor)} {shape_text(tensor)}"
            )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, allow_tf32 = inputs
    _, mean, matrix = output
    ctx.mark_non_differentiable(mean, matrix)
    ctx.save_for_backward(features, mean, matrix)
    ctx.allow_tf32 = allow_tf32


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor, None]:
    features, mean, matrix = ctx.saved_tensors
    grad_features = torch.ops.medmoco.covariance_loss_backward(
        grad_loss, features, mean, matrix, ctx.allow_tf32
    )
    return grad_features, None


torch.library.register_autograd("medmoco::covariance_loss", _backward, setup_context=_setup_context)
refuse_second_derivative(OP)
register_autocast(OP, 1, wide_operands)
