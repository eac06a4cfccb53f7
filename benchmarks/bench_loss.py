"""Times the operators against eager PyTorch and against what a skilled user would write instead.

    python benchmarks/bench_loss.py
    python benchmarks/bench_loss.py --op dense_match --sizes B=4,C=128,S=1024 --json match.json
    python benchmarks/bench_loss.py --op queue_info_nce --device cuda --dtype bfloat16 float32

Every contestant is checked against float64 first; one that fails is not timed. Contestants of a
case are timed in turns, together with a large matrix product and a large copy, whose rates give the
floor. Files are written anew after each case, so that a run cut short leaves what it measured.
Exit status: 0; 1 if a result of medmoco's is wrong; 2 for flags that make no sense.
"""

import argparse
import itertools
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from cases import OPERATIONS
from contest import Case, run_case
from flags import check_files, chosen_device, parser_for
from operation import Operation, Size
from reporting import (
    LEGEND,
    OURS,
    Row,
    case_text,
    describe_environment,
    environment_text,
    write_results,
)
from scaling import draw_scaling, scaling_cases
from summary import summary_text

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the cases that the flags ask for, and returns the exit status."""
    flags, cases = parse_flags(argv)
    if flags.threads is not None:
        torch.set_num_threads(flags.threads)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch._inductor")
    environment = describe_environment(flags.device)
    print(environment_text(environment), LEGEND, sep="\n")
    if flags.plot is not None:
        cases += scaling_cases(DTYPES[flags.dtype[0]], flags.device, quick=flags.quick)

    results: list[tuple[Case, list[Row]]] = []
    rows: list[Row] = []
    with tqdm(cases, unit="case", disable=None, dynamic_ncols=True) as bar:
        for case in bar:
            bar.set_description(f"{case.operation.name} {case.shape()}")
            results.append((case, run_case(case, quick=flags.quick)))
            rows += results[-1][1]
            bar.write(f"\n{case_text(results[-1][1])}", file=sys.stdout)
            write_results(environment, rows, flags.csv, flags.json)

    print(f"\n{summary_text(rows)}")
    if flags.plot is not None:
        draw_scaling(flags.plot, environment, results)
    failed = [row for row in rows if row.contestant == OURS and row.status == "FAILED"]
    for row in failed:
        text = f"FAILED: {row.op} {row.shape} {row.pass_name}: {row.note}"
        print(text, file=sys.stderr)
    return 1 if failed else 0


def parse_size(text: str, operation: Operation) -> Size:
    """`N=256,D=2048` as a size of an operator.

    Raises:
        ValueError: names or values are not those of the operator.
    """
    optional = operation.optional
    wanted = ",".join(f"{d}=..." for d in operation.dims)
    also = f" (optionally {', '.join(f'{o}=1' for o in optional)})" if optional else ""
    parts = [part.partition("=") for part in text.split(",")]
    names = [name for name, _, _ in parts]
    known = {*operation.dims, *optional}
    if len(set(names)) != len(names) or not set(operation.dims) <= set(names) <= known:
        raise ValueError(f"{operation.name} takes {wanted}{also}, got {text!r}")
    if not all(value.isascii() and value.isdigit() for _, _, value in parts):
        raise ValueError(f"sizes must be whole numbers, got {text!r}")
    size = {name: int(value) for name, _, value in parts}
    complaint = operation.complaint(size)
    if complaint:
        raise ValueError(f"{operation.name}: {complaint}")
    return {name: size[name] for name in (*operation.dims, *optional) if name in size}


def _parser() -> argparse.ArgumentParser:
    parser = parser_for(__doc__)
    add = parser.add_argument
    add("--op", nargs="+", choices=OPERATIONS, default=list(OPERATIONS), help="default: all")
    add("--device", help="cpu, cuda, cuda:1; default: cuda if there is a GPU")
    add(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        default=["float32"],
        help="of the operands; default: float32",
    )
    add("--sizes", nargs="+", help="for one --op, such as N=256,K=65536,C=128")
    add("--peers", nargs="+", metavar="NAME", default=["*"], help="such as eager 'attention*'")
    add("--graph", action="store_true", help="replay CUDA graphs: for few rows on a GPU")
    add("--quick", action="store_true", help="small sizes and no compiling: seconds")
    add("--threads", type=int, help="of the CPU; default: PyTorch's choice")
    add("--csv", type=Path, metavar="FILE", help="write a line a row")
    add("--json", type=Path, metavar="FILE", help="write rows and environment")
    add(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help="also measure queue_info_nce over batch and queue sizes, minutes, and draw it",
    )
    return parser


def parse_flags(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[Case]]:
    """Flags and the cases they ask for. Exits with status 2 if they make no sense."""
    parser = _parser()
    flags = parser.parse_args(argv)
    flags.device = chosen_device(parser, flags.device)
    if flags.threads is not None and flags.threads < 1:
        parser.error(f"--threads: expected at least 1, got {flags.threads}")
    if flags.sizes and len(flags.op) != 1:
        parser.error(f"--sizes: expected a single --op, got {' '.join(flags.op)}")
    if flags.graph and flags.device.type != "cuda":
        parser.error(f"--graph: expected --device cuda, got {flags.device}")
    if flags.plot is not None and len(flags.dtype) != 1:
        parser.error(f"--plot: expected a single --dtype, got {' '.join(flags.dtype)}")
    check_files(parser, csv=flags.csv, json=flags.json, plot=flags.plot)
    if flags.plot is not None and flags.plot.suffix != ".png":
        parser.error(f"--plot: expected a name that ends in .png, got {flags.plot}")
    try:
        return flags, list(_cases(flags))
    except ValueError as error:
        parser.error(f"--sizes: {error}")


def _cases(flags: argparse.Namespace) -> Iterator[Case]:
    for name, dtype in itertools.product(flags.op, flags.dtype):
        operation = OPERATIONS[name]
        for size, passes in _sizes(operation, flags):
            for backward in passes:
                yield Case(
                    operation,
                    size,
                    DTYPES[dtype],
                    flags.device,
                    backward,
                    graph=flags.graph,
                    contestants=tuple(flags.peers),
                )


def _sizes(operation: Operation, flags: argparse.Namespace) -> list[tuple[Size, tuple[bool, ...]]]:
    """Sizes, and for each whether with a backward pass, for each pass that is timed."""
    passes = operation.passes()
    if flags.sizes:
        return [(parse_size(text, operation), passes) for text in flags.sizes]
    if flags.quick:
        return [(size, passes) for size in operation.quick_sizes]
    sizes, large = operation.sizes, operation.large_sizes
    if flags.device.type == "cuda":
        sizes = operation.cuda_sizes or sizes
        large = operation.cuda_large_sizes or large
    return [(s, passes) for s in sizes] + [(s, passes[-1:]) for s in large]


if __name__ == "__main__":
    sys.exit(main())
