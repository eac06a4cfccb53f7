"""What goes into a cache: the volumes of a folder, or the cases of a labelled task."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from medmoco.data.task import CHANNEL, Task, patient_of
from medmoco.data.volumes import ABDOMEN_1K_IMAGES, SUFFIXES, find_volumes, volume_name
from medmoco.errors import UserError


@dataclass(frozen=True)
class Source:
    """One volume to be cached, with its label map if it has one."""

    case: str
    patient: str
    image: Path
    label: Path | None = None


def task_sources(task: Task) -> list[Source]:
    """The cases of a task with their label maps."""
    return [Source(case.name, case.patient, case.image, case.label) for case in task.cases]


def folder_sources(
    folder: Path, patients: str | None = None, exclude: Collection[str] = ()
) -> list[Source]:
    """All volumes below a folder, unlabelled.

    A case is named by its file; where two files share a name, by its path within the folder. In
    nnU-Net's imagesTr or imagesTs and in AbdomenCT-1K's parts, whose files end in _0000, _0001,
    ..., the channels of a case are volumes of one patient.

    Args:
        patients: see `task.patient_of`.
        exclude: names of cases to leave out, with all their channels and wherever they lie below
            the folder, and of patients.

    Raises:
        UserError: what `find_volumes` and `patient_of` raise, or nothing is left.
    """
    folder = Path(folder)
    paths = find_volumes(folder)
    counts = Counter(volume_name(path) for path in paths)
    with_channels = folders_of_channels(paths)
    sources = []
    for path in paths:
        name = file_name = volume_name(path)
        if counts[name] > 1:
            name = path.relative_to(folder).with_name(name).as_posix()
        case, file_case = name, file_name
        if path.parent in with_channels:
            case, file_case = CHANNEL.sub("", name), CHANNEL.sub("", file_name)
        patient = patient_of(case, patients)
        if not {name, file_name, case, file_case, patient} & set(exclude):
            sources.append(Source(name, patient, path))
    if not sources:
        raise UserError(f"{folder}: expected volumes besides those of --exclude, got none")
    return sources


def folders_of_channels(paths: Collection[Path], any_name: bool = False) -> set[Path]:
    """Folders of images by their name, all of whose files end in a channel's number.

    Every case has a channel 0000; where no file ends in it, the numbers are those of cases.

    Args:
        any_name: also folders that are not named as those of images.
    """
    named = ("images", ABDOMEN_1K_IMAGES)
    folders = {path.parent for path in paths}
    return {
        folder
        for folder in folders
        if (any_name or folder.name.startswith(named)) and _holds_channels(folder)
    }


def _holds_channels(folder: Path) -> bool:
    beside = (path for path in folder.glob("[!.]*") if path.name.endswith(SUFFIXES))
    numbers = [CHANNEL.search(volume_name(path)) for path in beside]
    return all(numbers) and any(number and int(number[1]) == 0 for number in numbers)


def read_case_list(path: Path) -> frozenset[str]:
    """Case names from a text file, one a line; file names with .nii or .nii.gz will do.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected a text file of case names: {error}") from None
    return frozenset(volume_name(Path(line.strip())) for line in lines if line.strip())
