"""The loss of both kinds of segmentation training."""

import torch
from torch import Tensor
from torch.nn import functional

from medmoco.distributed import gather_rows


def dice_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    class_weights: Tensor | None = None,
    over_ranks: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy plus one minus soft Dice, Dice pooled over the batch [1].

    With p the softmax, g the truth as one-hot and sums over the pixels of the whole batch, as
    nnU-Net's batch Dice:
        cross-entropy = -sum_i w(g_i) log p_i(g_i) / sum_i w(g_i), w the class weights,
        Dice = mean_c 2 sum_i p_ic g_ic / sum_i (p_ic + g_ic).
    The background and the classes that the batch lacks are left out of Dice: their score would
    not depend on where the network looks. (nnU-Net counts the latter with 1e-5 / (1e-5 + sum p_c),
    almost a constant.)

    Args:
        logits: (N, classes, ...); computed in float32 whatever their dtype.
        labels: (N, ...) int64 class indices.
        weights: (N, ...) how many pixels each pixel stands for; all the same without it.
        class_weights: (classes,) w of the cross-entropy; all the same without it.
        over_ranks: the batch is that of all ranks, whose loss each of them gets; of its gradient
            they get such parts that their mean over the ranks is the whole.

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
    predicted = probability.sum(over_pixels)
    if class_weights is not None:
        weights = weights * class_weights[labels].unsqueeze(1)
    entropy = -(truth * log_probability * weights).sum()
    total = weights.sum()
    if over_ranks:
        sums = torch.cat([both, size, predicted, torch.stack([entropy, total])])
        sums = gather_rows(sums[None]).sum(0)
        both, size, predicted, (entropy, total) = sums.split([*[logits.shape[1]] * 3, 2])

    dice = 2 * both / (predicted + size).clamp(min=1e-8)
    counted = size > 0
    counted[0] = False
    mean_dice = (dice * counted).sum() / counted.sum().clamp(min=1)
    return entropy / total + counted.any() * (1 - mean_dice), mean_dice.detach()


def inverse_frequency_weights(pixels: Tensor) -> Tensor:
    """Weights of the classes, proportional to the square root of their inverse frequency.

    The whole inverse would let a class of a few pixels outweigh all others. Scaled so that the
    average pixel has weight 1; a class without pixels has weight 0.

    Args:
        pixels: (classes,) number of pixels of each class in the set to train on.

    Returns:
        (classes,) float32.
    """
    share = pixels.double() / pixels.sum()
    weights = torch.where(share > 0, share.clamp(min=1e-12).rsqrt(), 0.0)
    return (weights / (weights * share).sum()).float()
