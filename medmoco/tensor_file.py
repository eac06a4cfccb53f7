"""Files of torch.save, read within bounds: no code runs, and nothing is larger than the file.

What torch.load leaves open is checked here: archives that inflate, long pickles, and tensors whose
shape claims more than the file holds.
"""

import errno
import warnings
import zipfile
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from medmoco.errors import UserError
from medmoco.printing import brief
from medmoco.seal import SealBroken, check_seal

MAX_PICKLE = 4 << 20  # bytes of the archive's part that is no tensor: names and numbers
# Tensors may share memory, as tied weights do: together they may be so many times the file.
MAX_SHARING = 4
NO_MEMORY = "DefaultCPUAllocator"  # begins what PyTorch's RuntimeError says of it
ZIP_START, PICKLE_START = b"PK\x03\x04", b"\x80"


class DamagedFile(UserError):
    """The file is not what was written."""


def load_tensors(path: Path) -> dict[str, Any]:
    """A dictionary of tensors and plain values written by torch.save; never runs a pickle's code.

    Returns:
        What was saved, on the CPU; every tensor is an ordinary dense one.

    Raises:
        DamagedFile: the file is damaged: it has a checksum that does not fit, or cannot be read.
        UserError: the file is missing, cannot be read at the moment, or holds anything else.
    """
    return load_sealed(path)[0]


def load_sealed(path: Path) -> tuple[dict[str, Any], bool]:
    """As `load_tensors`, and whether the file has a checksum, which then fits."""
    try:
        with open(path, "rb") as file:
            sealed = check_seal(file)
            size = file.seek(0, 2)
            _check_archive(file, size)
            file.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, of what is refused below
                content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except SealBroken as error:
        raise DamagedFile(f"{path}: damaged: {error}") from error
    except Exception as error:  # a damaged stream makes the unpickler raise whatever it meets
        reason = _trouble_of_the_moment(error)
        if reason is not None:  # no damage: the file may be whole, and the one before no better
            raise UserError(f"{path}: cannot be read: {reason}") from error
        detail = str(error).strip().splitlines() or [type(error).__name__]
        raise DamagedFile(
            f"{path}: expected a file of tensors written by torch.save, cannot read it: "
            f"{detail[0][:200]}"
        ) from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise UserError(f"{path}: expected a dictionary of tensors, got {kind}")
    _require_ordinary(path, content, size)
    return content, sealed


def _trouble_of_the_moment(error: Exception) -> str | None:
    """Why a file cannot be read that may be whole; None where the error is that of its content."""
    if isinstance(error, MemoryError) or NO_MEMORY in str(error):
        return "not enough memory"
    # A damaged archive sends its reader to places before the file's beginning: EINVAL.
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        return error.strerror
    return None


def require_format(path: Path, content: dict[str, Any], what: str, name: str, version: int) -> None:
    """Checks the entries "format" and "version" that files of ours have.

    Raises:
        UserError: it is another kind of file, or of a version that is not read here.
    """
    found = content.get("format", "no format entry")
    if not isinstance(found, str) or found != name:
        raise UserError(f"{path}: expected {what} of format {name!r}, got {brief(found)}")
    found = content.get("version")
    if type(found) is not int or found != version:
        raise UserError(
            f"{path}: expected version {version} of {what}, got {brief(found)}; "
            "read it with the medmoco that wrote it"
        )


def _check_archive(file: BinaryIO, size: int) -> None:
    """torch.save compresses nothing, so that an archive holds no more than its own bytes."""
    file.seek(0)
    start = file.read(len(ZIP_START))
    if start.startswith(PICKLE_START):
        return  # the format before torch 1.6, which reads no more than there is
    if start != ZIP_START:
        raise ValueError(f"it starts with {start!r}")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("its parts are compressed")
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError("its parts claim to be larger than the file")
    if any(e.file_size > MAX_PICKLE for e in entries if e.filename.endswith("/data.pkl")):
        raise ValueError(f"more than {MAX_PICKLE:,} bytes of names and numbers")


def _require_ordinary(path: Path, content: dict[str, Any], size: int) -> None:
    """Refuses tensors that are not dense and on the CPU, or are larger than their file.

    A list that holds itself, or twice each of its parts, is passed once.
    """
    waiting: list[Any] = [content]
    seen: set[int] = set()
    total = 0
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            ordinary = value.layout == torch.strided and value.device.type == "cpu"
            if not ordinary or value.is_quantized or value.is_nested:
                raise UserError(f"{path}: expected dense tensors on the CPU, got {_kind(value)}")
            total += prod(value.shape) * value.element_size()
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple, set)):
            waiting += value
    if total > MAX_SHARING * size:
        raise UserError(
            f"{path}: expected tensors no larger than the file of {size:,} bytes, got {total:,}"
        )


def _kind(tensor: Tensor) -> str:
    name = "quantised" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
    return f"a {name} one on {tensor.device.type}"
