"""Names and values that come from files, made safe to show to people."""

import sys
from io import TextIOWrapper

LONGEST = 80  # characters of a value in a message


def visible(value: object, keep: str = "") -> str:
    """Control characters, lone surrogates and direction marks become visible escapes.

    A file name may hold them, and they would break a page or a terminal, or mislead the reader.

    Args:
        value: to be shown.
        keep: characters that stay as they are.
    """
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii")
        for c in str(value)
    )


def brief(value: object) -> str:
    """A value from a file for an error's message, in one line of bounded length.

    Of anything that is not a plain value only the kind: what is inside may be of any size.
    """
    if value is None or isinstance(value, (bool, float)):
        return repr(value)
    if isinstance(value, int):  # Python writes none of more than 4300 digits
        return repr(value) if value.bit_length() < 256 else f"a number of {value.bit_length()} bits"
    if isinstance(value, str):
        return repr(value) if len(value) <= LONGEST else f"{value[:LONGEST]!r}..."
    if isinstance(value, (list, tuple, dict, set)):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__


def say(text: object) -> None:
    """Prints text that holds names from files; lines stay lines."""
    print(visible(text, keep="\n"), flush=True)


def print_any_name() -> None:
    """Lets standard output escape what it has no bytes for, as standard error does anyway."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
