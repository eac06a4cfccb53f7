"""A request to stop: noticed between two steps, or followed at once."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

# timeout(1), torchrun and schedulers tell a process and its group at once: that is one request.
SAME_REQUEST_SECONDS = 1.0


class Stopped(BaseException):
    """The run saved its state and stopped because it was asked to.

    A handler of a signal raises it wherever the program is, so that `except Exception` there, as
    around the reader of a file that may be damaged, must not take it for an error.
    """


def leave_stopping_to_the_trainer(worker: int) -> None:
    """For the processes of a DataLoader, as its worker_init_fn.

    A scheduler tells every process to stop; without its loaders the trainer could not save.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class StopRequest:
    """Context in which SIGTERM and SIGUSR1 only set `asked`; a second request ends at once.

    A request that comes too late to be followed goes on to whoever handled signals before.
    """

    def __init__(self) -> None:
        self.asked = False
        self._asked_at = 0.0
        self._asked_by = 0
        self._previous: dict[int, signal.Handlers] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._notice)  # type: ignore[assignment]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self.asked and kind is None:
            signal.raise_signal(self._asked_by)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if not self.asked:
            self.asked, self._asked_by, self._asked_at = True, number, time.monotonic()
        elif time.monotonic() - self._asked_at > SAME_REQUEST_SECONDS:
            # An exception could be caught, or lost in a destructor.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextmanager
def stopping_at_once(what: str) -> Iterator[None]:
    """Context in which SIGTERM and SIGUSR1 raise Stopped, for work whose files are whole or absent.

    Args:
        what: was stopped, for the message.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(f"stopped {what}")

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
