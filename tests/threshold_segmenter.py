"""A segmenter whose weights are set by hand, so that it marks what is brighter than a threshold."""

import torch

from medmoco.data.slices import PixelGrid
from medmoco.data.store import CacheSettings
from medmoco.models.decoders import UNet
from medmoco.models.encoder import Encoder
from medmoco.models.segmenter import Segmenter

WINDOW = (-175.0, 250.0)


def threshold_segmenter(
    threshold: float,
    size: int = 32,
    spacing: float = 1.0,
    axis: int = 2,
    modality: str = "ct",
    value: int = 1,
    channel: int = 0,
) -> Segmenter:
    """A U-Net that passes the image through its finest skip and compares it with a threshold.

    Args:
        threshold: HU in CT; a share of the range from 0 to 1 in MR.
        value: of the marked voxels in the label map.
        channel: of 4-D files.
    """
    model = UNet(Encoder("resnet18", 0.125, output_stride=8), 2).eval()
    low, high = WINDOW
    level = (threshold - low) / (high - low) if modality == "ct" else threshold
    last = model.blocks[-1].conv
    with torch.no_grad():
        for conv, source in ((last[0], -1), (last[3], 0)):  # the image is the last channel
            conv.weight.zero_()
            conv.weight[0, source, 1, 1] = 1
        model.classifier.weight.zero_()
        model.classifier.weight[1, 0] = 1000
        model.classifier.bias.copy_(torch.tensor([0, -1000 * level]))
    return Segmenter(
        model,
        "unet",
        ("background", "bright"),
        (0, value),
        PixelGrid(size, spacing),
        CacheSettings(modality, axis, WINDOW, channel),
    )
