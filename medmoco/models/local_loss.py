"""Local losses: what each part of the query map is contrasted with."""

import torch
from torch import Tensor
from torch.nn import functional

from medmoco.data.views import View, corresponding_coordinates, overlap_regions
from medmoco.distributed import draw_part, sum_over_ranks, world
from medmoco.models.branch import Branch, Embedding
from medmoco.models.queue import KeyQueue
from medmoco.ops import dense_match, queue_info_nce
from medmoco.ops.dispatch import autocast_off

REGION_POINTS = 4  # a region is the average of 4 x 4 points of the map


def coordinate_loss(
    query: Embedding,
    key: Embedding,
    views: tuple[View, View],
    ids: Tensor,
    queue: KeyQueue,
    temperature: float,
) -> Tensor:
    """InfoNCE of each query cell against the key map at the same place of the slice.

    Cells whose place lies outside the key's view are left out of the mean.

    Args:
        query: with its local map; carries the gradient.
        key: with its local map.
        views: those of query and key.
        ids: (batch,) int64; keys of the queue with the image's id are not its negatives.
        queue: of cells, the negatives.
        temperature: divides the logits; > 0.
    """
    query_map, key_map = _local_map(query), _local_map(key)
    coordinates, valid = corresponding_coordinates(
        views[0].affine, views[1].affine, query_map.shape[-1]
    )
    keys = _cells(_sample(key_map.float(), coordinates))
    loss = _cell_loss(_cells(query_map), keys, ids, queue, temperature)
    return _mean_where(loss, valid.flatten())


def dense_loss(
    query: Embedding, key: Embedding, ids: Tensor, queue: KeyQueue, temperature: float
) -> Tensor:
    """InfoNCE of each query cell against the key cell that resembles it most [1].

    Alike are the cells of the encoder's maps; compared are those of the local heads' maps.

    Args:
        query: with its local map; carries the gradient.
        key: with its local map.
        ids: (batch,) int64; keys of the queue with the image's id are not its negatives.
        queue: of images' average cells, the negatives.
        temperature: divides the logits; > 0.

    [1] Wang et al., 2021, arXiv:2011.09157.
    """
    index, _ = dense_match(query.map.detach(), key.map)
    cells = _local_map(key).flatten(2).mT
    matched = cells.take_along_dim(index[:, :, None], dim=1).flatten(0, 1)
    return _cell_loss(_cells(_local_map(query)), matched, ids, queue, temperature).mean()


def region_loss(
    query: Embedding,
    key: Embedding,
    views: tuple[View, View],
    branches: tuple[Branch, Branch],
    regions: int,
    temperature: float,
) -> Tensor:
    """InfoNCE over the regions of one image: the same region of the other view is the key.

    Args:
        query: carries the gradient.
        key: of the same images.
        views: those of query and key.
        branches: those of query and key, whose local heads embed the regions.
        regions: the grid over what the two views share is regions x regions.
        temperature: divides the logits; > 0.
    """
    here, there, inside = overlap_regions(views[0].affine, views[1].affine, regions * REGION_POINTS)
    regions_here = functional.avg_pool2d(_sample(query.map.float(), here), REGION_POINTS)
    regions_there = functional.avg_pool2d(_sample(key.map.float(), there), REGION_POINTS)
    valid = functional.avg_pool2d(inside[:, None].float(), REGION_POINTS)[:, 0] == 1
    head, key_head = branches[0].local_head, branches[1].local_head
    assert head is not None and key_head is not None
    r = functional.normalize(head(regions_here).float(), dim=1).flatten(2)
    with torch.no_grad():
        s = functional.normalize(key_head(regions_there).float(), dim=1).flatten(2)
    valid = valid.flatten(1)
    # Each image has negatives of its own and few: there is no queue to stream over.
    with autocast_off(r.device.type):
        logits = torch.einsum("bci,bcj->bij", r, s) / temperature
    # Finite, so that a row without a valid region has a finite gradient to be multiplied by 0.
    logits = logits.masked_fill(~valid[:, None, :], torch.finfo(logits.dtype).min)
    positive = logits.diagonal(dim1=1, dim2=2)
    loss = logits.logsumexp(2) - positive
    return _mean_where(loss.flatten(), valid.flatten())


@torch.no_grad()
def random_cell(key: Embedding, generator: torch.Generator) -> Tensor:
    """(batch, embed_dim) of unit length: one cell of each image's local map."""
    cells = _local_map(key).flatten(2)
    count, device = cells.shape[2], cells.device
    chosen = draw_part(
        lambda shape: torch.randint(count, shape, generator=generator, device=device),
        (len(cells), 1, 1),
    )
    return functional.normalize(cells.take_along_dim(chosen, dim=2).squeeze(2).float(), dim=1)


@torch.no_grad()
def average_cell(key: Embedding) -> Tensor:
    """(batch, embed_dim) of unit length: the average over each image's local map."""
    return functional.normalize(_local_map(key).float().mean((2, 3)), dim=1)


def _cell_loss(
    query: Tensor, key: Tensor, ids: Tensor, queue: KeyQueue, temperature: float
) -> Tensor:
    """(cells of all images,); query and key (cells of all images, embed_dim) of any length."""
    loss, _ = queue_info_nce(
        functional.normalize(query.float(), dim=1),
        functional.normalize(key.float(), dim=1),
        queue.keys,
        temperature,
        ids.repeat_interleave(len(query) // len(ids)),
        queue.ids,
    )
    return loss


def _local_map(embedding: Embedding) -> Tensor:
    assert embedding.local is not None, "the branch was built without a local head"
    return embedding.local


def _cells(feature_map: Tensor) -> Tensor:
    """(batch, channels, h, w) to (batch * h * w, channels)."""
    return feature_map.permute(0, 2, 3, 1).flatten(0, 2)


def _sample(feature_map: Tensor, coordinates: Tensor) -> Tensor:
    return functional.grid_sample(
        feature_map, coordinates, padding_mode="border", align_corners=False
    )


def _mean_where(values: Tensor, valid: Tensor) -> Tensor:
    """Mean over the valid entries, 0 where there are none; without waiting for the device.

    On several ranks it is their mean of this that is the mean over all valid entries.
    """
    kept = torch.where(valid, values, torch.zeros_like(values))
    return kept.sum() * world() / sum_over_ranks(valid.sum()).clamp(min=1)
