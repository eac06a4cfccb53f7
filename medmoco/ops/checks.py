"""Argument checks in Python, for tracing and where no kernel runs.

csrc/checks.h holds those of the compiled operators in C++; a test keeps the messages equal.
"""

import math

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def dtype_text(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def shape_text(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATING:
        raise RuntimeError(
            f"{op}: {name} must be float32, float64, bfloat16 or float16, got {dtype_text(tensor)}"
        )


def check_same_kind(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.dtype != other.dtype:
        raise RuntimeError(
            f"{op}: {name} must be {dtype_text(other)} to match {other_name}, "
            f"got {dtype_text(tensor)}"
        )
    if tensor.device != other.device:
        raise RuntimeError(
            f"{op}: {name} must be on {other.device} to match {other_name}, got {tensor.device}"
        )


def check_temperature(op: str, temperature: float) -> None:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise RuntimeError(f"{op}: temperature must be positive and finite, got {temperature:g}")


def check_features(op: str, features: Tensor, least_samples: int) -> None:
    """(samples, features) of a floating dtype, with enough samples for the statistic."""
    if features.dim() != 2:
        raise RuntimeError(
            f"{op}: features must be (samples, features), got {shape_text(features)}"
        )
    check_floating(op, "features", features)
    if features.shape[0] < least_samples:
        raise RuntimeError(
            f"{op}: features must have at least {least_samples} sample"
            f"{'s' if least_samples > 1 else ''}, got {features.shape[0]}"
        )


def check_whitening(op: str, features: Tensor, group_size: int, eps: float) -> None:
    check_features(op, features, least_samples=1)
    if group_size < 1 or features.shape[1] % group_size:
        raise RuntimeError(
            f"{op}: group_size must divide the {features.shape[1]} features, got {group_size}"
        )
    if not (eps > 0 and math.isfinite(eps)):
        raise RuntimeError(f"{op}: eps must be positive and finite, got {eps:g}")
