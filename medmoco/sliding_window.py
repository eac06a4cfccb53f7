"""A network on images larger than those it was trained on: overlapping windows, as in nnU-Net [1].

[1] Isensee et al., 2021, doi:10.1038/s41592-020-01008-z.
"""

import math
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

OVERLAP = 0.5  # least share of a window that the next one covers too
SIGMA = 1 / 8  # of the Gaussian, as a share of the window


def sliding_window(model: Callable[[Tensor], Tensor], images: Tensor, size: int) -> Tensor:
    """Logits of images from windows of `size` x `size` pixels.

    Where windows overlap, their logits are averaged with Gaussian weights, so that a pixel counts
    most where it is seen amidst its surroundings. A single window is the model's own output.

    Args:
        model: (B, C, size, size) to logits (B, classes, size, size).
        images: (B, C, H, W), H and W at least `size`.

    Returns:
        (B, classes, H, W) float32.
    """
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return model(images).float()
    weight = gaussian(size, images.device)
    total: Tensor | None = None
    weights = images.new_zeros(height, width)
    for row, column in product(window_starts(height, size), window_starts(width, size)):
        window = (..., slice(row, row + size), slice(column, column + size))
        logits = model(images[window]).float()
        if total is None:
            total = logits.new_zeros(*logits.shape[:2], height, width)
        total[window] += logits.mul_(weight)
        weights[window] += weight
    assert total is not None
    return total.div_(weights)


def window_starts(length: int, size: int) -> list[int]:
    """Evenly spaced starts of windows that cover `length` pixels and overlap by half or more."""
    count = math.ceil((length - size) / (size * (1 - OVERLAP))) + 1
    return [round(i * (length - size) / max(1, count - 1)) for i in range(count)]


def gaussian(size: int, device: torch.device) -> Tensor:
    """(size, size) weights of a window's pixels, above 0."""
    away = (torch.arange(size, device=device) - (size - 1) / 2) / (SIGMA * size)
    profile = torch.exp(-0.5 * away**2)
    return profile[:, None] * profile
