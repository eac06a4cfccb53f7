"""Momentum contrast [1] with a local loss and feature decorrelation [2].

[1] He et al., 2020, arXiv:1911.05722; Chen et al., 2020, arXiv:2003.04297 (MoCo v2).
[2] Hassanpour et al., 2024, arXiv:2402.14611.
"""

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from medmoco.data.views import View, corresponding_coordinates, overlap_regions
from medmoco.models.encoder import Encoder
from medmoco.models.heads import LocalHead, ProjectionHead
from medmoco.models.queue import KeyQueue
from medmoco.ops import covariance_loss, queue_info_nce

SHUFFLE_SPLIT = 32  # images that share batch statistics, as MoCo's 32 images a GPU
REGION_POINTS = 4  # a region is the average of 4 x 4 points of the map


class Embedding(NamedTuple):
    """What a branch makes of a batch of images."""

    map: Tensor  # (batch, channels, h, w), the encoder's last map
    pooled: Tensor  # (batch, channels), its average over space, before whitening
    projection: Tensor  # (batch, embed_dim), unit length
    local: Tensor | None  # (batch, embed_dim, h, w), the local head's map


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


class Branch(nn.Module):
    """Encoder, optional whitening of the pooled features, projector, optional local head."""

    def __init__(
        self, encoder: Encoder, embed_dim: int, whitening: nn.Module | None, local: bool
    ) -> None:
        super().__init__()
        channels = encoder.channels[-1]
        self.embed_dim = embed_dim
        self.encoder = encoder
        self.whitening = whitening
        self.projector = ProjectionHead(channels, channels, embed_dim)
        self.local_head = LocalHead(channels, channels, embed_dim) if local else None

    def forward(self, images: Tensor) -> Embedding:
        """images (batch, 1, height, width) in [0, 1]."""
        return self.embed(self.encoder(images))

    def embed(self, feature_map: Tensor) -> Embedding:
        pooled = feature_map.mean((2, 3))
        features = pooled if self.whitening is None else self.whitening(pooled)
        projection = functional.normalize(self.projector(features).float(), dim=1)
        local = None if self.local_head is None else self.local_head(feature_map)
        return Embedding(feature_map, pooled, projection, local)


