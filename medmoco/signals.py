"""A request to stop, noticed between two steps."""

import signal
from types import FrameType, TracebackType


class Stopped(Exception):
    """The run saved its state and stopped because it was asked to."""


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
