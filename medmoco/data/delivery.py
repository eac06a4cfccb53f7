"""What a loader delivers, and what is told of a loader that breaks off."""

import atexit
import multiprocessing
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.process import BaseProcess
from typing import TypeVar

from torch.utils.data import DataLoader

from medmoco.errors import Fault, UserError

Batch = TypeVar("Batch")
OF_A_DEAD_PROCESS = re.compile(r"DataLoader worker \(pid|Pin memory thread exited")  # of PyTorch
_workers: set[BaseProcess] = set()  # those of all loaders that live


class LoaderDied(Fault):
    """No more batches come: a worker was killed, or the slices cannot be read any more."""


def delivered(
    loader: Iterable[Batch], at_break: Callable[[], object] | None = None
) -> Iterator[Batch]:
    """The batches of a loader.

    Args:
        loader: gives the batches.
        at_break: saves what is made of the batches so far, before LoaderDied is raised.

    Raises:
        LoaderDied: between two batches, never in the middle of what is made of one, so that the
            state of a training is whole.
    """
    try:
        others = set(multiprocessing.active_children())
        batches = iter(loader)
        if isinstance(loader, DataLoader) and loader.num_workers:
            _workers.intersection_update(others)  # not those that ended before
            _workers.update(set(multiprocessing.active_children()) - others)
            _leave_deaths_to_the_loader()
        yield from batches
    except (OSError, RuntimeError, UserError) as error:
        if not isinstance(error, RuntimeError):
            what = f"slices cannot be read any more: {_reason(error)}"
        elif OF_A_DEAD_PROCESS.match(str(error)):
            what = (
                f"a process that reads slices {_end()}; it may have been for want of memory "
                "or of room in /dev/shm, where fewer --workers help"
            )
        else:
            raise
        if at_break is not None:
            at_break()
        raise LoaderDied(what) from error


def _leave_deaths_to_the_loader() -> None:
    """PyTorch's handler of SIGCHLD would raise wherever the trainer is when a worker dies, a step
    included. Without it the loader finds out when it has waited 5 s for a batch.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _reason(error: Exception) -> str:
    """A line; what was raised in a worker comes with its traceback, and ends with the message."""
    last = (str(error).splitlines() or [type(error).__name__])[-1]
    return re.sub(r"^[\w.]*Error: ", "", last)


@atexit.register
def _kill_workers() -> None:
    """Python asks its children to end as it exits, by SIGTERM, and waits for them: forever, for
    that signal they leave to the trainer.
    """
    for worker in _workers:
        if worker.is_alive():
            worker.kill()


def _end() -> str:
    codes = [worker.exitcode for worker in _workers if worker.exitcode]
    if not codes:
        return "ended"
    return f"was killed by {signal.Signals(-codes[0]).name}" if codes[0] < 0 else (
        f"ended with exit status {codes[0]}"
    )  # fmt: skip
