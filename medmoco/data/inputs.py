"""What is to be predicted: the volumes of a folder, or a single one, and their names."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from medmoco.data.nifti import VolumeError, read_layout
from medmoco.data.sources import folders_of_channels
from medmoco.data.task import CHANNEL
from medmoco.data.volumes import SUFFIXES, find_volumes, volume_name
from medmoco.errors import UserError

TASK_IMAGES = "imagesTs"  # what a Decathlon or nnU-Net folder holds for prediction


@dataclass(frozen=True)
class Input:
    """A volume to predict.

    Attributes:
        name: its path within the input folder, without .nii or .nii.gz and nnU-Net's channel.
        image: the file.
        channel: of a 4-D file.
    """

    name: str
    image: Path
    channel: int = 0


def find_inputs(path: Path, channel: int | None) -> list[Input]:
    """A file, or all volumes below a folder in sorted order; of a task's folder, its imagesTs.

    Names keep the folder's structure. In nnU-Net's folders, whose files end in _0000, _0001, ...,
    such a number is a channel and no part of the name; with `channel` that holds of folders of
    any name.

    Args:
        channel: which one to take of cases and files with several; None where there are none.

    Raises:
        UserError: what `find_volumes` raises, several channels and none chosen, no such channel, or
            two files of one name.
    """
    path = Path(path)
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise UserError(f"--input {path}: expected a .nii or .nii.gz file or a folder")
        folder, volumes = path.parent, [path]
    elif path.is_dir():
        folder = path / TASK_IMAGES if (path / TASK_IMAGES).is_dir() else path
        volumes = find_volumes(folder)
    else:
        raise UserError(f"--input {path}: expected a folder or a .nii or .nii.gz file, got neither")
    with_channels = folders_of_channels(volumes, any_name=channel is not None)
    found: dict[str, dict[int | None, Path]] = defaultdict(dict)
    for image in volumes:
        name, number = volume_name(image), None
        if image.parent in with_channels:
            number = int(CHANNEL.search(name)[1])  # type: ignore[index]
            name = CHANNEL.sub("", name)
        name = image.relative_to(folder).with_name(name).as_posix()
        if number in found[name]:
            raise UserError(
                f"{image}: expected one file of this name, got also {found[name][number]}"
            )
        found[name][number] = image
    return [_chosen(name, files, channel) for name, files in found.items()]


def _chosen(name: str, files: dict[int | None, Path], channel: int | None) -> Input:
    if None in files:
        return Input(name, files[None], channel or 0)
    first = next(iter(files.values()))
    if len(files) > 1 and channel is None:
        raise UserError(
            f"{first}: expected one channel, got {len(files)} files of this case; --channel chooses"
        )
    if channel is not None and channel not in files:
        held = ", ".join(map(str, files))
        raise UserError(f"{first}: expected channel {channel} of this case, got {held}")
    return Input(name, first if channel is None else files[channel])


def check_header(item: Input, channel: int | None) -> None:
    """Refuses what is no single 3-D volume, by the header alone.

    Args:
        channel: which one of a 4-D file was asked for, if any.

    Raises:
        VolumeError: what `read_layout` raises, a 2-D image, or a 4-D one without a channel.
    """
    layout = read_layout(item.image)
    if layout.header["dim"][0] < 3:
        raise VolumeError(item.image, "expected a volume of 3 axes, got an image of 2")
    if layout.channels > 1 and channel is None:
        raise VolumeError(
            item.image,
            f"expected 3 axes, got a 4-D file of {layout.channels} channels; --channel chooses one",
        )
    if item.channel >= layout.channels:
        raise VolumeError(
            item.image,
            f"expected a channel below {layout.channels}, got --channel {item.channel}",
        )
