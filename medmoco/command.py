"""What the subcommands share: errors for people, and the exit status."""

import sys
from collections.abc import Callable, Sequence

from medmoco.errors import UserError
from medmoco.printing import print_any_name, visible
from medmoco.signals import Stopped


def run_command(
    main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None
) -> int:
    """Runs a command; the exit status: 0 done or stopped as asked, 2 for an error to mend."""
    print_any_name()
    try:
        main(argv)
    except UserError as error:
        print("error: " + visible(error, keep="\n"), file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"{stopped}; --resume goes on from there", file=sys.stderr)
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
