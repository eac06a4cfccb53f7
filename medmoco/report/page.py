"""The page from top to bottom."""

from collections.abc import Sequence

from medmoco.report.html import Markup, element, page
from medmoco.report.record import (
    commands_section,
    configuration_section,
    files_section,
    timing_section,
)
from medmoco.report.results import (
    classes_section,
    main_table,
    volumes_section,
    words,
)
from medmoco.report.run_folder import Run, finite
from medmoco.report.training import (
    collapse_section,
    current_warnings,
    curves_section,
    spectra_section,
)
from medmoco.report.viewer import viewer_section

# Sections in the order of the page, by their anchors, as the navigation calls them.
SECTIONS = (
    ("classes", "Classes", classes_section),
    ("volumes", "Volumes", volumes_section),
    ("viewer", "Viewer", viewer_section),
    ("collapse", "Collapse", collapse_section),
    ("curves", "Curves", curves_section),
    ("spectra", "Spectra", spectra_section),
    ("files", "Skipped files", files_section),
    ("timing", "Timing", timing_section),
    ("configuration", "Configuration", configuration_section),
    ("commands", "Commands", commands_section),
)


def report_page(runs: Sequence[Run]) -> Markup:
    """The whole document of one run, or of several side by side."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs side by side"
    sections = [(anchor, name, build(runs)) for anchor, name, build in SECTIONS]
    present = [(anchor, name, content) for anchor, name, content in sections if content]
    links = [element("li", element("a", name, href=f"#{anchor}")) for anchor, name, _ in present]
    missing = [
        name.lower() for anchor, name, content in sections if not content and anchor != "files"
    ]
    header = element(
        "header",
        element("p", "medmoco report", class_="kicker"),
        element("h1", title),
        *(element("p", describe(run, len(runs) > 1), class_="lead") for run in runs),
        main_table(runs),
        words(runs),
        _warned(runs),
        element("nav", element("ul", *links), aria_label="Sections"),
    )
    left_out = f"Nothing was recorded for: {', '.join(missing)}. " if missing else ""
    versions = sorted({str(run.config["medmoco"]) for run in runs if run.config.get("medmoco")})
    made_by = f"Made from run folders of medmoco {', '.join(versions)}." if versions else ""
    footer = element("footer", element("p", left_out + made_by))
    scripted = any(anchor == "viewer" for anchor, _, _ in present)
    parts = (header, *(content for _, _, content in present), footer)
    return page(f"{title} · medmoco report", *parts, scripted=scripted)


def describe(run: Run, several: bool) -> str:
    """One sentence on what was run."""
    config = run.config
    arch, width = config.get("arch"), finite(config.get("width"))
    encoder = "An encoder" if arch is None else f"A {arch}"
    if width is not None and width != 1:
        encoder += f" of width {width:g}"
    if run.pretrain or run.diagnostics or config.get("command") in ("train", "pretrain"):
        training = f"was pretrained with {run.method} on {_images(run)}{_epochs(run)}"
    else:
        training = "was used without pretraining of its own"
    seed = config.get("seed")
    ending = f", seed {seed}." if seed is not None else "."
    return (f"{run.name}: " if several else "") + f"{encoder} {training}{_test(run)}{ending}"


def _images(run: Run) -> str:
    data, task = run.config.get("data"), run.config.get("task")
    if data is not None:
        return str(data)
    return "phantoms" if task is None else f"the images of {task}"


def _test(run: Run) -> str:
    volumes = {case for result in run.results.values() for case in result.per_volume}
    if not volumes:
        return "" if run.results else "; it was not tested on a segmentation task"
    task = run.config.get("task")
    of_task = f" of {task}" if task is not None else ""
    return f" and tested on {len(volumes)} volume{'s' if len(volumes) > 1 else ''}{of_task}"


def _epochs(run: Run) -> str:
    """How long it trained; of a run that stopped early, both what it did and what it was to do."""
    planned = finite(run.config.get("epochs"))
    last = run.diagnostics[-1] if run.diagnostics else run.pretrain[-1] if run.pretrain else {}
    done = finite(last.get("epoch"))
    if planned is None:
        return "" if done is None else f", {done:g} epochs recorded"
    plural = "" if planned == 1 else "s"
    if run.summary is None and done is not None and done < planned:
        return f" for {done:g} of {planned:g} epoch{plural}"
    return f" for {planned:g} epoch{plural}"


def _warned(runs: Sequence[Run]) -> Markup | None:
    """A pointer to the warnings, as they stand further down."""
    names = [run.name for run in runs if current_warnings(run)]
    if not names:
        return None
    link = element("a", "see below", href="#collapse")
    which = "" if len(runs) == 1 else f" ({', '.join(names)})"
    warning = element("strong", f"The features may have collapsed{which}: ")
    return element("div", element("p", warning, link, "."), class_="note warn")
