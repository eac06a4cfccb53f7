"""A request to stop: noticed between two steps, or followed at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType


class Stopped(Exception):
    """The run saved its state and stopped because it was asked to."""


def leave_stopping_to_the_trainer(worker: int) -> None:
    """For the processes of a DataLoader, as its worker_init_fn.

    A scheduler tells every process to stop; without its loaders the trainer could not save.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class StopRequest:
    """Context in which SIGTERM and SIGUSR1 only set `asked`; a second one ends at once."""

    def __init__(self) -> None:
        self.asked = False
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

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise SystemExit(128 + number)
        self.asked = True


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
