"""The viewer: slices of the worst and best test cases under the masks of truth and models."""

import json
from collections.abc import Sequence

import numpy as np

from medmoco.report.comparison import volume_mean
from medmoco.report.html import (
    DASH,
    NOTHING,
    Markup,
    element,
    model_head,
    note,
    number,
    section,
    table,
)
from medmoco.report.masks import Entry, Model, class_names, gather, leading_model
from medmoco.report.run_folder import Run

# Okabe & Ito's colours, in the order in which they differ most on black.
COLOURS = ("#56b4e9", "#e69f00", "#2fc49a", "#f0e442", "#de92bd", "#ff6f2c", "#7f9cff")
DIFFERENCES = {"missed": "#ff6f2c", "added": "#56b4e9", "another class": "#f0e442"}


def viewer_section(runs: Sequence[Run]) -> Markup:
    """Nothing where no run has kept a case. Its script is `script.SCRIPT`.

    Raises:
        UserError: what a run has kept, or a label map, is broken.
    """
    entries, left_out = gather(runs)
    if not entries:
        return NOTHING
    models = list(dict.fromkeys(model for entry in entries for model in entry.masks))
    data = {
        "cases": [_aligned(entry, models) for entry in entries],
        "colours": COLOURS,
        "differences": list(DIFFERENCES.values()),
        "kinds": list(DIFFERENCES),
    }
    # In a script element nothing but "<" can end the content.
    content = Markup(json.dumps(data).replace("<", "\\u003c"))
    names = ["truth", *(_name(model, runs) for model in models)]
    missing = f"No room on the page for: {', '.join(left_out)}." if left_out else None
    return section(
        "viewer",
        "Slices of the worst and best cases",
        _introduction(runs),
        element("noscript", note("warn", "The viewer needs JavaScript, which is turned off.")),
        _controls(entries, runs),
        element("p", role="status", id="viewer-state"),
        element("div", *(_panel(name) for name in names), class_="panels"),
        element("ul", *(_swatch(c, n) for n, c in DIFFERENCES.items()), class_="legend",
                id="viewer-contrast", aria_label="differences to the truth", hidden=True),
        *(_about(entry, models, runs) for entry in entries),
        element("p", missing, class_="soft") if missing else None,
        element("script", content, type="application/json", id="viewer-data"),
    )  # fmt: skip


def _introduction(runs: Sequence[Run]) -> Markup:
    several = len(runs) > 1
    leading = [(run, name) for run in runs if (name := leading_model(run)) is not None]
    names = [f"{name} of {run.name}" if several else name for run, name in leading]
    return element(
        "p",
        f"Chosen by mean Dice: {'; '.join(names)}. The left and right arrow keys move the slider. "
        "Pictures are compressed, masks are not; Dice is that of the whole volume.",
        class_="soft",
    )


def _name(model: Model, runs: Sequence[Run]) -> str:
    return f"{model.run.name}: {model.name}" if len(runs) > 1 else model.name


def _aligned(entry: Entry, models: Sequence[Model]) -> dict[str, object]:
    """The entry for the script, with null in the place of models that have no mask of it."""
    truth, *found = entry.packed["maps"]
    by_model = dict(zip(entry.masks, found, strict=True))
    return entry.packed | {"maps": [truth, *(by_model.get(model) for model in models)]}


