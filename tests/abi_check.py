"""Runs compiled operators against their float64 references: `python tests/abi_check.py`.

Without pytest and torchvision, so that it also runs in an environment that has little more than
another torch than the extension was built with. Exits with 1 if a result is off.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import medmoco
from medmoco._C import build_info
from medmoco.ops.covariance_loss import covariance_loss, covariance_loss_reference
from medmoco.ops.dense_match import dense_match, dense_match_reference
from medmoco.ops.queue_info_nce import queue_info_nce, queue_info_nce_reference
from medmoco.ops.zca_whiten import zca_whiten, zca_whiten_reference

# Of losses, and of all else relative to the largest.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def losses_and_gradients(function, query, key, *others):
    query, key = query.clone().requires_grad_(), key.clone().requires_grad_()
    loss, rank = function(query, key, *others)
    return loss.detach(), rank, *torch.autograd.grad(loss.sum(), (query, key))


def queue_info_nce_error(dtype: torch.dtype, batch: int, queue_size: int, embed_dim: int) -> float:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2 * batch + queue_size, embed_dim, generator=generator)
    rows = torch.nn.functional.normalize(rows, dim=1).to(dtype)
    query, key, queue = rows.split([batch, batch, queue_size])
    ids = torch.arange(batch) % 3, torch.arange(queue_size) % 7 - 1
    found = losses_and_gradients(queue_info_nce, query, key, queue, 0.1, *ids)
    wide = (tensor.double() for tensor in (query, key, queue))
    expected = losses_and_gradients(queue_info_nce_reference, *wide, 0.1, *ids)
    errors = [(expected[0] - found[0]).abs().max(), (expected[1] != found[1]).double().max()]
    errors += [
        (b - a).abs().max() / b.abs().max() for a, b in zip(found[2:], expected[2:], strict=True)
    ]
    return max(float(error) for error in errors)


def whitened_and_gradient(features, function, *others):
    features = features.clone().requires_grad_()
    whitened, mean, matrix = function(features, *others)
    weights = torch.linspace(-1, 2, whitened.numel()).sin().reshape(whitened.shape)
    gradient = torch.autograd.grad(whitened, features, weights.to(whitened.dtype))[0]
    return whitened.detach(), mean, matrix, gradient


def zca_whiten_error(dtype: torch.dtype, samples: int, features: int, group_size: int) -> float:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(features, features, generator=generator) / features**0.5
    rows = (torch.randn(samples, features, generator=generator) @ mixing + 1).to(dtype)
    found = whitened_and_gradient(rows, zca_whiten, group_size, 0.1)
    expected = whitened_and_gradient(rows.double(), zca_whiten_reference, group_size, 0.1)
    return max(
        float((b - a).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)
    )


def dense_match_error(dtype: torch.dtype, batch: int, channels: int, positions: int) -> float:
    generator = torch.Generator().manual_seed(0)
    query_map, key_map = (
        torch.randn(batch, channels, size, generator=generator).to(dtype)
        for size in (positions, positions + 9)
    )
    index, similarity = dense_match(query_map, key_map)
    expected_index, expected = dense_match_reference(query_map.double(), key_map.double())
    errors = (expected - similarity).abs().max(), (expected_index != index).double().max()
    return max(float(error) for error in errors)


def loss_and_gradient(function, features):
    features = features.clone().requires_grad_()
    loss = function(features)
    return loss.detach(), torch.autograd.grad(loss, features)[0]


def covariance_loss_error(dtype: torch.dtype, samples: int, dims: int) -> float:
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(samples, dims, generator=generator) + 1).to(dtype)
    found = loss_and_gradient(covariance_loss, rows)
    expected = loss_and_gradient(covariance_loss_reference, rows.double())
    return max(
        float((b - a).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)
    )


CASES = {
    queue_info_nce_error: [(5, 37, 9), (67, 1000, 127), (3, 9001, 17)],
    covariance_loss_error: [(300, 103), (103, 300), (7, 20), (3001, 5)],
    zca_whiten_error: [(70, 66, 33), (600, 8, 4)],
    dense_match_error: [(2, 3, 5), (1, 127, 131)],
}


def main() -> int:
    print(f"medmoco {medmoco.__version__} under torch {torch.__version__}: {build_info()}")
    failed = False
    for find_error, sizes in CASES.items():
        operator = find_error.__name__.removesuffix("_error")
        for dtype, tolerance in TOLERANCE.items():
            error = max(find_error(dtype, *size) for size in sizes)
            failed |= not error <= tolerance
            print(f"{operator} {dtype}: largest error {error:.1e}, {tolerance:.0e} allowed")
    if "torchvision" in sys.modules:
        failed = True
        print("medmoco.ops must not import torchvision")
    print("failed" if failed else "ok")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
