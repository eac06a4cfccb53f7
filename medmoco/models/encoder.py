"""ResNet encoders with torchvision's blocks and state_dict keys, and the file encoder.pt."""

import copy
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from medmoco.errors import UserError
from medmoco.models.metadata import EXPECTED, pack_names, require_entries, unpack_names
from medmoco.output import save_torch
from medmoco.printing import brief
from medmoco.tensor_file import load_tensors, require_format

ARCHITECTURES: dict[str, tuple[type[BasicBlock | Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}
OUTPUT_STRIDES = (32, 16, 8, 4)
FORMAT, VERSION = "medmoco.encoder", 1

_LAYER_STRIDES = (1, 2, 2, 2)
_STEM_STRIDE = 4
_MAX_WIDTH = 16.0


class Encoder(nn.Module):
    """ResNet [1] without classifier, for images of any size.

    At width 1 and in_channels 3 its state_dict is torchvision's without `fc`. An output stride
    below 32 turns strides of the later layers into dilation [2], also in basic blocks; the
    weights are the same for every output stride.

    Args:
        arch: "resnet18", "resnet34" or "resnet50".
        width: multiplies the channels of every layer, rounded so that each is a multiple of 8.
        output_stride: input pixels per cell of the last map: 32, 16, 8 or 4.
        in_channels: channels of the image.

    Attributes:
        channels: channels of the five maps of `pyramid`.
        whitening: a layer that the last map passes through, or None; see `keep_whitening` in
            medmoco.models.whitening.

    Raises:
        UserError: an argument is out of range.

    [1] He et al., 2016, arXiv:1512.03385. [2] Chen et al., 2017, arXiv:1706.05587.
    """

    def __init__(
        self, arch: str, width: float = 1.0, output_stride: int = 32, in_channels: int = 1
    ) -> None:
        super().__init__()
        if arch not in ARCHITECTURES:
            raise UserError(f"arch must be one of {', '.join(ARCHITECTURES)}, got {arch!r}")
        if not 0 < width <= _MAX_WIDTH:
            raise UserError(f"width must be above 0 and at most {_MAX_WIDTH:g}, got {width!r}")
        block, depths = ARCHITECTURES[arch]
        stem = max(8, round(64 * width / 8) * 8)
        self.arch = arch
        self.width = width
        self.conv1 = nn.Conv2d(in_channels, stem, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        planes = [stem * 2**level for level in range(4)]
        self.channels = (stem, *(count * block.expansion for count in planes))
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            _make_layer(block, inputs, *rest)
            for inputs, *rest in zip(self.channels, planes, depths, _LAYER_STRIDES, strict=False)
        )
        self.whitening: nn.Conv2d | None = None
        self.set_output_stride(output_stride)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def layers(self) -> tuple[nn.Sequential, ...]:
        return self.layer1, self.layer2, self.layer3, self.layer4

    def forward(self, image: Tensor) -> Tensor:
        """image (B, in_channels, H, W) -> last map (B, channels[-1], H/stride, W/stride)."""
        return self.pyramid(image)[-1]

    def pyramid(self, image: Tensor) -> tuple[Tensor, ...]:
        """All five maps, fine to coarse: the stem before max pooling, then layer1 to layer4.

        Args:
            image: (B, in_channels, H, W).

        Returns:
            (B, channels[i], h_i, w_i) at strides 2, 4, 8, 16, 32, none above the output stride.
        """
        stem = self.relu(self.bn1(self.conv1(image)))
        first = self.layer1(self.maxpool(stem))
        second = self.layer2(first)
        third = self.layer3(second)
        last = self.layer4(third)
        if self.whitening is not None:
            last = self.whitening(last)
        return stem, first, second, third, last

    def set_output_stride(self, output_stride: int) -> None:
        """Changes the stride of the last map in place; the weights stay as they are.

        Every cell of a coarser map keeps its value in the finer one, so features of a network
        that was trained at one stride stay meaningful at another.

        Raises:
            UserError: output_stride is not 32, 16, 8 or 4.
        """
        if output_stride not in OUTPUT_STRIDES:
            raise UserError(f"output_stride must be one of {OUTPUT_STRIDES}, got {output_stride!r}")
        self.output_stride = output_stride
        reached, dilation = _STEM_STRIDE, 1
        for layer, native_stride in zip(self.layers, _LAYER_STRIDES, strict=True):
            stride = native_stride if reached * native_stride <= output_stride else 1
            spatial = [
                conv
                for conv in layer.modules()
                if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3)
            ]
            # The convolution that loses its stride still reads the coarse map, so it keeps its
            # dilation; all after it read a map that is denser by that stride.
            _set_geometry(spatial[0], stride, dilation)
            dilation *= native_stride // stride
            for conv in spatial[1:]:
                _set_geometry(conv, 1, dilation)
            first: Any = layer[0]
            if first.downsample is not None:
                first.downsample[0].stride = (stride, stride)
            reached *= stride


def default_output_stride(image_size: int) -> int:
    """The output stride that leaves a map of about 24 to 32 cells a side."""
    if image_size <= 96:
        return 4
    return 8 if image_size <= 256 else 16


def last_norm_name(encoder: Encoder) -> str:
    """Name in `layer4[-1]` of the normalisation before the last residual sum."""
    return "bn3" if isinstance(encoder.layer4[-1], Bottleneck) else "bn2"


def fold_whitening(encoder: Encoder) -> Encoder:
    """A copy in eval mode whose last normalisation is a BatchNorm again, with the same outputs.

    A whitening layer in the place of the last BatchNorm is linear in eval mode, y = W(x - mean),
    so W goes into the convolution before it, and W mean with the output's own running variance
    into the BatchNorm, which thereby has statistics that also hold when training goes on.

    Args:
        encoder: left as it is. Without a whitening layer the copy is plain.
    """
    folded = copy.deepcopy(encoder).eval()
    block: Any = folded.layer4[-1]
    whitening = getattr(block, last_norm_name(folded))
    if isinstance(whitening, nn.BatchNorm2d):
        return folded
    # In float64, which neither autocast nor TF32 rounds.
    mean, matrix = (value.double() for value in whitening.whitening_matrix())
    variance = whitening.output_variance()
    conv = block.conv3 if isinstance(block, Bottleneck) else block.conv2
    norm = nn.BatchNorm2d(len(mean)).to(mean.device).eval()
    with torch.no_grad():
        conv.weight.copy_(torch.einsum("oi,ihkl->ohkl", matrix, conv.weight.double()))
        norm.running_mean.copy_(matrix @ mean)  # type: ignore[union-attr]
        norm.running_var.copy_(variance)  # type: ignore[union-attr]
        norm.weight.copy_((variance + norm.eps).sqrt())
        if whitening.weight is not None:
            norm.weight.mul_(whitening.weight)
            norm.bias.copy_(whitening.bias)
    setattr(block, last_norm_name(folded), norm)
    return folded


def save_encoder(path: Path, encoder: Encoder, **metadata: Any) -> None:
    """Writes encoder.pt, whole or not at all; a whitening layer inside is folded first.

    Args:
        path: file to write.
        encoder: on any device.
        metadata: what segmentation needs to treat images alike (image_size, spacing, modality,
            window, method): numbers, strings, tensors, and tuples, lists and dicts of them; and
            patients, the names of those it was trained on.
    """
    if "patients" in metadata:
        metadata["patients"] = pack_names(metadata["patients"])
    folded = fold_whitening(encoder)
    state = {name: tensor.cpu().contiguous() for name, tensor in folded.state_dict().items()}
    content = {
        "format": FORMAT,
        "version": VERSION,
        "arch": encoder.arch,
        "width": encoder.width,
        "output_stride": encoder.output_stride,
        "in_channels": encoder.conv1.in_channels,
        "state_dict": state,
    }
    save_torch(path, {**metadata, **content})


def load_encoder(path: Path) -> tuple[Encoder, dict[str, Any]]:
    """Reads an encoder.pt. No code in the file is run, and no random number is drawn.

    Returns:
        The encoder in eval mode on the CPU, and the metadata it was saved with.

    Raises:
        UserError: no such file, not an encoder of this version, or weights that do not fit or are
            not finite.
    """
    content = load_tensors(Path(path))
    require_format(path, content, "an encoder.pt", FORMAT, VERSION)
    try:
        if "patients" in content:
            content["patients"] = unpack_names(content["patients"])
        require_entries(content, EXPECTED)
        # On the meta device nothing is allocated before the file's tensors are seen to fit.
        with torch.device("meta"):
            settings = (content.pop(k) for k in ("arch", "width", "output_stride", "in_channels"))
            encoder = Encoder(*settings)
    except Exception as error:  # the settings can be anything
        reason = str(error).split("\n", 1)[0][:200]  # PyTorch's messages go on with stack frames
        raise UserError(f"{path}: the encoder's settings are damaged: {reason}") from error
    state = content.pop("state_dict", None)
    problem = mismatch(encoder.state_dict(), state)
    if problem:
        raise UserError(f"{path}: the weights do not fit {encoder.arch}: {problem}")
    require_finite(path, state)
    encoder.load_state_dict(state, assign=True)
    del content["format"], content["version"]
    return encoder.eval(), content


def _make_layer(
    block: type[BasicBlock | Bottleneck], inputs: int, planes: int, depth: int, stride: int
) -> nn.Sequential:
    outputs = planes * block.expansion
    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
        )
    first = block(inputs, planes, stride, shortcut)
    return nn.Sequential(first, *(block(outputs, planes) for _ in range(depth - 1)))


