"""Whitening by Newton's iteration, without an eigendecomposition."""

import torch
from torch import Tensor

from medmoco.ops.checks import check_whitening
from medmoco.ops.dispatch import autocast_off, wide_dtype

OP = "iternorm_whiten"


def iternorm_whiten(
    features: Tensor, group_size: int, eps: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Approximate ZCA whitening by a Newton-Schulz iteration [1, algorithm 1].

    S = Z_c^T Z_c / N + eps I, P_0 = I, P_k = (3 P_{k-1} - P_{k-1}^3 S / tr S) / 2, and the output
    is P z_c / sqrt(tr S). A few iterations whiten the large eigenvalues and leave small ones small.

    Args:
        features: (samples, features). Computed in float32, also under autocast (float64 for
            float64).
        group_size: features whitened together; divides their number.
        eps: added to the diagonal of the covariance, in units of variance; > 0.
        iterations: of Newton's method; at least 1.

    Returns:
        whitened (samples, features) in the dtype of features; mean (features,) and matrix
        (features / group_size, group_size, group_size), float32 (float64 for float64), constants
        to autograd.

    Raises:
        RuntimeError: features is not 2-D, floating and non-empty, group_size does not divide its
            features, eps is not positive, or iterations is less than 1.

    [1] Huang et al., "Iterative Normalization: Beyond Standardization towards Efficient
        Whitening", 2019, arXiv:1904.03441.
    """
    check_whitening(OP, features, group_size, eps)
    if iterations < 1:
        raise RuntimeError(f"{OP}: iterations must be at least 1, got {iterations}")
    with autocast_off(features.device.type):
        wide = features.to(wide_dtype(features))
        mean = wide.mean(0)
        groups = (wide - mean).unflatten(1, (-1, group_size)).transpose(0, 1)
        identity = torch.eye(group_size, dtype=wide.dtype, device=wide.device)
        covariance = groups.mT @ groups / wide.shape[0] + eps * identity
        trace = covariance.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        normalised = covariance / trace  # eigenvalues in (0, 1], where the iteration converges
        root = identity.expand_as(covariance)
        for _ in range(iterations):
            root = 1.5 * root - 0.5 * (root @ root @ root @ normalised)
        matrix = root / trace.sqrt()
        whitened = (groups @ matrix.mT).transpose(0, 1).flatten(1)
    return whitened.to(features.dtype), mean.detach(), matrix.detach()
