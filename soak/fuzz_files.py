"""Files as inputs, and what may stand in a file's place."""

import os
from pathlib import Path
from random import Random


def put(path: Path, content: bytes) -> Path:
    """Writes a file, and its folder if need be."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def link_or_pipe(random: Random, path: Path) -> Path:
    """Seldom puts in the place of a file a link to it, to a device or to nothing, or a FIFO."""
    kind = random.randrange(60)
    if kind == 0:
        path.rename(path.with_name("linked"))
        path.symlink_to("linked")
    elif kind <= 4:
        path.unlink()
        if kind == 1:
            os.mkfifo(path)
        else:
            path.symlink_to(("/dev/zero", path.name, "gone")[kind - 2])
    return path
