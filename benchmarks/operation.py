"""What a benchmarked operator has to tell, how a pass of it is run, and how errors are counted."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from baselines import Peer
from medmoco import ops

Size = dict[str, int]
Errors = dict[str, float]  # of "value", and of "gradient" in a backward pass
# A peer may be less exact than medmoco has to be; beyond this it computes something else.
PEER_ALLOWED = {torch.float32: 1e-2, torch.bfloat16: 1e-1, torch.float16: 1e-1}


@dataclass(frozen=True)
class Inputs:
    """Operands as the user function takes them; `cotangent` is the gradient that comes back."""

    operands: tuple[Any, ...]
    cotangent: Tensor | None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.operands, self.cotangent) if isinstance(t, Tensor))


@dataclass(frozen=True)
class Outcome:
    values: tuple[Tensor, ...]
    gradient: Tensor | None  # of the first operand

    def tensors(self) -> list[Tensor]:
        return [*self.values, *([] if self.gradient is None else [self.gradient])]


def run_pass(function: Callable[..., Any], inputs: Inputs, *, backward: bool) -> Outcome:
    """One forward pass, or one forward and one backward."""
    if not backward:
        with torch.no_grad():
            values = function(*inputs.operands)
        return Outcome(values if isinstance(values, tuple) else (values,), None)
    values = function(*inputs.operands)
    values = values if isinstance(values, tuple) else (values,)
    (gradient,) = torch.autograd.grad(values[0], inputs.operands[0], inputs.cotangent)
    return Outcome(tuple(value.detach() for value in values), gradient)


class Operation(ABC):
    """One operator. `sizes` are run by default, `quick_sizes` by --quick.

    `large_sizes` are run by default in the last pass alone, lest a run take too long.
    """

    name: str
    dims: tuple[str, ...]
    optional: tuple[str, ...] = ()
    sizes: Sequence[Size]
    large_sizes: Sequence[Size] = ()
    cuda_sizes: Sequence[Size] = ()  # in the place of `sizes` on CUDA, if any
    cuda_large_sizes: Sequence[Size] = ()  # in the place of `large_sizes` there, if any
    quick_sizes: Sequence[Size]
    differentiable = True

    def passes(self) -> tuple[bool, ...]:
        """Whether with a backward pass, for each pass that is timed."""
        return (False, True) if self.differentiable else (False,)

    def medmoco(self, *operands: Any) -> Any:
        return getattr(ops, self.name)(*operands)

    def complaint(self, size: Size) -> str | None:
        """What is wrong with a size of the right names, if anything."""
        wrong = [f"{name}={value}" for name, value in size.items() if value < 1]
        return f"expected sizes of at least 1, got {', '.join(wrong)}" if wrong else None

    @abstractmethod
    def inputs(self, size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs: ...

    @abstractmethod
    def peers(
        self, size: Size, dtype: torch.dtype, device: torch.device, *, quick: bool
    ) -> list[Peer]: ...

    @abstractmethod
    def flop(self, size: Size, *, backward: bool) -> float:
        """Operations of the matrix products that cannot be left out."""

    @abstractmethod
    def checker(self, inputs: Inputs, *, backward: bool) -> Callable[[Outcome], Errors]:
        """A function that compares outcomes of `inputs` with float64."""

    def exponentials(self, size: Size) -> float:
        """How many cannot be left out."""
        return 0

    def allowed(
        self, outcome: Outcome, eager: Errors, dtype: torch.dtype, device: torch.device
    ) -> Errors:
        """Largest errors of medmoco's: twice those of eager PyTorch in the same dtype."""
        rounding = {"value": outcome.values[0].dtype, "gradient": outcome.values[0].dtype}
        if outcome.gradient is not None:
            rounding["gradient"] = outcome.gradient.dtype
        return {name: 2 * e + 4 * torch.finfo(rounding[name]).eps for name, e in eager.items()}


def spread(count: int, most: int, device: torch.device) -> Tensor:
    """At most `most` (at least one) of the numbers below `count`, evenly spread."""
    return torch.arange(0, count, math.ceil(count / max(1, most)), device=device)


def largest(difference: Tensor) -> float:
    """Largest absolute value; NaN if there is any."""
    return float(difference.abs().max())


def gradient_error(found: Outcome, truth: Outcome, rows: Tensor | slice) -> Errors:
    """Largest error of the gradient over its largest entry."""
    if found.gradient is None or truth.gradient is None:
        return {}
    difference = found.gradient[rows].double() - truth.gradient
    return {"gradient": largest(difference) / largest(truth.gradient)}


def relative_errors(found: Outcome, truth: Outcome) -> Errors:
    """Of the first value and of the gradient, each over its largest entry."""
    value = largest(found.values[0].double() - truth.values[0]) / largest(truth.values[0])
    return {"value": value} | gradient_error(found, truth, slice(None))
