r"""Draws the picture at the head of README.md from finished runs of `medmoco train`.

    python benchmarks/picture.py runs/mocov2 runs/medmoco --output benchmarks/results/picture.png

Left the spectra of the embeddings of all runs, before and after pretraining; right the worst and
the best test case of the last run's fine-tuned model, each at the slice that shows most of the
organs. The runs of the picture in the repository were made by

    python -m medmoco.train --task Task04_Hippocampus --split benchmarks/splits/hippocampus.json \
        --width 0.25 --output-stride 8 --epochs 20 --no-controls --device cpu \
        --method mocov2 --output runs/mocov2

and the same with medmoco.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from flags import parser_for
from medmoco.command import run_command
from medmoco.errors import UserError
from medmoco.output import write_bytes_atomic
from medmoco.report.cases import ShownCase, read_cases, read_prediction
from medmoco.report.comparison import volume_mean
from medmoco.report.plots import spectrum_plots
from medmoco.report.rendering import LIGHT, Plot, Theme, render
from medmoco.report.run_folder import MODEL_FOLDERS, Run, read_run
from medmoco.report.viewer import COLOURS

MODEL = "fine-tuned"
OPACITY = 0.6  # of the masks
GAP = 2  # pixels between panels


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the picture, and prints what it shows."""
    parser = parser_for(__doc__)
    parser.add_argument(
        "runs", type=Path, nargs="+", help="folders; the last one's cases are shown"
    )
    parser.add_argument("--output", type=Path, required=True, help="PNG file to write")
    flags = parser.parse_args(argv)
    runs = [read_run(folder) for folder in flags.runs]
    spectra = spectrum_plots(runs)
    if not spectra:
        raise UserError(f"{runs[0].folder}: expected a pretraining run, got one without spectra")
    plots = [spectra[-1], cases_plot(runs[-1])]
    write_bytes_atomic(flags.output, render(plots, LIGHT, "png"))
    print("\n".join([plot.alt for plot in plots] + [f"\npicture: {flags.output}"]))


def cases_plot(run: Run) -> Plot:
    """The worst and the best case, a row each: the scan, with its truth, with the prediction.

    Raises:
        UserError: the run has no fine-tuned model, or its label maps are gone.
    """
    result, cases = run.results.get(MODEL), read_cases(run.folder)
    if result is None or not cases:
        raise UserError(f"{run.folder}: expected a run with a fine-tuned model and its test cases")
    chosen = {"worst": cases[0], "best": cases[-1]}
    scores = {name: volume_mean(result.per_volume[case.case]) for name, case in chosen.items()}
    labels = [f"{name} test case,\nDice {score:.2f}" for name, score in scores.items()]
    rows = [panels(run, case) for case in chosen.values()]
    height, width = (max(row[0].shape[axis] for row in rows) + GAP for axis in (0, 1))
    columns = len(rows[0])
    picture = np.ones((len(rows) * height, columns * width, 3))
    for y, row in enumerate(rows):
        for x, panel in enumerate(row):
            picture[y * height :, x * width :][: panel.shape[0], : panel.shape[1]] = panel

    def draw(axes: Axes, theme: Theme) -> None:
        axes.imshow(picture, interpolation="nearest")
        axes.set_xticks(
            [(x + 0.5) * width for x in range(columns)], ["scan", "truth", "prediction"]
        )
        axes.set_yticks([(y + 0.5) * height for y in range(len(rows))], labels)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)

    alt = f"{run.name}, fine-tuned: " + "; ".join(
        f"{name} test case {case.case}, Dice {scores[name]:.3f}" for name, case in chosen.items()
    )
    return Plot("Segmentation of new patients", alt, draw)


def panels(run: Run, case: ShownCase) -> list[np.ndarray]:
    """RGB pictures of one slice, square pixels: the scan, with the truth, with the prediction."""
    path = run.folder / "predictions" / MODEL_FOLDERS[MODEL] / f"{case.case}.nii.gz"
    prediction = read_prediction(path, case)
    if prediction is None:
        raise UserError(f"{path}: expected the label map of a test case, got no file")
    fullest = int((case.truth > 0).sum(axis=(1, 2)).argmax())
    grey = case.image[fullest, ..., None].repeat(3, axis=2) / 255
    palette = np.array([to_rgb(colour) for colour in COLOURS])
    shown = [grey]
    for labels in (case.truth[fullest], prediction[fullest]):
        colours = palette[(labels.astype(int) - 1) % len(palette)]
        masked = (1 - OPACITY) * grey + OPACITY * colours
        shown.append(np.where(labels[..., None] > 0, masked, grey))
    spacing = np.array(case.spacing[1:]) * case.step[1:]
    pixels = np.rint(np.array(grey.shape[:2]) * spacing / spacing.min()).astype(int)
    rows, columns = (
        np.arange(count) * size // count for count, size in zip(pixels, grey.shape, strict=False)
    )
    return [panel[rows][:, columns] for panel in shown]


if __name__ == "__main__":
    sys.exit(run_command(main))
