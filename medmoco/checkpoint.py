"""Checkpoints: the full state of a run in one file, written whole or not at all."""

from pathlib import Path
from typing import Any

import torch

from medmoco.errors import UserError
from medmoco.output import save_torch

FORMAT = "medmoco.checkpoint"
VERSION = 1


def save_checkpoint(path: Path, identity: dict[str, Any], state: dict[str, Any]) -> None:
    """Writes `state`; `identity` says of which model and method it is a state."""
    path.parent.mkdir(exist_ok=True)
    save_torch(path, {"format": FORMAT, "version": VERSION, "identity": identity, "state": state})


def load_checkpoint(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The state in a checkpoint, on the CPU. No code from the file runs.

    Raises:
        UserError: the file is damaged or no checkpoint of medmoco, is of another version, or its
            identity (method, architecture, ...) is not `identity`.
    """
    content = load_tensors(path)
    if content.get("format") != FORMAT:
        found = content.get("format", "no format entry")
        raise UserError(f"{path}: expected a checkpoint of format {FORMAT!r}, got {found!r}")
    if content.get("version") != VERSION:
        raise UserError(f"{path}: expected version {VERSION}, got {content.get('version')!r}")
    if not isinstance(content.get("identity"), dict) or not isinstance(content.get("state"), dict):
        raise UserError(f"{path}: expected the entries identity and state, got {sorted(content)}")
    for name, expected in identity.items():
        found = content["identity"].get(name)
        if found != expected:
            raise UserError(
                f"{path}: checkpoint of another run: expected {name} = {expected!r}, got {found!r}"
            )
    return content["state"]


def load_tensors(path: Path) -> dict[str, Any]:
    """A dictionary of tensors and plain values written by torch.save; never runs a pickle's code.

    Raises:
        UserError: the file is missing, damaged, or holds anything else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except Exception as error:  # a damaged stream makes the unpickler raise whatever it meets
        detail = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{path}: expected a file of tensors written by torch.save, cannot read it: {detail[0]}"
        ) from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise UserError(f"{path}: expected a dictionary of tensors, got {kind}")
    return content
