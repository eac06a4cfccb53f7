"""The loss of both kinds of segmentation training."""

import torch
from torch import Tensor
from torch.nn import functional


def dice_cross_entropy(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy plus one minus soft Dice, Dice pooled over the batch [1].

    The background and the classes that the batch lacks are left out of Dice: their score would
    not depend on where the network looks.

    Args:
        logits: (N, classes, ...); computed in float32 whatever their dtype.
        labels: (N, ...) int64 class indices.
        weights: (N, ...) how many pixels each pixel stands for; all the same without it.

    Returns:
        loss, a scalar; soft Dice, a scalar in [0, 1] without gradient, the mean over the classes.

    [1] Drozdzal et al., 2016, arXiv:1608.04117; Isensee et al., 2018, arXiv:1809.10486.
    """
    log_probability = functional.log_softmax(logits.float(), dim=1)
    truth = torch.zeros_like(log_probability).scatter_(1, labels.unsqueeze(1), 1.0)
    weights = torch.ones_like(labels, dtype=torch.float32) if weights is None else weights
    weights = weights.unsqueeze(1)

    over_pixels = [0, *range(2, logits.dim())]
    probability = log_probability.exp() * weights
    both = (probability * truth).sum(over_pixels)
    size = (truth * weights).sum(over_pixels)
    dice = 2 * both / (probability.sum(over_pixels) + size).clamp(min=1e-8)

    counted = size > 0
    counted[0] = False
    mean_dice = (dice * counted).sum() / counted.sum().clamp(min=1)
    any_counted = counted.any()
    cross_entropy = -(truth * log_probability * weights).sum() / weights.sum()
    return cross_entropy + any_counted * (1 - mean_dice), mean_dice.detach()
