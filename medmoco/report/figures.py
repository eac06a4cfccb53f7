"""Plots as figures of the page, each in a light and in a dark version."""

from collections.abc import Sequence

from medmoco.report.html import Markup, data_uri, element
from medmoco.report.rendering import DARK, LIGHT, WIDTH, Plot, render_svg

CSS_PIXELS_AN_INCH = 96


def plot_figures(plots: Sequence[Plot], prefixes: Sequence[str] = ()) -> Markup:
    """Plots side by side where there is room, below each other where there is not.

    Args:
        plots: what to draw.
        prefixes: what to write before each title, such as the run's name; none by default.
    """
    titles = [plot.title for plot in plots]
    if prefixes:
        titles = [
            f"{p}: {title}" if p else title for p, title in zip(prefixes, titles, strict=True)
        ]
    pairs = zip(titles, plots, strict=True)
    return element("div", *(_figure(title, plot) for title, plot in pairs), class_="plots")


def _figure(title: str, plot: Plot) -> Markup:
    light, dark = (data_uri(render_svg(plot, theme), "image/svg+xml") for theme in (LIGHT, DARK))
    width, height = (round(CSS_PIXELS_AN_INCH * inches) for inches in (WIDTH, plot.height))
    picture = element(
        "picture",
        element("source", media="(prefers-color-scheme: dark)", srcset=dark),
        element("img", src=light, alt=plot.alt, width=width, height=height),
    )
    return element("figure", element("h3", title), picture)
