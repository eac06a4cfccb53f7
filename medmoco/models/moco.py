"""Momentum contrast [1] with a local loss and feature decorrelation [2].

[1] He et al., 2020, arXiv:1911.05722; Chen et al., 2020, arXiv:2003.04297 (MoCo v2).
[2] Hassanpour et al., 2024, arXiv:2402.14611.
"""

import copy
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from medmoco.data.views import View
from medmoco.distributed import (
    average_gradients,
    average_over_ranks,
    gather_rows,
    own_part,
    world,
)
from medmoco.models.branch import Branch, Embedding
from medmoco.models.local_loss import (
    average_cell,
    coordinate_loss,
    dense_loss,
    random_cell,
    region_loss,
)
from medmoco.models.queue import KeyQueue
from medmoco.models.rank_norm import set_over_ranks, share_statistics
from medmoco.ops import covariance_loss, queue_info_nce

SHUFFLE_SPLIT = 32  # images that share batch statistics, as MoCo's 32 images a GPU


class Losses(NamedTuple):
    """Scalars of one step; `total` carries the gradient."""

    total: Tensor
    global_: Tensor
    local: Tensor | None
    decorrelation: Tensor | None
    top1: Tensor

    def as_dict(self) -> dict[str, Tensor]:
        """The parts that exist, detached, under their names in metrics.jsonl."""
        parts = {
            "loss": self.total,
            "loss_global": self.global_,
            "loss_local": self.local,
            "loss_decorrelation": self.decorrelation,
            "acc1": self.top1,
        }
        return {name: value.detach() for name, value in parts.items() if value is not None}


class MoCo(nn.Module):
    """Query and key branch, their queues, and the loss of two views.

    Args:
        query: the branch that learns; the key branch starts as its copy.
        queue_size: keys in each queue.
        momentum: of the key branch's moving average, in [0, 1).
        temperature: divides the logits; > 0.
        key_norm: "ema": the key branch normalises with averaged statistics in eval mode (EMAN,
            Cai et al., 2021); "shuffle": with those of shuffled splits of 32, as MoCo.
        local: "none", "regions" (negatives: the other regions of the image), "coordinates"
            (positive: the same place in the other view, negatives: a queue of cells) or "dense"
            (positive: the cell of the other view that resembles it most, negatives: a queue of
            images' average cells).
        global_weight: weight of the global loss.
        local_weight: weight of the local loss.
        covariance_weight: weight of VICReg's covariance term on batch-standardised pooled
            features; 0 leaves it out.
        regions: the region grid is regions x regions.
        over_ranks: whether normalisation, whitening and covariance have the statistics of the batch
            of all ranks, as one process has them, or each those of its own part.
    """

    def __init__(
        self,
        query: Branch,
        *,
        queue_size: int,
        momentum: float,
        temperature: float,
        key_norm: str,
        local: str,
        global_weight: float,
        local_weight: float,
        covariance_weight: float,
        regions: int,
        over_ranks: bool = True,
    ) -> None:
        super().__init__()
        if over_ranks and world() > 1:
            share_statistics(query)
        self.query = query
        self.key = copy.deepcopy(query).requires_grad_(False)
        embed_dim = query.embed_dim
        self.queue = KeyQueue(queue_size, embed_dim)
        queued = local in ("coordinates", "dense")
        self.local_queue = KeyQueue(queue_size, embed_dim) if queued else None
        self.momentum = momentum
        self.temperature = temperature
        self.key_norm = key_norm
        self.local = local
        self.global_weight = global_weight
        self.local_weight = local_weight
        self.covariance_weight = covariance_weight
        self.regions = regions
        self.over_ranks = over_ranks

    def forward(
        self, query_view: View, key_view: View, ids: Tensor, generator: torch.Generator
    ) -> tuple[Losses, Embedding]:
        """Loss of a batch, and its keys, which `enqueue` stores once the gradient is taken.

        Args:
            query_view: what the query branch sees, (batch, 1, size, size).
            key_view: another view of the same slices.
            ids: (batch,) int64; keys with the query's id are not its negatives. -1 matches none.
            generator: draws the shuffling.
        """
        query = self.query(query_view.image)
        key = self.encode_keys(key_view.image, generator)
        loss, rank = queue_info_nce(
            query.projection, key.projection, self.queue.keys, self.temperature, ids, self.queue.ids
        )
        global_ = loss.mean()
        local = self._local_loss(query, key, (query_view, key_view), ids)
        decorrelation = self._covariance(query.pooled)
        total = self.global_weight * global_
        if local is not None:
            total = total + self.local_weight * local
        if decorrelation is not None:
            total = total + self.covariance_weight * decorrelation
        top1 = (rank == 0).float().mean()
        return Losses(total, global_, local, decorrelation, top1), key

    @torch.no_grad()
    def encode_keys(self, images: Tensor, generator: torch.Generator) -> Embedding:
        """The key branch's embedding, normalised so that no key can tell its query."""
        if self.key_norm == "ema":
            self.key.eval()
            return self.key(images)
        self.key.train()
        everyone = gather_rows(images)
        order = torch.randperm(len(everyone), generator=generator, device=images.device)
        own, together = self._deal(order)
        set_over_ranks(self.key.encoder, together)
        maps = torch.cat([self.key.encoder(everyone[split]) for split in own])
        dealt = gather_rows(torch.cat(own))
        return self.key.embed(own_part(gather_rows(maps)[torch.argsort(dealt)]))

    def _deal(self, order: Tensor) -> tuple[tuple[Tensor, ...], bool]:
        """The splits that this rank encodes, and whether it only has its part of each.

        Whole splits, or else parts of all of them, whose statistics are then those of all ranks:
        so they are the splits of one process. Where not even that divides, or statistics are not
        to be shared, each rank makes splits of its own share.
        """
        splits = _splits(order)
        if len(order) % (SHUFFLE_SPLIT * world()) == 0:
            return own_part(splits), False
        if self.over_ranks and all(len(split) % world() == 0 for split in splits):
            return tuple(own_part(split) for split in splits), True
        return _splits(own_part(order)), False

    @torch.no_grad()
    def enqueue(self, key: Embedding, ids: Tensor, generator: torch.Generator) -> None:
        """Stores the keys of all ranks' batches, and one key an image for the local loss."""
        ids = gather_rows(ids)
        self.queue.enqueue(gather_rows(key.projection), ids)
        if self.local_queue is not None:
            cell = average_cell(key) if self.local == "dense" else random_cell(key, generator)
            self.local_queue.enqueue(gather_rows(cell), ids)

    @torch.no_grad()
    def update_key(self) -> None:
        """Moves the key branch towards the query branch; with "ema" its buffers too."""
        weight = 1 - self.momentum
        torch._foreach_lerp_(list(self.key.parameters()), list(self.query.parameters()), weight)
        if self.key_norm != "ema":
            return
        for key, query in zip(self.key.buffers(), self.query.buffers(), strict=True):
            if key.is_floating_point():
                key.lerp_(query, weight)
            else:
                key.copy_(query)  # num_batches_tracked

    @torch.no_grad()
    def average_statistics(self) -> None:
        """Averages the query's running statistics over the ranks.

        Where they are of the whole batch they are the same already, but for rounding on ranks whose
        processors differ.
        """
        average_over_ranks([b for b in self.query.buffers() if b.is_floating_point()])

    @torch.no_grad()
    def synchronise_key(self) -> None:
        """Makes the key branch an exact copy of the query branch."""
        self.key.load_state_dict(self.query.state_dict())

    def _local_loss(
        self, query: Embedding, key: Embedding, views: tuple[View, View], ids: Tensor
    ) -> Tensor | None:
        if self.local_queue is not None:
            negatives = (ids, self.local_queue, self.temperature)
            if self.local == "dense":
                return dense_loss(query, key, *negatives)
            return coordinate_loss(query, key, views, *negatives)
        if self.local == "regions":
            branches = (self.query, self.key)
            return region_loss(query, key, views, branches, self.regions, self.temperature)
        return None

    def _covariance(self, pooled: Tensor) -> Tensor | None:
        if self.covariance_weight == 0:
            return None
        # Standardised first: on raw features, shrinking them would be the cheapest solution.
        features = gather_rows(pooled.float()) if self.over_ranks else pooled.float()
        deviation = features.var(0, keepdim=True).add(1e-5).sqrt()
        return covariance_loss((features - features.mean(0)) / deviation)


