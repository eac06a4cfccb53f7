"""How features spread over their dimensions, or collapse.

All arithmetic is float64 on the CPU, whatever the features come in.
"""

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn import functional as F

# Where `collapse_warnings` sees a sign of collapse.
CHANCE_MARGIN = 0.05
STD_FLOOR = 0.3
CORRELATION_CEILING = 0.6
_RANKME_EPS = 1e-7  # as published, added to each share of the singular values
_ALPHA_FIRST, _ALPHA_LAST = 11, 100  # ranks of the log-log fit, counted from 1
_ALPHA_LEAST = 20  # fewer eigenvalues leave too short a stretch to fit


@dataclasses.dataclass(frozen=True)
class Diagnostics:
    """Measures of one set of feature vectors (N, D). None stands where one is not defined.

    Attributes:
        samples: N. The ranks mean little unless N is well above D.
        dimensions: D.
        rankme: effective rank of the matrix as it is, in [1, min(N, D)].
        rankme_centred: the same after the mean vector is taken away, in [1, min(N - 1, D)].
        rank_share: rankme_centred as a share of the most that is attainable, min(N - 1, D).
        alpha_req: exponent of the decay of the covariance's eigenvalues.
        mean_abs_correlation: between two dimensions, in [0, 1].
        std_sqrt_d: standard deviation of a dimension of the unit vectors, times sqrt(D): 1 when
            they spread evenly, 0 when all are the same.
        mean_share: squared length of the mean over the mean squared length, in [0, 1].
        spectrum: eigenvalues, descending, of the covariance of the unit vectors.
    """

    samples: int
    dimensions: int
    rankme: float | None = None
    rankme_centred: float | None = None
    rank_share: float | None = None
    alpha_req: float | None = None
    mean_abs_correlation: float | None = None
    std_sqrt_d: float | None = None
    mean_share: float | None = None
    spectrum: list[float] = dataclasses.field(default_factory=list)


def diagnose(features: Tensor) -> Diagnostics:
    """Everything of `Diagnostics` for features (N, D); undefined for N < 2 or non-finite values."""
    samples, dimensions = features.shape
    features = _prepared(features)
    if samples < 2 or not bool(features.isfinite().all()):
        return Diagnostics(samples, dimensions)
    rounding = _rounding(features)
    singular, centred = torch.linalg.svdvals(features), _centred_singular_values(features)
    rankme_centred = _effective_rank(centred, rounding)
    attainable = min(samples - 1, dimensions)
    return Diagnostics(
        samples=samples,
        dimensions=dimensions,
        rankme=_effective_rank(singular, rounding),
        rankme_centred=rankme_centred,
        rank_share=None if rankme_centred is None else rankme_centred / attainable,
        alpha_req=_decay_exponent(centred, rounding),
        mean_abs_correlation=mean_abs_correlation(features),
        std_sqrt_d=std_sqrt_d(features),
        mean_share=mean_share(features),
        spectrum=spectrum(features).tolist(),
    )


def spectrum(features: Tensor) -> Tensor:
    """Eigenvalues of the covariance of the L2-normalised vectors [1].

    Args:
        features: (N, D).

    Returns:
        (min(N, D),) float64, descending; the covariance's other eigenvalues are 0.

    [1] Jing et al., 2022, arXiv:2110.09348.
    """
    unit = F.normalize(_prepared(features), dim=1)
    return _centred_singular_values(unit).square() / len(unit)


def rankme(features: Tensor, centred: bool = False) -> float | None:
    """Effective rank exp(-sum p log p), p_k = sigma_k / sum(sigma) + 1e-7 [1].

    Args:
        features: (N, D), not centred by the published definition.
        centred: takes the mean vector away first.

    Returns:
        In [1, min(N, D)], or None when all singular values are 0.

    [1] Garrido et al., 2023, arXiv:2210.02885, eq. 1 and 2.
    """
    features = _prepared(features)
    singular = _centred_singular_values(features) if centred else torch.linalg.svdvals(features)
    return _effective_rank(singular, _rounding(features))


def alpha_req(features: Tensor) -> float | None:
    """Exponent alpha of the decay lambda_i ~ i^-alpha of the covariance's eigenvalues [1].

    A line through log lambda against log i on ranks 11 to 100, as many as there are.

    Args:
        features: (N, D).

    Returns:
        alpha, or None with fewer than 20 eigenvalues above rounding.

    [1] Agrawal et al., 2022, "alpha-ReQ", NeurIPS.
    """
    features = _prepared(features)
    return _decay_exponent(_centred_singular_values(features), _rounding(features))


