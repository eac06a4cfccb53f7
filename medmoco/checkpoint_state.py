"""The state in a checkpoint: every entry has its type and range, and fits what it is loaded into.

A checksum tells of damage, not of who wrote a file: anyone can seal one. What torch and Python
check themselves when a state is set is left to them; what they would take without a word, and fail
on later, is checked here.
"""

import dataclasses
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from medmoco.checkpoint import Misfit
from medmoco.diagnostics import Diagnostics
from medmoco.divergence import all_finite
from medmoco.models.encoder import mismatch
from medmoco.printing import brief

Check = tuple[Callable[[Any], bool], str]  # what holds of an entry, and how a message says so
Entries = Mapping[str, Any]  # of names, a Check or the Entries within

MOST_STEPS = 2**53
MOST_SECONDS = 1e9
CUDA_BYTES = 16  # of a generator's state: seed and offset
GENERATOR_BYTES = (len(torch.Generator().get_state()), CUDA_BYTES)
# What an optimizer keeps of a weight, tensors of its shape; "step" is a single number.
KEPT: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.SGD: ("momentum_buffer",),
    torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"),
}


# --- entries --------------------------------------------------------------------------------------


def pick(found: Any, expected: Entries, place: str = "") -> dict[str, Any]:
    """The entries that are expected, checked; others are left out, whatever they are.

    Args:
        found: anything that a checkpoint may hold.
        expected: by name.
        place: of `found` in the state, for messages, as "random.numpy.".

    Raises:
        Misfit: names the first entry that is missing or not as expected.
    """
    if not isinstance(found, dict):
        names = ", ".join(expected)
        raise Misfit(f"{place.rstrip('.')} must hold {names}, got {brief(found)}")
    picked = {}
    for name, check in expected.items():
        if name not in found:
            raise Misfit(f"expected {place}{name}, got none")
        value = picked[name] = found[name]
        if isinstance(check, Mapping):
            picked[name] = pick(value, check, f"{place}{name}.")
        elif not check[0](value):
            raise Misfit(f"{place}{name} must be {check[1]}, got {described(value)}")
    return picked


