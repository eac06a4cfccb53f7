"""What the subcommands share: errors for people, and the exit status."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence

from medmoco.distributed import LostRank, await_launcher, launch, record_failure
from medmoco.errors import Fault, UserError
from medmoco.printing import print_any_name, visible
from medmoco.signals import Stopped


def run_command(
    main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None
) -> int:
    """Runs a command; the exit status.

    0 done or stopped as asked, 1 for a fault in the middle of a run, 2 for an error to mend.
    Of several ranks the first one speaks on standard output; errors are told by whom they meet.
    """
    print_any_name()
    try:
        with _first_rank_speaks():
            main(argv)
    except UserError as error:
        print("error: " + visible(error, keep="\n"), file=sys.stderr)
        record_failure(error)
        return 1 if isinstance(error, Fault) else 2
    except Stopped as stopped:
        if launch().rank == 0:
            print(f"{stopped}; --resume goes on from there", file=sys.stderr)
        return 0
    except LostRank as lost:
        print(
            f"error: {lost}; what ended the first of them counts, an error or a signal to it alone",
            file=sys.stderr,
        )
        await_launcher()
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        record_failure(error)
        raise
    return 0


@contextlib.contextmanager
def _first_rank_speaks() -> Iterator[None]:
    if launch().rank == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
