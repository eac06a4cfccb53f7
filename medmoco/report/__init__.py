"""The report: one self-contained HTML page for one run or for several side by side."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from medmoco.errors import UserError
from medmoco.output import write_text
from medmoco.printing import say
from medmoco.report.page import report_page
from medmoco.report.plots import write_plots
from medmoco.report.record import next_command
from medmoco.report.run_folder import Run, read_run

__all__ = ["Run", "main", "next_command", "read_run", "report_page", "write_plots", "write_report"]


def write_report(run_dirs: Sequence[Path], output: Path) -> Path:
    """Writes the page that shows the runs; the same folders give the same bytes.

    Raises:
        UserError: a folder is no run or is given twice, a file in it is broken, or there is no
            folder for the output.
        Fault: the output cannot be written.
    """
    folders = [Path(folder) for folder in run_dirs]
    places = [folder.resolve() for folder in folders]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise UserError(f"{folders[i]}: expected different runs, got this one twice")
    output = Path(output)
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: expected a folder that exists, got {output.parent}")
    write_text(output, report_page([read_run(folder) for folder in folders]))
    return output


def main(argv: Sequence[str] | None = None) -> None:
    """`medmoco report RUN [RUN ...] [--output FILE]`."""
    parser = argparse.ArgumentParser(prog="medmoco report", description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="default: report.html in the run's folder, or beside the folders of several runs",
    )
    given = parser.parse_args(argv)
    folder = given.runs[0] if len(given.runs) == 1 else given.runs[0].resolve().parent
    written = write_report(given.runs, given.output or folder / "report.html")
    say(f"report: {written}")
