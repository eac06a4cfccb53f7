"""The tables of the ablation's report, in Markdown, from its CSVs alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from ablation import OF_FEATURES
from ablation_statistics import (
    EFFECTS,
    LEAST_SEEDS,
    Effect,
    effect,
    holm,
    mean_over_organs,
)
from medmoco.diagnostics import CHANCE_MARGIN, CORRELATION_CEILING, STD_FLOOR
from variants import CONTROLS, FACTORIAL, RANDOM, VARIANTS

NOTHING = "-"
CHANCE = 1 - CHANCE_MARGIN  # of log(K + 1): a loss above it has hardly left chance
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


def variant_table(runs: Sequence[Row]) -> str:
    """A line a variant: means over seeds, and in brackets the least and the largest."""
    labels = labels_of(runs)
    header = ["variant", "seeds", *dice_header(labels)]
    header += ["loss / chance", "rank of features", "of dimensions", "rank of embeddings"]
    header += ["correlation of embeddings", ""]
    floor = mean_of(runs, RANDOM, "linear_dice")
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


def search_table(search: Sequence[Row]) -> str:
    """A line a trial of the search for flags, in the order in which each variant's were run."""
    header = ["variant", "settings", "linear Dice, cross-validated", "loss / chance"]
    header += ["rank of embeddings", "correlation of embeddings"]
    lines = []
    for variant in variants_of(search):
        for row in search:
            if row["variant"] == variant:
                own = [row]
                lines.append(
                    [
                        variant,
                        row["settings"] or NOTHING,
                        _spread(own, "linear_dice", 100),
                        _spread(own, "loss_of_chance", 1, 2),
                        _spread(own, "embeddings_rankme_centred"),
                        _spread(own, "embeddings_mean_abs_correlation", 1, 2),
                    ]
                )
    return markdown(header, lines)


def finetune_table(rows: Sequence[Row]) -> str:
    """Dice of U-Nets over rate and length of their training, a column an initialisation."""
    variants = variants_of(rows)
    schedules = sorted({(int(row["steps"]), float(row["rate"])) for row in rows})
    lines = []
    for steps, rate in schedules:
        own = [r for r in rows if (int(r["steps"]), float(r["rate"])) == (steps, rate)]
        dice = [[row for row in own if row["variant"] == variant] for variant in variants]
        lines.append([str(steps), f"{rate:g}", *(_spread(found, "dice", 100) for found in dice)])
    return markdown(["steps", "peak rate", *variants], lines)


def leak_table(rows: Sequence[Row]) -> str:
    """Global loss with keys of their query's batch, and by how much it differs in each run where
    they are normalised otherwise; mean and range over seeds."""
    first, *others = dict.fromkeys(row["keys"] for row in rows)
    lines = []
    for variant in variants_of(rows):
        loss = {(r["keys"], r["seed"]): float(r["loss"]) for r in rows if r["variant"] == variant}
        seeds = sorted({seed for _, seed in loss})
        rises = [[loss[kind, s] - loss[first, s] for s in seeds] for kind in others]
        own = [row for row in rows if (row["variant"], row["keys"]) == (variant, first)]
        lines.append([variant, str(len(seeds)), _spread(own, "loss", 1, 2)])
        lines[-1] += [
            f"{np.mean(rise):+.3f} ({min(rise):+.3f} to {max(rise):+.3f})" for rise in rises
        ]
    return markdown(["variant", "seeds", first, *others], lines)


def dice_header(labels: Sequence[int]) -> list[str]:
    return ["linear Dice", *map(_unet, labels)]


def _unet(labels: int) -> str:
    return f"U-Net, {labels} label{'s' if labels > 1 else ''}"


def dice_cells(runs: Sequence[Row], labels: Sequence[int]) -> list[str]:
    columns = ["linear_dice", *(f"finetune_dice_{n}" for n in labels)]
    return [_spread(runs, column, 100) for column in columns]


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def failed_variants(runs: Sequence[Row]) -> list[str]:
    """Those over which no claim is made."""
    floor = mean_of(runs, RANDOM, "linear_dice")
    own = {v: [row for row in runs if row["variant"] == v] for v in variants_of(runs)}
    return [variant for variant, rows in own.items() if failure(rows, floor)]


def failure(runs: Sequence[Row], floor: float | None) -> str:
    """Why no claim is made over these runs, or nothing."""
    losses = [float(row["loss_of_chance"]) for row in runs if row["loss_of_chance"]]
    at_chance = sum(loss > CHANCE for loss in losses)
    reasons = []
    if at_chance:
        reasons.append(f"the loss of {at_chance} of {len(losses)} has hardly left chance")
    linear = np.mean([float(row["linear_dice"]) for row in runs])
    if floor is not None and runs[0]["variant"] in VARIANTS and linear < floor:
        reasons.append("its probe is below that of random features")
    return f"failed: {' and '.join(reasons)}" if reasons else ""


def effect_table(dice: Sequence[Row], failed: Sequence[str] = ()) -> str:
    """The effects in points of Dice, on the linear decoder and on U-Nets.

    p of each line alone, and corrected over all lines.

    Args:
        failed: variants over which no claim is made; effects that rest on them say so.
    """
    header = ["effect", "on", "points", "95 % interval", "p", "p (Holm)", "single seeds"]
    stages: list[tuple[str, str, int | None]] = [("linear decoder", "linear", None)]
    counts = sorted({int(row["labels"]) for row in dice if row["stage"] == "finetune"})
    stages += [(_unet(count), "finetune", count) for count in counts]
    found = [(title, one) for title, stage, count in stages for one in _effects(dice, stage, count)]
    corrected = iter(holm([one.p for _, one in found if one.p is not None]))
    lines = []
    for title, one in found:
        interval = NOTHING if one.low is None else f"{one.low:+.1f} to {one.high:+.1f}"
        p = NOTHING if one.p is None else _p_value(one.p)
        holms = f"fewer than {LEAST_SEEDS} seeds" if one.p is None else _p_value(next(corrected))
        seeds = f"{one.lowest:+.1f} to {one.highest:+.1f}"
        resting = [variant for variant in EFFECTS[one.name] if variant in failed]
        name = f"{one.name} (failed: {', '.join(resting)})" if resting else one.name
        lines.append([name, title, f"{one.points:+.1f}", interval, p, holms, seeds])
    return markdown(header, lines)


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


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


def labels_of(runs: Sequence[Row]) -> list[int]:
    names = [name for name in runs[0] if name.startswith("finetune_dice_")]
    return sorted(int(name.removeprefix("finetune_dice_")) for name in names)


def variants_of(runs: Sequence[Row]) -> list[str]:
    """Those that ran, in the order of the list."""
    found = {row["variant"] for row in runs}
    return [variant for variant in (*CONTROLS, *VARIANTS) if variant in found]


def values_of(runs: Sequence[Row], column: str) -> list[float]:
    return [float(row[column]) for row in runs if row[column] != ""]


def mean_of(runs: Sequence[Row], variant: str, column: str) -> float | None:
    values = values_of([row for row in runs if row["variant"] == variant], column)
    return float(np.mean(values)) if values else None


def _spread(runs: Sequence[Row], column: str, factor: float = 1, digits: int = 1) -> str:
    values = [factor * value for value in values_of(runs, column)]
    if not values:
        return NOTHING
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"
