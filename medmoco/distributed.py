"""Several processes that train one model: who they are, and what they tell each other.

torchrun starts them, a rank each. A process that was started alone is the only rank of a world of
one, in which nothing is sent, so that callers need no second path. A global batch is divided over
the ranks in rank order; what is random is drawn for the global batch, by the same generator on
every rank, so that the number of ranks does not change it.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from medmoco.errors import UserError
from medmoco.printing import say

# A rank that ends is noticed at once; only time tells of one whose machine is gone. Longer than a
# slow file system may keep the rank that saves.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
# For what one rank may do alone, such as reading volumes, before the first step.
PREPARATION_TIMEOUT = timedelta(days=1)
LAUNCHER_SECONDS = 10  # within which torchrun ends a rank that lost another one


class LostRank(Exception):
    """A collective failed, most often since another rank ended, whose error then counts."""


@dataclass(frozen=True)
class Launch:
    """How this process was started, from torchrun's environment.

    Attributes:
        rank: of this process, below `world`.
        world: processes that were started together.
        local_rank: of this process on its machine.
        local_world: processes on this machine.
        elastic: whether torchrun watches over them.
        restarts: how often it has restarted them.
        may_restart: how often it would.
        agent: name of the torchrun on this machine, the same after its restarts; "" without one.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    elastic: bool
    restarts: int
    may_restart: int
    agent: str


def launch() -> Launch:
    """How this process was started; one alone is rank 0 of 1, whatever RANK says."""

    def number(name: str, default: int) -> int:
        return int(os.environ.get(name, default))

    world = number("WORLD_SIZE", 1)
    # torchrun makes a folder of its own, of a random name: FOLDER/attempt_0/0/error.json.
    own_folder = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parent.parent.parent
    return Launch(
        rank=number("RANK", 0) if world > 1 else 0,
        world=world,
        local_rank=number("LOCAL_RANK", 0) if world > 1 else 0,
        local_world=number("LOCAL_WORLD_SIZE", 1),
        elastic="TORCHELASTIC_RUN_ID" in os.environ,
        restarts=number("TORCHELASTIC_RESTART_COUNT", 0),
        may_restart=number("TORCHELASTIC_MAX_RESTARTS", 0),
        agent=own_folder.name,
    )


def own_device(device: str) -> torch.device:
    """The device of this rank: with several ranks, "cuda" is the GPU of its local rank.

    Raises:
        UserError: a GPU is named for several ranks, or there are fewer than ranks.
    """
    chosen, launched = torch.device(device), launch()
    if chosen.type != "cuda" or launched.world == 1:
        return chosen
    if device not in ("cuda", f"cuda:{launched.local_rank}"):
        raise UserError(
            f"--device {device}: expected cpu or cuda with {launched.world} ranks, of which each "
            "takes the GPU of its number"
        )
    if launched.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"--device {device}: expected a GPU for each of {launched.local_world} ranks on this "
            f"machine, got {torch.cuda.device_count()}"
        )
    return torch.device("cuda", launched.local_rank)


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Context in which the ranks are one group, once all have come here.

    A process that was started alone only passes through.

    Args:
        device: of this rank; NCCL carries what lies on a GPU, gloo the rest.

    Raises:
        UserError: the environment does not say where they meet.
        LostRank: the others cannot be reached.
    """
    if launch().world == 1:
        yield
        return
    if dist.is_initialized():
        await_ranks()
        yield
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE={launch().world}: expected {' and '.join(missing)} with it, got none; "
            "start several ranks with torchrun, or one with WORLD_SIZE unset"
        )
    if launch().rank == 0:
        say(f"waiting for {launch().world} ranks")
    with _telling_of_lost_ranks():
        store, number, size = next(iter(dist.rendezvous("env://", timeout=PREPARATION_TIMEOUT)))
        # torchrun keeps one store for all attempts; addresses of the last one lead nowhere.
        store = dist.PrefixStore(f"medmoco/attempt {launch().restarts}", store)
        store.set(f"ready/{number}", "yes")
        store.wait([f"ready/{other}" for other in range(size)], PREPARATION_TIMEOUT)
        backend = "gloo"
        if device.type == "cuda":
            backend = "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(device)
        dist.init_process_group(
            backend, store=store, rank=number, world_size=size, timeout=COLLECTIVE_TIMEOUT
        )
        global _patient
        _patient = dist.new_group(backend="gloo", timeout=PREPARATION_TIMEOUT)
    yield
    # Only here: after an error, to take leave could mean to wait for a rank that is gone.
    dist.destroy_process_group()


_patient: Any = None  # the group of all ranks once more, for `await_ranks` and `exchange`


def await_ranks() -> None:
    """Waits until all ranks have come here, however long one of them works alone before.

    Raises:
        LostRank: one has ended.
    """
    if world() > 1:
        with _telling_of_lost_ranks():
            dist.barrier(_patient)


def rank() -> int:
    """Of this process in the group, 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Ranks in the group, 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


