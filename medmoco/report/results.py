"""What the page says of the segmentation: the main table, classes, volumes."""

from collections.abc import Sequence

from medmoco.report.comparison import (
    against_controls,
    over_folds,
    over_seeds,
    seed_groups,
    tested_alike,
    volume_mean,
)
from medmoco.report.figures import plot_figures
from medmoco.report.html import (
    DASH,
    NOTHING,
    TIMES,
    Markup,
    details,
    element,
    framed_table,
    join,
    model_head,
    note,
    number,
    of_run,
    section,
    table,
)
from medmoco.report.intervals import of_class, of_mean, over_values
from medmoco.report.plots import dice_plot
from medmoco.report.run_folder import MODEL_FOLDERS, Result, Run, finite, part_of

MAX_PAIRED = 4  # classes that fit into half the width of the page
OVER_VOLUMES = (
    "In small print, 95 % intervals of the means by Student's t, with the test volumes as a sample "
    "of patients: what another training would change they do not tell."
)
SHOWN_VOLUMES = 10  # worst ones, before the rest is folded away


def main_table(runs: Sequence[Run]) -> Markup:
    """Method, Dice beside its controls, and effective rank, a row per run."""
    rank_head = ("Effective rank", element("small", f"of N {TIMES} D"))
    groups = element(
        "tr",
        element("th", "Method", scope="col", rowspan=2),
        element("th", "Linear evaluation, Dice", scope="colgroup", colspan=2),
        element("th", "Fine-tuning, Dice", scope="colgroup", colspan=2),
        element("th", *rank_head, scope="col", rowspan=2),
    )
    columns = ("pretrained", "frozen random encoder", "pretrained", "from scratch")
    # In a narrow window the cells stand below each other, each with its whole name.
    full_names = ("Linear Dice", "Frozen random encoder", "Fine-tuning Dice", "From scratch")
    head = element("tr", *(element("th", name, scope="col") for name in columns))
    body = []
    for run in runs:
        results = (run.linear, run.linear_random, run.finetune, run.finetune_scratch)
        cells = [
            element("td", number(result and result.mean), data_label=full_name)
            for full_name, result in zip(full_names, results, strict=True)
        ]
        name = element("th", run.method, element("small", _name_and_seed(run)), scope="row")
        rank = element("td", element("div", *_ranks(run)), data_label="Effective rank")
        body.append(element("tr", name, *cells, rank))
    caption = f"Mean Dice over the test volumes, background excluded; {DASH} was not run"
    return framed_table(caption, [groups, head], body, "numbers main")


def words(runs: Sequence[Run]) -> Markup:
    """The differences to the controls, and what stands against a comparison."""
    several = len(runs) > 1
    parts: list[Markup] = []
    items = [
        of_run(run.name, several, sentence)
        for run in runs
        for sentence in (*against_controls(run), *over_folds(run))
    ]
    for group in seed_groups(runs):
        items += [f"{group[0].method}. {sentence}" for sentence in over_seeds(group)]
    if items:
        parts.append(element("ul", *(element("li", item) for item in items)))
    if not tested_alike(runs):
        different = (
            "Not all models were tested on the same volumes and classes: do not compare their Dice."
        )
        parts.append(note("warn", different))
    for run in runs:
        if run.summary is None:
            unfinished = "the run has not finished: it wrote no summary.json."
            parts.append(note("warn", of_run(run.name, several, unfinished)))
        if run.truncated:
            cut = "the last line of metrics.jsonl is unfinished and was left out."
            parts.append(note("warn", of_run(run.name, several, cut)))
    return join(parts)


def classes_section(runs: Sequence[Run]) -> Markup:
    """Dice per class, a column per run and model, with intervals, and its spread over volumes."""
    columns = [(run, name, result) for run in runs for name, result in run.results.items()]
    classes = list(dict.fromkeys(c for _, _, result in columns for c in result.per_class))
    if not classes:
        return NOTHING
    heads = ["Class", *(model_head(name, run, runs) for run, name, _ in columns)]
    rows = [
        [c, *(_with_interval(r.per_class.get(c), of_class(r, c)) for _, _, r in columns)]
        for c in classes
    ]
    rows.append(["mean", *(_with_interval(r.mean, of_mean(r)) for _, _, r in columns)])
    parts = [
        table("Mean over the test volumes", heads, rows, marked=[len(rows) - 1]),
        element("p", OVER_VOLUMES, class_="soft"),
    ]
    parts += [_seeds_table(group, classes) for group in seed_groups(runs)]
    plots = [(run, plot) for run in runs if (plot := dice_plot(run)) is not None]
    names = [run.name if len(runs) > 1 else "" for run, _ in plots]
    parts.append(plot_figures([plot for _, plot in plots], names))
    parts += [element("p", sentence, class_="soft") for sentence in _absent(columns, len(runs) > 1)]
    if any(result.pooled for _, _, result in columns):
        pooled = [[c, *(number(r.pooled.get(c)) for _, _, r in columns)] for c in classes]
        whole = table("Voxels of all test volumes taken together", heads, pooled)
        parts.append(details("Pooled Dice", whole))
    return section("classes", "Dice per class", *parts)


