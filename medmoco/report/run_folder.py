"""Reads what a run has left in its folder, finished or not."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmoco.errors import UserError
from medmoco.json_file import parse_object, read_object
from medmoco.output import CONFIG_NAME

SUMMARY_NAME = "summary.json"
METRICS_NAME = "metrics.jsonl"
# Where in predictions/ the label maps of a model lie, by what it is called in tables.
MODEL_FOLDERS = {
    "linear": "linear-pretrained",
    "frozen random": "linear-random",
    "fine-tuned": "finetune-pretrained",
    "from scratch": "finetune-scratch",
}

Record = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """Dice of one segmentation model on the test volumes, in [0, 1]; None where undefined."""

    mean: float | None
    per_class: dict[str, float | None]
    per_volume: dict[str, dict[str, float | None]]
    pooled: dict[str, float | None]
    absent: dict[str, float | None]
    seconds: float | None


@dataclass(frozen=True, eq=False)
class Run:
    """A run folder's content; parts that the run has not written are empty or None."""

    folder: Path
    config: Record
    summary: Record | None
    pretrain: list[Record]
    diagnostics: list[Record]
    segmentation: list[Record]
    linear: Result | None
    linear_random: Result | None
    finetune: Result | None
    finetune_scratch: Result | None
    bad_files: list[tuple[str, str]]
    truncated: bool

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def method(self) -> str:
        value = (self.summary or {}).get("method") or self.config.get("method")
        return str(value) if value is not None else "no pretraining"

    @property
    def classes(self) -> list[str]:
        return [str(name) for name in (self.summary or {}).get("classes") or []]

    @property
    def results(self) -> dict[str, Result]:
        """The results that exist, by what they are called in tables."""
        results = (self.linear, self.linear_random, self.finetune, self.finetune_scratch)
        named = zip(MODEL_FOLDERS, results, strict=True)
        return {name: result for name, result in named if result is not None}


def finite(value: object) -> float | None:
    """The value as a float, or None if it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:  # JSON knows integers of any length
        return None
    return number if math.isfinite(number) else None


def part_of(record: Record, key: str) -> Record:
    """A nested object of a record, empty if the record has none."""
    value = record.get(key)
    return value if isinstance(value, dict) else {}


def read_run(folder: Path) -> Run:
    """Reads a run folder.

    Raises:
        UserError: the folder is no run, or one of its files is broken. A last line of
            metrics.jsonl that a stopped run has left unfinished is passed over.
    """
    folder = Path(folder)
    if not (folder / CONFIG_NAME).is_file():
        raise UserError(f"{folder}: expected the folder of a run, got one without {CONFIG_NAME}")
    config = read_object(folder / CONFIG_NAME, nan_is_null=True)
    summary_path = folder / SUMMARY_NAME
    summary = read_object(summary_path, nan_is_null=True) if summary_path.is_file() else None
    records, truncated = _read_metrics(folder / METRICS_NAME)
    content = summary or {}
    controls = _member(summary_path, content, "controls", dict)
    for key, kind in (("classes", list), ("effective_rank", dict), ("warnings", list)):
        _member(summary_path, content, key, kind)
    return Run(
        folder=folder,
        config=config,
        summary=summary,
        pretrain=_of_stage(records, "pretrain"),
        diagnostics=_of_stage(records, "diagnostics"),
        segmentation=_of_stage(records, "linear") + _of_stage(records, "finetune"),
        linear=_read_result(summary_path, content, "linear"),
        linear_random=_read_result(summary_path, controls, "linear_random"),
        finetune=_read_result(summary_path, content, "finetune"),
        finetune_scratch=_read_result(summary_path, controls, "finetune_scratch"),
        bad_files=_read_bad_files(summary_path, content),
        truncated=truncated,
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected a readable text file: {error}") from error


def _read_metrics(path: Path) -> tuple[list[Record], bool]:
    """The records in the order of their first writing, and whether the last line was unfinished.

    A run that was killed and resumed repeats the steps after its last checkpoint; the later record
    of a step replaces the earlier one.
    """
    if not path.is_file():
        return [], False
    *lines, rest = _read_text(path).split("\n")
    records: dict[tuple[Any, ...], Record] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            record = parse_object(path, line, f", line {number}", nan_is_null=True)
            identity = tuple(str(record.get(k)) for k in ("stage", "encoder", "epoch", "step"))
            records[identity] = record
    return list(records.values()), bool(rest.strip())


def _of_stage(records: list[Record], stage: str) -> list[Record]:
    return [r for r in records if r.get("stage") == stage and finite(r.get("epoch")) is not None]


def _member(path: Path, record: Record, key: str, kind: type) -> Any:
    """record[key], empty if absent or null."""
    value = record.get(key)
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise UserError(f"{path}: {key} must be a {kind.__name__}, got {type(value).__name__}")
    return value


def _numbers(values: Record) -> dict[str, float | None]:
    return {str(key): finite(value) for key, value in values.items()}


def _read_result(path: Path, record: Record, key: str) -> Result | None:
    if record.get(key) is None:
        return None
    result = _member(path, record, key, dict)
    volumes = _member(path, result, "dice_per_volume", dict)
    return Result(
        mean=finite(result.get("dice_mean")),
        per_class=_numbers(_member(path, result, "dice_per_class", dict)),
        per_volume={str(case): _numbers(_member(path, volumes, case, dict)) for case in volumes},
        pooled=_numbers(_member(path, result, "dice_pooled", dict)),
        absent=_numbers(_member(path, result, "absent", dict)),
        seconds=finite(result.get("seconds")),
    )


def _read_bad_files(path: Path, summary: Record) -> list[tuple[str, str]]:
    files = []
    for entry in _member(path, summary, "bad_files", list):
        if not isinstance(entry, dict):
            raise UserError(f"{path}: bad_files must hold objects, got {type(entry).__name__}")
        files.append(
            (str(entry.get("path", "unnamed")), str(entry.get("reason", "no reason given")))
        )
    return files
