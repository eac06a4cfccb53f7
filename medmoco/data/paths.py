"""Paths that a file names: as written, they stay within the folder that the file describes."""

import os
from pathlib import Path

from medmoco.errors import UserError
from medmoco.printing import brief

LONGEST_PATH = 4096  # bytes; of Linux
LONGEST_NAME = 255


def inside(folder: Path, name: str, source: Path) -> Path:
    """The path of a file that need not exist, below `folder` as it is written.

    Symbolic links are followed: data sets link cases, and git-annex and the like link every file.

    Args:
        folder: that the name is relative to.
        name: as it is written.
        source: the file that it is written in, for messages.

    Raises:
        UserError: it is no path of a file, or leads out of the folder, by ".." or as an absolute
            path.
    """
    try:
        written = os.fsencode(name)
    except UnicodeEncodeError:  # a lone surrogate that stands for no byte
        written = b"\0"
    longest = max(map(len, written.split(b"/")))
    if b"\0" in written or len(written) > LONGEST_PATH or longest > LONGEST_NAME:
        raise UserError(f"{source}: expected paths of files, got {brief(name)}")
    path = Path(os.path.normpath(folder / name))
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder)):
        raise UserError(f"{source}: expected paths within the folder, got {brief(name)}")
    return path