class MoCo(nn.Module):
    """Query and key branch, their queues, and the loss of two views.

    Args:
        query: the branch that learns; the key branch starts as its copy.
        queue_size: keys in each queue.
        momentum: of the key branch's moving average, in [0, 1).
        temperature: divides the logits; > 0.
        key_norm: "ema": the key branch normalises with averaged statistics in eval mode (EMAN,
            Cai et al., 2021); "shuffle": with those of shuffled splits of 32, as MoCo.
        local: "none", "regions" (negatives: the other regions of the image) or "coordinates"
            (positive: the same place in the other view, negatives: a queue of cells).
        local_weight: weight of the local loss.
        covariance_weight: weight of VICReg's covariance term on batch-standardised pooled
            features; 0 leaves it out.
        regions: the region grid is regions x regions.
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
        local_weight: float,
        covariance_weight: float,
        regions: int,
    ) -> None:
        super().__init__()
        self.query = query
        self.key = copy.deepcopy(query).requires_grad_(False)
        embed_dim = query.embed_dim
        self.queue = KeyQueue(queue_size, embed_dim)
        self.local_queue = KeyQueue(queue_size, embed_dim) if local == "coordinates" else None
        self.momentum = momentum
        self.temperature = temperature
        self.key_norm = key_norm
        self.local = local
        self.local_weight = local_weight
        self.covariance_weight = covariance_weight
        self.regions = regions

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
        local = self._local_loss(query, key, query_view, key_view, ids)
        decorrelation = self._covariance(query.pooled)
        total = global_
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
        order = torch.randperm(len(images), generator=generator, device=images.device)
        shuffled = images[order]
        maps = [self.key.encoder(split) for split in _splits(shuffled)]
        return self.key.embed(torch.cat(maps)[torch.argsort(order)])

    @torch.no_grad()
    def enqueue(self, key: Embedding, ids: Tensor, generator: torch.Generator) -> None:
        """Stores the batch's keys, and one cell an image for the local loss."""
        self.queue.enqueue(key.projection, ids)
        if self.local_queue is None or key.local is None:
            return
        cells = key.local.flatten(2)
        chosen = torch.randint(
            cells.shape[2], (len(cells), 1, 1), generator=generator, device=cells.device
        )
        cell = cells.gather(2, chosen.expand(-1, cells.shape[1], 1)).squeeze(2)
        self.local_queue.enqueue(functional.normalize(cell.float(), dim=1), ids)

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
    def synchronise_key(self) -> None:
        """Makes the key branch an exact copy of the query branch."""
        self.key.load_state_dict(self.query.state_dict())

    def _local_loss(
        self, query: Embedding, key: Embedding, query_view: View, key_view: View, ids: Tensor
    ) -> Tensor | None:
        if self.local == "coordinates":
            return self._coordinate_loss(query, key, query_view, key_view, ids)
        if self.local == "regions":
            return self._region_loss(query, key, query_view, key_view)
        return None

    def _coordinate_loss(
        self, query: Embedding, key: Embedding, query_view: View, key_view: View, ids: Tensor
    ) -> Tensor:
        """Each cell of the query map against the key map at the same place of the slice."""
        assert query.local is not None and key.local is not None and self.local_queue is not None
        size = query.local.shape[-1]
        coordinates, valid = corresponding_coordinates(query_view.affine, key_view.affine, size)
        keys = _sample(key.local.float(), coordinates)
        loss, _ = queue_info_nce(
            _unit_cells(query.local.float()),
            _unit_cells(keys),
            self.local_queue.keys,
            self.temperature,
            ids.repeat_interleave(size * size),
            self.local_queue.ids,
        )
        return _mean_where(loss, valid.flatten())

    def _region_loss(
        self, query: Embedding, key: Embedding, query_view: View, key_view: View
    ) -> Tensor:
        """InfoNCE over the regions of one image: the same region of the other view is the key."""
        points = self.regions * REGION_POINTS
        here, there, inside = overlap_regions(query_view.affine, key_view.affine, points)
        regions = functional.avg_pool2d(_sample(query.map.float(), here), REGION_POINTS)
        others = functional.avg_pool2d(_sample(key.map.float(), there), REGION_POINTS)
        valid = functional.avg_pool2d(inside[:, None].float(), REGION_POINTS)[:, 0] == 1
        assert self.query.local_head is not None and self.key.local_head is not None
        r = functional.normalize(self.query.local_head(regions).float(), dim=1).flatten(2)
        with torch.no_grad():
            s = functional.normalize(self.key.local_head(others).float(), dim=1).flatten(2)
        valid = valid.flatten(1)
        logits = torch.einsum("bci,bcj->bij", r, s) / self.temperature
        # Finite, so that a row without a valid region has a finite gradient to be multiplied by 0.
        logits = logits.masked_fill(~valid[:, None, :], torch.finfo(logits.dtype).min)
        positive = logits.diagonal(dim1=1, dim2=2)
        loss = logits.logsumexp(2) - positive
        return _mean_where(loss.flatten(), valid.flatten())

    def _covariance(self, pooled: Tensor) -> Tensor | None:
        if self.covariance_weight == 0:
            return None
        # Standardised first: on raw features, shrinking them would be the cheapest solution.
        features = pooled.float()
        deviation = features.var(0, keepdim=True).add(1e-5).sqrt()
        return covariance_loss((features - features.mean(0)) / deviation)


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


def _sample(feature_map: Tensor, coordinates: Tensor) -> Tensor:
    return functional.grid_sample(
        feature_map, coordinates, padding_mode="border", align_corners=False
    )


def _unit_cells(feature_map: Tensor) -> Tensor:
    """(batch, channels, h, w) to (batch * h * w, channels) of unit length."""
    return functional.normalize(feature_map.permute(0, 2, 3, 1).flatten(0, 2), dim=1)


def _mean_where(values: Tensor, valid: Tensor) -> Tensor:
    """Mean over the valid entries, 0 where there are none; without waiting for the device."""
    kept = torch.where(valid, values, torch.zeros_like(values))
    return kept.sum() / valid.sum().clamp(min=1)
