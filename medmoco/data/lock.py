"""One process builds, the others wait."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medmoco.printing import say


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Holds an exclusive lock on a file; the system releases it if the process dies.

    Args:
        path: of the lock file, which stays: to delete it would be a race.
        what: the thing that is being built, for the message to whoever waits.
    """
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{what}: another process is building it, waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
