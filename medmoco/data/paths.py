"""Paths that a file names: they stay within the folder that the file describes."""

import os
from pathlib import Path

from medmoco.errors import UserError
from medmoco.printing import brief

LONGEST_PATH = 4096  # bytes; of Linux
LONGEST_NAME = 255


def inside(folder: Path, name: str, source: Path) -> Path:
    """The path of a file that need not exist, below `folder` whatever its name and its links.

    Args:
        folder: that the name is relative to.
        name: as it is written.
        source: the file that it is written in, for messages.

    Raises:
        UserError: it is no path of a file, or leads out of the folder, by "..", as an absolute path
            or through a symbolic link.
    """
    try:
        written = os.fsencode(name)
    except UnicodeEncodeError:  # a lone surrogate that stands for no byte
        written = b"\0"
    longest = max(map(len, written.split(b"/")))
    if b"\0" in written or len(written) > LONGEST_PATH or longest > LONGEST_NAME:
        raise UserError(f"{source}: expected paths of files, got {brief(name)}")
    path = Path(os.path.normpath(folder / name))
    if not path.is_relative_to(os.path.normpath(folder)):
        raise UserError(f"{source}: expected paths within the folder, got {brief(name)}")
    # A data set from elsewhere may bring links, to be read or shown by name in a report.
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise UserError(
            f"{source}: expected paths within the folder, got {brief(name)}, a symbolic link "
            "out of it; link the whole folder instead, or copy the file"
        )
    return path
