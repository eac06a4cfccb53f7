"""Pictures of predicted and true contours over slices, as SVG inside the page."""

import io
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from medmoco.errors import UserError
from medmoco.report.html import Markup, data_uri, element

MAX_SLICES = 8  # of one run
MAX_PIXELS = 320  # side of an embedded image
MODEL_NAMES = {
    "linear-pretrained": "linear",
    "linear-random": "frozen random",
    "finetune-pretrained": "fine-tuned",
    "finetune-scratch": "from scratch",
}
# Okabe & Ito's colours, in the order in which they differ most on black.
COLOURS = ("#56b4e9", "#e69f00", "#2fc49a", "#f0e442", "#de92bd", "#ff6f2c", "#7f9cff")
ARRAYS = {"image": 3, "truth": 3, "prediction": 3, "case": 1, "slice": 1, "stage": 1}


@dataclass(frozen=True, eq=False)
class Overlay:
    """One slice: image (S,S) uint8, truth and prediction (S,S) uint8 class indices.

    `stage` is the stage and the encoder, such as linear-pretrained.
    """

    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    case: str
    slice: int
    stage: str


def read_overlays(path: Path) -> list[Overlay]:
    """Reads overlays.npz; pickles in it are refused.

    Raises:
        UserError: the file is broken, an array is missing, or shapes or types are not as expected.
    """
    try:
        # Opened here, as numpy leaves a file open that turns out to be no archive.
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ARRAYS}
    except KeyError as error:
        raise UserError(f"{path}: expected the array {error}, which is missing") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, TypeError) as error:
        raise UserError(f"{path}: expected arrays written by numpy.savez: {error}") from error
    pictures = arrays["image"].shape
    for name, dimensions in ARRAYS.items():
        array = arrays[name]
        expected = pictures if dimensions == 3 else pictures[:1]
        if array.ndim != dimensions or array.shape != expected:
            raise UserError(f"{path}: {name} must have shape {expected}, got {array.shape}")
        kind = {"case": "U", "stage": "U", "slice": "iu"}.get(name, "u")
        if array.dtype.kind not in kind or (kind == "u" and array.dtype != np.uint8):
            raise UserError(f"{path}: {name} has an unexpected type, {array.dtype}")
    return [
        Overlay(image, truth, prediction, str(case), int(position), str(stage))
        for image, truth, prediction, case, position, stage in zip(
            *(arrays[name] for name in ARRAYS), strict=True
        )
    ]


def group_by_slice(overlays: Sequence[Overlay]) -> list[list[Overlay]]:
    """Predictions of the same slice together, at most MAX_SLICES slices spread over the file."""
    groups: dict[tuple[object, ...], list[Overlay]] = {}
    for overlay in overlays:
        # Models that work on grids of their own have other images and truths of one slice.
        seen = overlay.image.tobytes(), overlay.truth.tobytes()
        groups.setdefault((overlay.case, overlay.slice, *seen), []).append(overlay)
    slices = list(groups.values())
    count = min(len(slices), MAX_SLICES)
    return [slices[i] for i in np.linspace(0, len(slices) - 1, count).round().astype(int)]


def slice_figure(group: Sequence[Overlay], names: Sequence[str], anchor: str) -> Markup:
    """The truth and each model's prediction over the same slice, side by side.

    Args:
        group: of one slice, as `group_by_slice` gives it.
        names: of the classes, background first.
        anchor: an id that no other element of the page has.
    """
    first = group[0]
    side = first.image.shape[0]
    picture = element(
        "image",
        id=anchor,
        href=data_uri(_png(first.image), "image/png"),
        width=side,
        height=side,
    )
    # The image's bytes stand in the page once; the other panels refer to them.
    again = element("use", href=f"#{anchor}")
    caption = f"{first.case}, slice {first.slice}"
    present = [class_name(names, c) for c in np.unique(first.truth).tolist() if c > 0]
    alt = f"Truth of {caption}: {', '.join(present) or 'no class'}"
    panels = [_panel("truth", alt, picture, first.truth)]
    for overlay in group:
        name = MODEL_NAMES.get(overlay.stage, overlay.stage)
        alt = f"Prediction of {caption}, {name}. Dice: {_agreement(overlay, names)}"
        panels.append(_panel(name, alt, again, overlay.prediction))
    grid = element("div", *panels, class_="panels")
    return element("figure", element("figcaption", caption), grid, class_="slice")


def _panel(name: str, alt: str, picture: Markup, labels: np.ndarray) -> Markup:
    box = f"0 0 {labels.shape[1]} {labels.shape[0]}"
    drawing = element("svg", picture, *_contours(labels), viewBox=box, role="img", aria_label=alt)
    return element("div", drawing, element("span", name))


def legend(names: Sequence[str], classes: Sequence[int]) -> Markup:
    """Line samples and names of classes; beyond the palette's length the lines are dashed."""
    entries = []
    for c in classes:
        line = element("line", x1=1, y1=5, x2=27, y2=5, **_stroke(c))
        sample = element("svg", line, viewBox="0 0 28 10", aria_hidden="true")
        entries.append(element("li", sample, class_name(names, c)))
    return element("ul", *entries, class_="legend", aria_label="classes")


def class_name(names: Sequence[str], index: int) -> str:
    return names[index] if index < len(names) else f"class {index}"


def _agreement(overlay: Overlay, names: Sequence[str]) -> str:
    """Dice of each class in this slice."""
    scores = []
    for index in np.union1d(np.unique(overlay.truth), np.unique(overlay.prediction)).tolist():
        truth, prediction = overlay.truth == index, overlay.prediction == index
        if index > 0:
            dice = 2 * (truth & prediction).sum() / (truth.sum() + prediction.sum())
            scores.append(f"{class_name(names, index)} {dice:.2f}")
    return ", ".join(scores) or "no class in truth or prediction"


def _png(image: np.ndarray) -> bytes:
    picture = Image.fromarray(image)
    if max(image.shape) > MAX_PIXELS:
        picture = picture.resize((MAX_PIXELS, MAX_PIXELS), Image.Resampling.BOX)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _stroke(index: int) -> dict[str, object]:
    colour = COLOURS[(index - 1) % len(COLOURS)]
    return {"stroke": colour, "stroke_dasharray": "4 2" if index > len(COLOURS) else None}


def _contours(labels: np.ndarray) -> list[Markup]:
    """A path per class along the boundary of its pixels, corners cut."""
    axes = Figure().subplots()
    paths = []
    for index in np.unique(labels[labels > 0]).tolist():
        # A border of zeros closes the contours of regions that touch the edge.
        mask = np.pad((labels == index).astype(np.float32), 1)
        outlines = axes.contour(mask, levels=[0.5]).allsegs[0]
        # Contour coordinates are pixel centres of the padded map; SVG's are pixel corners.
        drawn = "".join(
            "M" + "L".join(f"{x - 0.5:g} {y - 0.5:g}" for x, y in outline[:-1]) + "Z"
            for outline in outlines
        )
        style = _stroke(index)
        paths.append(element("path", d=drawn, fill=style["stroke"], class_="class", **style))
    return paths