def _controls(entries: Sequence[Entry], runs: Sequence[Run]) -> Markup:
    def labelled(text: str, control: Markup, name: str) -> Markup:
        return element("div", element("label", text, for_=name), control)

    def switch(kind: str, text: str, **attributes: object) -> Markup:
        return element("label", element("input", type=kind, autocomplete="off", **attributes), text)

    chooser = element("select", *_options(entries, runs), id="viewer-case", autocomplete="off")
    slider = element(
        "input", type="range", id="viewer-slice", min=0, max=0, value=0, step=1, disabled=True,
        autocomplete="off",
    )  # fmt: skip
    place = element("span", id="viewer-place", aria_hidden="true")
    modes = element(
        "fieldset",
        element("legend", "Masks", class_="unseen"),
        switch("checkbox", "masks", id="viewer-masks", checked=True),
        switch("radio", "classes", name="viewer-mode", id="viewer-classes", checked=True),
        switch("radio", "difference to the truth", name="viewer-mode", id="viewer-difference"),
    )
    return element(
        "div",
        labelled("Case", chooser, "viewer-case"),
        labelled("Slice", element("span", slider, place, class_="slide"), "viewer-slice"),
        modes,
        class_="controls",
    )


def _options(entries: Sequence[Entry], runs: Sequence[Run]) -> list[Markup]:
    groups: dict[str, list[Markup]] = {}
    for i, entry in enumerate(entries):
        leading = leading_model(entry.run)
        scores = entry.run.results[leading].per_volume if leading else {}
        dice = number(volume_mean(scores.get(entry.shown.case, {})))
        of_run = f" of {entry.run.name}" if len(runs) > 1 else ""
        group = f"{'worst' if entry.worst else 'best'}{of_run}, {leading or DASH}"
        option = element("option", f"{entry.shown.case}: Dice {dice}", value=i)
        groups.setdefault(group, []).append(option)
    return [element("optgroup", *options, label=name) for name, options in groups.items()]


def _panel(name: str) -> Markup:
    # The canvas lies on the picture, and says in words what both show.
    layers = element("div", element("img", alt=""), element("canvas", role="img"))
    return element("figure", layers, element("figcaption", name), class_="panel")


def _about(entry: Entry, models: Sequence[Model], runs: Sequence[Run]) -> Markup:
    """The legend of a case, whose boxes turn classes off, and its Dice by class and model."""
    shown = entry.shown
    maps = (shown.truth, *entry.masks.values())
    present = np.unique(np.concatenate([np.unique(labels) for labels in maps])).tolist()
    names = class_names(entry.run.classes, len(shown.values))
    boxes = [
        _swatch(COLOURS[(c - 1) % len(COLOURS)], names[c], c, dashed=c > len(COLOURS))
        for c in present
        if c > 0
    ]
    tested = [m for m in models if shown.case in m.result.per_volume]
    scores = [model.result.per_volume[shown.case] for model in tested]
    classes = list(dict.fromkeys(name for row in scores for name in row))
    rows = [[name, *(number(row.get(name)) for row in scores)] for name in classes]
    rows.append(["mean", *(number(volume_mean(row)) for row in scores)])
    heads = ["Class", *(model_head(model.name, model.run, runs) for model in tested)]
    return element(
        "div",
        element("ul", *boxes, class_="legend", aria_label="classes"),
        element("p", taken, class_="soft") if (taken := _taken(entry)) else None,
        table(f"Dice of {shown.case}", heads, rows, marked=[len(rows) - 1]),
        class_="about-case",
        hidden=True,
    )


def _taken(entry: Entry) -> str:
    """How the slices were thinned, if they were."""
    slices, *plane = entry.shown.step
    parts = [f"one slice of {slices}"] if slices > 1 else []
    if max(plane) > 1:
        parts.append(f"one pixel for {plane[0]} x {plane[1]}")
    return f"This volume is large. Shown: {' and '.join(parts)}." if parts else ""


def _swatch(colour: str, name: str, value: int | None = None, dashed: bool = False) -> Markup:
    dashes = "4 2" if dashed else None
    line = element("line", x1=1, y1=5, x2=27, y2=5, stroke=colour, stroke_dasharray=dashes)
    sample = element("svg", line, viewBox="0 0 28 10", aria_hidden="true")
    if value is None:
        return element("li", sample, name)
    box = element("input", type="checkbox", value=value, checked=True, autocomplete="off")
    return element("li", element("label", box, sample, name))