# --- a global batch and its parts -------------------------------------------------------------


def own_part(rows: Any) -> Any:
    """This rank's part of the rows of a global batch; parts differ by a row at most."""
    count = len(rows)
    return rows[rank() * count // world() : (rank() + 1) * count // world()]


def draw_part(
    draw: Callable[[Sequence[int]], Tensor], shape: Sequence[int], rows: int | None = None
) -> Tensor:
    """This rank's rows of what is drawn for the global batch.

    Args:
        draw: random numbers of a shape.
        shape: of this rank's rows, (own rows, ...).
        rows: of the global batch; None where every rank has as many.
    """
    return own_part(draw((shape[0] * world() if rows is None else rows, *shape[1:])))


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all ranks, in rank order; the gradient goes back to the rank that they are from.

    Args:
        rows: (rows, ...), as many on every rank.

    Returns:
        (rows * ranks, ...). The gradient of a rank's rows is the sum over all ranks' losses.
    """
    return rows if world() == 1 else _GatherRows.apply(rows)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = rows.new_empty((world() * len(rows), *rows.shape[1:]))
        with _telling_of_lost_ranks():
            dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return own_part(sum_over_ranks(grad))


def exchange(value: Any) -> list[Any]:
    """What every rank says, in rank order, once all have come here, however late.

    Args:
        value: of this rank, anything that the processes of one job may pickle for each other.

    Raises:
        LostRank: one has ended.
    """
    if world() == 1:
        return [value]
    values = [None] * world()
    with _telling_of_lost_ranks():
        dist.all_gather_object(values, value, group=_patient)
    return values


# --- reductions ---------------------------------------------------------------------------------


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over the ranks, a constant for autograd."""
    if world() == 1:
        return values.detach()
    total = values.detach().clone(memory_format=torch.contiguous_format)
    with _telling_of_lost_ranks():
        dist.all_reduce(total)
    return total


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replaces every gradient by its mean over the ranks."""
    average_over_ranks([p.grad for p in parameters if p.grad is not None])


@torch.no_grad()
def average_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Replaces tensors of one dtype by their means over the ranks, in one message."""
    if world() == 1 or not tensors:
        return
    mean = sum_over_ranks(torch.cat([tensor.flatten() for tensor in tensors])) / world()
    parts = mean.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def any_rank(*asked: bool) -> tuple[bool, ...]:
    """Each question with yes where any rank says so: what all must decide alike."""
    if world() == 1:
        return asked
    return tuple((sum_over_ranks(torch.tensor(asked, dtype=torch.int32)) > 0).tolist())


def require_same(tensors: Iterable[Tensor], what: str) -> None:
    """Compares a checksum of the bits of float32 or int64 tensors over the ranks.

    Raises:
        UserError: it differs.
    """
    if world() == 1:
        return
    sums = torch.stack([_checksum(tensor) for tensor in tensors])
    everyone = gather_rows(sums[None]).cpu()
    for other, theirs in enumerate(everyone):
        if not torch.equal(theirs, everyone[0]):
            raise UserError(
                f"{what}: expected the same on all ranks, got another one on rank {other} than on "
                "rank 0; --resume goes on from the last checkpoint, for which all ranks must see "
                "the same --output"
            )


def _checksum(tensor: Tensor) -> Tensor:
    """() int64: each 32 bits times an odd number of their place, modulo 2^64."""
    content = tensor.detach().contiguous().flatten().view(torch.int32).long()
    return (content * (2 * torch.arange(len(content), device=content.device) + 1)).sum()


# --- when a rank is gone ------------------------------------------------------------------------


@contextmanager
def _telling_of_lost_ranks() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of gloo and NCCL alike
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise LostRank(f"rank {launch().rank} lost the others: {reason}") from error


def record_failure(error: BaseException) -> None:
    """Leaves the error to torchrun, which shows the first one of all ranks when all have ended."""
    if launch().elastic:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def await_launcher() -> None:
    """Lets torchrun notice the rank whose error came first before this one ends too."""
    if launch().elastic:
        time.sleep(LAUNCHER_SECONDS)
