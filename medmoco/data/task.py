"""Labelled data sets: the layouts of Decathlon and nnU-Net, and a folder of images beside labels.

Decathlon: Antonelli et al., 2022, doi:10.1038/s41467-022-30695-9; nnU-Net: Isensee et al., 2021,
doi:10.1038/s41592-020-01008-z.
"""

import csv
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from medmoco.data.nifti import ReadFault, VolumeError
from medmoco.data.paths import inside
from medmoco.data.volumes import (
    ABDOMEN_1K_IMAGES,
    ABDOMEN_1K_LABELS,
    SUFFIXES,
    find_volumes,
    read_volume,
    volume_name,
)
from medmoco.errors import UserError
from medmoco.json_file import read_object
from medmoco.printing import brief

FOLDER_PAIRS = (("imagesTr", "labelsTr"), ("images", "labels"), ("img", "label"))
MAX_VALUE = 255  # label maps are written as uint8
CHANNEL = re.compile(r"_(\d{4})$")  # nnU-Net: case_0000.nii.gz is channel 0 of `case`
# Sets that come without a dataset.json: where labels lie, how cases are named, values from 1 on.
KNOWN_SETS = (
    (
        "label",  # BTCV, Synapse project syn3193805
        re.compile(r"img\d{4}$"),
        (
            *("spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver"),
            *("stomach", "aorta", "inferior vena cava", "portal and splenic vein", "pancreas"),
            *("right adrenal gland", "left adrenal gland"),
        ),
    ),
    (
        ABDOMEN_1K_LABELS,  # Ma et al., 2022, doi:10.1109/TPAMI.2021.3100536
        re.compile(r"Case_\d{5}$"),
        ("liver", "kidney", "spleen", "pancreas"),
    ),
)
ROLE = re.compile(r"^(image|img|label|lbl|seg|mask)s?[-_]*(?=.)", re.IGNORECASE)


@dataclass(frozen=True)
class Case:
    """One labelled volume. Neither file need exist: the cache reports what is missing."""

    name: str
    patient: str
    image: Path
    label: Path


@dataclass(frozen=True)
class Task:
    """A labelled data set.

    Attributes:
        cases: sorted by name.
        classes: names; classes[0] is "background".
        values: the value that stands for each class in the label files.
        modality: "ct" or "mr" as dataset.json says, else None.
    """

    root: Path
    cases: tuple[Case, ...]
    classes: tuple[str, ...]
    values: tuple[int, ...]
    modality: str | None


def read_task(folder: Path, patients: str | None = None) -> Task:
    """Reads the layout of a labelled data set; volumes themselves are not opened.

    Only where there is no dataset.json, the label files are read for the values that they hold.

    Args:
        folder: dataset.json with imagesTr and labelsTr (Decathlon, nnU-Net), or folders images and
            labels, or img and label (BTCV), or AbdomenCT-1K's parts and Mask.
        patients: CSV file or regular expression, see `patient_of`.

    Raises:
        UserError: no known layout, a broken dataset.json, or one whose paths leave the folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: expected the folder of a labelled data set, got no folder")
    described = (folder / "dataset.json").is_file()
    content = _read_description(folder / "dataset.json") if described else {}
    files = _listed_files(folder, content) or _paired_files(folder)
    cases = tuple(
        Case(name, patient_of(name, patients), image, label)
        for name, (image, label) in sorted(files.items())
    )
    if described:
        classes, values = _classes(folder / "dataset.json", content)
    else:
        classes, values = _named_by_their_set(cases, *_discovered_classes(cases))
    return Task(folder, cases, classes, values, _modality(content))


def read_classes(path: Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and values of the classes from a dataset.json; the background, 0, comes first.

    Raises:
        UserError: not readable, or no classes that could be told apart.
    """
    return _classes(path, _read_description(path))


