"""Scores of a set of cases: nnU-Net's summary.json, a CSV row a case and class, text."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from medmoco.printing import visible
from medmoco.scores import CaseScores, ClassScores

SCORES = ("Dice", "IoU", "HD95", "NSD", "ASSD")
COUNTS = ("TP", "FP", "FN", "TN", "n_pred", "n_ref")
OUTCOMES = ("found", "missed", "invented", "absent")
WORST = 5  # cases in the text

Names = dict[int, str]  # value to name, without the background


def entries(scores: ClassScores) -> dict[str, float | int | None]:
    """The scores under nnU-Net's names, ours behind them; None where both masks are empty."""
    both, n_pred, n_ref = scores.n_both, scores.n_pred, scores.n_ref
    values = (scores.dice, scores.iou, scores.hd95, scores.nsd, scores.assd)
    counts = (both, n_pred - both, n_ref - both, scores.n_voxels - n_pred - n_ref + both)
    return dict(zip(SCORES + COUNTS, (*values, *counts, n_pred, n_ref), strict=True))


def summarise(cases: Sequence[CaseScores], names: Names) -> dict[str, Any]:
    """The content of summary.json, in the form of nnU-Net v2 [1].

    nnU-Net's keys hold what they hold there: foreground_mean, the mean over the classes of "mean";
    mean, of each label over the cases that have a value; metric_per_case. Where nnU-Net writes NaN,
    which is no JSON, stands null; a class without any value is left out of foreground_mean. HD95,
    NSD, ASSD and all that is under "medmoco" are ours.

    [1] nnunetv2/evaluation/evaluate_predictions.py, compute_metrics_on_folder.
    """
    per_case = [{value: entries(case.of(value)) for value in names} for case in cases]
    means = {
        value: {name: mean(row[value][name] for row in per_case) for name in SCORES + COUNTS}
        for value in names
    }
    return {
        "foreground_mean": {
            name: mean(row[name] for row in means.values()) for name in SCORES + COUNTS
        },
        "mean": {str(value): row for value, row in means.items()},
        "metric_per_case": [
            {
                "metrics": {str(value): scores for value, scores in row.items()},
                "prediction_file": str(case.pair.prediction),
                "reference_file": str(case.pair.truth),
            }
            for case, row in zip(cases, per_case, strict=True)
        ],
        "medmoco": {
            "classes": {str(value): name for value, name in names.items()},
            "cases": len(cases),
            "outcomes": {str(value): outcomes(cases, value) for value in names},
            "pooled": {str(value): pooled(cases, value) for value in names},
        },
    }


def outcomes(cases: Sequence[CaseScores], value: int) -> dict[str, int]:
    """How many cases found, missed or invented the class, and in how many it is absent."""
    counts = [case.of(value).outcome for case in cases]
    return {outcome: counts.count(outcome) for outcome in OUTCOMES}


def pooled(cases: Sequence[CaseScores], value: int) -> dict[str, float | None]:
    """Dice and IoU with the voxels of all cases taken together."""
    scores = [case.of(value) for case in cases]
    together = ClassScores(
        sum(s.n_both for s in scores),
        sum(s.n_pred for s in scores),
        sum(s.n_ref for s in scores),
        sum(s.n_voxels for s in scores),
        None,
        None,
        None,
    )
    return {"Dice": together.dice, "IoU": together.iou}


def mean(values: Iterable[float | int | None]) -> float | None:
    """Of those that are not None; None if all are."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def csv_text(cases: Sequence[CaseScores], names: Names) -> str:
    """metrics.csv: a row a case and class; empty where both masks are."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("case", "label", "class", "outcome", *SCORES, *COUNTS))
    for case in cases:
        for value, name in names.items():
            scores = case.of(value)
            row = entries(scores).values()
            writer.writerow((_cell(case.pair.case), value, _cell(name), scores.outcome, *row))
    return text.getvalue()


def _cell(name: str) -> str:
    """A name that a spreadsheet takes for text: what begins like a formula gets an apostrophe."""
    shown = visible(name)
    return f"'{shown}" if shown.startswith(("=", "+", "-", "@")) else shown


def class_table(summary: dict[str, Any], tolerance: float) -> str:
    """Means for the terminal, a row a class."""
    about = summary["medmoco"]
    header = ("", "Dice", "IoU", "HD95 mm", f"NSD {tolerance:g} mm", "ASSD mm", "pooled Dice")
    rows = [(*header, *OUTCOMES), ("mean", *_shown(summary["foreground_mean"]), *[""] * 5)]
    for label, name in about["classes"].items():
        counts = [str(count) for count in about["outcomes"][label].values()]
        shown = _shown(summary["mean"][label])
        rows.append((name, *shown, _number(about["pooled"][label]["Dice"]), *counts))
    policy = ""
    if any(counts["missed"] or counts["invented"] for counts in about["outcomes"].values()):
        policy = "\nmissed or invented: Dice, IoU and NSD 0, the volume's diagonal as distance"
    return _aligned(rows) + policy


def worst_table(cases: Sequence[CaseScores], names: Names) -> str:
    """The cases of lowest mean Dice for the terminal, the worst first."""
    rows = []
    for case in cases:
        scores = {value: case.of(value) for value in names}
        each = [entries(one) for one in scores.values()]
        means = {name: mean(one[name] for one in each) for name in SCORES}
        odd = [
            f"{names[value]} {one.outcome}"
            for value, one in scores.items()
            if one.outcome in ("missed", "invented")
        ]
        dice, distance = means["Dice"], means["HD95"]
        if dice is not None and distance is not None:
            rows.append((dice, -distance, (case.pair.case, *_shown(means)), ", ".join(odd)))
    rows = sorted(rows)[:WORST]
    header = ("", "Dice", "IoU", "HD95 mm", "NSD", "ASSD mm")
    lines = _aligned([header, *(row for _, _, row, _ in rows)]).splitlines()
    remarks = ["", *(remark for *_, remark in rows)]
    return "\n".join(
        f"{line}  {remark}".rstrip() for line, remark in zip(lines, remarks, strict=True)
    )


def _shown(scores: dict[str, float | None]) -> list[str]:
    return [_number(scores[name], 2 if name in ("HD95", "ASSD") else 3) for name in SCORES]


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    rows = [[visible(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    )
