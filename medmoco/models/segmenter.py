"""A trained segmentation network with all that prediction needs, and its file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import medmoco
from medmoco.data.slices import PixelGrid
from medmoco.data.store import CacheSettings
from medmoco.errors import UserError
from medmoco.models.decoders import DECODERS
from medmoco.models.encoder import Encoder, fold_whitening, mismatch, require_finite
from medmoco.models.metadata import EXPECTED, require_entries
from medmoco.models.whitening import MapWhitening, group_of
from medmoco.output import save_torch
from medmoco.printing import brief
from medmoco.tensor_file import load_tensors, require_format

FORMAT, VERSION = "medmoco.segmenter", 1
FOLDER = "segmenters"  # in a run; which of its models is taken, the first that is there
PREFERENCE = ("finetune-pretrained", "finetune-scratch", "linear-pretrained", "linear-random")
MAX_CLASSES = 256  # a class index is a uint8
MAX_VALUE = 65535  # of a label map


@dataclass(frozen=True)
class Segmenter:
    """A network and the images it was trained on.

    Attributes:
        model: (B, in_channels, size, size) in [0, 1] to logits (B, classes, size, size), in eval
            mode; its `encoder` is an `Encoder`.
        decoder: its kind, a key of `DECODERS`.
        classes: names; classes[0] is the background.
        values: the value that stands for each class in label maps.
        grid: pixels of the images.
        settings: how voxels became pixels; modality and slice axis are known.
    """

    model: nn.Module
    decoder: str
    classes: tuple[str, ...]
    values: tuple[int, ...]
    grid: PixelGrid
    settings: CacheSettings

    @property
    def encoder(self) -> Encoder:
        return self.model.encoder  # type: ignore[return-value]


def save_segmenter(path: Path, segmenter: Segmenter) -> None:
    """Writes a segmenter's file, whole or not at all; a whitening layer inside is folded first.

    Args:
        path: file to write.
        segmenter: on any device; stays as it is.
    """
    encoder = segmenter.encoder
    inner = fold_whitening(encoder).state_dict()
    state = {f"encoder.{name}": tensor for name, tensor in inner.items()}
    for name, tensor in segmenter.model.state_dict().items():
        if not name.startswith("encoder."):
            state[name] = tensor
    save_torch(
        path,
        {
            "format": FORMAT,
            "version": VERSION,
            "medmoco": medmoco.__version__,
            "decoder": segmenter.decoder,
            "classes": list(segmenter.classes),
            "values": list(segmenter.values),
            "arch": encoder.arch,
            "width": encoder.width,
            "output_stride": encoder.output_stride,
            "in_channels": encoder.conv1.in_channels,
            "whitening_group": group_of(encoder.whitening),
            "image_size": segmenter.grid.size,
            "spacing": float(segmenter.grid.spacing),
            "modality": segmenter.settings.modality,
            "slice_axis": segmenter.settings.slice_axis,
            "window": [float(end) for end in segmenter.settings.window],
            "channel": segmenter.settings.channel,
            "state_dict": {name: value.cpu().contiguous() for name, value in state.items()},
        },
    )


def load_segmenter(path: Path) -> Segmenter:
    """Reads a segmenter's file. No code in it is run, and no random number is drawn.

    Returns:
        The segmenter in eval mode on the CPU.

    Raises:
        UserError: no such file, not a segmenter of this version, an entry that makes no sense, or
            weights that do not fit or are not finite.
    """
    path = Path(path)
    content = load_tensors(path)
    require_format(path, content, "a segmenter", FORMAT, VERSION)
    try:
        classes, values = _classes(content["classes"], content["values"])
        require_entries(content, EXPECTED)
        grid = PixelGrid(content["image_size"], float(content["spacing"]))
        modality, axis, channel = (content[k] for k in ("modality", "slice_axis", "channel"))
        low, high = content["window"]
        settings = CacheSettings(modality, axis, (float(low), float(high)), channel)
        # On the meta device nothing is allocated before the file's tensors are seen to fit.
        with torch.device("meta"):
            parts = (content[key] for key in ("arch", "width", "output_stride", "in_channels"))
            encoder = Encoder(*parts)
            if content.get("whitening_group") is not None:
                encoder.whitening = MapWhitening(encoder.channels[-1], content["whitening_group"])
            model = DECODERS[content["decoder"]](encoder, len(classes))
    except Exception as error:  # the entries can be anything
        reason = str(error).split("\n", 1)[0][:200]  # PyTorch's messages go on with stack frames
        if isinstance(error, KeyError):
            reason = f"no or unknown {reason}"
        raise UserError(f"{path}: the segmenter's settings are damaged: {reason}") from error
    problem = mismatch(model.state_dict(), content.get("state_dict"))
    if problem:
        raise UserError(f"{path}: the weights do not fit {content['decoder']}: {problem}")
    require_finite(path, content["state_dict"])
    model.load_state_dict(content["state_dict"], assign=True)
    return Segmenter(model.eval(), content["decoder"], classes, values, grid, settings)


def find_segmenters(path: Path) -> list[Path]:
    """The files that are meant by a file, a run, or a run of several folds.

    Raises:
        UserError: there is no model at this place, or the folds are at different stages.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"--model {path}: expected a run or a segmenter's file, got neither")
    files = (path / FOLDER / f"{name}.pt" for name in PREFERENCE)
    best = next(filter(Path.is_file, files), None)
    if best:
        return [best]
    folds = sorted(path.glob("fold_*"))
    if not folds:
        raise UserError(
            f"--model {path}: expected a run with a trained model in {FOLDER}/, got none; "
            "`medmoco segment` trains one, and --resume brings that of an older run"
        )
    for fold in folds:
        if not any((fold / FOLDER / f"{name}.pt").is_file() for name in PREFERENCE):
            raise UserError(
                f"--model {path}: expected a trained model in every fold, but {fold.name} is not "
                "finished; finish with `medmoco segment --resume`, or name the files"
            )
    found = [file for fold in folds for file in find_segmenters(fold)]
    if len({file.name for file in found}) > 1:
        listed = ", ".join(file.relative_to(path).as_posix() for file in found)
        raise UserError(
            f"--model {path}: expected one kind of model in all folds, got {listed}; finish with "
            "`medmoco segment --resume`, or name the files"
        )
    return found


def _classes(names: Any, values: Any) -> tuple[tuple[str, ...], tuple[int, ...]]:
    if not _list_of(str, names) or not 2 <= len(set(names)) == len(names) <= MAX_CLASSES:
        raise UserError(f"classes must be 2 to {MAX_CLASSES} different names, got {brief(names)}")
    if not _list_of(int, values) or len(set(values)) != len(names) or len(values) != len(names):
        raise UserError(f"values must be {len(names)} different whole numbers, got {brief(values)}")
    if not 0 <= min(values) <= max(values) <= MAX_VALUE:
        raise UserError(f"values must lie between 0 and {MAX_VALUE}, got {brief(values)}")
    return tuple(names), tuple(values)


def _list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)
