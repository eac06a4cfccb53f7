"""Layers that whiten features in groups of channels: exact ZCA and IterNorm."""

import abc
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medmoco.distributed import gather_rows, own_part
from medmoco.errors import UserError
from medmoco.models.encoder import Encoder, last_norm_name
from medmoco.ops import iternorm_whiten, zca_whiten

SAMPLES_A_CHANNEL = 4  # with fewer samples the small eigenvalues are noise
_NORM_EPS = 1e-5


class _Whitening(nn.Module, abc.ABC):
    """Whitening of (N, D) or (N, D, H, W) by statistics of the batch, or by their averages.

    Training uses the statistics of the batch, over positions too, and averages them as BatchNorm
    does (momentum None: a cumulative average); eval mode uses the averages. Arithmetic is float32
    under autocast as well, and float64 for float64.

    Attributes:
        over_ranks: whether the batch is that of all ranks, of which each then whitens all of it.
    """

    over_ranks = False
    running_mean: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self, features: int, group_size: int, eps: float, momentum: float | None, affine: bool
    ) -> None:
        super().__init__()
        if group_size < 1 or features % group_size:
            raise UserError(
                f"the whitening group must divide the {features} channels, got {group_size}"
            )
        self.features = features
        self.group_size = group_size
        self.eps = eps
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(features)) if affine else None
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

    def forward(self, features: Tensor) -> Tensor:
        """features (N, D) or (N, D, H, W), whitened across D; the same shape and dtype.

        Raises:
            UserError: in training, when there are too few samples to whiten.
        """
        rows = features.movedim(1, -1)
        with torch.autocast(features.device.type, enabled=False):
            flat = rows.reshape(-1, self.features)
            flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
            if self.training:
                batch = gather_rows(flat) if self.over_ranks else flat
                self._check_samples(len(batch), pooled=features.ndim == 2)
                self.num_batches_tracked.add_(1)
                batch = self._whiten_batch(batch)
                flat = own_part(batch) if self.over_ranks else batch
            else:
                mean, blocks = self._running_blocks()
                centred = (flat - mean).unflatten(1, (-1, self.group_size))
                flat = torch.einsum("gij,ngj->ngi", blocks.to(flat), centred).flatten(1)
            if self.weight is not None and self.bias is not None:
                flat = flat * self.weight + self.bias
        return flat.to(features.dtype).reshape(rows.shape).movedim(-1, 1)

    def whitening_matrix(self) -> tuple[Tensor, Tensor]:
        """mean (D,) and block diagonal matrix (D, D) of eval mode: y = matrix (x - mean)."""
        mean, blocks = self._running_blocks()
        return mean, torch.block_diag(*blocks)

    @abc.abstractmethod
    def output_variance(self) -> Tensor:
        """(D,) variance that eval mode leaves by the running statistics, before any affine."""

    @abc.abstractmethod
    def reset_running_stats(self) -> None:
        """Forgets the averages, as BatchNorm's method of this name."""

    @abc.abstractmethod
    def _whiten_batch(self, rows: Tensor) -> Tensor:
        """Whitens (samples, D) by its own statistics and averages them."""

    @abc.abstractmethod
    def _running_blocks(self) -> tuple[Tensor, Tensor]:
        """mean (D,) and blocks (D/g, g, g) of eval mode."""

    def _check_samples(self, samples: int, pooled: bool) -> None:
        needed = SAMPLES_A_CHANNEL * self.group_size
        if samples < needed:
            place = "pooled features" if pooled else "cells of a feature map"
            raise UserError(
                f"the batch is too small for whitening in groups of {self.group_size} channels: "
                f"expected at least {needed} {place} ({SAMPLES_A_CHANNEL} a channel), got "
                f"{samples}; raise --batch-size, or lower --whiten-group"
            )

    @torch.no_grad()
    def _average(self, average: Tensor, value: Tensor) -> None:
        value = value.to(average)
        if self.momentum is None:
            average.lerp_(value, 1 / self.num_batches_tracked.to(average))
        else:
            average.lerp_(value, self.momentum)


