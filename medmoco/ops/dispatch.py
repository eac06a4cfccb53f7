"""What the operators share between the Python call and the compiled kernel."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

CHUNK_BYTES = 256 * 2**20  # of logits at a time, where the reference stands in for a kernel


def has_kernel(op: str, device: torch.device) -> bool:
    """Whether `op` may run compiled on `device`.

    Kernels that no GPU has run yet are registered only with MEDMOCO_UNVERIFIED=1, and all need the
    tensor cores of compute capability 8.0.
    """
    if device.type == "cpu":
        return True
    return _is_registered(op, device.type) and (device.type != "cuda" or _runs_kernels(device))


@torch.compiler.assume_constant_result
def _is_registered(op: str, device_type: str) -> bool:
    key = {"cuda": "CUDA", "meta": "Meta"}.get(device_type)
    if key is None:
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"medmoco::{op}", key)


@torch.compiler.assume_constant_result
def _runs_kernels(device: torch.device) -> bool:
    # Fake tensors may be on a GPU that is not there.
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


@torch.compiler.assume_constant_result
def tf32_allowed() -> bool:
    """Whether the user has let CUDA matrix products round float32 operands to TF32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """What is accumulated in: float64 for float64, float32 for all else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def autocast_enabled(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def autocast_operands(device_type: str, tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors in autocast's dtype where autocast is on; float64 stays, as in PyTorch."""
    tensors = list(tensors)
    if not autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return [
        t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    ]


def autocast_off(device_type: str) -> AbstractContextManager[object]:
    """For formulas that choose their own precision, on any device, with or without autocast."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


class Cast(Protocol):
    """The operands of an operator in the dtype that autocast wants them in."""

    def __call__(self, device_type: str, tensors: Iterable[Tensor]) -> list[Tensor]: ...


def wide_operands(device_type: str, tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors in float32 (float64 stays), for operators that autocast must not narrow."""
    return [t.to(wide_dtype(t)) if t.is_floating_point() else t for t in tensors]


# torch.library.register_autocast would fix one dtype for all calls.
_library = torch.library.Library("medmoco", "IMPL")


def register_autocast(op: str, operands: int, cast: Cast) -> None:
    """Under autocast `op` takes its first `operands` arguments as `cast` returns them."""
    for device_type, dispatch_key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def kernel(*arguments: Any, device_type: str = device_type) -> Any:
            tensors = cast(device_type, arguments[:operands])
            with autocast_off(device_type):
                return getattr(torch.ops.medmoco, op)(*tensors, *arguments[operands:])

        _library.impl(op, kernel, dispatch_key)


def register_constant(op: str) -> None:
    """The outputs of `op` are constants to autograd."""
    _library.impl(op, torch.library.fallthrough_kernel, "Autograd")


def refuse_forward_mode(op: str, *tensors: Tensor) -> None:
    """Makes a forward-mode derivative an error: PyTorch would take that of a custom op for zero."""
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(f"{op}: forward-mode derivatives are not implemented")


def refuse_second_derivative(op: str) -> None:
    """Makes a derivative of `<op>_backward` an error: a silent one would be wrong."""

    def raise_error(ctx: Any, *_: Any) -> None:
        raise_second_derivative(op)

    torch.library.register_autograd(f"medmoco::{op}_backward", raise_error)


def raise_second_derivative(op: str) -> NoReturn:
    raise RuntimeError(f"{op}: second derivatives are not implemented")
