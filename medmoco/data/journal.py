"""What a build has finished, so that the next one goes on where it was killed."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TextIO

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

    Attributes:
        found: volumes that were finished before, by number.
    """

    def __init__(self, path: Path, plan: str) -> None:
        self._path = path
        self._plan = plan
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
            first, *lines = self._path.read_text(encoding="ascii").splitlines()
            if json.loads(first) != {"plan": self._plan}:
                return {}
        except (OSError, ValueError):
            return {}
        found = {}
        for line in lines:
            try:
                record = json.loads(line)
                volume = Converted(record["number"], record["modality"], tuple(record["checksums"]))
            except (ValueError, KeyError, TypeError):
                break  # the line that was being written
            found[volume.number] = volume
        return found
