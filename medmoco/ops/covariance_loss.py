"""VICReg's covariance term: the off-diagonal covariance of the features, squared."""

import torch
from torch import Tensor

from medmoco.ops.checks import check_features
from medmoco.ops.dispatch import autocast_off, wide_dtype

OP = "covariance_loss"
DIRECT_COLUMNS = 16  # of largest variance, kept out of the Gram form's subtraction


def covariance_loss(features: Tensor) -> Tensor:
    """Sum of the squared off-diagonal entries of the features' covariance, over D [1, eq. 4].

    L = 1/D sum_{i != j} C_ij^2 with C = Z_c^T Z_c / (N - 1), Z_c the features less their mean. With
    fewer samples than features it is computed through the (N, N) Gram matrix, which costs N/D of
    the (D, D) covariance.

    Args:
        features: (samples, features), at least 2 samples. Computed in float32, also under
            autocast (float64 for float64).

    Returns:
        The loss, a float32 scalar (float64 for float64).

    Raises:
        RuntimeError: features is not 2-D or not floating, or has fewer than 2 samples.

    [1] Bardes et al., "VICReg: Variance-Invariance-Covariance Regularization", 2022,
        arXiv:2105.04906.
    """
    check_features(OP, features, least_samples=2)
    samples, dims = features.shape
    with autocast_off(features.device.type):
        if samples + DIRECT_COLUMNS < dims:
            return _gram_form(features.to(wide_dtype(features)))
        return covariance_loss_reference(features)


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