class ZCAWhitening(_Whitening):
    """Standardisation of each channel, then exact ZCA in groups [1].

    Channels are standardised first, by a BatchNorm without parameters, so that `eps` is relative
    to a variance of 1. Averaged are mean, variance and the covariance of the standardised
    channels, never the whitening matrix: the average of inverse roots whitens nothing.

    Args:
        features: channels D.
        group_size: channels whitened together, a divisor of D.
        eps: added to the eigenvalues, > 0.
        momentum: weight of the batch in the averages; None for a cumulative average.

    Raises:
        UserError: group_size does not divide the channels.

    [1] Huang et al., 2018, arXiv:1804.08450.
    """

    running_var: Tensor
    running_covariance: Tensor

    def __init__(
        self,
        features: int,
        group_size: int = 64,
        eps: float = 1e-3,
        momentum: float | None = 0.1,
    ) -> None:
        super().__init__(features, group_size, eps, momentum, affine=False)
        self.register_buffer("running_var", torch.ones(features))
        self.register_buffer("running_covariance", _identity_blocks(features, group_size))

    def reset_running_stats(self) -> None:
        self.num_batches_tracked.zero_()
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.running_covariance.copy_(_identity_blocks(self.features, self.group_size))

    def output_variance(self) -> Tensor:
        root = self._inverse_root()
        return (root @ self.running_covariance @ root).diagonal(dim1=1, dim2=2).flatten()

    def _whiten_batch(self, rows: Tensor) -> Tensor:
        standardised = F.batch_norm(rows, None, None, training=True, eps=_NORM_EPS)
        self._average_statistics(rows.detach(), standardised.detach())
        whitened, _, _ = zca_whiten(standardised, self.group_size, self.eps)
        return whitened

    def _average_statistics(self, rows: Tensor, standardised: Tensor) -> None:
        variance, mean = torch.var_mean(rows, dim=0, correction=0)
        groups = standardised.unflatten(1, (-1, self.group_size)).transpose(0, 1)
        self._average(self.running_mean, mean)
        self._average(self.running_var, variance)
        self._average(self.running_covariance, groups.mT @ groups / len(rows))

    def _inverse_root(self) -> Tensor:
        eigenvalues, vectors = torch.linalg.eigh(self.running_covariance)
        scale = (eigenvalues.clamp(min=0) + self.eps).rsqrt()
        return (vectors * scale[:, None, :]) @ vectors.mT

    def _running_blocks(self) -> tuple[Tensor, Tensor]:
        scale = (self.running_var + _NORM_EPS).rsqrt().unflatten(0, (-1, self.group_size))
        return self.running_mean, self._inverse_root() * scale[:, None, :]


