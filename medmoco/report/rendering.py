"""How plots are drawn: with matplotlib's objects, in light and in dark ink."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 4.2  # inches
HEIGHT = 3.1


@dataclass(frozen=True)
class Theme:
    """Colours after Okabe & Ito, told apart by colour-blind readers, as light or dark ink."""

    ink: str
    faint: str
    palette: tuple[str, ...]


LIGHT = Theme(
    "#1c2430", "#8a93a0", ("#0072b2", "#d55e00", "#007a59", "#b0558a", "#8a6d00", "#3f3f9f")
)
DARK = Theme(
    "#e6e9ee", "#7d8794", ("#56b4e9", "#e69f00", "#2fc49a", "#de92bd", "#f0e442", "#a9a9ff")
)


@dataclass(frozen=True)
class Plot:
    """One pair of axes: `draw` fills it, `alt` says in words what it shows."""

    title: str
    alt: str
    draw: Callable[[Axes, Theme], None]
    height: float = HEIGHT


def render_svg(plot: Plot, theme: Theme) -> bytes:
    """The plot as SVG on a transparent ground; the same plot gives the same bytes."""
    return render([plot], theme, "svg")


def render(plots: Sequence[Plot], theme: Theme, kind: str) -> bytes:
    """Plots side by side; `kind` png has titles and a white ground, svg neither."""
    style: dict[Any, Any] = {
        "svg.hashsalt": "medmoco",  # else the ids in the file are drawn at random
        "font.size": 10.0,
        "axes.edgecolor": theme.faint,
        "axes.labelcolor": theme.ink,
        "axes.titlecolor": theme.ink,
        "text.color": theme.ink,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": theme.faint,
        "grid.alpha": 0.3,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
    }
    with matplotlib.rc_context(style):
        size = (WIDTH * len(plots), max(plot.height for plot in plots))
        figure = Figure(figsize=size, layout="constrained")
        for axes, plot in zip(figure.subplots(1, len(plots), squeeze=False)[0], plots, strict=True):
            plot.draw(axes, theme)
            axes.patch.set_alpha(0)
            labels = axes.get_legend_handles_labels()[1]
            if kind == "png":
                axes.set_title(plot.title, fontsize=11, loc="left")
            if labels and kind == "png":
                axes.legend()
            elif labels:  # above the axes, where it hides nothing
                columns = 2 if max(map(len, labels)) < 20 else 1
                axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns)
        buffer = io.BytesIO()
        if kind == "svg":
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        else:
            figure.savefig(buffer, format="png", dpi=150, facecolor="white")
        return buffer.getvalue()
