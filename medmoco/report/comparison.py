"""What the numbers of one or several runs say, in words that claim no more than they show."""

import math
from collections.abc import Sequence

from medmoco.report.html import MINUS
from medmoco.report.run_folder import Result, Run, finite, part_of

# Flags that may differ between runs that count as repetitions with another seed.
NOT_METHOD = {"argv", "cache", "device", "encoder", "output", "seed", "tensorboard", "workers"}
TIE = 0.0005  # half of the last digit that is shown


def against_controls(run: Run) -> list[str]:
    """One sentence per evaluation that says how far it is from its control."""
    sentences = []
    if run.linear is not None:
        name, control = "Linear evaluation", "a frozen random encoder"
        sentences.append(_difference(name, run.linear, control, run.linear_random))
    if run.finetune is not None:
        sentences.append(
            _difference("Fine-tuning", run.finetune, "training from scratch", run.finetune_scratch)
        )
    return sentences


def seed_groups(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that differ in nothing but the seed, groups of two or more."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        flags = {k: v for k, v in run.config.items() if k not in NOT_METHOD}
        groups.setdefault(repr(sorted(flags.items())), []).append(run)
    several = [group for group in groups.values() if len(group) > 1]
    return [g for g in several if len({repr(run.config.get("seed")) for run in g}) == len(g)]


def spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation."""
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1)
    return f"{mean:.3f} ± {math.sqrt(variance):.3f}".replace("-", MINUS)


def over_seeds(group: Sequence[Run]) -> list[str]:
    """One sentence per evaluation of a group of seeds: mean, and difference to the control."""
    evaluations = {
        "Linear evaluation": ("a frozen random encoder", "linear", "linear_random"),
        "Fine-tuning": ("training from scratch", "finetune", "finetune_scratch"),
    }
    sentences = []
    for name, (control, ours, theirs) in evaluations.items():
        scores = [_mean_of(getattr(run, ours)) for run in group]
        controls = [_mean_of(getattr(run, theirs)) for run in group]
        known = [score for score in scores if score is not None]
        if len(known) < 2:
            continue
        sentence = f"{name}: Dice {spread(known)} over {len(known)} seeds (mean ± std)"
        pairs = zip(scores, controls, strict=True)
        both = [a - b for a, b in pairs if a is not None and b is not None]
        if len(both) > 1:
            higher = sum(difference > 0 for difference in both)
            sentence += (
                f"; difference to {control} {spread(both)}, positive in {higher} of {len(both)}"
            )
        sentences.append(sentence + ".")
    return sentences


def over_folds(run: Run) -> list[str]:
    """One sentence on each model of a cross-validation: what its folds scored, each by itself."""
    summary = run.summary or {}
    about, controls = part_of(summary, "folds"), part_of(summary, "controls")
    if not about:
        return []
    models = {
        "Linear evaluation": part_of(summary, "linear"),
        "Frozen random encoder": part_of(controls, "linear_random"),
        "Fine-tuning": part_of(summary, "finetune"),
        "Training from scratch": part_of(controls, "finetune_scratch"),
    }
    sentences = []
    for name, result in models.items():
        scores = part_of(part_of(result, "folds"), "dice").values()
        known = [score for value in scores if (score := finite(value)) is not None]
        if len(known) > 1:
            sentences.append(
                f"Cross-validation. {name}: Dice {spread(known)} over {len(known)} of "
                f"{about.get('of')} folds (mean ± std); above, their cases are taken together."
            )
    return sentences


def tested_alike(runs: Sequence[Run]) -> bool:
    """Whether all runs with results were tested on the same volumes and classes."""
    tests = {
        frozenset((case, tuple(scores)) for case, scores in result.per_volume.items())
        for run in runs
        for result in run.results.values()
    }
    return len(tests) <= 1


def _mean_of(result: Result | None) -> float | None:
    return None if result is None else result.mean


def _difference(name: str, ours: Result, control: str, theirs: Result | None) -> str:
    if ours.mean is None:
        return f"{name}: no Dice is defined, as no test volume holds a class."
    if theirs is None or theirs.mean is None:
        return f"{name}: Dice {ours.mean:.3f}. {control.capitalize()}, its control, was not run."
    difference = ours.mean - theirs.mean
    if abs(difference) < TIE:
        verdict = "no difference in three digits"
    else:
        verdict = f"{abs(difference):.3f} {'higher' if difference > 0 else 'lower'}"
    return (
        f"{name}: Dice {ours.mean:.3f}, against {theirs.mean:.3f} for {control}: "
        f"{verdict}{_volumes_in_favour(ours, theirs)} (one seed, no claim)."
    )


def _volumes_in_favour(ours: Result, theirs: Result) -> str:
    pairs = [
        (volume_mean(scores), volume_mean(theirs.per_volume[case]))
        for case, scores in ours.per_volume.items()
        if case in theirs.per_volume
    ]
    known = [a - b for a, b in pairs if a is not None and b is not None]
    higher = sum(difference > 0 for difference in known)
    return f", higher on {higher} of {len(known)} test volumes" if known else ""


def volume_mean(scores: dict[str, float | None]) -> float | None:
    """Mean Dice of a volume's classes; None if none is defined."""
    known = [score for score in scores.values() if finite(score) is not None]
    return sum(s for s in known if s is not None) / len(known) if known else None
