"""The curve of fine-tuning, beside those of pretraining."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from medmoco.report.plots import colour_of, name_colours
from medmoco.report.rendering import Plot, Theme
from medmoco.report.run_folder import Run, finite

STYLES = {"pretrained": "-", "scratch": "--"}
NAMES = {"pretrained": "fine-tuned", "scratch": "from scratch"}


def finetune_plot(runs: Sequence[Run]) -> Plot | None:
    """Loss over the epochs of fine-tuning; None where no run recorded it."""
    curves: list[tuple[Run, str, list[float], list[float]]] = []
    for run in runs:
        for encoder in STYLES:
            points = [
                (float(record["epoch"]), loss)
                for record in run.segmentation
                if (record["stage"], record.get("encoder")) == ("finetune", encoder)
                and (loss := finite(record.get("loss"))) is not None
            ]
            if points:
                epochs, losses = (list(values) for values in zip(*points, strict=True))
                curves.append((run, encoder, epochs, losses))
    if not curves:
        return None

    def draw(axes: Axes, theme: Theme) -> None:
        for run, encoder, epochs, losses in curves:
            axes.plot(epochs, losses, STYLES[encoder], lw=1.6, color=colour_of(theme, runs, run))
        for encoder in dict.fromkeys(encoder for _, encoder, _, _ in curves):
            axes.plot([], [], STYLES[encoder], lw=1.6, color=theme.ink, label=NAMES[encoder])
        name_colours(axes, theme, runs)
        axes.set(xlabel="epoch", ylabel="Dice + cross-entropy")
        axes.set_xlim(left=0)

    ends = "; ".join(
        f"{run.name}, {NAMES[encoder]}: from {losses[0]:.3g} to {losses[-1]:.3g}"
        for run, encoder, _, losses in curves
    )
    return Plot("Fine-tuning loss", f"Fine-tuning loss over its epochs. {ends}.", draw)