def _set_geometry(conv: nn.Conv2d, stride: int, dilation: int) -> None:
    conv.stride = (stride, stride)
    conv.dilation = (dilation, dilation)
    conv.padding = (dilation, dilation)


def mismatch(expected: dict[str, Tensor], state: Any) -> str | None:
    """What keeps `state` from being loaded, in words, or None."""
    if not isinstance(state, dict):
        return f"expected a state_dict, got {type(state).__name__}"
    for words, names in (
        ("missing", [name for name in expected if name not in state]),
        ("unexpected", [brief(name) for name in state if name not in expected]),
    ):
        if names:
            shown = ", ".join(itertools.islice(names, 3))
            return f"{len(names)} {words}: {shown}" + (", ..." if len(names) > 3 else "")
    for name, tensor in expected.items():
        value = state[name]
        if not isinstance(value, Tensor):
            return f"{name} must be a tensor, got {type(value).__name__}"
        if (value.shape, value.dtype) != (tensor.shape, tensor.dtype):
            return (
                f"{name} must be {tuple(tensor.shape)} {tensor.dtype}, "
                f"got {tuple(value.shape)} {value.dtype}"
            )
    return None


def require_finite(path: Path, state: dict[str, Tensor], prefix: str = "") -> None:
    """Raises a UserError that names the first tensor of a file with a NaN or an infinite value.

    Args:
        prefix: of the names in the file.
    """
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {prefix}{name} holds values that are not finite")
