"""The exceptions that are meant for users."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the user can mend: a file, an argument, a combination of options.

    The message is complete: it names the file or argument, what was expected and what came.
    The command line prints it without a traceback and exits with status 2.
    """


class Fault(UserError):
    """Nothing was asked for wrongly, but something failed around a run: a disk that is full, a
    process that was killed. The command line exits with status 1.
    """


@contextmanager
def telling_what_is_kept(kept: Callable[[], str]) -> Iterator[None]:
    """Context of work that --resume goes on with: a fault says what there is to go on from.

    Args:
        kept: is asked when there was a fault.
    """
    try:
        yield
    except Fault as fault:
        raise Fault(f"{fault}; {kept()}") from fault


@contextmanager
def keeping_what_is_finished() -> Iterator[None]:
    """`telling_what_is_kept` of work in stages, each of which leaves whole files."""
    with telling_what_is_kept(lambda: "what is finished is kept, and --resume goes on from there"):
        yield
