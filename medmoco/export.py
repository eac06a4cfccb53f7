"""Weights for other tools: an encoder in torchvision's keys, or a whole segmenter as ONNX.

--to torchvision writes a state_dict that torchvision, timm and segmentation_models_pytorch load
strictly. --to onnx writes input "image" (batch, 1, size, size) float32, pixels in [0, 1], to output
"logits" (batch, classes, size, size) float32, for any batch, in opset 18; its metadata_props tell
how voxels become pixels.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import medmoco
from medmoco.command import run_command
from medmoco.config import option, parse
from medmoco.errors import UserError
from medmoco.models.encoder import Encoder, fold_whitening, load_encoder
from medmoco.models.segmenter import Segmenter, find_segmenters, load_segmenter
from medmoco.output import save_torch, write_bytes_atomic
from medmoco.printing import say

OPSET = 18  # of 2022: readers of older files than today's default are common
STEM_OF_TORCHVISION = 64  # channels


@dataclass(frozen=True)
class ExportConfig:
    """Flags of the export."""

    to: str | None = option(None, "format", choices=("torchvision", "onnx"))
    run: Path | None = option(
        None,
        "folder of a run: its encoder.pt, or with onnx its fine-tuned segmenter, else the linear "
        "one (--model chooses another)",
    )
    encoder: Path | None = option(None, "encoder.pt, instead of --run")
    model: Path | None = option(None, "a segmenter's file, instead of --run")
    output: Path | None = option(None, "file to write; default beside what is exported")
    channels: int = option(
        1, "of the images that torchvision's network takes; with 3 a grey image in all of them "
        "gives the features of one", choices=(1, 3),
    )  # fmt: skip
    overwrite: bool = option(False, "replace --output")


def torchvision_state(encoder: Encoder, channels: int = 1) -> dict[str, Tensor]:
    """The state_dict of torchvision's network of this name, without `fc`.

    Args:
        encoder: of width 1; a whitening in the place of its last normalisation is folded.
        channels: of the images. An encoder of one channel reads their mean.

    Raises:
        UserError: torchvision's network has other shapes, or no place for a layer.
    """
    if encoder.channels[0] != STEM_OF_TORCHVISION:
        raise UserError(
            f"--to torchvision: expected an encoder of width 1, got {encoder.width:g}: "
            f"torchvision's {encoder.arch} has other shapes"
        )
    if encoder.whitening is not None:
        raise UserError(
            "--to torchvision: expected an encoder without a whitening at its end "
            "(--keep-whitening), for which torchvision's network has no place"
        )
    folded = fold_whitening(encoder).state_dict()
    state = {name: tensor.contiguous() for name, tensor in folded.items()}
    own = encoder.conv1.in_channels
    if own not in (1, channels):
        raise UserError(f"--channels {channels}: the encoder takes images of {own} channels")
    if own != channels:
        state["conv1.weight"] = state["conv1.weight"].repeat(1, channels, 1, 1) / channels
    return state


def loading_code(path: Path, arch: str, channels: int) -> str:
    """Python that loads an exported encoder, strictly, a paragraph for each library."""
    stem = f"network.conv1 = torch.nn.Conv2d({channels}, 64, 7, stride=2, padding=3, bias=False)\n"
    return f"""\
import torch
weights = torch.load({str(path)!r}, weights_only=True)

import torchvision
network = torchvision.models.{arch}()
{stem if channels != 3 else ""}network.fc = torch.nn.Identity()
network.load_state_dict(weights)

import timm
network = timm.create_model("{arch}", in_chans={channels}, num_classes=0)
network.load_state_dict(weights)

import segmentation_models_pytorch as smp
network = smp.Unet("{arch}", encoder_weights=None, in_channels={channels}, classes=2)
network.encoder.load_state_dict(weights)
"""


def onnx_model(segmenter: Segmenter) -> bytes:
    """A segmenter as an ONNX file, see the head of this module.

    Raises:
        UserError: the packages of the extra [onnx] are missing.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as error:
        raise UserError(
            f"--to onnx: expected the packages onnx and onnxscript, {error.name} is missing: "
            "pip install 'medmoco[onnx]'"
        ) from error
    size = segmenter.grid.size
    # A batch of one would be taken for a constant.
    images = torch.zeros(2, segmenter.encoder.conv1.in_channels, size, size)
    program = torch.onnx.export(
        segmenter.model,
        (images,),
        dynamo=True,
        opset_version=OPSET,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    # torch notes at each node which lines of which files on this machine it comes from.
    graph = proto.graph
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output):
        part.ClearField("metadata_props")
    onnx.helper.set_model_props(proto, onnx_metadata(segmenter))
    onnx.checker.check_model(proto)
    return proto.SerializeToString()


