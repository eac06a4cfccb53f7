"""Scores predicted label maps against the true ones: Dice, IoU, HD95, NSD, surface distance."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import medmoco
from medmoco.command import run_command
from medmoco.config import option, parse
from medmoco.data.pairs import described_classes, find_truth, match, some
from medmoco.data.task import read_classes
from medmoco.data.volumes import find_volumes
from medmoco.errors import UserError
from medmoco.output import CONFIG_NAME, write_json, write_text
from medmoco.printing import say
from medmoco.score_tables import class_table, csv_text, summarise, worst_table
from medmoco.scores import CaseScores, score_pairs

SUMMARY_NAME, CSV_NAME = "summary.json", "metrics.csv"
MAX_WORKERS = 8  # each holds two volumes


@dataclass(frozen=True)
class EvaluateConfig:
    """Flags of the evaluation."""

    pred: Path | None = option(None, "folder of predicted label maps")
    truth: Path | None = option(
        None, "folder of true label maps with the same names, or a labelled data set"
    )
    output: Path | None = option(
        None,
        "folder for summary.json and metrics.csv; default beside --pred, its name with -evaluation "
        "(nnU-Net's own place is --pred itself)",
    )
    labels: str | None = option(
        None,
        "dataset.json, or the names of the values 1, 2, ... with commas between them; default: the "
        "dataset.json in or above --truth or in --pred, else every value is a class",
    )
    tolerance: float = option(
        2.0, "of the NSD in mm: how far two observers lie apart; set it for the organ", least=0
    )
    resample: bool = option(
        False, "bring predictions from other grids onto the truth's (nearest neighbour)"
    )
    only_common: bool = option(
        False, "leave out predictions without truth and the reverse; they are listed"
    )
    workers: int | None = option(None, "cases at a time; default: cores, 8 at most", least=1)
    overwrite: bool = option(False, "replace the summary.json and metrics.csv in --output")


def choose_output(config: EvaluateConfig) -> Path:
    """--output, or a folder beside --pred: the folder of predictions stays as it was.

    Raises:
        UserError: the folder holds earlier results, or a run, or is a file.
    """
    assert config.pred is not None
    folder = config.output
    if folder is None:
        pred = config.pred.resolve() if config.pred.name in ("", "..") else config.pred
        folder = pred.with_name(f"{pred.name}-evaluation")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: expected a folder, got a file")
    if (folder / CONFIG_NAME).is_file():
        raise UserError(f"--output {folder}: expected a folder of its own, got that of a run")
    for name in (SUMMARY_NAME, CSV_NAME):
        if (folder / name).exists() and not config.overwrite:
            raise UserError(
                f"--output {folder}: {name} is there already; "
                "add --overwrite to replace it, or choose another folder"
            )
    return folder


def label_names(labels: str) -> dict[int, str]:
    """Value to name of --labels, background included.

    Raises:
        UserError: no readable dataset.json, or an empty or repeated name.
    """
    if labels.endswith(".json"):
        names, values = read_classes(Path(labels))
        return dict(zip(values, names, strict=True))
    listed = ["background", *(name.strip() for name in labels.split(","))]
    if "" in listed or len(set(listed)) < len(listed):
        raise UserError(
            f"--labels {labels!r}: expected a dataset.json or different names with commas between"
        )
    return dict(enumerate(listed))


def occurring(cases: Sequence[CaseScores]) -> dict[int, str]:
    """Value to name of the classes that any file holds, where nothing names them."""
    return {value: f"label {value}" for value in sorted({v for c in cases for v in c.by_value})}


def main(argv: Sequence[str] | None = None) -> None:
    """The command `medmoco evaluate`."""
    config = parse(EvaluateConfig, argv, prog="medmoco evaluate", description=__doc__)
    if config.pred is None or config.truth is None:
        raise UserError("expected --pred and --truth, the folders of label maps")
    output = choose_output(config)
    predictions = find_volumes(config.pred)
    truths, names = find_truth(config.truth)
    names = label_names(config.labels) if config.labels else names or described_classes(config.pred)
    matched = match(predictions, truths, config.only_common)
    if matched.left_out:
        names_left_out = some(str(path) for path in matched.left_out)
        say(f"warning: left out, without a counterpart: {names_left_out}")
    cases = score_pairs(
        matched.pairs,
        list(names) if names else None,
        tolerance=config.tolerance,
        resample=config.resample,
        workers=config.workers or min(MAX_WORKERS, os.cpu_count() or 1),
    )
    names = names or occurring(cases)
    classes = {value: name for value, name in names.items() if value}
    if not classes:
        raise UserError(f"{config.truth}: expected label maps with a class besides 0, got none")
    resampled = [case.pair.case for case in cases if case.resampled]
    if resampled:
        say(f"warning: resampled onto the truth's grid: {some(resampled)}")
    summary = summarise(cases, classes)
    summary["medmoco"] |= {
        "version": medmoco.__version__,
        "tolerance_mm": config.tolerance,
        "resampled": resampled,
        "left_out": [str(path) for path in matched.left_out],
    }
    write_results(output, summary, csv_text(cases, classes))
    say(f"\n{len(cases)} cases\n{class_table(summary, config.tolerance)}")
    say(f"\nworst cases\n{worst_table(cases, classes)}")
    say(f"\nsummary:  {output / SUMMARY_NAME}\neach row: {output / CSV_NAME}")
    say(f"next:     {next_command(config.pred, output)}")


def next_command(pred: Path, output: Path) -> str:
    """The report of the run that the predictions lie in, else a look at the rows."""
    for folder in pred.resolve().parents:
        if (folder / CONFIG_NAME).is_file():
            return f"python -m medmoco.report {shlex.quote(str(folder))}"
    return f"column -s, -t < {shlex.quote(str(output / CSV_NAME))} | less -S"


def write_results(output: Path, summary: dict[str, Any], table: str) -> None:
    """Writes both files.

    Raises:
        UserError: their folder cannot be made.
        Fault: they cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--output {output}: cannot be written: {reason}") from error
    write_text(output / CSV_NAME, table)
    write_json(output / SUMMARY_NAME, summary)


if __name__ == "__main__":
    sys.exit(run_command(main))
