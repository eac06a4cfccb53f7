"""What a build has finished, so that the next one goes on where it was killed."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from medmoco.errors import UserError
from medmoco.json_file import parse_object
from medmoco.output import write_text


@dataclass(frozen=True)
class Converted:
    """One volume that lies in its shard.

    Attributes:
        number: of its source.
        modality: "ct" or "mr".
        checksums: CRC-32 of the images and, for labelled sets, of the labels.
    """

    number: int
    modality: str
    checksums: tuple[int, ...]


class Journal:
    """A file of one line a volume, begun by a line that names what is built.

    Lines are not synced: what a power cut took from the shards, the checksums tell.

    Args:
        path: of the file; made if it is not there.
        plan: a digest; a file of another plan is begun anew.
        volumes: number of the plan's.

    Attributes:
        found: volumes that were finished before, by number.
    """

    def __init__(self, path: Path, plan: str, volumes: int) -> None:
        self._path = path
        self._plan = plan
        self._volumes = volumes
        self.found = self._read()
        self._file: TextIO | None = None

    def __enter__(self) -> "Journal":
        known = [{"plan": self._plan}, *map(asdict, self.found.values())]
        write_text(self._path, "".join(json.dumps(record) + "\n" for record in known))
        self._file = open(self._path, "a", encoding="ascii")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._file is not None
        self._file.close()

    def add(self, volume: Converted) -> None:
        """Call it when the volume's voxels are written."""
        assert self._file is not None
        if self.found.get(volume.number) != volume:
            self._file.write(json.dumps(asdict(volume)) + "\n")
            self._file.flush()

    def _read(self) -> dict[int, Converted]:
        try:
            text = self._path.read_text(encoding="ascii", errors="replace")
        except OSError:
            return {}
        records = [self._record(line) for line in text.splitlines()]
        if not records or records[0] != {"plan": self._plan}:
            return {}
        # A line that was being written, or was damaged, is passed over: its volume is done again.
        found = map(self._converted, filter(None, records[1:]))
        return {volume.number: volume for volume in found if volume}

    def _record(self, line: str) -> dict[str, Any] | None:
        try:
            return parse_object(self._path, line)
        except UserError:
            return None

    def _converted(self, record: dict[str, Any]) -> Converted | None:
        number, modality, checksums = map(record.get, ("number", "modality", "checksums"))
        if type(number) is not int or not 0 <= number < self._volumes:
            return None
        if modality not in ("ct", "mr") or not isinstance(checksums, list):
            return None
        return Converted(number, modality, tuple(checksums))
