"""Which slices an epoch of fine-tuning shows: background is thinned, rare organs are repeated."""

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from medmoco.distributed import own_part

EMPTY_SHARE = 1 / 3  # slices without foreground, per slice with foreground
LEAST_SHARE = 0.2  # of the slices with foreground that show a class, repeats included


class ForegroundSampler(torch.utils.data.Sampler[int]):
    """Every slice with foreground once an epoch, rare classes oftener, and some without any.

    A class that fewer than a fifth of the slices with foreground show gets further slices of its
    own, drawn with replacement, until it has that fifth: nnU-Net's oversampling of a class drawn at
    random [1], applied only to the classes that need it. A third as many slices without foreground
    come with them, drawn anew each epoch.

    Args:
        shown: (slices, classes) bool, which classes a slice shows; the background is column 0.
        generator: of the order and of what is drawn.

    Attributes:
        first: items of an epoch that are left out, because they were seen before a break. Its order
            is drawn all the same.

    [1] Isensee et al., 2021, doi:10.1038/s41592-020-01008-z.
    """

    def __init__(self, shown: Tensor, generator: torch.Generator):
        self.generator = generator
        self.first = 0
        has_foreground = shown[:, 1:].any(dim=1)
        self.full = has_foreground.nonzero().squeeze(1)
        self.empty = (~has_foreground).nonzero().squeeze(1)
        self.rare = _rare_classes(shown[:, 1:])
        few = math.ceil(EMPTY_SHARE * len(self.full))
        self.empty_drawn = min(len(self.empty), few) if len(self.full) else len(self.empty)

    def __len__(self) -> int:
        return len(self.full) + sum(more for _, more in self.rare) + self.empty_drawn

    def __iter__(self) -> Iterator[int]:
        drawn = torch.randperm(len(self.empty), generator=self.generator)[: self.empty_drawn]
        repeated = [
            slices[torch.randint(len(slices), (more,), generator=self.generator)]
            for slices, more in self.rare
        ]
        items = torch.cat([self.full, self.empty[drawn], *repeated])
        order = torch.randperm(len(items), generator=self.generator)
        yield from items[order][self.first :].tolist()


class Order(Protocol):
    """Numbers of items, as many at each pass over it."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[int]: ...


class RankBatches(torch.utils.data.Sampler[list[int]]):
    """This rank's part of every batch of an order of items; the last batch may be smaller.

    Where a batch has fewer items than there are ranks, a rank without any is given the first one,
    for no loader can deliver nothing: it is `own_rows` that tells.

    Args:
        order: of the items.
        batch_size: items a batch, of all ranks together.
    """

    def __init__(self, order: Order, batch_size: int) -> None:
        self.order = order
        self.batch_size = batch_size

    def __len__(self) -> int:
        """Batches of a pass over the whole order."""
        return math.ceil(len(self.order) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        items = list(self.order)
        for start in range(0, len(items), self.batch_size):
            batch = items[start : start + self.batch_size]
            yield own_part(batch) or batch[:1]

    def rows(self, batch: int) -> int:
        """Items of a batch, of all ranks together; batches count from 0."""
        return min(self.batch_size, len(self.order) - batch * self.batch_size)


def own_rows(batch: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    """What of a batch that `RankBatches` chose belongs to this rank, of `rows` of all ranks."""
    own = len(own_part(range(rows)))
    return {name: values[:own] for name, values in batch.items()}


def _rare_classes(shown: Tensor) -> list[tuple[Tensor, int]]:
    """Of each class that is rare, but not absent: its slices, and how many draws it lacks."""
    wanted = math.ceil(LEAST_SHARE * int(shown.any(dim=1).sum()))
    slices = [shown[:, c].nonzero().squeeze(1) for c in range(shown.shape[1])]
    return [(found, wanted - len(found)) for found in slices if 0 < len(found) < wanted]
