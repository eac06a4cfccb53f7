"""Checkpoints: the full state of a training in one file, written whole or not at all."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medmoco.distributed import rank
from medmoco.errors import UserError
from medmoco.output import make_folder, save_torch
from medmoco.printing import brief
from medmoco.tensor_file import DamagedFile, load_sealed, require_format

FORMAT = "medmoco.checkpoint"
VERSION = 2
SECONDS = 600.0  # between two checkpoints within an epoch


class AnotherRun(UserError):
    """The checkpoint is whole, but that of another training."""


class Misfit(UserError):
    """The checkpoint is whole, but its state does not fit the training.

    The message lacks the file's name, which `Checkpoints.naming_misfits` adds.
    """


class Checkpoints:
    """The last two checkpoints of a training: `path` and, should it be damaged, the one before.

    A new one is written beside them, and takes the place of the last one after that has become the
    one before: whatever moment the machine stops at, one of the two is whole.

    Args:
        path: of the last one, FOLDER/NAME.pt; the one before is FOLDER/NAME.previous.pt.
        identity: see `save_checkpoint`.

    Attributes:
        written: checkpoints, by this process.
        seconds: that it took.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.previous = path.with_name(f"{path.stem}.previous{path.suffix}")
        self.identity = identity
        self._last_is_damaged = False
        self._loaded = path
        self.written, self.seconds = 0, 0.0

    def newest(self) -> Path | None:
        """The file that was written last; None where none was."""
        return next((path for path in (self.path, self.previous) if path.is_file()), None)

    def exist(self) -> bool:
        return self.newest() is not None

    def save(self, state: dict[str, Any]) -> None:
        started = time.perf_counter()
        # A damaged file must not take the place of the whole one before it.
        previous = None if self._last_is_damaged else self.previous
        save_checkpoint(self.path, self.identity, state, previous)
        self._last_is_damaged = False
        self.written += 1
        self.seconds += time.perf_counter() - started

    def load(self) -> dict[str, Any] | None:
        """The last state that is whole, None where none was saved yet.

        Which file is damaged, and which one it is instead, is told on stderr.

        Raises:
            AnotherRun: the identity is another one.
            UserError: no file is whole, or one cannot be read.
        """
        damages: list[str] = []
        for path in (self.path, self.previous):
            if not path.is_file():
                continue
            try:
                state = load_checkpoint(path, self.identity)
            except DamagedFile as damage:
                damages.append(str(damage))
                continue
            if damages:
                self._last_is_damaged = True
            if damages and rank() == 0:  # all ranks find the same
                print(f"warning: {damages[0]}\ngoing on from {path}", file=sys.stderr)
            self._loaded = path
            return state
        if damages:
            raise UserError("\n".join([*damages, "no checkpoint is left to go on from"]))
        return None

    @contextmanager
    def naming_misfits(self) -> Iterator[None]:
        """Context in which a training takes the state that `load` gave.

        A state that does not fit is no damage by a kill or a disk: the checkpoint before it, which
        may come from the same hands, is not gone on from instead.

        Raises:
            UserError: instead of a `Misfit`, with the name of the file.
        """
        try:
            yield
        except Misfit as misfit:
            raise UserError(
                f"{self._loaded}: whole, but no state of this run: {misfit}"
            ) from misfit

    def remove(self) -> None:
        """Deletes what a training that is over needs no more."""
        for path in (self.path, self.previous):
            path.unlink(missing_ok=True)

    def cost(self, seconds: float) -> str:
        """What this process has written, in words.

        Args:
            seconds: that the training took in this process, checkpoints included.
        """
        size = self.path.stat().st_size / 1e6 if self.path.is_file() else 0.0
        return (
            f"{self.written} checkpoints of {size:.1f} MB in {self.seconds:.2f} s, "
            f"{self.seconds / seconds:.1%} of the training"
        )


def save_checkpoint(
    path: Path, identity: dict[str, Any], state: dict[str, Any], previous: Path | None = None
) -> None:
    """Writes `state`; `identity` says of which model and method it is a state.

    Args:
        path: of the file; its folder is made if need be.
        identity: what has to be the same where the state is loaded.
        state: tensors and plain values.
        previous: where the file goes that is at `path` now; None to replace it.
    """
    make_folder(path.parent)
    content = {"format": FORMAT, "version": VERSION, "identity": identity, "state": state}
    save_torch(path, content, previous)


def load_checkpoint(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The state in a checkpoint, on the CPU. No code from the file runs.

    Raises:
        DamagedFile: a bit of it changed, or it is cut off.
        AnotherRun: its identity (method, architecture, ...) is not `identity`.
        UserError: the file is no checkpoint of medmoco, or is of another version.
    """
    content, sealed = load_sealed(path)
    require_format(path, content, "a checkpoint", FORMAT, VERSION)
    if not sealed:
        raise DamagedFile(f"{path}: expected a checkpoint that ends with its checksum, got none")
    if not isinstance(content.get("identity"), dict) or not isinstance(content.get("state"), dict):
        names = ", ".join(map(brief, content))
        raise UserError(f"{path}: expected the objects identity and state, got {names[:200]}")
    for name, expected in identity.items():
        found = content["identity"].get(name)
        if type(found) is not type(expected) or found != expected:
            raise AnotherRun(
                f"{path}: checkpoint of another run: expected {name} = {expected!r}, "
                f"got {brief(found)}"
            )
    return content["state"]
