"""Batch normalisation with statistics over all ranks, on the CPU too."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from medmoco.distributed import gather_rows, sum_over_ranks, world


class RankBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose batch is that of all ranks, of which some may have fewer images, or none.

    In eval mode, in a world of one, and where `over_ranks` is False, it is a BatchNorm2d.
    torch's SyncBatchNorm does the same on GPUs alone.
    """

    over_ranks = True

    def forward(self, images: Tensor) -> Tensor:
        """images (batch, channels, height, width), this rank's; the same shape."""
        if not (self.training and self.over_ranks and world() > 1):
            return super().forward(images)
        found = _Normalise.apply(images, self.weight, self.bias, self.eps)
        normalised, mean, variance, samples = found
        self._average(mean, variance, samples)
        return normalised

    @torch.no_grad()
    def _average(self, mean: Tensor, variance: Tensor, samples: Tensor) -> None:
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None and self.running_var is not None
        self.num_batches_tracked.add_(1)
        share: Any = self.momentum
        if share is None:
            share = 1 / self.num_batches_tracked.to(mean)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance * (samples / (samples - 1)), share)


class _Normalise(torch.autograd.Function):
    """Sums over whole maps, which are many times as fast on the CPU as torch.var_mean."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        own = images.to(weight.dtype)
        samples = weight.new_full((), own.numel() // own.shape[1])
        mean = own.sum((0, 2, 3)) / samples.clamp(min=1)
        variance = (own - _map(mean)).square_().sum((0, 2, 3)) / samples.clamp(min=1)
        parts = gather_rows(torch.stack([mean, variance, samples.expand_as(mean)])[None])
        samples = parts[:, 2, 0].sum()
        share = parts[:, 2] / samples
        mean = (share * parts[:, 0]).sum(0)
        variance = (share * (parts[:, 1] + (parts[:, 0] - mean).square())).sum(0)
        ctx.save_for_backward(images, weight, mean, variance, samples)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance, samples)
        normalised = functional.batch_norm(images, mean, variance, weight, bias, False, 0.0, eps)
        return normalised, mean, variance, samples

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        images, weight, mean, variance, samples = ctx.saved_tensors
        grad = grad.to(weight.dtype)
        standard = functional.batch_norm(
            images.to(weight.dtype), mean, variance, None, None, False, 0.0, ctx.eps
        )
        grad_bias = grad.sum((0, 2, 3))
        grad_weight = (grad * standard).sum((0, 2, 3))
        of_bias, of_weight = sum_over_ranks(torch.stack([grad_bias, grad_weight])) / samples
        scale = weight * (variance + ctx.eps).rsqrt()
        along = standard.mul_(_map(-scale * of_weight)).addcmul_(grad, _map(scale))
        along.sub_(_map(scale * of_bias))
        return along.to(images.dtype), grad_weight, grad_bias, None


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
