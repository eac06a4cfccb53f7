"""Tables and plots of the ablation, from its tables alone.

    python benchmarks/ablation_report.py OUTPUT

Reads OUTPUT/runs.csv, dice.csv and spectra.jsonl; prints the tables as Markdown, and writes
OUTPUT/spectra.png, dice_and_rank.png and dice_and_labels.png.
"""

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from ablation import DICE, OF_FEATURES, RUNS, SPECTRA
from ablation_statistics import (
    EFFECTS,
    LEAST_SEEDS,
    Effect,
    effect,
    holm,
    mean_over_organs,
)
from medmoco.command import run_command
from medmoco.diagnostics import CHANCE_MARGIN, CORRELATION_CEILING, STD_FLOOR
from medmoco.errors import UserError
from variants import CONTROLS, FACTORIAL, RANDOM, VARIANTS

NOTHING = "-"
CHANCE = 1 - CHANCE_MARGIN  # of log(K + 1): a loss above it has hardly left chance
DPI = 120
# Signs of collapse that could be warned of: a column, whether to warn above or below, the limit.
SIGNS = (
    ("loss_of_chance", "above", CHANCE),
    ("embeddings_std_sqrt_d", "below", STD_FLOOR),
    ("embeddings_mean_abs_correlation", "above", CORRELATION_CEILING),
    ("embeddings_rank_share", "below", 0.1),
    ("features_std_sqrt_d", "below", STD_FLOOR),
    ("features_mean_share", "above", 0.9),
    ("features_rank_share", "below", 0.2),
)

Row = dict[str, str]


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables, writes the plots."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("output", type=Path, help="folder of the tables")
    folder = parser.parse_args(argv).output
    runs, dice = read_table(folder / RUNS), read_table(folder / DICE)
    print(short_table(runs))
    print(f"\n{variant_table(runs)}")
    print(f"\n{effect_table(dice)}")
    print(f"\n{diagnostic_table(runs)}")
    print(f"\n{sign_table(runs)}")
    plots = {
        "dice_and_rank.png": rank_plot(runs),
        "dice_and_labels.png": labels_plot(runs),
        "spectra.png": spectra_plot(read_spectra(folder / SPECTRA)),
    }
    print()
    for name, figure in plots.items():
        figure.savefig(folder / name, dpi=DPI)
        print(f"wrote {folder / name}")


def read_table(path: Path) -> list[Row]:
    """The rows of a CSV.

    Raises:
        UserError: there is no such file, or it has no row.
    """
    if not path.is_file():
        raise UserError(f"{path}: expected a table of the ablation, found none")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise UserError(f"{path}: expected a row or more, got none")
    return rows


