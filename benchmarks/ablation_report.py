"""Tables and plots of the ablation, from its tables alone.

    python benchmarks/ablation_report.py OUTPUT

Reads OUTPUT/runs.csv, dice.csv, spectra.jsonl and, if they are there, search.csv, finetune.csv and
leak.csv; prints the tables as Markdown, and writes OUTPUT/spectra.png, dice_and_rank.png and
dice_and_labels.png.
"""

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ablation import DICE, RUNS, SEARCH, SPECTRA
from ablation_finetune import FINETUNE
from ablation_leak import LEAK
from ablation_tables import (
    Row,
    diagnostic_table,
    effect_table,
    failed_variants,
    finetune_table,
    labels_of,
    leak_table,
    mean_of,
    search_table,
    short_table,
    sign_table,
    values_of,
    variant_table,
    variants_of,
)
from flags import parser_for
from medmoco.command import run_command
from medmoco.errors import UserError
from variants import FACTORIAL, RANDOM, VARIANTS

DPI = 120


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables, writes the plots."""
    parser = parser_for(__doc__)
    parser.add_argument("output", type=Path, help="folder of the tables")
    folder = parser.parse_args(argv).output
    print("\n\n".join(tables(folder)), end="\n\n")
    runs = read_table(folder / RUNS)
    plots = {
        "dice_and_rank.png": rank_plot(runs),
        "dice_and_labels.png": labels_plot(runs),
        "spectra.png": spectra_plot(read_spectra(folder / SPECTRA)),
    }
    for name, figure in plots.items():
        figure.savefig(folder / name, dpi=DPI)
        print(f"wrote {folder / name}")


def tables(folder: Path) -> list[str]:
    """All tables of a folder, the short one for a README first."""
    runs, dice = read_table(folder / RUNS), read_table(folder / DICE)
    of_runs = (short_table, variant_table, diagnostic_table, sign_table)
    short, *long = (table(runs) for table in of_runs)
    found = [short, effect_table(dice, failed_variants(runs)), *long]
    if (folder / SEARCH).is_file():
        search = read_table(folder / SEARCH)
        found += [search_table(search), sign_table(search)]
    if (folder / FINETUNE).is_file():
        found.append(finetune_table(read_table(folder / FINETUNE)))
    if (folder / LEAK).is_file():
        found.append(leak_table(read_table(folder / LEAK)))
    return found


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


def rank_plot(runs: Sequence[Row]) -> Figure:
    """Dice of the linear decoder beside the effective rank, a point a run."""
    variants = [v for v in variants_of(runs) if v in VARIANTS]
    figure = Figure(figsize=(8, _height(variants)), layout="constrained")
    axes = figure.subplots()
    for number, variant in enumerate(variants):
        own = [row for row in runs if row["variant"] == variant]
        ranks = [float(row["features_rankme_centred"]) for row in own]
        scores = [100 * float(row["linear_dice"]) for row in own]
        axes.scatter(ranks, scores, color=f"C{number % 10}", marker="osD^"[number // 10],
                     label=variant)  # fmt: skip
    floor = mean_of(runs, RANDOM, "linear_dice")
    if floor is not None:
        axes.axhline(100 * floor, color="0.6", linestyle="--", label="random features")
    axes.set(xlabel="effective rank of centred features (RankMe)", ylabel="linear Dice, points")
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


def labels_plot(runs: Sequence[Row]) -> Figure:
    """Dice of fine-tuned U-Nets over the number of labelled volumes, mean and range of seeds."""
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    labels = labels_of(runs)
    shown = [v for v in variants_of(runs) if v in (RANDOM, *FACTORIAL)]
    for variant in shown:
        own = [row for row in runs if row["variant"] == variant]
        scores = {n: 100 * np.array(values_of(own, f"finetune_dice_{n}")) for n in labels}
        told = [n for n in labels if len(scores[n])]  # not every run has every number
        name, colour = "from scratch", "0.4"
        if variant != RANDOM:
            name, colour = variant, f"C{FACTORIAL.index(variant)}"
        axes.plot(told, [scores[n].mean() for n in told], "o-", color=colour, label=name)
        low, high = ([end(scores[n]) for n in told] for end in (np.min, np.max))
        axes.fill_between(told, low, high, color=colour, alpha=0.15)
    axes.set(xscale="log", xlabel="labelled volumes", ylabel="Dice, points")
    axes.set_xticks(labels, [str(n) for n in labels], minor=False)
    axes.set_xticks([], minor=True)
    if shown:
        axes.legend(fontsize="small")
    return figure


def spectra_plot(spectra: Sequence[dict[str, Any]]) -> Figure:
    """Eigenvalues of features and embeddings, relative to their sum, the mean over seeds."""
    variants = [v for v in VARIANTS if any(s["variant"] == v for s in spectra)]
    figure = Figure(figsize=(12, _height(variants)), layout="constrained")
    both = figure.subplots(1, 2)
    for axes, part in zip(both, ("features", "embeddings"), strict=True):
        for number, variant in enumerate(variants):
            own = [np.array(s[part]) for s in spectra if s["variant"] == variant and s[part]]
            if not own:
                continue
            mean = np.mean([values / values.sum() for values in own], axis=0)
            shown = mean[mean > 0]
            line = ("-", "--", ":", "-.")[number // 10]
            places = np.arange(1, len(shown) + 1)
            axes.semilogy(places, shown, color=f"C{number % 10}", linestyle=line, label=variant)
        axes.set(title=part, xlabel="eigenvalue", ylabel="share of the sum")
    if variants:
        named = both[0].get_legend_handles_labels()
        figure.legend(*named, loc="outside right upper", fontsize="small")
    return figure


def _height(variants: Sequence[str]) -> float:
    """Inches that a legend of all these needs, and a plot at least."""
    return max(4.5, 0.19 * len(variants) + 0.6)


if __name__ == "__main__":
    sys.exit(run_command(main))
