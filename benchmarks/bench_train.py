"""Times the pretraining step end to end, with our operators and with their references in PyTorch.

    python benchmarks/bench_train.py --device cuda
    python benchmarks/bench_train.py --device cuda --output-stride 8 --batch-size 64 --json FILE
    python benchmarks/bench_train.py --quick

A step is what the trainer does with a batch that is on the device: two views of each slice, both
encoders, losses, gradient, weights, key branch, queues. Loading slices is no part of it. First the
losses and gradients of one step are compared. `encoders alone` are the encoders' passes without
all else, in the same rounds; what a step takes longer is its share outside the encoders. What does
not fit into memory is a row that says so. Exit status: 0; 1 if the first step is wrong; 2 for flags
that make no sense.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from flags import check_files, chosen_device, parser_for
from medmoco.errors import UserError
from medmoco.methods import build_model
from medmoco.models.encoder import ARCHITECTURES, OUTPUT_STRIDES
from reporting import OURS, describe_environment, environment_text, number, write_results
from summary import aligned
from train_contest import EAGER, TrainRow, run_case
from training import OPERATORS, TrainCase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES: dict[str, Any] = {
    "arch": "resnet50",
    "width": 1.0,
    "image_size": 224,
    "output_stride": 32,
    "batch_size": 256,
    "queue_size": 65536,
}
QUICK_SIZES: dict[str, Any] = {
    "arch": "resnet18",
    "width": 0.125,
    "image_size": 32,
    "output_stride": 8,
    "batch_size": 16,
    "queue_size": 256,
}
SECONDS, QUICK_SECONDS = 10.0, 0.2  # of timing, a method
LEGEND = (
    "outside: share of the step that the encoders do not take. peak: most memory beyond what\n"
    "stays between steps. held: that which stays. errors: of the first step's losses and\n"
    "gradient, against eager. x medmoco: time over medmoco's."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the methods that the flags ask for, and returns the exit status."""
    flags, cases = parse_flags(argv)
    if flags.threads is not None:
        torch.set_num_threads(flags.threads)
    environment = describe_environment(flags.device)
    print(environment_text(environment), LEGEND, sep="\n")
    rows: list[TrainRow] = []
    with tqdm(cases, unit="method", disable=None, dynamic_ncols=True) as bar:
        for case in bar:
            bar.set_description(case.method)
            found = run_case(case, seconds=QUICK_SECONDS if flags.quick else SECONDS)
            rows += found
            bar.write(f"\n{case_text(found)}", file=sys.stdout)
            write_results(environment, rows, flags.csv, flags.json)
    print(f"\n{train_summary(rows)}")
    failed = [row for row in rows if row.status == "FAILED"]
    for row in failed:
        print(f"FAILED: {row.method}: {row.note}", file=sys.stderr)
    return 1 if failed else 0


def case_text(rows: Sequence[TrainRow]) -> str:
    """The rows of one case as a block of aligned lines."""
    lines = [
        f"{shape_text(rows[0])}  {rows[0].device}",
        f"  {'':16}{'median [p20, p80] ms':>28}{'images/s':>10}{'outside':>9}{'peak MiB':>10}"
        f"{'held MiB':>10}{'loss':>8}{'errors':>17}{'x medmoco':>11}",
    ]
    for row in rows:
        if row.status != "ok":
            lines.append(f"  {row.contestant:16}{row.status}: {row.note}")
            continue
        times = f"{number(row.median_ms)} [{number(row.p20_ms)}, {number(row.p80_ms)}]"
        errors = f"{number(row.loss_error, '.1e')} {number(row.gradient_error, '.1e')}"
        lines.append(
            f"  {row.contestant:16}{times:>28}{number(row.images_per_s, '.0f'):>10}"
            f"{number(row.outside_encoders, '.1%'):>9}{number(row.peak_mib, '.0f'):>10}"
            f"{number(row.held_mib, '.0f'):>10}{number(row.loss, '.3f'):>8}"
            f"{errors:>17}{number(row.times_medmoco, '.2f'):>11}"
        )
        if row.note:
            lines.append(f"    ({row.note})")
    return "\n".join(lines)