def mean_abs_correlation(features: Tensor) -> float | None:
    """Mean |correlation| of two different dimensions; constant dimensions are left out.

    Args:
        features: (N, D).

    Returns:
        In [0, 1], or None with fewer than 2 dimensions that vary.
    """
    features = _prepared(features)
    centred = features - features.mean(0)
    deviation = centred.norm(dim=0)
    varies = deviation > len(features) * torch.finfo(torch.float64).eps * features.norm(dim=0)
    standardised = centred[:, varies] / deviation[varies]
    count = standardised.shape[1]
    if count < 2:
        return None
    total = (standardised.T @ standardised).abs().sum() - count  # the diagonal is 1
    return float((total / (count * (count - 1))).clamp(0, 1))


def std_sqrt_d(features: Tensor) -> float:
    """Mean standard deviation of a dimension of the L2-normalised vectors, times sqrt(D) [1].

    Args:
        features: (N, D).

    Returns:
        In [0, 1]: 1 for vectors that spread evenly over the sphere.

    [1] Chen and He, 2021, arXiv:2011.10566, section 4.1.
    """
    unit = F.normalize(_prepared(features), dim=1)
    return float(unit.std(0, correction=0).mean() * math.sqrt(unit.shape[1]))


def mean_share(features: Tensor) -> float | None:
    """|mean of z|^2 over the mean of |z|^2: 1 when all vectors are the same, else less.

    Args:
        features: (N, D).

    Returns:
        In [0, 1], or None when all vectors are 0.
    """
    features = _prepared(features)
    energy = features.square().sum(1).mean()
    if float(energy) == 0:
        return None
    return min(1.0, float(features.mean(0).square().sum() / energy))


def collapse_warnings(loss: float | None, chance: float, embeddings: Diagnostics) -> list[str]:
    """Sentences for the signs of collapse that hold, each with the flags that helped [1].

    The pooled features are not judged: behind a ReLU they lean to one side and vary little, most
    of all where segmentation is best. Nor is the rank: it may fall where segmentation gets better.

    Args:
        loss: of the contrast, in nats, averaged over the epoch; None before the first.
        chance: log(K + 1), the loss of guessing among the positive and K negatives.
        embeddings: of the projected vectors.

    [1] benchmarks/results/ablation/RESULTS.md.
    """
    warnings = []
    if loss is not None and abs(loss - chance) <= CHANCE_MARGIN * chance:
        warnings.append(
            f"The loss of {loss:.3f} stays within 5 % of chance, log(K + 1) = {chance:.3f}: "
            "queries are not told from the negatives. Try a higher --lr or --momentum."
        )
    if embeddings.std_sqrt_d is not None and embeddings.std_sqrt_d < STD_FLOOR:
        warnings.append(
            "The embeddings hardly vary: the standard deviation of a dimension times sqrt(D) is "
            f"{embeddings.std_sqrt_d:.2f}, below {STD_FLOOR} (1 is an even spread). Try a higher "
            "--momentum, or --decorrelation zca."
        )
    correlation = embeddings.mean_abs_correlation
    if correlation is not None and correlation > CORRELATION_CEILING:
        warnings.append(
            "The embeddings' dimensions repeat each other: their mean |correlation| is "
            f"{correlation:.2f}, above {CORRELATION_CEILING}. Try --decorrelation zca, or a "
            "higher --lr."
        )
    return warnings


def _prepared(features: Tensor) -> Tensor:
    return features.detach().to("cpu", torch.float64)


def _centred_singular_values(features: Tensor) -> Tensor:
    """Their squares over N are the covariance's eigenvalues, small ones resolved."""
    return torch.linalg.svdvals(features - features.mean(0))


def _rounding(features: Tensor) -> float:
    """Singular values up to this are rounding, also those that centring leaves of equal vectors."""
    return float(features.norm()) * max(features.shape) * torch.finfo(torch.float64).eps


def _effective_rank(singular: Tensor, rounding: float) -> float | None:
    if float(singular[0]) <= rounding:
        return None
    share = singular / singular.sum() + _RANKME_EPS
    return float(torch.exp(-(share * share.log()).sum()))


def _decay_exponent(singular: Tensor, rounding: float) -> float | None:
    singular = singular[singular > rounding]
    if len(singular) < _ALPHA_LEAST:
        return None
    log_eigenvalue = 2 * singular[_ALPHA_FIRST - 1 : _ALPHA_LAST].log()
    log_rank = torch.arange(_ALPHA_FIRST, _ALPHA_FIRST + len(log_eigenvalue)).double().log()
    log_rank = log_rank - log_rank.mean()
    return float(-(log_rank @ log_eigenvalue) / (log_rank @ log_rank))
