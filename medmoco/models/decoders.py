"""What turns an encoder into a segmentation network: image in, logits of the same size out."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from medmoco.distributed import sum_over_ranks
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


class DeepLabV3Plus(nn.Module):
    """DeepLabv3+ [1]: atrous spatial pyramid pooling, then a decoder at the stride of layer1.

    As its authors' code has it for any backbone: separable convolutions, the depthwise part with
    normalisation and ReLU of its own, dropout 0.1 after the pyramid. The rates are the paper's:
    6, 12, 18 at output stride 16, and 12, 24, 36 at 8, so that they span the same pixels; other
    strides go on in this way. All widths scale with the encoder's: of width 1 they are the
    paper's 256, and 48 for the skip.

    [1] Chen et al., 2018, arXiv:1802.02611.
    """

    def __init__(self, encoder: Encoder, classes: int):
        super().__init__()
        self.encoder = encoder
        stem, finest, *_, deepest = encoder.channels
        width, skip = 4 * stem, 3 * stem // 4
        rates = [rate * 16 // encoder.output_stride for rate in (6, 12, 18)]
        self.scales = nn.ModuleList(
            [_conv(deepest, width), *(_separable(deepest, width, rate) for rate in rates)]
        )
        self.image_pooling = ImagePooling(deepest, width)
        self.project = nn.Sequential(_conv((len(rates) + 2) * width, width), nn.Dropout(0.1))
        self.skip = _conv(finest, skip)
        self.refine = nn.Sequential(_separable(width + skip, width), _separable(width, width))
        self.classifier = nn.Conv2d(width, classes, kernel_size=1)

    def forward(self, image: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> logits (B, classes, H, W)."""
        _, finest, _, _, deepest = self.encoder.pyramid(image)
        seen = [branch(deepest) for branch in (*self.scales, self.image_pooling)]
        context = self.project(torch.cat(seen, dim=1))
        joined = torch.cat([resize(context, finest), self.skip(finest)], dim=1)
        return resize(self.classifier(self.refine(joined)), image)


class ImagePooling(nn.Module):
    """The average over the whole map, 1x1 conv-BN-ReLU, spread over the map again."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel_size=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.conv(x.mean((2, 3), keepdim=True))
        if self.training and sum_over_ranks(torch.tensor(len(pooled))) == 1:
            # The last batch of an epoch can be a single image, whose one cell has no statistics.
            norm = self.norm
            pooled = functional.batch_norm(
                pooled, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
            )
        else:
            pooled = self.norm(pooled)
        return functional.relu(pooled).expand(-1, -1, *x.shape[-2:])


def resize(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear, pixel areas aligned, to the height and width of `like`."""
    size = like.shape[-2:]
    if x.shape[-2:] == size:
        return x
    return functional.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _conv(inputs: int, outputs: int, kernel: int = 1, rate: int = 1, groups: int = 1) -> nn.Module:
    """Conv-BN-ReLU that keeps the size of the map."""
    padding = kernel // 2 * rate
    return nn.Sequential(
        nn.Conv2d(
            inputs, outputs, kernel, padding=padding, dilation=rate, groups=groups, bias=False
        ),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def _separable(inputs: int, outputs: int, rate: int = 1) -> nn.Module:
    """3x3 within each channel, then 1x1 across them."""
    return nn.Sequential(_conv(inputs, inputs, 3, rate, groups=inputs), _conv(inputs, outputs))


DECODERS: dict[str, Callable[[Encoder, int], nn.Module]] = {
    "linear": LinearDecoder,
    "unet": UNet,
    "deeplab": DeepLabV3Plus,
}
