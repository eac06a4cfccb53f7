"""What the folds of a cross-validation have in common: one summary over their cases."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medmoco.json_file import read_object

Summary = dict[str, Any]


def fold_name(number: int) -> str:
    """Of the folder of a fold in the folder of the run, as nnU-Net's."""
    return f"fold_{number}"


def finished_folds(output: Path, count: int) -> dict[int, Summary]:
    """The summaries of the folds that have one, by number."""
    paths = {number: output / fold_name(number) / "summary.json" for number in range(count)}
    return {n: read_object(path) for n, path in paths.items() if path.is_file()}


def over_folds(folds: dict[int, Summary], count: int) -> Summary:
    """A summary.json whose results are those of `pooled_result`.

    Args:
        folds: of the finished ones, at least one.
        count: of all folds.

    Returns:
        As the summary of a fold; "folds": {"finished": numbers, "of": count}.
    """
    summaries = list(folds.values())
    first = summaries[0]
    controls = list(dict.fromkeys(name for one in summaries for name in one["controls"]))
    bad = {file["path"]: file for one in summaries for file in one["bad_files"]}
    return {
        **{name: first[name] for name in ("medmoco", "method", "seed", "classes")},
        "linear": pooled_result({n: one["linear"] for n, one in folds.items()}),
        "finetune": pooled_result({n: one["finetune"] for n, one in folds.items()}),
        "controls": {
            name: pooled_result({n: one["controls"].get(name) for n, one in folds.items()})
            for name in controls
        },
        "folds": {"finished": list(folds), "of": count},
        "bad_files": list(bad.values()),
        "warnings": list(dict.fromkeys(text for one in summaries for text in one["warnings"])),
        "seconds": {"segment": sum(one["seconds"]["segment"] for one in summaries)},
    }


def pooled_result(results: dict[int, Any]) -> Summary | None:
    """Dice of one model over the cases of all folds, each tested by the model that did not see it.

    Args:
        results: of each fold, by number; None where the model was not run.

    Returns:
        dice_mean, dice_per_class, dice_per_volume, absent and seconds as `DiceTable.result`, a
        volume counting the same in whichever fold it lies; "folds": the mean Dice of each fold,
        with their mean and standard deviation (n - 1; null of fewer than two). None if no fold has
        a result.
    """
    found = {number: result for number, result in results.items() if result is not None}
    if not found:
        return None
    volumes: dict[str, Any] = {}
    for number, result in found.items():
        for case, scores in result["dice_per_volume"].items():
            # A hand-made list of folds may test a case twice.
            name = f"{case} ({fold_name(number)})" if case in volumes else case
            volumes[name] = scores
    classes = list(next(iter(found.values()))["dice_per_class"])
    columns = {name: [scores[name] for scores in volumes.values()] for name in classes}
    per_class = {name: _mean(column) for name, column in columns.items()}
    means = [result["dice_mean"] for result in found.values() if result["dice_mean"] is not None]
    return {
        "dice_mean": _mean(list(per_class.values())),
        "dice_per_class": per_class,
        "dice_per_volume": volumes,
        "absent": {name: column.count(None) for name, column in columns.items()},
        "seconds": round(math.fsum(result["seconds"] for result in found.values()), 2),
        "folds": {
            "dice": {str(number): result["dice_mean"] for number, result in found.items()},
            "mean": _mean(means),
            "std": statistics.stdev(means) if len(means) > 1 else None,
        },
    }


def fold_lines(summary: Summary) -> str:
    """Mean and standard deviation over the folds of each model, a line each."""
    models = {"linear": summary["linear"], "finetune": summary["finetune"], **summary["controls"]}
    lines = []
    for name, result in models.items():
        if result is not None and result["folds"]["mean"] is not None:
            std = result["folds"]["std"]
            spread = "" if std is None else f" ± {std:.3f}"
            lines.append(f"{name}: {result['folds']['mean']:.3f}{spread} over the folds")
    return "\n".join(lines)


def _mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return math.fsum(found) / len(found) if found else None