def onnx_metadata(segmenter: Segmenter) -> dict[str, str]:
    """What a reader must know of images and classes, each value as JSON."""
    settings = segmenter.settings
    about = {
        "medmoco": medmoco.__version__,
        "decoder": segmenter.decoder,
        "arch": segmenter.encoder.arch,
        "classes": segmenter.classes,  # of the logits; the first is the background
        "values": segmenter.values,  # of the classes in label maps
        "image_size": segmenter.grid.size,  # pixels a side
        "spacing": segmenter.grid.spacing,  # mm a pixel
        "modality": settings.modality,
        "window": settings.window,  # HU that become 0 and 1, of CT
        "slice_axis": settings.slice_axis,  # 0 sagittal, 1 coronal, 2 axial, of RAS+ volumes
        "channel": settings.channel,  # of 4-D files
    }
    return {name: json.dumps(value) for name, value in about.items()}


def export(config: ExportConfig) -> str:
    """Writes the file.

    Returns:
        What to do with it, for people.

    Raises:
        UserError: what is wrong with flags or files.
    """
    if config.to is None:
        raise UserError("--to: expected torchvision or onnx, got none")
    if config.to == "onnx" and config.channels != 1:
        raise UserError(f"--channels {config.channels}: only --to torchvision can change them")
    source = _source(config)
    ending = "-torchvision.pt" if config.to == "torchvision" else ".onnx"
    output = config.output or source.with_name(source.stem + ending)
    _check_output(output, source, config.overwrite)
    if config.to == "onnx":
        write_bytes_atomic(output, onnx_model(load_segmenter(source)))
        return (
            f"{output}: {source} as ONNX, opset {OPSET}: image -> logits, any batch\n"
            f'next: python -c "import onnxruntime; session = '
            f"onnxruntime.InferenceSession('{output}'); "
            'print(session.get_modelmeta().custom_metadata_map)"'
        )
    encoder = load_segmenter(source).encoder if config.model else load_encoder(source)[0]
    save_torch(output, torchvision_state(encoder, config.channels))
    code = loading_code(output, encoder.arch, config.channels)
    return f"{output}: {source} in torchvision's keys\nnext, whichever you use:\n\n{code}"


def _source(config: ExportConfig) -> Path:
    """The file to export."""
    paths = {"run": config.run, "encoder": config.encoder, "model": config.model}
    given = {name: path for name, path in paths.items() if path is not None}
    if len(given) != 1:
        found = " and ".join(f"--{name}" for name in given) or "none"
        raise UserError(f"--run: expected one of --run, --encoder and --model, got {found}")
    ((name, path),) = given.items()
    if config.to == "onnx":
        if name == "encoder":
            raise UserError("--to onnx: expected --run or --model, a segmenter, got --encoder")
        files = find_segmenters(path)
        if len(files) > 1:
            listed = ", ".join(map(str, files))
            raise UserError(f"--{name} {path}: expected one model, got {listed}; --model takes one")
        return files[0]
    if name != "run":
        return path
    if not (path / "encoder.pt").is_file():
        raise UserError(
            f"--run {path}: expected encoder.pt in it, got none; --model FILE takes the encoder "
            "of a segmenter"
        )
    return path / "encoder.pt"


def _check_output(output: Path, source: Path, overwrite: bool) -> None:
    if output.is_dir():
        raise UserError(f"--output {output}: expected a file, got a folder")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: expected a file in an existing folder")
    if output.resolve() == source.resolve():
        raise UserError(f"--output {output}: expected another file than the one to export")
    if output.exists() and not overwrite:
        raise UserError(f"--output {output}: the file exists; add --overwrite to replace it")


def main(argv: Sequence[str] | None = None) -> None:
    """The command `medmoco export`."""
    config = parse(ExportConfig, argv, prog="medmoco export", description=__doc__)
    say(export(config))


if __name__ == "__main__":
    sys.exit(run_command(main))