def patient_of(name: str, patients: str | None) -> str:
    """The patient that a case belongs to; by default each case is a patient of its own.

    Args:
        name: case name.
        patients: a CSV file of `case,patient` lines, or a regular expression that is searched in
            the name: its first group, or else the whole match, is the patient.

    Raises:
        UserError: the CSV cannot be read or does not list the case, or the expression is invalid or
            does not match.
    """
    if patients is None:
        return name
    if patients.endswith(".csv") or Path(patients).is_file():
        listed = _read_patients(patients)
        if name not in listed:
            raise UserError(f"--patients {patients}: expected a line for case {name}, got none")
        return listed[name]
    try:
        match = re.search(patients, name)
    except re.error as error:
        raise UserError(
            f"--patients {patients}: expected a CSV file or a regular expression: {error}"
        ) from None
    found = match and (match.group(1) if match.re.groups else match.group())
    if not found:
        raise UserError(f"--patients {patients}: the expression does not match case {name}")
    return found


@lru_cache(maxsize=8)
def _read_patients(path: str) -> dict[str, str]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--patients {path}: expected a readable CSV file: {error}") from None
    for number, row in enumerate(rows, 1):
        if len(row) != 2:
            raise UserError(
                f"--patients {path}: expected `case,patient` in row {number}, "
                f"got {brief(','.join(row))}"
            )
    return {volume_name(Path(case.strip())): patient.strip() for case, patient in rows}


def _read_description(path: Path) -> dict[str, Any]:
    content = read_object(path, nan_is_null=True)  # in entries that are not read: json.dumps's way
    ending = content.get("file_ending", ".nii.gz")
    if not isinstance(ending, str) or ending not in SUFFIXES:
        raise UserError(f"{path}: expected file_ending .nii.gz or .nii, got {brief(ending)}")
    return content


def _listed_files(folder: Path, content: dict[str, Any]) -> dict[str, tuple[Path, Path]]:
    """The cases that dataset.json lists under "training"; none in nnU-Net's newer layout."""
    path = folder / "dataset.json"
    listed = content.get("training", [])
    if not isinstance(listed, list):
        raise UserError(f'{path}: expected a list under "training", got {type(listed).__name__}')
    files = {}
    for entry in listed:
        names = [entry.get(key) for key in ("image", "label")] if isinstance(entry, dict) else []
        named = [name for name in names if isinstance(name, str)]
        if len(named) < 2:
            raise UserError(
                f'{path}: expected {{"image": FILE, "label": FILE}} under "training", '
                f"got {brief(entry)}"
            )
        image, label = (inside(folder, name, path) for name in named)
        if volume_name(image) in files:
            name = brief(volume_name(image))
            raise UserError(f"{path}: expected each case once, got {name} twice")
        first_channel = image.with_name(image.name.replace(".nii", "_0000.nii"))
        # os.path, for a name that is too long is no file there, and not an OSError.
        channels = os.path.isfile(first_channel) and not os.path.isfile(image)
        chosen = first_channel if channels else image
        files[volume_name(image)] = (chosen, label)
    return files


