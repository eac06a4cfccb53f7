"""Runs the compiled kernels of a device on odd sizes, and compares what they give with float64.

    python benchmarks/smoke.py --part shapes
    python benchmarks/smoke.py --part behaviour large

Parts: `shapes` is small enough for compute-sanitizer; `behaviour` repeats calls, and makes them on
a side stream, in a CUDA graph, under torch.compile and autocast; `large` passes 2^31 elements.
Operators without a kernel on the device are left out. References are
computed on the CPU, so that a checker of memory sees our kernels and few others. Exit status: 0; 1
if a result is wrong or there is no kernel to check; 2 for flags that make no sense.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

import smoke_info_nce
from cases import OPERATIONS
from operation import Inputs, Operation, Outcome, Size, run_pass
from smoke_behaviour import DTYPES, Check, LeftOut, behaviour_checks
from smoke_large import large_checks

CPU = torch.device("cpu")
# Of the operators that have no checks of their own.
SIZES: dict[str, tuple[Size, ...]] = {
    "dense_match": (
        {"B": 2, "C": 19, "S": 67},
        {"B": 3, "C": 64, "S": 9},
        {"B": 2, "C": 300, "S": 136},
    ),
    "covariance_loss": ({"N": 33, "D": 70}, {"N": 130, "D": 17}),
    "zca_whiten": ({"N": 40, "D": 36, "group": 12},),
}
PARTS = ("shapes", "behaviour", "large")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts that the flags ask for, and returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--elements", type=int, default=2**31, help="that `large` goes beyond")
    flags = parser.parse_args(argv)
    if flags.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: torch sees no GPU")
    names = registered(flags.device)
    print(f"kernels on {flags.device}: {', '.join(names) or 'none'}")
    if not names:
        print("FAILED: nothing to check; kernels that no GPU has run need MEDMOCO_UNVERIFIED=1")
        return 1
    failed = [name for name, check in _checks(flags, names) if not _passes(name, check)]
    print(f"FAILED: {', '.join(failed)}" if failed else "all ok")
    return 1 if failed else 0


def registered(device: torch.device) -> list[str]:
    """Our operators that are compiled for a device, backward passes too."""
    key = {"cpu": "CPU", "cuda": "CUDA"}[device.type]
    names = sorted(name for name in torch._C._dispatch_get_all_op_names() if "medmoco::" in name)
    found = [n for n in names if torch._C._dispatch_has_kernel_for_dispatch_key(n, key)]
    return [name.removeprefix("medmoco::") for name in found]


def _checks(flags: argparse.Namespace, names: Sequence[str]) -> Iterator[Check]:
    if "shapes" in flags.part:
        for name in names:
            if name.startswith("queue_info_nce"):
                yield from smoke_info_nce.shape_checks(name, flags.device)
            elif name in OPERATIONS:  # its backward pass with it
                yield from _operation_checks(OPERATIONS[name], flags.device)
    for name in names:
        if "behaviour" in flags.part:
            yield from behaviour_checks(name, flags.device)
        if "large" in flags.part:
            if name == "queue_info_nce":
                yield from smoke_info_nce.large_checks(flags.device, flags.elements)
            yield from large_checks(name, flags.device, flags.elements)


def _passes(name: str, check: Callable[[], None]) -> bool:
    start = time.perf_counter()
    try:
        check()
    except LeftOut as reason:
        print(f"  {name}: left out: {reason}", flush=True)
        return True
    except Exception as error:  # whatever a broken kernel brings about
        print(f"  {name}: FAILED: {type(error).__name__}: {error}", flush=True)
        return False
    print(f"  {name}: ok ({time.perf_counter() - start:.1f} s)", flush=True)
    return True


def _operation_checks(operation: Operation, device: torch.device) -> Iterator[Check]:
    """The benchmark's own comparison with float64."""
    for size in SIZES[operation.name]:
        for dtype in DTYPES:
            shape = " ".join(f"{name}={value}" for name, value in size.items())
            title = f"{operation.name} {shape} {dtype}"
            yield title, partial(_compare, operation, size, DTYPES[dtype], device)


def _compare(operation: Operation, size: Size, dtype: torch.dtype, device: torch.device) -> None:
    for backward in operation.passes():
        inputs = operation.inputs(size, dtype, CPU, seed=0)
        errors_of = operation.checker(inputs, backward=backward)
        eager, *_ = operation.peers(size, dtype, CPU, quick=True)
        assert eager.function is not None
        theirs = errors_of(run_pass(eager.function, inputs, backward=backward))
        on_device = Inputs(
            tuple(_moved(operand, device) for operand in inputs.operands),
            None if inputs.cotangent is None else inputs.cotangent.to(device),
        )
        outcome = run_pass(operation.medmoco, on_device, backward=backward)
        gradient = None if outcome.gradient is None else outcome.gradient.cpu()
        outcome = Outcome(tuple(value.cpu() for value in outcome.values), gradient)
        allowed = operation.allowed(outcome, theirs, dtype, device)
        for kind, error in errors_of(outcome).items():
            assert error <= allowed[kind], f"{kind} error {error:.1e}, {allowed[kind]:.1e} allowed"


def _moved(operand: object, device: torch.device) -> object:
    if not isinstance(operand, Tensor):
        return operand
    return operand.detach().to(device).requires_grad_(operand.requires_grad)


if __name__ == "__main__":
    sys.exit(main())
