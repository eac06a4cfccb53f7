"""Smoke checks on more than 2^31 elements, of operators other than queue_info_nce.

Operands are repeats of few rows or positions, so that the truth is known from those.
"""

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from medmoco.ops import covariance_loss, dense_match, zca_whiten
from medmoco.ops.zca_whiten import zca_whiten_reference
from smoke_behaviour import Check, LeftOut

BFLOAT16 = torch.bfloat16
# Errors over the largest value: sums in float32, and what comes back in bfloat16.
SUM_ALLOWED, ROUNDED_ALLOWED = 1e-3, 1e-2
SLICE_ELEMENTS = 2**26  # compared at a time


def need(device: torch.device, gigabytes: float) -> None:
    free = torch.cuda.mem_get_info(device)[0] / 1e9 if device.type == "cuda" else math.inf
    if free < gigabytes:
        raise LeftOut(f"{free:.0f} GB are free, {gigabytes:.0f} needed")


def large_checks(name: str, device: torch.device, elements: int) -> Iterator[Check]:
    """Of an operator, with operands that go beyond so many elements."""
    checks = {
        "dense_match": {
            "images": _check_images,
            "positions of a query map": _check_query_positions,
            "positions of a key map": _check_key_positions,
        },
        "covariance_loss": {"samples": _check_samples, "features": _check_features},
        "zca_whiten": {"rows": _check_rows},
    }
    for title, check in checks.get(name, {}).items():
        yield f"{name}, {title} of more than {elements} elements", partial(check, device, elements)


def _draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(BFLOAT16)


