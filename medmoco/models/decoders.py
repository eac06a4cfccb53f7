"""What turns an encoder into a segmentation network: image in, logits of the same size out."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from medmoco.models.encoder import Encoder


class LinearDecoder(nn.Module):
    """A frozen encoder, BatchNorm, a 1x1 convolution, bilinear upsampling: the linear evaluation.

    BatchNorm has no parameters of its own, the convolution after it would only repeat them.
    """

    def __init__(self, encoder: Encoder, classes: int):
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.norm = nn.BatchNorm2d(encoder.channels[-1], affine=False)
        self.classifier = nn.Conv2d(encoder.channels[-1], classes, kernel_size=1)
        self.train(False)

    def train(self, mode: bool = True) -> "LinearDecoder":
        """The encoder stays in eval mode: its statistics are as frozen as its weights."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, image: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> logits (B, classes, H, W)."""
        logits = self.classifier(self.norm(self.encoder(image)))
        return resize(logits, image)


class UNet(nn.Module):
    """U-Net on the five maps of an encoder, and the image itself as the finest skip [1].

    Every level has as many channels as the encoder's map of that level, so the decoder scales
    with the encoder's width. Maps are resized to the skip they meet, which makes it independent
    of output stride and image size.

    [1] Ronneberger et al., 2015, arXiv:1505.04597.
    """

    def __init__(self, encoder: Encoder, classes: int):
        super().__init__()
        self.encoder = encoder
        stem, *_, deepest = encoder.channels
        skips = (*encoder.channels[-2::-1], encoder.conv1.in_channels)  # coarse to fine
        widths = (*encoder.channels[-2::-1], stem)
        self.blocks = nn.ModuleList()
        below = deepest
        for skip, width in zip(skips, widths, strict=True):
            self.blocks.append(UpBlock(below, skip, width))
            below = width
        self.classifier = nn.Conv2d(below, classes, kernel_size=1)

    def forward(self, image: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> logits (B, classes, H, W)."""
        *skips, x = (image, *self.encoder.pyramid(image))
        for block, skip in zip(self.blocks, reversed(skips), strict=True):
            x = block(x, skip)
        return self.classifier(x)


class UpBlock(nn.Module):
    """Resizes the coarse map to the skip, joins both, and applies 3x3 conv-BN-ReLU twice."""

    def __init__(self, below: int, skip: int, width: int):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(below + skip, width, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.conv(torch.cat([resize(x, skip), skip], dim=1))


def resize(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear, pixel areas aligned, to the height and width of `like`."""
    size = like.shape[-2:]
    if x.shape[-2:] == size:
        return x
    return functional.interpolate(x, size=size, mode="bilinear", align_corners=False)


DECODERS: dict[str, Callable[[Encoder, int], nn.Module]] = {"linear": LinearDecoder, "unet": UNet}
