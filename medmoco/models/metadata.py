"""Entries of our files besides the weights: each of its type and range, or refused by name."""

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from medmoco.data.nifti import MAX_SPACING
from medmoco.errors import UserError
from medmoco.printing import brief

MAX_CANVAS = 2**14  # pixels a side


def require_entries(content: Mapping[str, Any], names: Collection[str]) -> None:
    """Checks the entries of these names, of which some may be missing.

    Raises:
        UserError: names the first that is not as `EXPECTED` describes it.
    """
    for name in names:
        holds, words = EXPECTED[name]
        if name in content and not holds(content[name]):
            raise UserError(f"{name} must be {words}, got {brief(content[name])}")


def pack_names(names: Sequence[str]) -> Tensor:
    """(bytes,) uint8: a JSON list. As a list of Python's the names of many patients would make
    a pickle longer than `medmoco.tensor_file` reads."""
    return torch.frombuffer(bytearray(json.dumps(list(names)).encode("ascii")), dtype=torch.uint8)


def unpack_names(value: Any) -> Any:
    """What `pack_names` was given. What is no tensor comes back as it is: older files have lists.

    Raises:
        ValueError, RecursionError: the tensor holds no JSON.
    """
    return json.loads(bytes(value.numpy())) if isinstance(value, Tensor) else value


def _is_whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _is_real(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9  # False for NaN


def _is_window(value: Any) -> bool:
    pair = isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_real, value))
    return pair and value[0] < value[1]


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(type(name) is str for name in value)


# What an entry is, and how a message says so.
EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "arch": (lambda v: type(v) is str, "a name"),
    "width": (_is_real, "a number"),
    "output_stride": (lambda v: _is_whole(v, 1, 64), "a whole number of pixels"),
    "in_channels": (lambda v: _is_whole(v, 1, 2**16), "a whole number from 1 to 65536"),
    "decoder": (lambda v: type(v) is str, "a name"),
    "whitening_group": (lambda v: v is None or _is_whole(v, 1, 2**16), "a number of channels"),
    "method": (lambda v: v is None or type(v) is str, "a name"),
    "image_size": (
        lambda v: _is_whole(v, 1, MAX_CANVAS),
        f"a whole number of pixels from 1 to {MAX_CANVAS}",
    ),
    "spacing": (
        lambda v: _is_real(v) and math.ulp(0) < v <= MAX_SPACING,
        f"a number of mm above 0 and up to {MAX_SPACING:g}",
    ),
    "modality": (lambda v: v in ("ct", "mr") if type(v) is str else False, "ct or mr"),
    "window": (_is_window, "two rising numbers of HU"),
    "slice_axis": (lambda v: _is_whole(v, 0, 2), "0, 1 or 2"),
    "channel": (lambda v: _is_whole(v, 0, 2**31), "a whole number of at least 0"),
    "patients": (_are_names, "a list of names"),
}
