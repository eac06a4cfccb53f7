"""Results of a benchmark: rows, a table for people, CSV and JSON for machines."""

import csv
import dataclasses
import io
import math
import os
import platform
import shlex
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import medmoco
from gpu import ask_driver, clock_mhz, first_line
from medmoco._C import build_info
from medmoco.output import write_json, write_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ROOT = Path(__file__).resolve().parents[1]
OURS = "medmoco"
LEGEND = (
    "x medmoco: time over medmoco's. x floor: over what the least work takes at the rate of a\n"
    "large matrix product, or of a large copy, or (on CUDA) for exponentials by the clock.\n"
    "peak: beyond inputs, outputs and gradients."
)


@dataclass
class Row:
    """One contestant in one case. What was not measured is None."""

    part: str  # "cases", or "over N" and "over K" for the points of the plot
    op: str
    device: str
    dtype: str
    shape: str
    pass_name: str  # "forward" or "forward+backward", "... graph" where a CUDA graph is replayed
    contestant: str
    status: str  # ok, FAILED (wrong result: not timed), error, missing, n/a
    note: str = ""
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    repeats: int = 0
    gflop_per_s: float | None = None  # of the least work, whatever the contestant does
    gbyte_per_s: float | None = None  # inputs, outputs and gradients, each once
    peak_mib: float | None = None  # beyond inputs, outputs and gradients
    value_error: float | None = None  # against float64
    value_error_allowed: float | None = None
    gradient_error: float | None = None
    gradient_error_allowed: float | None = None
    times_medmoco: float | None = None  # median over that of medmoco
    times_floor: float | None = None
    floor_ms: float | None = None  # the largest of the next three
    product_floor_ms: float | None = None
    copy_floor_ms: float | None = None
    exponential_floor_ms: float | None = None  # on CUDA, where their unit may be what is slowest
    product_gflop_per_s: float | None = None  # the rates that the floor is reckoned from
    copy_gbyte_per_s: float | None = None


def case_text(rows: Sequence[Row]) -> str:
    """The rows of one case as a block of aligned lines."""
    first = rows[0]
    lines = [f"{first.op}  {first.shape}  {first.dtype}  {first.device}  {first.pass_name}"]
    timed = next((row for row in rows if row.floor_ms is not None), None)
    if timed is not None:
        lines.append(_floor_text(timed))
    lines.append(
        f"  {'':25}{'median [p20, p80] ms':>28}{'GFLOP/s':>9}{'GB/s':>9}{'peak MiB':>10}"
        f"{'error':>9}{'x medmoco':>11}{'x floor':>9}"
    )
    for row in rows:
        if row.status in ("ok", "FAILED", "error"):
            lines.append(_row_text(row))
    for status in ("missing", "n/a"):
        absent = [f"{r.contestant} ({r.note})" for r in rows if r.status == status]
        if absent:
            text = f"{status}: {'; '.join(absent)}"
            lines += textwrap.wrap(text, 116, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)


def _floor_text(row: Row) -> str:
    parts = [
        f"product {number(row.product_floor_ms)} at {row.product_gflop_per_s:.0f} GFLOP/s",
        f"copy {number(row.copy_floor_ms)} at {row.copy_gbyte_per_s:.0f} GB/s",
    ]
    if row.exponential_floor_ms is not None:
        parts.append(f"exponentials {number(row.exponential_floor_ms)}")
    return f"  floor {number(row.floor_ms)} ms ({', '.join(parts)})"


def _row_text(row: Row) -> str:
    if row.status != "ok":
        return f"  {row.contestant:25}{row.status}: {row.note}"
    times = f"{number(row.median_ms)} [{number(row.p20_ms)}, {number(row.p80_ms)}]"
    error = max(e for e in (row.value_error, row.gradient_error) if e is not None)
    name = f"{row.contestant} ({row.note})" if row.note else row.contestant
    return (
        f"  {name:25}{times:>28}{number(row.gflop_per_s):>9}{number(row.gbyte_per_s):>9}"
        f"{number(row.peak_mib, '.1f'):>10}{error:9.1e}"
        f"{number(row.times_medmoco, '.2f'):>11}{number(row.times_floor, '.2f'):>9}"
    )


def number(value: float | None, form: str | None = None) -> str:
    """Four significant digits and no exponent, or in the given format."""
    if value is None:
        return "n/a"
    digits = 3 - math.floor(math.log10(value)) if value > 0 else 3
    return format(value, form or f".{min(6, max(0, digits))}f")


def error_text(error: BaseException) -> str:
    """Why a contestant could not run, in a line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:120]}"


def csv_text(environment: dict[str, Any], rows: Sequence["DataclassInstance"]) -> str:
    """A line a row. What holds for all rows is repeated in each, so that files can be joined."""
    text = io.StringIO()
    columns = [field.name for field in dataclasses.fields(rows[0])]
    writer = csv.DictWriter(text, [*columns, *environment], lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(row) | environment for row in rows)
    return text.getvalue()


def write_results(
    environment: dict[str, Any],
    rows: Sequence["DataclassInstance"],
    csv_file: Path | None,
    json_file: Path | None,
) -> None:
    """Writes rows, at least one and all of a kind, where files are given."""
    if csv_file is not None:
        write_text(csv_file, csv_text(environment, rows))
    if json_file is not None:
        listed = [{k: _json_value(v) for k, v in dataclasses.asdict(r).items()} for r in rows]
        write_json(json_file, {"environment": environment, "rows": listed})


def _json_value(value: Any) -> Any:
    """JSON has no NaN and no infinity, which errors of a wrong result may be."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def describe_environment(device: torch.device) -> dict[str, Any]:
    """What the figures depend on: machine, software, commit and command."""
    cuda = device.type == "cuda"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": "python " + shlex.join(_short_path(argument) for argument in sys.argv),
        "commit": commit(),
        "medmoco": medmoco.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_kernels": build_info()["cpu_kernels"],
        "torch_kernels": torch.backends.cpu.get_cpu_capability().lower(),
        "threads": torch.get_num_threads(),
        "variables": " ".join(f"{k}={v}" for k, v in sorted(os.environ.items()) if matters(k)),
        "load_average": round(os.getloadavg()[0], 2),
        "device_name": torch.cuda.get_device_name(device) if cuda else _cpu_model(),
        "driver": ask_driver("driver_version", device) if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "multiprocessors": torch.cuda.get_device_properties(device).multi_processor_count
        if cuda
        else None,
        "clock_mhz": clock_mhz(device) if cuda else None,
    }


def matters(variable: str) -> bool:
    """Whether an environment variable changes which kernels run, or how threads wait."""
    chosen = ("OMP_", "MKL_", "GOMP_", "KMP_", "ATEN_CPU_", "MEDMOCO_CPU_", "MEDMOCO_UNVERIFIED")
    return variable.startswith(chosen)


def environment_text(environment: dict[str, Any]) -> str:
    e = environment
    driver = f", driver {e['driver']}, CUDA {e['cuda']}" if e["driver"] else ""
    return (
        f"medmoco {e['medmoco']} at {e['commit']}, torch {e['torch']}, {e['cpu_kernels']} kernels\n"
        f"{e['device_name']}{driver}, {e['threads']} threads, load {e['load_average']}, {e['date']}"
        + (f"\n{e['variables']}" if e["variables"] else "")
    )


def commit() -> str:
    commit = first_line("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    changed = first_line("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return commit + (", with uncommitted changes" if changed else "") if commit else "unknown"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _short_path(argument: str) -> str:
    """Paths inside the project as seen from it: results should not depend on where it lies."""
    return argument.removeprefix(f"{ROOT}{os.sep}")