def shape_text(row: TrainRow) -> str:
    cells = math.ceil(row.image_size / row.output_stride)
    return (
        f"{row.method}  {row.arch} x {row.width:g}  {row.image_size} px  {cells} x {cells} cells  "
        f"batch {row.batch_size}  queue {row.queue_size}  {row.dtype}"
    )


def train_summary(rows: Sequence[TrainRow]) -> str:
    """A line a method: medmoco beside eager."""
    header = ("images/s", "outside", "peak MiB")
    lines = [["", f"{OURS} ms", *header, *(f"{EAGER} {name}" for name in header), f"x {EAGER}"]]
    for ours in (row for row in rows if row.contestant == OURS):
        eager = next(r for r in rows if r.contestant == EAGER and r.method == ours.method)
        both = [_figures(row) for row in (ours, eager)]
        time = number(ours.median_ms) if ours.status == "ok" else ours.status
        times = number(eager.times_medmoco, ".2f") if eager.status == "ok" else eager.note
        lines.append([shape_text(ours), time, *both[0], *both[1], times])
    return aligned(lines)


def _figures(row: TrainRow) -> tuple[str, str, str]:
    return (
        number(row.images_per_s, ".0f"),
        number(row.outside_encoders, ".1%"),
        number(row.peak_mib, ".0f"),
    )


def parse_flags(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[TrainCase]]:
    """Flags and the cases they ask for. Exits with status 2 if they make no sense."""
    parser = _parser()
    flags = parser.parse_args(argv)
    flags.device = chosen_device(parser, flags.device)
    if flags.threads is not None and flags.threads < 1:
        parser.error(f"--threads: expected at least 1, got {flags.threads}")
    check_files(parser, csv=flags.csv, json=flags.json)
    if flags.dtype is None:
        flags.dtype = "bfloat16" if flags.device.type == "cuda" else "float32"
    sizes = dict(QUICK_SIZES if flags.quick else SIZES)
    sizes |= {name: value for name in SIZES if (value := getattr(flags, name)) is not None}
    for name, least in (("image_size", 4), ("batch_size", 2), ("queue_size", 1)):
        if sizes[name] < least:
            flag = name.replace("_", "-")
            parser.error(f"--{flag}: expected at least {least}, got {sizes[name]}")
    cases = [
        TrainCase(method=name, device=flags.device, dtype=DTYPES[flags.dtype], **sizes)
        for name in flags.methods
    ]
    for case in cases:
        try:
            with torch.device("meta"):
                build_model(case.config())
        except UserError as error:  # such as a batch that is too small to whiten
            parser.error(f"{case.method}: {error}")
    return flags, cases


def _parser() -> argparse.ArgumentParser:
    parser = parser_for(__doc__)
    add = parser.add_argument
    methods = tuple(OPERATORS)
    add("--methods", nargs="+", choices=methods, default=methods, help="default: all")
    add("--device", help="cpu, cuda, cuda:1; default: cuda if there is a GPU")
    add("--dtype", choices=DTYPES, help="of autocast; default: bfloat16 on CUDA, else float32")
    add("--arch", choices=ARCHITECTURES, help="default: resnet50")
    add("--width", type=float, help="scales the encoder's channels; default: 1")
    add("--image-size", type=int, help="pixels of a view, square; default: 224")
    add("--output-stride", type=int, choices=OUTPUT_STRIDES, help="pixels a cell; default: 32")
    add("--batch-size", type=int, help="default: 256")
    add("--queue-size", type=int, help="default: 65536")
    add("--quick", action="store_true", help="a small encoder, in seconds")
    add("--threads", type=int, help="of the CPU; default: PyTorch's choice")
    add("--csv", type=Path, metavar="FILE", help="write a line a row")
    add("--json", type=Path, metavar="FILE", help="write rows and environment")
    return parser


if __name__ == "__main__":
    sys.exit(main())
