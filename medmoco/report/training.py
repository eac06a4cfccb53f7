"""What the page says of the pretraining: signs of collapse, curves and spectra."""

from collections.abc import Sequence

from medmoco.report.figures import plot_figures
from medmoco.report.finetune_plot import finetune_plot
from medmoco.report.html import (
    DASH,
    MINUS,
    NOTHING,
    TIMES,
    Markup,
    element,
    note,
    number,
    of_run,
    section,
    table,
)
from medmoco.report.plots import MAX_POINTS, curve_plots, spectrum_plots
from medmoco.report.run_folder import Record, Run, finite, part_of

COLUMNS = (
    "Vectors",
    "RankMe",
    f"N {TIMES} D",
    "RankMe, centred",
    f"centred / min(N{MINUS}1, D)",
    "alpha-ReQ",
    "mean |correlation|",
    f"std {TIMES} √D",
    "share of the mean",
)
HOW_TO_READ = (
    f"A warning comes when the loss stays within 5 % of log(K+1), or when of the embeddings std "
    f"{TIMES} √D is below 0.3 or the mean |correlation| above 0.6. Features and ranks are shown, "
    "not judged: a higher rank need not come with a higher Dice."
)


def collapse_section(runs: Sequence[Run]) -> Markup:
    """Warnings in words, then the diagnostics of the first and of the last epoch."""
    several = len(runs) > 1
    parts = [part for run in runs for part in _warnings(run, several)]
    rows = [row for run in runs for row in _diagnostic_rows(run, several)]
    if rows:
        parts.append(table("Diagnostics on held-out slices, not augmented", COLUMNS, rows))
        parts.append(element("p", HOW_TO_READ, class_="soft"))
    return section("collapse", "Spread and collapse", *parts) if parts else NOTHING


def _warnings(run: Run, several: bool) -> list[Markup]:
    """What the run warned of at its end, or that it did not; and the epochs that warned before."""
    parts: list[Markup] = []
    found = current_warnings(run)
    if found:
        opening = element("p", element("strong", of_run(run.name, several, "signs of collapse")))
        listed = element("ul", *(element("li", warning) for warning in found))
        parts.append(element("div", opening, listed, class_="note warn"))
    elif run.diagnostics:
        fine = "none of the three signs of collapse at the last epoch."
        parts.append(note("good", of_run(run.name, several, fine)))
    # An untrained encoder is expected to look collapsed: epoch 0 is no news.
    earlier = [r for r in run.diagnostics[:-1] if isinstance(r.get("warnings"), list)]
    epochs = [f"{r['epoch']:g}" for r in earlier if r["warnings"] and finite(r["epoch"])]
    if epochs:
        before = f"warnings at earlier epochs: {', '.join(epochs)}."
        parts.append(element("p", of_run(run.name, several, before), class_="soft"))
    return parts


def current_warnings(run: Run) -> list[str]:
    """Warnings of the last epoch and of the summary, each once."""
    last = run.diagnostics[-1].get("warnings") if run.diagnostics else None
    listed = [last, (run.summary or {}).get("warnings")]
    texts = [str(text) for texts in listed if isinstance(texts, list) for text in texts]
    return list(dict.fromkeys(texts))


def curves_section(runs: Sequence[Run]) -> Markup:
    tuning = finetune_plot(runs)
    plots = curve_plots(runs) + ([tuning] if tuning else [])
    if not plots:
        return NOTHING
    longest = max(len(run.pretrain) for run in runs)
    averaged = element(
        "p", f"Losses and accuracies are averaged to {MAX_POINTS} points.", class_="soft"
    )
    return section(
        "curves", "Training curves", plot_figures(plots), averaged if longest > MAX_POINTS else None
    )


def spectra_section(runs: Sequence[Run]) -> Markup:
    plots = spectrum_plots(runs)
    if not plots:
        return NOTHING
    explanation = element(
        "p",
        "Eigenvalues of the covariance of unit-length vectors. A spectrum that drops early leaves "
        "dimensions unused: dimensional collapse.",
        class_="soft",
    )
    return section("spectra", "Spectra", plot_figures(plots), explanation)


def _diagnostic_rows(run: Run, several: bool) -> list[list[object]]:
    """Features and embeddings at the last epoch; of a single run at the first one too."""
    first = [] if several else run.diagnostics[:-1][:1]
    rows: list[list[object]] = []
    for record in first + run.diagnostics[-1:]:
        for kind in ("features", "embeddings"):
            if values := part_of(record, kind):
                name = f"{kind}, epoch {finite(record['epoch']):g}"
                rows.append(
                    [f"{run.name}: {name}" if several else name, *_diagnostic_cells(values)]
                )
    return rows


def _diagnostic_cells(values: Record) -> list[str]:
    samples, dimensions = (finite(values.get(key)) for key in ("samples", "dimensions"))
    known = samples is not None and dimensions is not None
    return [
        number(values.get("rankme"), 1),
        f"{samples:.0f} {TIMES} {dimensions:.0f}" if known else DASH,
        number(values.get("rankme_centred"), 1),
        number(values.get("rank_share"), 2),
        number(values.get("alpha_req"), 2),
        number(values.get("mean_abs_correlation"), 2),
        number(values.get("std_sqrt_d"), 2),
        number(values.get("mean_share"), 2),
    ]