def _seeds_table(group: Sequence[Run], classes: Sequence[str]) -> Markup:
    """Means over runs that differ in nothing but the seed."""
    names = [name for name in MODEL_FOLDERS if all(name in run.results for run in group)]
    results = [[run.results[name] for run in group] for name in names]
    rows = [
        [c, *(_over([r.per_class.get(c) for r in of_name]) for of_name in results)] for c in classes
    ]
    rows.append(["mean", *(_over([r.mean for r in of_name]) for of_name in results)])
    caption = f"{group[0].method}: mean over {len(group)} seeds, with intervals over them"
    return table(caption, ["Class", *names], rows, marked=[len(rows) - 1])


def _over(scores: Sequence[float | None]) -> Markup:
    known = [score for score in scores if score is not None]
    mean = sum(known) / len(known) if known else None
    return _with_interval(mean, over_values(known))


def _with_interval(mean: float | None, ends: tuple[float, float] | None) -> Markup:
    if mean is None or ends is None:
        return join([number(mean)])
    return join([number(mean), element("small", f"{ends[0]:.3f}{DASH}{ends[1]:.3f}")])


def volumes_section(runs: Sequence[Run]) -> Markup:
    """Dice per volume of the pretrained models, or of the controls alone, worst first."""
    parts = []
    for run in runs:
        named = [("Fine-tuning", run.finetune), ("Linear evaluation", run.linear)]
        if run.finetune is None and run.linear is None:
            # Beside pretrained models the controls are in the plot; tables would only be long.
            named = [("From scratch", run.finetune_scratch), ("Frozen random", run.linear_random)]
        for name, result in named:
            if result is not None and result.per_volume:
                title = name if len(runs) == 1 else f"{run.name}: {name.lower()}"
                parts.append(_volume_tables(title, result))
    classes = max(
        (len(result.per_class) for run in runs for result in run.results.values()), default=0
    )
    side_by_side = element("div", *parts, class_="pairs" if classes <= MAX_PAIRED else None)
    return section("volumes", "Dice per volume, worst first", side_by_side) if parts else NOTHING


def _name_and_seed(run: Run) -> str:
    seed = run.config.get("seed")
    return run.name if seed is None else f"{run.name}, seed {seed}"


def _ranks(run: Run) -> list[Markup]:
    """RankMe of features and embeddings with the size of the matrix it was measured on."""
    summary = run.summary or {}
    last = run.diagnostics[-1] if run.diagnostics else {}
    lines = []
    for kind in ("features", "embeddings"):
        measured = part_of(last, kind)
        rank = finite(part_of(summary, "effective_rank").get(kind))
        rank = finite(measured.get("rankme")) if rank is None else rank
        if rank is None:
            continue
        known = measured or (summary if kind == "features" else {})
        samples, dimensions = finite(known.get("samples")), finite(known.get("dimensions"))
        size = (
            "" if None in (samples, dimensions) else f" of {samples:.0f} {TIMES} {dimensions:.0f}"
        )
        lines.append(element("div", f"{rank:.1f}", element("small", f"{kind}{size}")))
    return lines or [Markup(DASH)]


def _absent(columns: Sequence[tuple[Run, str, Result]], several: bool) -> list[str]:
    """Which classes had no Dice in how many volumes; models of which the same holds together."""
    models: dict[str, list[str]] = {}
    for run, name, result in columns:
        counts = [f"{c} in {n:.0f}" for c, n in result.absent.items() if n]
        if counts:
            statement = f"{', '.join(counts)} of {len(result.per_volume)} volumes"
            models.setdefault(statement, []).append(f"{run.name} {name}" if several else name)
    return [
        f"Absent from both truth and prediction, and so left out of the mean: {statement} "
        f"({'all models' if len(names) == len(columns) else ', '.join(names)})."
        for statement, names in models.items()
    ]


def _volume_tables(title: str, result: Result) -> Markup:
    classes = list(dict.fromkeys(c for scores in result.per_volume.values() for c in scores))
    means = {case: volume_mean(scores) for case, scores in result.per_volume.items()}
    # Volumes without any class come last; equal ones in the order of their names.
    order = sorted(means, key=lambda case: (finite(means[case]) is None, means[case] or 0, case))
    rows = [
        [case, number(means[case]), *(number(result.per_volume[case].get(c)) for c in classes)]
        for case in order
    ]
    columns = ["Volume", "mean", *classes]
    count = f"{len(rows)} test volume{'s' if len(rows) != 1 else ''}"
    shown = table(f"{title}, {count}", columns, rows[:SHOWN_VOLUMES])
    rest = rows[SHOWN_VOLUMES:]
    if not rest:
        return element("div", shown)
    more = details(f"{len(rest)} more", table(f"{title}, the rest", columns, rest))
    return element("div", shown, more)
