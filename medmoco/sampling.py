"""Which slices an epoch of fine-tuning shows: background is thinned, rare organs are repeated."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

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


def _rare_classes(shown: Tensor) -> list[tuple[Tensor, int]]:
    """Of each class that is rare, but not absent: its slices, and how many draws it lacks."""
    wanted = math.ceil(LEAST_SHARE * int(shown.any(dim=1).sum()))
    slices = [shown[:, c].nonzero().squeeze(1) for c in range(shown.shape[1])]
    return [(found, wanted - len(found)) for found in slices if 0 < len(found) < wanted]