def read_spectra(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def variant_table(runs: Sequence[Row]) -> str:
    """A line a variant: means over seeds, and in brackets the least and the largest."""
    labels = labels_of(runs)
    header = ["variant", "seeds", *dice_header(labels)]
    header += ["loss / chance", "rank of features", "of dimensions", "rank of embeddings"]
    header += ["correlation of embeddings", ""]
    floor = _mean(runs, RANDOM, "linear_dice")
    lines = []
    for variant in variants_of(runs):
        own = [row for row in runs if row["variant"] == variant]
        lines.append(
            [
                variant,
                str(len(own)),
                *dice_cells(own, labels),
                _spread(own, "loss_of_chance", 1, 2),
                _spread(own, "features_rankme_centred"),
                own[0]["dimensions"] or NOTHING,
                _spread(own, "embeddings_rankme_centred"),
                _spread(own, "embeddings_mean_abs_correlation", 1, 2),
                failure(own, floor),
            ]
        )
    return markdown(header, lines)


def short_table(runs: Sequence[Row]) -> str:
    """Dice alone, of the 2 x 2 and without pretraining."""
    labels = labels_of(runs)
    wanted = [v for v in variants_of(runs) if v in (RANDOM, *FACTORIAL)]
    own = {v: [row for row in runs if row["variant"] == v] for v in wanted}
    lines = [[v, *dice_cells(rows, labels)] for v, rows in own.items()]
    return markdown(["variant", *dice_header(labels)], lines)


def dice_header(labels: Sequence[int]) -> list[str]:
    return ["linear Dice", *(f"U-Net, {n} labels" for n in labels)]


def dice_cells(runs: Sequence[Row], labels: Sequence[int]) -> list[str]:
    columns = ["linear_dice", *(f"finetune_dice_{n}" for n in labels)]
    return [_spread(runs, column, 100) for column in columns]


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def failure(runs: Sequence[Row], floor: float | None) -> str:
    """Why no claim is made over these runs, or nothing."""
    losses = [float(row["loss_of_chance"]) for row in runs if row["loss_of_chance"]]
    reasons = []
    if losses and np.mean(losses) > CHANCE:
        reasons.append("the loss has hardly left chance")
    linear = np.mean([float(row["linear_dice"]) for row in runs])
    if floor is not None and runs[0]["variant"] in VARIANTS and linear < floor:
        reasons.append("its probe is below that of random features")
    return f"failed: {' and '.join(reasons)}" if reasons else ""


def effect_table(dice: Sequence[Row]) -> str:
    """The effects in points of Dice, on the linear decoder and on U-Nets."""
    header = ["effect", "on", "points", "95 % interval", "p (Holm)", "single seeds"]
    lines = []
    stages: list[tuple[str, str, int | None]] = [("linear decoder", "linear", None)]
    counts = sorted({int(row["labels"]) for row in dice if row["stage"] == "finetune"})
    stages += [(f"U-Net, {count} labels", "finetune", count) for count in counts]
    for title, stage, count in stages:
        effects = _effects(dice, stage, count)
        corrected = iter(holm([found.p for found in effects if found.p is not None]))
        for found in effects:
            interval = NOTHING if found.low is None else f"{found.low:+.1f} to {found.high:+.1f}"
            p = f"fewer than {LEAST_SEEDS} seeds" if found.p is None else f"{next(corrected):.3f}"
            seeds = f"{found.lowest:+.1f} to {found.highest:+.1f}"
            lines.append([found.name, title, f"{found.points:+.1f}", interval, p, seeds])
    return markdown(header, lines)


def _effects(dice: Sequence[Row], stage: str, labels: int | None) -> list[Effect]:
    """Those whose variants have a seed in common."""
    found = []
    for name, weights in EFFECTS.items():
        # Of these variants alone: others may have fewer seeds.
        scores = mean_over_organs((r for r in dice if r["variant"] in weights), stage, labels)
        if scores.keys() == weights.keys() and all(values.size for values in scores.values()):
            found.append(effect(name, weights, scores))
    return found


def diagnostic_table(runs: Sequence[Row]) -> str:
    """How each diagnostic goes with the linear decoder's Dice: Spearman's rank correlation, over
    the means of the variants and over all runs."""
    trained = [row for row in runs if row["variant"] in VARIANTS]
    variants = sorted({row["variant"] for row in trained})
    header = ["diagnostic", f"over {len(variants)} variants", f"over {len(trained)} runs"]
    lines = []
    for column in ("loss_of_chance", *OF_FEATURES):
        pairs = {
            variant: [
                (float(row[column]), float(row["linear_dice"]))
                for row in trained
                if row["variant"] == variant and row[column] != ""
            ]
            for variant in variants
        }
        means = [np.mean(own, axis=0) for own in pairs.values() if own]
        all_runs = [pair for own in pairs.values() for pair in own]
        lines.append([f"`{column}`", _rank_correlation(means), _rank_correlation(all_runs)])
    return markdown(header, lines)


def sign_table(runs: Sequence[Row]) -> str:
    """The linear decoder's Dice of the runs that show a sign of collapse at their end, and of those
    that do not: a sign is worth a warning if it comes with the lower Dice."""
    trained = [row for row in runs if row["variant"] in VARIANTS]
    lines = []
    for column, side, limit in SIGNS:
        groups: tuple[list[float], list[float]] = ([], [])
        for row in trained:
            if row[column] != "":
                value = float(row[column])
                shown = value > limit if side == "above" else value < limit
                groups[shown].append(100 * float(row["linear_dice"]))
        without, having = (
            f"{len(dice)} runs: {np.mean(dice):.1f} ({min(dice):.1f} to {max(dice):.1f})"
            if dice
            else NOTHING
            for dice in groups
        )
        lines.append([f"`{column}` {side} {limit:g}", having, without])
    return markdown(["sign", "Dice with it", "Dice without"], lines)


def _rank_correlation(pairs: Sequence[Any]) -> str:
    if len(pairs) < 3 or np.ptp(pairs, axis=0).min() == 0:
        return NOTHING
    return f"{spearmanr(*np.transpose(pairs)).statistic:+.2f}"


def rank_plot(runs: Sequence[Row]) -> Figure:
    """Dice of the linear decoder beside the effective rank, a point a run."""
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, variant in enumerate(v for v in variants_of(runs) if v in VARIANTS):
        own = [row for row in runs if row["variant"] == variant]
        ranks = [float(row["features_rankme_centred"]) for row in own]
        scores = [100 * float(row["linear_dice"]) for row in own]
        axes.scatter(ranks, scores, color=f"C{number % 10}", marker="osD^"[number // 10 % 4],
                     label=variant)  # fmt: skip
    floor = _mean(runs, RANDOM, "linear_dice")
    if floor is not None:
        axes.axhline(100 * floor, color="0.6", linestyle="--", label="random features")
    axes.set(xlabel="effective rank of centred features (RankMe)", ylabel="linear Dice, points")
    axes.legend(fontsize="small")
    return figure


def labels_plot(runs: Sequence[Row]) -> Figure:
    """Dice of fine-tuned U-Nets over the number of labelled volumes, mean and range of seeds."""
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    labels = labels_of(runs)
    for number, variant in enumerate(v for v in variants_of(runs) if v in (RANDOM, *VARIANTS)):
        own = [row for row in runs if row["variant"] == variant]
        scores = np.array([[100 * float(row[f"finetune_dice_{n}"]) for n in labels] for row in own])
        colour = "0.4" if variant == RANDOM else f"C{number % 10}"
        name = "from scratch" if variant == RANDOM else variant
        axes.plot(labels, scores.mean(0), "o-", color=colour, label=name)
        axes.fill_between(labels, scores.min(0), scores.max(0), color=colour, alpha=0.15)
    axes.set(xscale="log", xlabel="labelled volumes", ylabel="Dice, points")
    axes.set_xticks(labels, [str(n) for n in labels], minor=False)
    axes.set_xticks([], minor=True)
    axes.legend(fontsize="small")
    return figure


def spectra_plot(spectra: Sequence[dict[str, Any]]) -> Figure:
    """Eigenvalues of features and embeddings, relative to their sum, the mean over seeds."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    both = figure.subplots(1, 2)
    variants = [v for v in VARIANTS if any(s["variant"] == v for s in spectra)]
    for axes, part in zip(both, ("features", "embeddings"), strict=True):
        for number, variant in enumerate(variants):
            own = [np.array(s[part]) for s in spectra if s["variant"] == variant and s[part]]
            if not own:
                continue
            mean = np.mean([values / values.sum() for values in own], axis=0)
            shown = mean[mean > 0]
            axes.semilogy(np.arange(1, len(shown) + 1), shown, color=f"C{number % 10}",
                          linestyle=("-", "--", ":")[number // 10 % 3], label=variant)  # fmt: skip
        axes.set(title=part, xlabel="eigenvalue", ylabel="share of the sum")
    if variants:
        both[0].legend(fontsize="small")
    return figure


def labels_of(runs: Sequence[Row]) -> list[int]:
    names = [name for name in runs[0] if name.startswith("finetune_dice_")]
    return sorted(int(name.removeprefix("finetune_dice_")) for name in names)


def variants_of(runs: Sequence[Row]) -> list[str]:
    """Those that ran, in the order of the list."""
    found = {row["variant"] for row in runs}
    return [variant for variant in (*CONTROLS, *VARIANTS) if variant in found]


def _values(runs: Sequence[Row], column: str) -> list[float]:
    return [float(row[column]) for row in runs if row[column] != ""]


def _mean(runs: Sequence[Row], variant: str, column: str) -> float | None:
    values = _values([row for row in runs if row["variant"] == variant], column)
    return float(np.mean(values)) if values else None


def _spread(runs: Sequence[Row], column: str, factor: float = 1, digits: int = 1) -> str:
    values = [factor * value for value in _values(runs, column)]
    if not values:
        return NOTHING
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    sys.exit(run_command(main))
