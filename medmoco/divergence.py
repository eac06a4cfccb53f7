"""A training that diverged: what is told of it, and how it is noticed before it is saved."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medmoco.data.store import SliceCache
from medmoco.errors import UserError

MAX_FILES = 8  # of a batch that a message names
ADVICE = "start again with a lower --lr, with --clip-norm 1, or with --amp-dtype float32"


class NonFiniteLoss(UserError):
    """The loss of a step was NaN or infinite when it was read back from the device."""

    def __init__(self, step: int, loss: float):
        super().__init__(f"the loss is {loss}")
        self.step = step


def diverged(
    what: str, step: int, slices: Sequence[int], cache: SliceCache, checkpoint: Path | None
) -> UserError:
    """The error that ends a training.

    Args:
        what: is not finite, as "the loss is nan".
        step: the first one where it is not.
        slices: numbers in the cache of that step's batch.
        checkpoint: the last one that was written, all of whose values are finite; None without one.
    """
    kept = "no checkpoint was written"
    if checkpoint is not None:
        kept = f"the last good checkpoint is {checkpoint}, whose encoder --init takes"
    return UserError(
        f"{what} at step {step}, on the batch of {name_slices(slices, cache)}; {kept}; {ADVICE}"
    )


def name_slices(slices: Sequence[int], cache: SliceCache) -> str:
    """The files that slices come from and their places there, counted from 0, at most 8 files."""
    places: dict[str, list[int]] = defaultdict(list)
    for index in slices:
        volume, position = cache.locate(index)
        places[cache.volumes[int(volume)].path].append(int(position))
    named = [
        f"{path} ({'slice' if len(found) == 1 else 'slices'} {', '.join(map(str, sorted(found)))})"
        for path, found in sorted(places.items())
    ]
    more = len(named) - MAX_FILES
    return ", ".join(named[:MAX_FILES]) + (f" and {more} more files" if more > 0 else "")


def all_finite(state: Any) -> bool:
    """Whether every value of every tensor is finite, however they are nested; one wait a device."""
    finite: dict[torch.device, list[Tensor]] = defaultdict(list)
    for tensor in _tensors(state):
        if tensor.is_floating_point():
            finite[tensor.device].append(tensor.isfinite().all())
    return all(bool(torch.stack(found).all()) for found in finite.values())


def _tensors(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, (list, tuple)):
        return [tensor for value in state for tensor in _tensors(value)]
    return []
