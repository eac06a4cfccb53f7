"""Everything that is written to disk goes through here: whole files or none."""

import glob
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from medmoco.errors import Fault, UserError
from medmoco.json_file import read_object
from medmoco.seal import seal

CONFIG_NAME = "config.json"


class WriteError(Fault, OSError):
    """A file or folder that cannot be written, `strerror` says why.

    What was there before is whole.
    """

    def __init__(self, path: Path, cause: OSError):
        super().__init__(cause.errno, cause.strerror or str(cause), str(path))

    def __str__(self) -> str:
        return f"{self.filename}: cannot be written: {self.strerror}"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Context in which an OSError becomes the WriteError of `path`: a full disk names no file."""
    try:
        yield
    except OSError as error:
        raise WriteError(path, error) from error


def make_folder(path: Path) -> None:
    """Makes a folder and its parents if need be.

    Raises:
        WriteError: it cannot be made.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def check_output(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Says why a folder cannot take a run's output; touches nothing.

    Raises:
        UserError: the folder holds files and neither `resume` nor `overwrite` is set, `overwrite`
            would delete a folder that is not a run, `resume` finds nothing to resume, or the folder
            cannot be read.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: expected a folder, got a file")
    try:
        occupied = folder.is_dir() and any(
            not _is_leftover(path, CONFIG_NAME) for path in folder.iterdir()
        )
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be read: {error.strerror}") from error
    is_run = _is_run(folder)
    if resume and not is_run:
        raise UserError(
            f"--resume: {folder} holds no {CONFIG_NAME} of medmoco, so there is no run to resume"
        )
    if occupied and overwrite and not is_run:
        raise UserError(
            f"--overwrite: {folder} is not empty and holds no {CONFIG_NAME} of medmoco, "
            "so it is not a run; choose another --output"
        )
    if occupied and not (resume or overwrite):
        raise UserError(
            f"--output {folder}: the folder is not empty; "
            "add --resume to go on with it, --overwrite to delete it, or choose another one"
        )


def prepare_output(folder: Path, *, resume: bool, overwrite: bool) -> Path:
    """Creates the output folder of a run, emptied if `overwrite`.

    What a process that was killed has left of writing files in it is deleted.

    Raises:
        UserError: as `check_output`, or the folder cannot be made.
    """
    folder = Path(folder)
    check_output(folder, resume=resume, overwrite=overwrite)
    try:
        if overwrite and not resume and folder.is_dir():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.rglob(".*"):
            if _is_leftover(path):
                path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be made: {error.strerror or error}") from error
    return folder


def _is_run(folder: Path) -> bool:
    """Many programs write a config.json; what they lie beside must not be deleted as a run."""
    try:
        return "medmoco" in read_object(folder / CONFIG_NAME)
    except UserError:
        return False


@contextmanager
def atomic_file(path: Path, previous: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write to that appears whole or not at all, even if the machine stops.

    Until the end of the context it is a hidden one beside `path`. The file whose place it takes
    becomes `previous`, in the same folder, if that is given.

    Raises:
        WriteError: the disk is full, the folder read-only or away, ...; `path` is as it was.
    """
    with writing(path), _renamed_when_whole(Path(path), previous) as file:
        yield file


@contextmanager
def _renamed_when_whole(path: Path, previous: Path | None) -> Iterator[BinaryIO]:
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp gives 0600, too narrow for shared folders
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Returns when what was made or renamed in a folder would survive a power cut."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def remove_leftovers(path: Path) -> None:
    """Deletes what a process that was killed has left of writing `path`."""
    for found in path.parent.glob(f".{glob.escape(path.name)}.*"):
        if _is_leftover(found, path.name):
            found.unlink(missing_ok=True)


def _is_leftover(path: Path, name: str | None = None) -> bool:
    """Whether this is a temporary file of `atomic_file`, for a file of this or of any name."""
    of = ".+" if name is None else re.escape(name)
    return re.fullmatch(rf"\.{of}\.[a-z0-9_]{{8}}", path.name) is not None and path.is_file()


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """Writes a file that appears whole or not at all, even if the machine stops."""
    with atomic_file(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    write_bytes_atomic(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def save_torch(path: Path, value: Any, previous: Path | None = None) -> None:
    """torch.save through memory, with a checksum, so that the file is whole or absent.

    Args:
        path: of the file.
        value: what torch.load is to give back.
        previous: where the file goes that is at `path` now; None to replace it.
    """
    buffer = io.BytesIO()
    torch.save(value, buffer)
    archive = bytearray(buffer.getbuffer())
    seal(archive)
    with atomic_file(path, previous) as file:
        file.write(archive)


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Appends one JSON object as one line, in one write."""
    line = json.dumps(record, allow_nan=False) + "\n"
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(line)
