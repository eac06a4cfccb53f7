"""The phantom: a labelled data set of drawn abdomens, so that everything runs without any data.

It shows that the pipeline works; nothing about a method can be concluded from it.
"""

import gzip
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.nifti1 import Nifti1Image
from tqdm import tqdm

from medmoco.data.abdomen import CLASSES, render
from medmoco.data.anatomy import draw_patient
from medmoco.data.lock import locked
from medmoco.errors import UserError
from medmoco.json_file import read_object
from medmoco.output import write_json
from medmoco.printing import say

VERSION = 1  # of what is drawn: another version is another phantom
MIN_SIZE, MIN_SLICES = 16, 2
MILLIMETRES = 2  # NIfTI's code


def generate_phantom(
    folder: Path, patients: int = 40, size: int = 96, slices: int = 24, seed: int = 0
) -> Path:
    """Writes a data set of abdominal CT in the Decathlon layout, or finds it there already.

    imagesTr and labelsTr hold int16 HU and uint8 class values as .nii.gz. The field of view is that
    of a CT (300 to 420 mm, as the patient needs), 192 mm high, so voxels are about 4 x 4 x 8 mm by
    default. The same seed gives the same files; patient n does not depend on how many there are.

    Args:
        folder: is created whole or not at all.
        patients: at least 1.
        size: pixels of a slice's side, at least 16.
        slices: of each volume, at least 2.
        seed: not negative.

    Returns:
        The folder.

    Raises:
        UserError: a number is out of range, or the folder holds something else.
    """
    folder = Path(folder)
    settings = {"patients": patients, "size": size, "slices": slices, "seed": seed}
    lowest = {"patients": 1, "size": MIN_SIZE, "slices": MIN_SLICES, "seed": 0}
    for name, value in settings.items():
        if value < lowest[name]:
            raise UserError(f"phantom: expected {name} of at least {lowest[name]}, got {value}")
    settings["version"] = VERSION
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent / f".{folder.name}.lock", "phantom"):
            if _found(folder, settings):
                say(f"phantom: {folder} (found), {patients} patients")
                return folder
            _generate(folder, settings)
    except OSError as error:
        raise UserError(f"{folder}: the phantom cannot be written: {error}") from error
    say(f"phantom: {folder} (drawn), {patients} patients")
    return folder


def _found(folder: Path, settings: dict[str, int]) -> bool:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        found = read_object(folder / "dataset.json")["phantom"]
    except (UserError, KeyError):
        raise UserError(
            f"{folder}: expected a phantom or no such folder, got something else; choose another"
        ) from None
    if found != settings:
        raise UserError(f"{folder}: expected the phantom {settings}, got {found}; choose another")
    return True


def _generate(folder: Path, settings: dict[str, int]) -> None:
    partial = Path(tempfile.mkdtemp(".partial", f".{folder.name}.", folder.parent))
    try:
        for name in ("imagesTr", "labelsTr"):
            (partial / name).mkdir()
        cases = [f"phantom_{number:03d}.nii.gz" for number in range(settings["patients"])]
        for number, case in enumerate(tqdm(cases, desc="phantom", unit="patient", disable=None)):
            random = np.random.default_rng([settings["seed"], number])
            patient = draw_patient(random)
            hu, labels, affine = render(patient, random, settings["size"], settings["slices"])
            _write_volume(partial / "imagesTr" / case, hu, affine)
            _write_volume(partial / "labelsTr" / case, labels, affine)
        write_json(partial / "dataset.json", _description(cases, settings))
        os.chmod(partial, 0o755)  # mkdtemp gives 0700, too narrow for shared folders
        if folder.exists():
            folder.rmdir()  # an empty one
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_volume(path: Path, voxels: np.ndarray, affine: np.ndarray) -> None:
    image = Nifti1Image(voxels, affine)
    image.header["xyzt_units"] = MILLIMETRES
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def _description(cases: list[str], settings: dict[str, int]) -> dict[str, Any]:
    return {
        "name": "phantom",
        "description": "Drawn abdomens in HU; no claim about a method rests on them",
        "modality": {"0": "CT"},
        "labels": {str(value): name for value, name in enumerate(CLASSES)},
        "numTraining": len(cases),
        "numTest": 0,
        "training": [
            {"image": f"./imagesTr/{case}", "label": f"./labelsTr/{case}"} for case in cases
        ],
        "test": [],
        "phantom": settings,
    }