def close(found: Tensor, truth: Tensor, allowed: float, name: str) -> None:
    """Slices of `found`, (repeats, *shape of truth) or such, equal the truth but for rounding."""
    truth = truth.to(found.device)
    most = max(1, SLICE_ELEMENTS // truth.numel())
    largest = float(truth.abs().max())
    for part in found.split(most):
        error = float((part - truth).abs().max())
        assert error <= allowed * largest, f"{name} is off by {error / largest:.1e} of the largest"


# --- dense_match


def _check_images(device: torch.device, elements: int) -> None:
    few, channels, positions = 8, 256, 49
    repeats = elements // (few * channels * positions) + 2
    need(device, 5 * repeats * few * channels * positions / 1e9)
    query, key = (_draw(few, channels, positions, seed=seed) for seed in (0, 1))
    index, similarity = dense_match(*(t.to(device).repeat(repeats, 1, 1) for t in (query, key)))
    shape = repeats, few, positions
    _compare_matches(index.view(shape), similarity.view(shape), query, key)


def _check_query_positions(device: torch.device, elements: int) -> None:
    channels, few = 2048, 64
    repeats = elements // (channels * few) + 2
    need(device, 4 * repeats * channels * few / 1e9)
    query, key = (_draw(1, channels, few, seed=seed) for seed in (0, 1))
    index, similarity = dense_match(query.to(device).repeat(1, 1, repeats), key.to(device))
    shape = repeats, 1, few
    _compare_matches(index.view(shape), similarity.view(shape), query, key)


def _check_key_positions(device: torch.device, elements: int) -> None:
    """Of equal keys the first is the match, however far the last is."""
    channels, few = 2048, 64
    repeats = elements // (channels * few) + 2
    need(device, 4 * repeats * channels * few / 1e9)
    query, key = (_draw(1, channels, few, seed=seed) for seed in (0, 1))
    index, similarity = dense_match(query.to(device), key.to(device).repeat(1, 1, repeats))
    _compare_matches(index[None], similarity[None], query, key)
    far = key.to(device).repeat(1, 1, repeats)
    far[:, :, -1] = query.to(device)[:, :, 0]
    index, _ = dense_match(query.to(device)[:, :, :1], far)
    assert int(index) == repeats * few - 1, f"the last key is not found, but {int(index)}"


def _compare_matches(index: Tensor, similarity: Tensor, query: Tensor, key: Tensor) -> None:
    """index, similarity (repeats, images, positions); near ties may go either way."""
    unit = [t.double() / t.double().norm(dim=1, keepdim=True) for t in (query, key)]
    cosine = (unit[0].mT @ unit[1]).to(index.device)
    assert int(index.min()) >= 0 and int(index.max()) < key.shape[2], "an index is out of range"
    best = cosine.amax(2)
    close(similarity, best, SUM_ALLOWED, "similarity")
    chosen = cosine.expand(len(index), -1, -1, -1).gather(3, index[..., None])[..., 0]
    close(chosen, best, SUM_ALLOWED, "the cosine at the index")


# --- covariance_loss


def _check_samples(device: torch.device, elements: int) -> None:
    """Each sample r times: that scales the covariance."""
    few, dims = 500, 1024 if elements > 2**30 else 64
    repeats = elements // (few * dims) + 2
    need(device, 5 * repeats * few * dims / 1e9)
    block = _draw(few, dims, seed=0)
    wide = block.double().requires_grad_()
    centred = wide - wide.mean(0)
    covariance = repeats * (centred.T @ centred) / (repeats * few - 1)
    loss = (covariance.square().sum() - covariance.diagonal().square().sum()) / dims
    found, gradient = _loss_and_gradient(block.to(device).repeat(repeats, 1))
    copies = gradient.view(repeats, few, dims)
    _compare_covariance(found, copies, loss, wide)


def _check_features(device: torch.device, elements: int) -> None:
    """Each feature r times: a copy's covariance with it is its variance."""
    # The ranks take time that grows with the square of the features.
    samples, few = 2048 if elements > 2**30 else 64, 500
    repeats = elements // (samples * few) + 2
    need(device, 8 * repeats * samples * few / 1e9)
    block = _draw(samples, few, seed=0)
    wide = block.double().requires_grad_()
    centred = wide - wide.mean(0)
    covariance = centred.T @ centred / (samples - 1)
    squares, diagonal = covariance.square().sum(), covariance.diagonal().square().sum()
    loss = (repeats**2 * squares - repeats * diagonal) / (repeats * few)
    found, gradient = _loss_and_gradient(block.to(device).repeat(1, repeats))
    copies = gradient.view(samples, repeats, few).transpose(0, 1)
    _compare_covariance(found, copies, loss, wide)


def _loss_and_gradient(features: Tensor) -> tuple[Tensor, Tensor]:
    loss = covariance_loss(features.requires_grad_())
    (gradient,) = torch.autograd.grad(loss, features)
    return loss.detach(), gradient


def _compare_covariance(found: Tensor, copies: Tensor, loss: Tensor, wide: Tensor) -> None:
    """The loss, and the gradients (repeats, *) of each copy of `wide`, which share that of it."""
    close(found[None], loss.detach(), SUM_ALLOWED, "loss")
    (gradient,) = torch.autograd.grad(loss, wide)
    close(copies, gradient / len(copies), ROUNDED_ALLOWED, "gradient")


# --- zca_whiten


def _check_rows(device: torch.device, elements: int) -> None:
    """Repeated rows have the moments of the few, and so the same matrix and gradients."""
    few, dims, group_size, eps = 1000, 128, 64, 1e-3
    repeats = elements // (few * dims) + 2
    need(device, 12 * repeats * few * dims / 1e9)
    block, weights = (_draw(few, dims, seed=seed) for seed in (0, 1))
    wide = block.double().requires_grad_()
    truth, mean, matrix = zca_whiten_reference(wide, group_size, eps)
    (gradient,) = torch.autograd.grad(truth, wide, weights.double())
    features = block.to(device).repeat(repeats, 1).requires_grad_()
    whitened, found_mean, found_matrix = zca_whiten(features, group_size, eps)
    shape = repeats, few, dims
    close(found_mean[None], mean, SUM_ALLOWED, "mean")
    close(found_matrix[None], matrix, SUM_ALLOWED, "matrix")
    close(whitened.detach().view(shape), truth.detach(), ROUNDED_ALLOWED, "whitened")
    repeated = weights.to(device).repeat(repeats, 1)
    (found_gradient,) = torch.autograd.grad(whitened, features, repeated)
    close(found_gradient.view(shape), gradient, ROUNDED_ALLOWED, "gradient")
