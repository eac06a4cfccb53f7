"""Batch normalisation with statistics over all ranks, on the CPU too."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from medmoco.distributed import gather_rows, sum_over_ranks, world


class RankBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose batch is that of all ranks, of which each has as many images.

    In eval mode, in a world of one, and where `over_ranks` is False, it is a BatchNorm2d.
    torch's SyncBatchNorm does the same on GPUs alone.
    """

    over_ranks = True

    def forward(self, images: Tensor) -> Tensor:
        """images (batch, channels, height, width), this rank's; the same shape."""
        if not (self.training and self.over_ranks and world() > 1):
            return super().forward(images)
        normalised, mean, variance = _Normalise.apply(images, self.weight, self.bias, self.eps)
        self._average(mean, variance, images.numel() // images.shape[1] * world())
        return normalised

    @torch.no_grad()
    def _average(self, mean: Tensor, variance: Tensor, samples: int) -> None:
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None and self.running_var is not None
        self.num_batches_tracked.add_(1)
        share: Any = self.momentum
        if share is None:
            share = 1 / self.num_batches_tracked.to(mean)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance * (samples / (samples - 1)), share)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        own = torch.var_mean(images.to(weight.dtype), (0, 2, 3), correction=0)
        variances, means = gather_rows(torch.stack(own)[None]).unbind(1)
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)
        ctx.save_for_backward(images, weight, mean, (variance + eps).rsqrt())
        ctx.mark_non_differentiable(mean, variance)
        normalised = functional.batch_norm(images, mean, variance, weight, bias, False, 0.0, eps)
        return normalised, mean, variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        images, weight, mean, scale = ctx.saved_tensors
        standard = (images.to(weight.dtype) - _map(mean)) * _map(scale)
        grad = grad.to(weight.dtype)
        grad_bias = grad.sum((0, 2, 3))
        grad_weight = (grad * standard).sum((0, 2, 3))
        sums = sum_over_ranks(torch.stack([grad_bias, grad_weight]))
        of_bias, of_weight = sums / (images.numel() // images.shape[1] * world())
        along = grad - _map(of_bias) - standard * _map(of_weight)
        return (along * _map(weight * scale)).to(images.dtype), grad_weight, grad_bias, None


def _map(values: Tensor) -> Tensor:
    return values[:, None, None]


def share_statistics(module: nn.Module) -> None:
    """Makes every normalisation and whitening in `module` take its statistics over all ranks."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.BatchNorm2d:
                setattr(parent, name, _over_ranks(child))
    set_over_ranks(module, True)


def set_over_ranks(module: nn.Module, over_ranks: bool) -> None:
    """Whether layers that can take statistics over all ranks do so."""
    for layer in module.modules():
        if hasattr(layer, "over_ranks"):
            layer.over_ranks = over_ranks  # type: ignore[assignment]


def _over_ranks(norm: nn.BatchNorm2d) -> RankBatchNorm2d:
    """The same parameters and buffers under another forward."""
    with torch.device("meta"):
        layer = RankBatchNorm2d(norm.num_features, norm.eps, norm.momentum)
    layer.weight, layer.bias = norm.weight, norm.bias
    for name, buffer in norm.named_buffers():
        setattr(layer, name, buffer)
    return layer.train(norm.training)
