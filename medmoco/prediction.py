"""Volumes through networks, in batches of slices: from pixels to class indices on the same grid."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medmoco.data.slices import PixelGrid, fit_stack, unfit
from medmoco.data.store import FULL_SCALE
from medmoco.sliding_window import sliding_window

INSIDE = "model"  # the part of the time that is spent inside networks


@dataclass
class Clock:
    """Seconds by part of the work; CUDA is waited for at the end of each."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            spent = time.perf_counter() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + spent


@dataclass(frozen=True)
class Member:
    """One of the networks that segment a volume, and the pixels that it sees.

    Attributes:
        model: image to logits, in eval mode.
        grid: of its images.
        pixels: (n, h, w) uint16, the stack of slices.
    """

    model: nn.Module
    grid: PixelGrid
    pixels: np.ndarray


# Told the place of a batch in the stack, and its probabilities (B, classes, h, w).
OnProbabilities = Callable[[slice, Tensor], None]


@torch.no_grad()
def predict_stack(
    members: Sequence[Member],
    spacing: tuple[float, float],
    *,
    batch_size: int,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    clock: Clock | None = None,
    on_probabilities: OnProbabilities | None = None,
) -> np.ndarray:
    """Segments a stack of slices; several networks vote with the mean of their probabilities.

    Slices that are larger than a network's images are seen through sliding windows. The logits, not
    the labels, are brought back to the slices' own pixels, so that boundaries stay smooth.

    Args:
        members: one or more, of the same classes, with stacks of one shape.
        spacing: mm between rows and between columns.
        batch_size: slices at once; nothing but the label map grows with their number.
        device: of the networks.
        amp_dtype: of autocast, None for float32.
        clock: adds up the time inside the networks, and of the rest.
        on_probabilities: is given the mean probabilities of every batch.

    Returns:
        (n, h, w) uint8 class indices.
    """
    clock = clock or Clock(device)
    count, height, width = members[0].pixels.shape
    classes = np.empty((count, height, width), np.uint8)
    for start in range(0, count, batch_size):
        part = slice(start, start + batch_size)
        scores: Any = None
        for member in members:
            logits = _logits(member, part, spacing, device, amp_dtype, clock)
            with clock.part("to slices"):
                native = unfit(logits, (height, width), spacing, member.grid)
                if len(members) > 1 or on_probabilities:
                    native = native.softmax(dim=1).div_(len(members))
                scores = native if scores is None else scores.add_(native)
        with clock.part("to slices"):
            # Of max and argmax, which give the same, the former is several times as fast.
            classes[part] = scores.max(dim=1).indices.byte().cpu().numpy()
        if on_probabilities:
            with clock.part("probabilities"):
                on_probabilities(part, scores)
    return classes


def _logits(
    member: Member,
    part: slice,
    spacing: tuple[float, float],
    device: torch.device,
    amp_dtype: torch.dtype | None,
    clock: Clock,
) -> Tensor:
    """Of a batch of slices, on the canvas that holds them."""
    with clock.part("to images"):
        slices = torch.from_numpy(member.pixels[part].astype(np.float32) / FULL_SCALE)
        images = fit_stack(slices.to(device), spacing, member.grid)
        # Convolutions follow their input's format, and in this one take a quarter less time.
        images = images.to(memory_format=torch.channels_last)

    def run(window: Tensor) -> Tensor:
        with clock.part(INSIDE), autocast(device, amp_dtype):
            return member.model(window)

    return sliding_window(run, images, member.grid.size)


def autocast(device: torch.device, amp_dtype: torch.dtype | None) -> torch.autocast:
    """Lower precision on CUDA only; on the CPU it costs more than it saves."""
    return torch.autocast(
        device.type, dtype=amp_dtype, enabled=amp_dtype is not None and device.type == "cuda"
    )
