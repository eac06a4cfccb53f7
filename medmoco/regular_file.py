"""Opening what came from somewhere: a regular file, and nothing that would wait or never end."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: Path) -> BinaryIO:
    """Opens a file for reading, through links.

    Raises:
        OSError: it cannot be opened, or is a FIFO, device or socket, of which a read might wait for
            ever or never end.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO opens without a writer
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(handle, "rb")
