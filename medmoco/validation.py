"""Dice while a network is trained, and the choice of its weights by patients kept from it."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from medmoco.data.delivery import delivered
from medmoco.distributed import any_rank, sum_over_ranks
from medmoco.errors import UserError
from medmoco.prediction import autocast
from medmoco.sampling import RankBatches, own_rows
from medmoco.signals import Stopped, StopRequest


def hold_out(patients: Sequence[str], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Keeps a share of the patients from the training, at least one unless the share is 0.

    Args:
        patients: of each slice.
        fraction: share of the patients, in [0, 1).
        seed: decides which.

    Returns:
        Numbers of the slices to train on, and of those to validate on, in ascending order.

    Raises:
        UserError: the fraction is out of range, or there are fewer than two patients to share out.
    """
    if not 0 <= fraction < 1:
        raise UserError(
            f"--validation-fraction: expected a share of at least 0 and below 1, got {fraction}"
        )
    names = sorted(set(patients))
    if fraction and len(names) < 2:
        raise UserError(
            "--validation-fraction: expected at least 2 patients to train on, one of them for "
            f"validation, got {len(names)}"
        )
    # Another stream than those that chose the test patients and those with labels.
    order = np.random.default_rng([seed, 1]).permutation(len(names))
    count = min(math.ceil(fraction * len(names) - 1e-9), len(names) - 1)
    kept = {names[i] for i in order[:count]}
    train = [i for i, patient in enumerate(patients) if patient not in kept]
    return train, [i for i, patient in enumerate(patients) if patient in kept]


def overlap(logits: Tensor, labels: Tensor) -> Tensor:
    """(classes, 3) int64: |P and G|, |P|, |G| in pixels; logits (B, classes, ...), labels (B, ...).

    It stays on the device and does not wait for it.
    """
    classes = logits.shape[1]
    pairs = (labels * classes + logits.argmax(dim=1)).flatten()
    joint = torch.zeros(classes**2, dtype=torch.int64, device=pairs.device)
    joint = joint.scatter_add_(0, pairs, torch.ones_like(pairs)).view(classes, classes)
    return torch.stack([joint.diagonal(), joint.sum(dim=0), joint.sum(dim=1)], dim=1)


def dice_of(counts: Tensor) -> list[float | None]:
    """Dice of each class but the background, pixels taken together; None where there are none.

    nnU-Net calls it pseudo Dice: its pixels are those of canvases, not of whole volumes.
    """
    rows = counts[1:].tolist()
    return [2 * both / (p + g) if p + g else None for both, p, g in rows]


def mean_dice(dice: Sequence[float | None]) -> float | None:
    """Over the classes that have one."""
    found = [value for value in dice if value is not None]
    return sum(found) / len(found) if found else None


@torch.no_grad()
def validate(
    model: nn.Module,
    dataset: Dataset,
    batch_size: int,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    stop: StopRequest | None = None,
) -> list[float | None]:
    """`dice_of` all slices of a data set, in eval mode; the model goes back to its own mode.

    Draws no random number. The ranks share the slices out, and each gets the result of all.

    Raises:
        Stopped: `stop` was asked for meanwhile, on any rank.
        LoaderDied: slices cannot be read any more.
    """
    training = model.training
    model.eval()
    counts: Tensor | None = None
    chosen = RankBatches(range(len(dataset)), batch_size)  # type: ignore[arg-type]
    loader = DataLoader(dataset, batch_sampler=chosen, generator=torch.Generator())
    for number, batch in enumerate(delivered(loader)):
        (stopping,) = any_rank(stop is not None and stop.asked)
        if stopping:
            raise Stopped("stopped in a validation")
        batch = own_rows(batch, chosen.rows(number))
        with autocast(device, amp_dtype):
            logits = model(batch["image"].to(device))
        found = overlap(logits, batch["label"].to(device))
        counts = found if counts is None else counts + found
    model.train(training)
    assert counts is not None
    return dice_of(sum_over_ranks(counts))


class BestWeights:
    """The weights of the epoch with the best validation Dice.

    Args:
        patience: epochs without a better one before the training is to stop, None for never.
    """

    def __init__(self, patience: int | None):
        self.patience = patience
        self.epoch = 0
        self.dice: float | None = None
        self._weights: dict[str, Tensor] = {}

    def add(self, epoch: int, dice: float | None, model: nn.Module) -> bool:
        """Takes the result of an epoch; tells whether the training is to stop."""
        # While nothing is found yet, at a Dice of 0, every epoch is better than those before.
        if dice is not None and (not self.dice or dice > self.dice):
            self.epoch, self.dice = epoch, dice
            self._weights = copy.deepcopy(model.state_dict())
        return self.patience is not None and epoch - self.epoch >= self.patience

    def restore(self, model: nn.Module) -> None:
        """Gives the model the best weights, if any epoch had a Dice."""
        if self._weights:
            model.load_state_dict(self._weights)

    def state(self) -> dict[str, Any]:
        """Tensors and plain values, for `load`."""
        return {"epoch": self.epoch, "dice": self.dice, "weights": self._weights}

    def load(self, state: dict[str, Any]) -> None:
        self.epoch, self.dice, self._weights = state["epoch"], state["dice"], state["weights"]