def described(value: Any) -> str:
    """As `brief`; of a tensor also shape and type."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    return brief(value)


def whole(least: int, most: int) -> Check:
    """An int in a range; True and False are none."""
    words = f"a whole number from {least} to {most}"
    return (lambda v: type(v) is int and least <= v <= most), words


def real(least: float = -math.inf, most: float = math.inf) -> Check:
    """A number that is finite, in a range."""
    bounds = f" from {least:g} to {most:g}" if math.isfinite(most) else ""

    def holds(value: Any) -> bool:
        return type(value) in (int, float) and _is_finite(value) and least <= value <= most

    return holds, f"a finite number{bounds}"


def optional(check: Check) -> Check:
    """What the check is for, or None."""
    return (lambda v: v is None or check[0](v)), f"{check[1]}, or None"


def list_of(check: Check, length: int | None = None) -> Check:
    """A list of this length, if one is given, of what the check is for."""

    def holds(value: Any) -> bool:
        fits = isinstance(value, list) and length in (None, len(value))
        return fits and all(map(check[0], value))

    return holds, "a list" + ("" if length is None else f" of {length}") + f", each {check[1]}"


def tensor(shape: tuple[int, ...], dtype: torch.dtype, least: float, most: float) -> Check:
    """A tensor whose values lie in a range; NaN lies in none."""

    def holds(value: Any) -> bool:
        fits = isinstance(value, Tensor) and (value.shape, value.dtype) == (shape, dtype)
        return fits and bool(((value >= least) & (value <= most)).all())

    return holds, f"{shape} {dtype} of values from {least:g} to {most:g}"


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond float64
        return False


def _is_generator(value: Any) -> bool:
    fits = isinstance(value, Tensor) and value.dtype == torch.uint8 and value.ndim == 1
    if not fits or len(value) not in GENERATOR_BYTES:
        return False
    if len(value) == CUDA_BYTES:
        return True
    # torch checks the next of its 624 numbers and how many are left, but not that they end
    # together: it would read beyond them.
    left, _, following = struct.unpack("<iiQ", bytes(value[8:24].tolist()))
    return left + following <= 625


def _is_python_generator(value: Any) -> bool:
    """random.setstate checks all but the last of the three, which it takes as it is."""
    return isinstance(value, tuple) and len(value) == 3 and optional(real())[0](value[2])


TRUTH: Check = (lambda v: type(v) is bool), "True or False"
ANYTHING: Check = (lambda v: True), "anything"  # whoever takes it checks it
GENERATOR: Check = _is_generator, "the state of a generator"
RANDOM: Entries = {
    "torch": GENERATOR,
    "cuda": list_of(GENERATOR),
    "numpy": {
        "key": tensor((624,), torch.int64, 0, 2**32 - 1),
        "position": whole(0, 624),  # numpy would read beyond the key
        "has_gauss": whole(0, 1),
        "gauss": real(),
    },
    "python": (_is_python_generator, "the state of Python's random"),
}
MEASURES: Entries = {field.name: optional(real()) for field in dataclasses.fields(Diagnostics)} | {
    "samples": whole(0, MOST_STEPS),
    "dimensions": whole(0, MOST_STEPS),
    "spectrum": list_of(real()),
}


def pretraining_state(found: Any, total: int, batches: int) -> dict[str, Any]:
    """The entries of a pretraining's state.

    Args:
        found: the state in a checkpoint.
        total: steps of the run.
        batches: steps of an epoch.

    Raises:
        Misfit: an entry is not as expected.
    """
    step = pick(found, {"step": whole(0, total)})["step"]
    diagnosis = {
        "stage": ((lambda v: type(v) is str and v == "diagnostics"), "'diagnostics'"),
        "epoch": whole(0, step // batches),
        "step": whole(0, step),
        "loss": optional(real()),
        "features": MEASURES,
        "embeddings": MEASURES,
        "effective_rank": optional(real()),
        "warnings": list_of(((lambda v: type(v) is str), "a sentence")),
    }
    expected = {
        "step": whole(0, total),
        "losses": (_is_sum_and_number, "the sum and the number of an epoch's losses"),
        "diagnostics": diagnosis,
        "model": ANYTHING,
        "optimizer": {"state": ANYTHING},
        "generator": GENERATOR,
        "random": RANDOM,
    }
    return pick(found, expected)


def _is_sum_and_number(value: Any) -> bool:
    pair = isinstance(value, list) and len(value) == 2
    return pair and real()[0](value[0]) and whole(0, MOST_STEPS)[0](value[1])


def begun_state(found: Any) -> dict[str, Any]:
    """What a fine-tuning's checkpoint tells without its model: "seconds", "course".

    Raises:
        Misfit: an entry is not as expected.
    """
    course = {"epoch": whole(1, MOST_STEPS), "finished": TRUTH}
    pick(found, {"seconds": real(0, MOST_SECONDS), "course": course})
    return found


def course_state(found: Any, epochs: int, batches: int, classes: int) -> dict[str, Any]:
    """The entries of a fine-tuning's state.

    Args:
        found: the state in a checkpoint.
        epochs: of the training.
        batches: of an epoch.
        classes: with the background.

    Raises:
        Misfit: an entry is not as expected.
    """
    expected: dict[str, Any] = {
        "epoch": whole(1, epochs),
        "batch": whole(0, batches),
        "finished": TRUTH,
    }
    place = pick(found, expected)
    epoch, batch = place["epoch"], place["batch"]
    share = optional(real(0, 1))
    if place["finished"] and batch < batches:
        raise Misfit(f"batch must be {batches} in a state that is finished, got {batch}")
    ended = epoch > 1 or place["finished"]  # an epoch, so that its Dice is known
    expected |= {
        "dice": list_of(share, classes - 1 if ended else 0),
        "losses": (lambda v: _is_of_batches(v, batch), f"({batch},) finite numbers"),
        "counts": tensor((batch, classes, 3), torch.int64, 0, MOST_STEPS),
        "order": GENERATOR,
        "generator": GENERATOR,
        "model": ANYTHING,
        "optimizer": {"state": ANYTHING},
        "best": {"epoch": whole(0, epoch), "dice": share, "weights": ANYTHING},
        "random": RANDOM,
    }
    if batch == 0:
        expected |= dict.fromkeys(("losses", "counts"), ((lambda v: v is None), "None"))
    return pick(found, expected)


def _is_of_batches(value: Any, batch: int) -> bool:
    fits = isinstance(value, Tensor) and value.is_floating_point() and value.shape == (batch,)
    return fits and all_finite(value)


# --- what takes them ------------------------------------------------------------------------------


@contextmanager
def as_misfits() -> Iterator[None]:
    """Context in which a state is set: whatever torch, numpy or Python raise is a `Misfit`."""
    try:
        yield
    except (Misfit, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the entries can be anything
        raise Misfit(str(error).strip().split("\n", 1)[0][:200] or type(error).__name__) from error


def fitting_weights(module: nn.Module, found: Any, what: str) -> dict[str, Tensor]:
    """Entries of a file for `module.load_state_dict`, which would cast other types.

    Raises:
        Misfit: they are others, or hold what is not finite, or below 0 what never is.
    """
    problem = mismatch(module.state_dict(), found)
    if problem is None and not all_finite(found):
        problem = "not all values are finite"
    if problem is not None:
        raise Misfit(f"{what} does not fit: {problem}")
    for name, value in found.items():
        # Counters: keys in a queue, batches that statistics were averaged over.
        counts = value.ndim == 0 and not value.is_floating_point()
        if (counts or name.endswith("_var")) and bool((value < 0).any()):
            raise Misfit(f"{what} does not fit: {name} must be at least 0")
    return dict(found)  # without what else a file may have attached to its dictionary


def load_optimizer(optimizer: torch.optim.Optimizer, found: Any, steps: int, lr: float) -> None:
    """Loads what an optimizer keeps of its weights. Its settings stay those of the run.

    Args:
        optimizer: new, of a class in `KEPT`; all its weights have a gradient in every step.
        found: the entry "state" of its state_dict.
        steps: that it has taken.
        lr: that it had last.

    Raises:
        Misfit: of other weights, or of another number of steps.
    """
    groups = [group | {"lr": lr} for group in optimizer.state_dict()["param_groups"]]
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    numbers = range(len(weights) if steps else 0)
    if not isinstance(found, dict) or found.keys() != set(numbers):
        raise Misfit(f"optimizer must have a state of {len(numbers)} weights, got {brief(found)}")
    copied: dict[int, dict[str, Tensor]] = {}
    for number in numbers:
        single = torch.zeros(())
        like = {n: single if n == "step" else weights[number] for n in KEPT[type(optimizer)]}
        kept = found[number]
        problem = mismatch(like, kept)
        if problem is None and not all_finite(kept):
            problem = "not all values are finite"
        if problem is None and "step" in kept and not 1 <= kept["step"] <= steps:
            problem = f"step must be from 1 to {steps}, got {kept['step']:g}"
        if problem is None and "exp_avg_sq" in kept and bool((kept["exp_avg_sq"] < 0).any()):
            problem = "exp_avg_sq must be at least 0"
        if problem is not None:
            raise Misfit(f"optimizer does not fit: of weight {number}: {problem}")
        # Tensors of a file may share memory, with others or within themselves.
        copied[number] = {name: value.detach().clone() for name, value in kept.items()}
    optimizer.load_state_dict({"state": copied, "param_groups": groups})
