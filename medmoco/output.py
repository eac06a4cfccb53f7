"""Everything that is written to disk goes through here: whole files or none."""

import io
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from medmoco.errors import UserError

CONFIG_NAME = "config.json"


def check_output(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Says why a folder cannot take a run's output; touches nothing.

    Raises:
        UserError: the folder holds files and neither `resume` nor `overwrite` is set, `overwrite`
            would delete a folder that is not a run, or `resume` finds nothing to resume.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: expected a folder, got a file")
    occupied = folder.is_dir() and any(folder.iterdir())
    is_run = (folder / CONFIG_NAME).is_file()
    if resume and not is_run:
        raise UserError(f"--resume: {folder} holds no {CONFIG_NAME}, so there is no run to resume")
    if occupied and overwrite and not is_run:
        raise UserError(
            f"--overwrite: {folder} is not empty and holds no {CONFIG_NAME}, so it is not a run "
            "of medmoco; choose another --output"
        )
    if occupied and not (resume or overwrite):
        raise UserError(
            f"--output {folder}: the folder is not empty; "
            "add --resume to go on with it, --overwrite to delete it, or choose another one"
        )


def prepare_output(folder: Path, *, resume: bool, overwrite: bool) -> Path:
    """Creates the output folder of a run, emptied if `overwrite`; raises as `check_output`."""
    folder = Path(folder)
    check_output(folder, resume=resume, overwrite=overwrite)
    if overwrite and not resume and folder.is_dir():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """Writes a file that appears whole or not at all, even if the machine stops."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp gives 0600, too narrow for shared folders
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself must survive a power cut
    finally:
        os.close(directory)


def write_text(path: Path, text: str) -> None:
    write_bytes_atomic(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def save_torch(path: Path, value: Any) -> None:
    """torch.save through memory, so that the file is whole or absent."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_bytes_atomic(path, buffer.getvalue())


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Appends one JSON object as one line, in one write."""
    line = json.dumps(record, allow_nan=False) + "\n"
    with open(path, "a", encoding="utf-8") as file:
        file.write(line)