def train_step(
    model: MoCo,
    optimizer: torch.optim.Optimizer,
    views: tuple[View, View],
    ids: Tensor,
    generator: torch.Generator,
    autocast: AbstractContextManager[object],
    clip_norm: float,
) -> Losses:
    """One step on a batch: the key branch follows, the query branch learns, the queues move on.

    Args:
        model: in training mode.
        optimizer: of the query branch.
        views: what the query and the key branch see, (batch, 1, size, size).
        ids: (batch,) int64; keys with the query's id are not its negatives. -1 matches none.
        generator: draws the shuffling and the cells that are stored.
        autocast: around what is computed forward.
        clip_norm: largest norm of the gradient over all weights; 0 for no limit.
    """
    model.update_key()
    with autocast:
        losses, key = model(*views, ids, generator)
    optimizer.zero_grad(set_to_none=True)
    losses.total.backward()
    average_gradients(model.query.parameters())
    if clip_norm > 0:
        nn.utils.clip_grad_norm_(model.query.parameters(), clip_norm)
    optimizer.step()
    model.enqueue(key, ids, generator)
    model.average_statistics()
    return losses


@torch.no_grad()
def recalibrate_batchnorm(module: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replaces the running statistics of every normalisation by averages over `batches`.

    A cumulative average (momentum None), so that each batch counts the same.
    """
    layers: list[Any] = [m for m in module.modules() if hasattr(m, "running_mean")]
    kept = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
    was_training = module.training
    module.train()
    for batch in batches:
        module(batch)
    module.train(was_training)
    for layer, momentum in zip(layers, kept, strict=True):
        layer.momentum = momentum


def _splits(images: Tensor) -> tuple[Tensor, ...]:
    """Splits of 32; a remainder joins the last one, so that no split has few images."""
    count = max(1, len(images) // SHUFFLE_SPLIT)
    return images.tensor_split([SHUFFLE_SPLIT * i for i in range(1, count)])
