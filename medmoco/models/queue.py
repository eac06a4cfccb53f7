"""The queue of negatives."""

import torch
from torch import Tensor, nn


class KeyQueue(nn.Module):
    """Ring buffer of the latest keys, each with the id of what it shows [1].

    It takes batches of any size, also larger than itself, and never waits for the device.

    Args:
        size: keys that it holds, > 0.
        dim: length of a key.

    Attributes:
        keys: (size, dim) float32; zero where nothing was enqueued yet.
        ids: (size,) int64; -1 where nothing was enqueued yet, or for keys without id.
        cursor: () int64, keys enqueued since the beginning; modulo size, the row written next.

    [1] He et al., 2020, arXiv:1911.05722.
    """

    keys: Tensor
    ids: Tensor
    cursor: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(size, dim))
        self.register_buffer("ids", torch.full((size,), -1, dtype=torch.int64))
        self.register_buffer("cursor", torch.zeros((), dtype=torch.int64))

    @property
    def filled(self) -> Tensor:
        """() int64, rows that hold a key."""
        return self.cursor.clamp(max=len(self.keys))

    @torch.no_grad()
    def enqueue(self, keys: Tensor, ids: Tensor | None = None) -> None:
        """Overwrites the oldest keys.

        Args:
            keys: (batch, dim), any batch size; the last `size` of them stay.
            ids: (batch,) int64, or None for keys without id.

        Raises:
            ValueError: the shapes do not fit.
        """
        size, dim = self.keys.shape
        if keys.ndim != 2 or keys.shape[1] != dim:
            raise ValueError(f"keys must be (batch, {dim}), got {tuple(keys.shape)}")
        batch = len(keys)
        if ids is None:
            ids = self.ids.new_full((batch,), -1)
        if ids.shape != (batch,):
            raise ValueError(f"ids must be ({batch},) to match keys, got {tuple(ids.shape)}")
        kept = min(batch, size)
        first = self.cursor + (batch - kept)
        rows = (first + torch.arange(kept, device=self.keys.device)) % size
        self.keys.index_copy_(0, rows, keys[batch - kept :].to(self.keys))
        self.ids.index_copy_(0, rows, ids[batch - kept :].to(self.ids))
        self.cursor += batch
