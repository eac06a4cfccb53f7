"""JSON that came from somewhere: read within bounds, and refused with the file's name.

Python's own reader takes what is no JSON (NaN, infinite numbers), keeps the last of several entries
of one name without a word, and nests as deep as its stack.
"""

import json
import math
import re
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any

from medmoco.errors import UserError
from medmoco.regular_file import open_regular

MAX_BYTES = 16 << 20  # as objects in memory it can be 60 times as much
MAX_DEPTH = 64
MAX_DIGITS = 300  # of a whole number; float64 ends at 309
_BRACKET = re.compile(r"[\[\]{}]")


def read_json(path: Path, *, nan_is_null: bool = False) -> Any:
    """The content of a JSON file in UTF-8.

    Args:
        path: of the file.
        nan_is_null: take NaN and Infinity, which many programs write, for null.

    Raises:
        UserError: no such file, no JSON, an entry that stands twice in its object, numbers that
            float64 does not hold, or more than `MAX_BYTES` or `MAX_DEPTH`.
    """
    try:
        with open_regular(path) as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError(
                f"{path}: expected a JSON file of {MAX_BYTES:,} bytes at most, got more"
            )
        text = content.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected a readable JSON file: {error}") from None
    return parse_json(path, text, nan_is_null=nan_is_null)


def read_object(path: Path, *, nan_is_null: bool = False) -> dict[str, Any]:
    """As `read_json`; anything but an object at the top is a UserError too."""
    return _object(str(path), read_json(path, nan_is_null=nan_is_null))


def parse_object(
    path: Path, text: str, place: str = "", *, nan_is_null: bool = False
) -> dict[str, Any]:
    """As `read_object`, from a part of a file that `place` names in messages."""
    return _object(f"{path}{place}", parse_json(f"{path}{place}", text, nan_is_null=nan_is_null))


def parse_json(path: Path | str, text: str, *, nan_is_null: bool = False) -> Any:
    """As `read_json`, from text that was read already."""
    try:
        if len(text) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} characters")
        _require_shallow(text)
        return json.loads(
            text,
            object_pairs_hook=_without_repeats,
            parse_int=_whole,
            parse_float=_real,
            parse_constant=(lambda _: None) if nan_is_null else _no_number,
        )
    except ValueError as error:
        raise UserError(f"{path}: expected a readable JSON file: {error}") from None


def _object(path: str, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _require_shallow(text: str) -> None:
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    # Without what is escaped every second part between quotes is a string. A pattern for strings
    # with their escapes would take a hundred bytes for each character of one.
    parts = text.replace("\\\\", "").replace('\\"', "").split('"')
    brackets = _BRACKET.findall("".join(parts[::2]))
    depths = accumulate(1 if bracket in "[{" else -1 for bracket in brackets)
    if max(depths, default=0) > MAX_DEPTH:
        raise ValueError(f"lists and objects nested more than {MAX_DEPTH} deep")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{twice[:80]!r} stands twice in one object")
    return found


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _real(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"a number beyond float64, {digits[:80]}")
    return number


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
