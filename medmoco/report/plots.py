"""The plots: curves, spectra and Dice of one run, or of several in the same axes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from medmoco.output import write_bytes_atomic
from medmoco.report.rendering import HEIGHT, LIGHT, Plot, Theme, render
from medmoco.report.run_folder import Record, Run, finite, part_of, read_run

Curve = tuple[Run, np.ndarray, np.ndarray]  # epochs trained, values

MAX_POINTS = 400
FIRST_EPOCH = (0, (2, 1.5))  # dashes
SPECTRUM_FLOOR = 1e-10  # of the largest eigenvalue; below it float32 holds only noise


def curve_plots(runs: Sequence[Run]) -> list[Plot]:
    """Loss, top-1 accuracy and effective rank over the epochs; what no run has is left out."""
    plots = [_loss_plot(runs), _accuracy_plot(runs), _rank_plot(runs)]
    return [plot for plot in plots if plot is not None]


def spectrum_plots(runs: Sequence[Run]) -> list[Plot]:
    """Eigenvalues of features and of embeddings, at the first and at the last epoch."""
    plots = [_spectrum_plot(runs, kind) for kind in ("features", "embeddings")]
    return [plot for plot in plots if plot is not None]


def dice_plot(run: Run) -> Plot | None:
    """Dice of every test volume, a row of points per class and model."""
    results = {name: r for name, r in run.results.items() if r.per_volume}
    if not results:
        return None
    volumes = [scores for r in results.values() for scores in r.per_volume.values()]
    classes = list(dict.fromkeys(name for scores in volumes for name in scores))

    def draw(axes: Axes, theme: Theme) -> None:
        height = 0.8 / len(results)
        for i, (name, result) in enumerate(results.items()):
            colour = theme.palette[i % len(theme.palette)]
            axes.plot([], [], "o", ms=5, color=colour, label=name)
            for j, label in enumerate(classes):
                scores = [s for v in result.per_volume.values() if (s := v.get(label)) is not None]
                place = np.full(len(scores), j - 0.4 + height * (i + 0.5))
                axes.plot(scores, place, "o", ms=4.5, mew=0, alpha=0.45, color=colour)
                if scores:
                    axes.plot(np.mean(scores), place[0], "|", ms=11, mew=2.2, color=colour)
        axes.set(xlabel="Dice", xlim=(-0.02, 1.02), ylim=(len(classes) - 0.5, -0.5))
        axes.set_yticks(range(len(classes)), [short(label) for label in classes])
        axes.grid(axis="y", visible=False)

    rows = max(HEIGHT, 1 + 0.16 * len(results) * len(classes))
    alt = "; ".join(f"{name}: mean {_words(r.mean)}" for name, r in results.items())
    return Plot(
        "Dice of each test volume", f"Dice of each test volume by class. {alt}.", draw, rows
    )


def write_plots(run_dir: Path) -> list[Path]:
    """Writes curves.png and spectrum.png into a run folder, each if the run has data for it.

    Raises:
        UserError: the folder is no run, or a file of it is broken.
    """
    runs = [read_run(run_dir)]
    written = []
    for name, plots in (("curves.png", curve_plots(runs)), ("spectrum.png", spectrum_plots(runs))):
        if plots:
            path = Path(run_dir) / name
            write_bytes_atomic(path, render(plots, LIGHT, "png"))
            written.append(path)
    return written


def _loss_plot(runs: Sequence[Run]) -> Plot | None:
    totals = _curves(runs, "loss")
    if not totals:
        return None
    # Chance belongs to the global term; the total has the local and decorrelation terms on top.
    terms = _curves(runs, "loss_global")
    curves = terms if len(terms) == len(totals) else totals
    chances = sorted({c for run, _, _ in curves for c in _values(run.pretrain, "chance")[-1:]})
    pairs = zip(totals, curves, strict=True)
    differs = not all(np.array_equal(total[2], term[2]) for total, term in pairs)

    def draw(axes: Axes, theme: Theme) -> None:
        for run, epochs, values in curves:
            axes.plot(epochs, values, color=colour_of(theme, runs, run), lw=1.6)
        if differs:
            for run, epochs, values in totals:
                axes.plot(epochs, values, color=colour_of(theme, runs, run), lw=1.1, ls=":")
            axes.plot([], [], color=theme.ink, lw=1.6, label="global")
            axes.plot([], [], color=theme.ink, lw=1.1, ls=":", label="with all terms")
        for i, chance in enumerate(chances):
            shown = "chance, log(K+1)" if i == 0 else None
            axes.axhline(chance, color=theme.ink, ls=(0, (5, 3)), lw=1.1, label=shown)
        name_colours(axes, theme, runs)
        axes.set(xlabel="epoch", ylabel="loss (nats)")
        axes.set_xlim(left=0)

    at = ", ".join(f"{chance:.3g}" for chance in chances) or "not recorded"
    return Plot(
        "Pretraining loss", f"Pretraining loss. {_ends(curves)}. Chance, log(K+1): {at}.", draw
    )


def _accuracy_plot(runs: Sequence[Run]) -> Plot | None:
    curves = _curves(runs, "acc1")
    if not curves:
        return None

    def draw(axes: Axes, theme: Theme) -> None:
        for run, epochs, values in curves:
            axes.plot(epochs, values, color=colour_of(theme, runs, run), lw=1.6)
        name_colours(axes, theme, runs)
        axes.set(xlabel="epoch", ylabel="share of queries", ylim=(-0.02, 1.02))
        axes.set_xlim(left=0)

    title = "Positive ranked first (acc1)"
    return Plot(title, f"Share of queries whose positive is ranked first. {_ends(curves)}.", draw)


def _rank_plot(runs: Sequence[Run]) -> Plot | None:
    curves = {kind: _rank_curves(runs, kind) for kind in ("features", "embeddings")}
    if not any(curves.values()):
        return None

    def draw(axes: Axes, theme: Theme) -> None:
        for kind, style in (("features", "o-"), ("embeddings", "s--")):
            for run, epochs, ranks in curves[kind]:
                axes.plot(epochs, ranks, style, ms=4, lw=1.6, color=colour_of(theme, runs, run))
            if curves[kind]:
                axes.plot([], [], style, ms=4, color=theme.ink, label=kind)
        name_colours(axes, theme, runs)
        axes.set(xlabel="epoch", ylabel="RankMe")
        axes.set_ylim(bottom=0)

    alt = " ".join(f"Of {kind}: {_ends(found)}." for kind, found in curves.items() if found)
    return Plot("Effective rank", f"Effective rank over the epochs. {alt}", draw)


def _rank_curves(runs: Sequence[Run], kind: str) -> list[Curve]:
    curves = []
    for run in runs:
        steps = _steps_an_epoch(run)
        points = [
            (_trained(record, steps), rank)
            for record in run.diagnostics
            if (rank := finite(part_of(record, kind).get("rankme"))) is not None
        ]
        if points:
            epochs, ranks = np.array(points).T
            curves.append((run, epochs, ranks))
    return curves


def _spectrum_plot(runs: Sequence[Run], kind: str) -> Plot | None:
    curves = []
    for run in runs:
        with_spectrum = [
            (record, values)
            for record in run.diagnostics
            if (values := _spectrum(part_of(record, kind))).size
        ]
        # A run of one epoch has one spectrum, which is then the last.
        curves += [(run, False, *entry) for entry in with_spectrum[:-1][:1]]
        curves += [(run, True, *entry) for entry in with_spectrum[-1:]]
    if not curves:
        return None

    def draw(axes: Axes, theme: Theme) -> None:
        for run, last, record, values in curves:
            axes.plot(
                np.arange(1, values.size + 1),
                np.maximum(values, values[0] * SPECTRUM_FLOOR),
                color=colour_of(theme, runs, run),
                lw=1.8 if last else 1.3,
                ls="-" if last else FIRST_EPOCH,
                label=f"epoch {finite(record['epoch']):g}" if len(runs) == 1 else None,
            )
        if len(runs) > 1:
            axes.plot([], [], ls=FIRST_EPOCH, color=theme.ink, label="first epoch")
            axes.plot([], [], ls="-", color=theme.ink, label="last epoch")
            name_colours(axes, theme, runs)
        axes.set_yscale("log")
        axes.set(xlabel="eigenvalue, largest first", ylabel="eigenvalue of the covariance")

    alt = "; ".join(
        f"{run.name}, epoch {finite(record['epoch']):g}: largest {values[0]:.2g}, "
        f"smallest positive {values[-1]:.2g}"
        for run, _, record, values in curves
    )
    return Plot(f"Spectrum, {kind}", f"Eigenvalues of the {kind}, logarithmic. {alt}.", draw)


def _values(records: Sequence[Record], key: str) -> list[float]:
    return [value for record in records if (value := finite(record.get(key))) is not None]


def _spectrum(diagnosis: Record) -> np.ndarray:
    """Positive eigenvalues in descending order, float64.

    N samples span at most N - 1 directions; what is left of the others is rounding and would
    stretch the axis by ten decades.
    """
    values, samples = diagnosis.get("spectrum"), finite(diagnosis.get("samples"))
    numbers = values if isinstance(values, list) else []
    kept = [v for v in (finite(value) for value in numbers) if v is not None and v > 0]
    most = None if samples is None else max(int(samples) - 1, 1)
    return np.sort(np.array(kept, dtype=np.float64))[::-1][:most]


def _steps_an_epoch(run: Run) -> float | None:
    """Steps in an epoch: the last record of a whole epoch is at the end of it."""
    first = min((record["epoch"] for record in run.pretrain), default=0)
    shares = [
        step / (record["epoch"] - first + 1)
        for record in run.pretrain
        if (step := finite(record.get("step"))) is not None
    ]
    return max(shares, default=0) or None


def _trained(record: Record, steps_an_epoch: float | None) -> float:
    """Epochs trained when the record was written, with the steps of an unfinished one."""
    step = finite(record.get("step"))
    if step is None or steps_an_epoch is None:
        return float(record["epoch"])
    return step / steps_an_epoch


def _curves(runs: Sequence[Run], key: str) -> list[Curve]:
    """The curves of the runs that recorded `key`."""
    curves = [(run, *_curve(run, key)) for run in runs]
    return [curve for curve in curves if curve[2].size]


def _ends(curves: Sequence[Curve]) -> str:
    """First and last value of each curve, in words."""
    return "; ".join(f"{run.name}: from {v[0]:.3g} to {v[-1]:.3g}" for run, _, v in curves)


def _curve(run: Run, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs trained and values of `key`, averaged to at most MAX_POINTS points."""
    steps = _steps_an_epoch(run)
    epochs = np.array([_trained(record, steps) for record in run.pretrain])
    values = np.array([finite(record.get(key)) for record in run.pretrain], dtype=np.float64)
    kept = np.isfinite(values)
    epochs, values = epochs[kept], values[kept]
    if values.size <= MAX_POINTS:
        return epochs, values
    bins = np.array_split(np.arange(values.size), MAX_POINTS)
    return np.array([epochs[b].mean() for b in bins]), np.array([values[b].mean() for b in bins])


def name_colours(axes: Axes, theme: Theme, runs: Sequence[Run]) -> None:
    """Entries of the legend that say which run has which colour, if there are several."""
    for run in runs if len(runs) > 1 else ():
        axes.plot([], [], lw=3, color=colour_of(theme, runs, run), label=short(run.name))


def colour_of(theme: Theme, runs: Sequence[Run], run: Run) -> str:
    return theme.palette[runs.index(run) % len(theme.palette)]


def short(name: str, length: int = 22) -> str:
    """A name that fits a legend; matplotlib hides labels that begin with an underscore."""
    visible = "".join(c if c.isprintable() else "?" for c in name).lstrip("_") or "run"
    shortened = visible if len(visible) <= length else visible[: length - 1] + "…"
    return shortened.replace("$", r"\$")  # else a pair of them begins a formula


def _words(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