class IterNorm(_Whitening):
    """Whitening by Newton-Schulz iterations [1], which with few of them stays incomplete.

    As in the authors' code, the whitening matrix itself is averaged.

    Args:
        features: channels D.
        group_size: channels whitened together, a divisor of D; None for all of them.
        eps: added to the diagonal of the covariance, > 0.
        iterations: Newton-Schulz steps T.
        momentum: weight of the batch in the averages; None for a cumulative average.
        affine: whether a learned weight and bias follow, as in the BatchNorm it may stand for.

    Raises:
        UserError: group_size does not divide the channels.

    [1] Huang et al., 2019, arXiv:1904.03441.
    """

    running_matrix: Tensor
    running_output_var: Tensor

    def __init__(
        self,
        features: int,
        group_size: int | None = None,
        eps: float = 1e-5,
        iterations: int = 5,
        momentum: float | None = 0.1,
        affine: bool = False,
    ) -> None:
        super().__init__(features, group_size or features, eps, momentum, affine)
        self.iterations = iterations
        self.register_buffer("running_matrix", _identity_blocks(features, self.group_size))
        self.register_buffer("running_output_var", torch.ones(features))

    def reset_running_stats(self) -> None:
        self.num_batches_tracked.zero_()
        self.running_mean.zero_()
        self.running_matrix.copy_(_identity_blocks(self.features, self.group_size))
        self.running_output_var.fill_(1)

    def output_variance(self) -> Tensor:
        return self.running_output_var

    def _whiten_batch(self, rows: Tensor) -> Tensor:
        whitened, mean, matrix = iternorm_whiten(rows, self.group_size, self.eps, self.iterations)
        self._average(self.running_mean, mean)
        self._average(self.running_matrix, matrix)
        self._average(self.running_output_var, whitened.detach().square().mean(0))
        return whitened

    def _running_blocks(self) -> tuple[Tensor, Tensor]:
        return self.running_mean, self.running_matrix

    def _check_samples(self, samples: int, pooled: bool) -> None:
        # On a map the published setting has fewer cells than this (2048 channels in one group);
        # the few iterations keep directions without variance from being blown up.
        if pooled:
            super()._check_samples(samples, pooled)


class MapWhitening(nn.Conv2d):
    """The whitening of pooled features at every cell of the map: W (x - mean), a 1x1 convolution.

    Averaging over the map is linear, so whitened cells have the whitened features as their average.

    Args:
        features: channels D.
        group_size: channels whitened together.
    """

    mean: Tensor

    def __init__(self, features: int, group_size: int) -> None:
        super().__init__(features, features, 1, groups=features // group_size, bias=False)
        # Subtracted first: as a bias it would cancel digits where the mean is far from zero.
        self.register_buffer("mean", torch.zeros(features))

    def forward(self, feature_map: Tensor) -> Tensor:
        """(B, D, h, w), whitened across D; the same shape."""
        return super().forward(feature_map - self.mean[:, None, None])


def group_of(layer: nn.Conv2d | None) -> int | None:
    """Channels whitened together by a `MapWhitening`; None for none."""
    return None if layer is None else layer.weight.shape[1]


def map_whitening_state(whitening: nn.Module | None) -> dict[str, Tensor] | None:
    """Eval mode of a whitening as state_dict of a `MapWhitening`, on the CPU; None without one.

    Returns:
        "weight" (D, group_size, 1, 1) and "mean" (D,), float32: what encoder.pt holds.
    """
    if whitening is None:
        return None
    assert isinstance(whitening, _Whitening) and whitening.weight is None
    mean, blocks = whitening._running_blocks()
    weight = blocks.reshape(whitening.features, whitening.group_size, 1, 1)
    return {"weight": weight.detach().cpu().clone(), "mean": mean.detach().cpu().clone()}


def keep_whitening(encoder: Encoder, state: Any) -> None:
    """Appends the whitening that an encoder was pretrained with to it, as its last layer.

    Args:
        encoder: changed in place.
        state: as `map_whitening_state` gives it.

    Raises:
        UserError: there is none, or it does not fit the encoder.
    """
    if state is None:
        raise UserError("it holds no whitening after pooling")
    features = encoder.channels[-1]
    try:
        layer = MapWhitening(features, group_size=state["weight"].shape[1])
        layer.load_state_dict(state)
    except Exception as error:  # the entry of a file can be anything
        raise UserError(f"its whitening does not fit {features} channels") from error
    encoder.whitening = layer


def replace_last_norm(encoder: Encoder, layer: nn.Module) -> None:
    """Puts `layer` in place of the normalisation before the last residual sum.

    `medmoco.models.encoder.fold_whitening` turns it into a BatchNorm again.
    """
    setattr(encoder.layer4[-1], last_norm_name(encoder), layer)


def _identity_blocks(features: int, group_size: int) -> Tensor:
    return torch.eye(group_size).repeat(features // group_size, 1, 1)
