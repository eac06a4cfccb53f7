"""Event files for TensorBoard, made from the records of metrics.jsonl."""

import importlib.util
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmoco.epoch_table import scalars
from medmoco.errors import UserError
from medmoco.output import writing

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def require_tensorboard() -> None:
    """Raises:
    UserError: the package is missing.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "--tensorboard: expected the package tensorboard, which is not installed: "
            "pip install 'medmoco[tensorboard]'"
        )


class EventFiles:
    """Scalars in folders that TensorBoard calls runs: pretrain, and one per segmentation model.

    Models that are compared share their tags (finetune/loss), and so a chart.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writers: dict[str, SummaryWriter] = {}

    def add(self, record: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # the package is optional

        run = run_of(record)
        with writing(self.folder / run):
            if run not in self._writers:
                self._writers[run] = SummaryWriter(str(self.folder / run))
            for name, value in scalars(record).items():
                self._writers[run].add_scalar(f"{record['stage']}/{name}", value, record["step"])

    def rebuild(self, run: str, records: Iterable[dict[str, Any]]) -> None:
        """Makes the files of `run` anew, and those of other runs that have none.

        TensorBoard only adds to its files: what a resumed run repeats would be drawn twice.
        """
        self.close()
        shutil.rmtree(self.folder / run, ignore_errors=True)
        there = {folder.name for folder in self.folder.glob("*")}
        for record in records:
            if run_of(record) not in there:
                self.add(record)
        self.flush()

    def flush(self) -> None:
        with writing(self.folder):
            for writer in self._writers.values():
                writer.flush()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()


def run_of(record: dict[str, Any]) -> str:
    """The folder of a record: its stage and encoder; the diagnostics are part of pretraining."""
    encoder = record.get("encoder")
    return "pretrain" if encoder is None else f"{record['stage']}-{encoder}"
