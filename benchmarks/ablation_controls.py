"""What the linear evaluation is to be compared with: features that nobody has pretrained.

Features are encoders, or serve as one; the atlas gives what `Segmentation.run` gives.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from medmoco.data.slices import SliceDataset
from medmoco.data.splits import Split
from medmoco.downstream import CALIBRATION_SLICES, LINEAR_STRIDE, Segmentation, unet_stride
from medmoco.finetune import finetune
from medmoco.linear import content_mask
from medmoco.metrics import DiceTable
from medmoco.models.decoders import UNet
from medmoco.models.encoder import Encoder
from medmoco.ops import zca_whiten

PATCH = 16  # pixels a side
ATLAS = (32, 32, 32)  # cells of the atlas, over the box of a volume
WHITEN_EPS = 1e-3  # of channels of variance 1, as in the layer
SUPERVISED_STEPS = 4  # times those of a fine-tuning, for five times as many volumes and more


class IntensityPatches(nn.Module):
    """In place of an encoder: the features of a cell are the pixels around it."""

    channels = (PATCH**2,)

    def set_output_stride(self, stride: int) -> None:
        self.stride = stride

    def forward(self, image: Tensor) -> Tensor:
        """image (B, 1, H, W) -> (B, PATCH^2, H/stride, W/stride)."""
        # Centred on the cell, as resizing the map takes it.
        padding = (PATCH - self.stride) // 2
        patches = functional.unfold(image, PATCH, padding=padding, stride=self.stride)
        rows, columns = (side // self.stride for side in image.shape[-2:])
        return patches.unflatten(2, (rows, columns))


class WhitenedEncoder(nn.Module):
    """A trained encoder whose features are whitened afterwards, all channels together.

    Args:
        encoder: frozen, with the output stride to evaluate at.
        mean, matrix: (channels,) and (channels, channels): W (x - mean).
    """

    mean: Tensor
    matrix: Tensor

    def __init__(self, encoder: Encoder, mean: Tensor, matrix: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.channels = encoder.channels
        self.register_buffer("mean", mean)
        self.register_buffer("matrix", matrix)

    def set_output_stride(self, stride: int) -> None:
        self.encoder.set_output_stride(stride)

    def forward(self, image: Tensor) -> Tensor:
        centred = self.encoder(image) - self.mean[:, None, None]
        return torch.einsum("ij,bjhw->bihw", self.matrix, centred)


def blind_atlas(segmentation: Segmentation) -> dict[str, Any]:
    """At each place the label that the training volumes have there most often; no pixel is read."""
    cache, split = segmentation.cache, segmentation.split
    numbers = {case: number for number, case in enumerate(cache.volumes.names("case"))}
    classes = len(cache.classes)
    frequency = torch.zeros(1, classes, *ATLAS)
    for case in split.train:
        labels = torch.from_numpy(cache.labels(numbers[case]).copy()).long()
        shares = functional.one_hot(labels, classes).movedim(-1, 0)[None].float()
        frequency += functional.interpolate(shares, size=ATLAS, mode="trilinear")
    table = DiceTable(cache.classes)
    for case in split.test:
        truth = cache.labels(numbers[case])
        here = functional.interpolate(frequency, size=truth.shape, mode="trilinear")
        table.add(case, here[0].argmax(0).numpy(), truth)
    return table.result() | {"weight_decay": None}


@torch.no_grad()
def whiten_afterwards(segmentation: Segmentation, encoder: Encoder) -> WhitenedEncoder:
    """Standardised and whitened by the cells of the pretraining slices, padding left out."""
    encoder.eval()
    encoder.set_output_stride(LINEAR_STRIDE)
    slices = segmentation.cache.indices_of(segmentation.split.pretrain)
    chosen = slices[:: -(-len(slices) // CALIBRATION_SLICES)]
    dataset = SliceDataset(segmentation.cache, chosen, segmentation.grid)
    batches = DataLoader(dataset, segmentation.config.batch_size)
    parts = []
    for batch in batches:
        centre = slice(LINEAR_STRIDE // 2, None, LINEAR_STRIDE)
        inside = content_mask(batch)[:, centre, centre]
        parts.append(encoder(batch["image"]).movedim(1, -1)[inside])
    cells = torch.cat(parts)
    deviation = cells.double().std(0).clamp(min=1e-12).float()
    _, mean, matrix = zca_whiten(cells / deviation, cells.shape[1], WHITEN_EPS)
    return WhitenedEncoder(encoder, mean * deviation, matrix[0] / deviation)


def supervised_encoder(segmentation: Segmentation, steps: int) -> Encoder:
    """The encoder of a U-Net that was trained with the labels of all pretraining volumes."""
    cache, split = segmentation.cache, segmentation.split
    config = dataclasses.replace(segmentation.config, epochs=1)
    every = Segmentation(config, cache, Split((), split.pretrain, split.test), segmentation.grid)
    torch.manual_seed(config.seed)
    assert config.arch is not None and config.width is not None
    encoder = Encoder(config.arch, config.width)
    encoder.set_output_stride(unet_stride(segmentation.grid.size))
    batches = -(-int((every.pixels[:, 1:] > 0).any(1).sum()) * 4 // 3 // config.batch_size)
    finetune(
        UNet(encoder, len(cache.classes)).to(every.device),
        every.dataset,
        every.pixels > 0,
        epochs=max(1, round(SUPERVISED_STEPS * steps / batches)),
        batch_size=config.batch_size,
        lr=config.lr,
        seed=config.seed,
        device=every.device,
        amp_dtype=every.amp_dtype,
        workers=0,
        log=lambda *_: None,
    )
    return encoder