def _paired_files(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Cases by matching the names in folders of images with those in a folder of labels."""
    parts = [part for part in sorted(folder.glob(f"{ABDOMEN_1K_IMAGES}*")) if part.is_dir()]
    pairs = [([folder / images], labels) for images, labels in FOLDER_PAIRS]
    for images, labels in (*pairs, (parts, ABDOMEN_1K_LABELS)):
        if images and all(map(Path.is_dir, images)) and (folder / labels).is_dir():
            break
    else:
        known = ", ".join(f"{images} and {labels}" for images, labels in FOLDER_PAIRS)
        raise UserError(f"{folder}: expected a dataset.json or folders {known}, got neither")
    found = [path for part in images for path in find_volumes(part)]
    first_channels = [path for path in found if volume_name(path).endswith("_0000")]
    channels = bool(first_channels) and all(CHANNEL.search(volume_name(path)) for path in found)
    by_key = {case_key(volume_name(path)): path for path in find_volumes(folder / labels)}
    files = {}
    for image in first_channels if channels else found:
        name = CHANNEL.sub("", volume_name(image)) if channels else volume_name(image)
        absent = folder / labels / image.name.replace(volume_name(image), name)
        files[name] = (image, by_key.get(case_key(name), absent))
    return files


def case_key(name: str) -> str:
    """What the names of a case's files share: img0001 and label0001 are one case."""
    return ROLE.sub("", name).lower()


def _classes(path: Path, content: dict[str, Any]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Class names and values from both styles: {"0": "liver"} and {"liver": 0}."""
    labels = content.get("labels")
    if not isinstance(labels, dict) or not labels:
        got = brief(labels)
        raise UserError(f'{path}: expected an object of classes under "labels", got {got}')
    names: dict[int, str] = {}
    for key, item in labels.items():
        name, value = (key, item) if isinstance(item, int) else (item, key)
        if not isinstance(name, str) or name == "ignore" or not _is_value(value):
            raise UserError(
                f'{path}: expected a class name and a whole number under "labels", got '
                f"{brief(key)}: {brief(item)} (regions and ignored labels are not supported)"
            )
        if int(value) > MAX_VALUE or int(value) in names:
            raise UserError(
                f'{path}: expected different values from 0 to {MAX_VALUE} under "labels", got '
                f"{brief(int(value))} for {brief(name)}"
            )
        names[int(value)] = name
    names[0] = "background"
    if len(names) < 2 or len(set(names.values())) < len(names):
        raise UserError(
            f"{path}: expected a class besides background, each name once, got {brief(labels)}"
        )
    return tuple(names[value] for value in sorted(names)), tuple(sorted(names))


def _is_value(value: object) -> bool:
    """Whether this is a whole number of at least 0, or one in words, that is not absurdly long."""
    text = str(value) if isinstance(value, (int, str)) and not isinstance(value, bool) else ""
    return text.isascii() and text.isdecimal() and len(text) < 10


def _discovered_classes(cases: tuple[Case, ...]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The values that the label files hold; unreadable files are left for the cache to report."""
    values: set[int] = set()
    for case in tqdm(cases, desc="label values (no dataset.json)", unit="file", disable=None):
        try:
            found = np.unique(read_volume(case.label, label=True).voxels)
        except ReadFault:
            raise  # else its values would be missing now, and not another time
        except VolumeError:
            continue
        if found[0] < 0 or found[-1] > MAX_VALUE:
            raise UserError(
                f"{case.label}: expected label values from 0 to {MAX_VALUE}, "
                f"got {found[0]} to {found[-1]}"
            )
        values.update(found.tolist())
    if values == {0}:
        raise UserError(
            f"{cases[0].label.parent}: expected label maps with a class besides 0, got none"
        )
    ordered = sorted(values | {0})
    return ("background", *(f"label {value}" for value in ordered[1:])), tuple(ordered)


def _named_by_their_set(
    cases: tuple[Case, ...], classes: tuple[str, ...], values: tuple[int, ...]
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The organs' names where cases, folders and all values are those of a set that is known."""
    for label_folder, name, organs in KNOWN_SETS:
        of_set = all(c.label.parent.name == label_folder and name.match(c.name) for c in cases)
        if of_set and values == tuple(range(len(organs) + 1)):
            return ("background", *organs), values
    return classes, values


def _modality(content: dict[str, Any]) -> str | None:
    """Of the first channel: "modality" in Decathlon's file, "channel_names" in nnU-Net's."""
    channels = content.get("channel_names", content.get("modality"))
    name = channels.get("0") if isinstance(channels, dict) else channels
    if not isinstance(name, str):
        return None
    if name.strip().upper() == "CT":
        return "ct"
    return "mr" if re.match(r"MR|T1|T2|FLAIR|ADC|DWI|PD\b", name.strip(), re.IGNORECASE) else None
