"""What a rank of test_distributed_training.py runs.

    ranks_program.py runs FILE     the calls of `medmoco pretrain` in a JSON file, one after another
    ranks_program.py killed FLAGS  one call, whose rank 1 is killed in every attempt

With WORLD_SIZE unset it is the only rank.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from medmoco import pretrain
from medmoco.command import run_command
from medmoco.distributed import gather_rows, joined, launch, own_part, rank, require_same, world
from medmoco.errors import UserError
from medmoco.models.branch import Branch
from medmoco.models.encoder import Encoder
from medmoco.models.moco import MoCo
from medmoco.models.rank_norm import share_statistics
from medmoco.pretraining import Pretraining

take_step = Pretraining._train_step


def at_step(step: int, act: Callable[[], None]) -> None:
    """Lets this rank act before a step, in the runs from here on."""

    def act_then_step(self, batch):
        if self.step + 1 == step:
            act()
        return take_step(self, batch)

    Pretraining._train_step = act_then_step


def signal_self(number: int) -> None:
    os.kill(os.getpid(), number)


def weighted(layer: nn.Module, images: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    """Output of a layer and gradient of the images, of a loss that weighs every pixel."""
    images = images.clone().requires_grad_()
    output = layer(images)
    (output * weight).sum().backward()
    return [output.detach(), images.grad]


def check_norm() -> None:
    """Statistics over all ranks on parts of a batch, against BatchNorm2d on all of it."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(6, 5, 4, 3, generator=generator, dtype=torch.float64) * 3 + 50
    weight = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    whole, parts = nn.BatchNorm2d(5).double(), nn.Sequential(nn.BatchNorm2d(5)).double()
    share_statistics(parts)
    expected = weighted(whole, images, weight)
    found = weighted(parts, own_part(images), own_part(weight))
    torch.testing.assert_close(found, [own_part(rows) for rows in expected])
    for name, value in whole.named_parameters():
        grad = gather_rows(parts[0].get_parameter(name).grad[None]).sum(0)
        torch.testing.assert_close(grad, value.grad)
    for name, value in whole.named_buffers():
        torch.testing.assert_close(parts[0].get_buffer(name), value)


def check_gather() -> None:
    """Rows come in rank order, and gradients of all ranks' losses go home."""
    own = torch.full((2, 3), float(rank()), requires_grad=True)
    everyone = gather_rows(own)
    assert everyone[:, 0].tolist() == [float(r) for r in range(world()) for _ in range(2)]
    (everyone * (1 + rank())).sum().backward()
    assert own.grad.eq(sum(range(1, world() + 1))).all()


def check_difference_is_told() -> None:
    try:
        require_same([torch.tensor([float(rank())])], "queue")
    except UserError as error:
        assert "queue: expected the same on all ranks" in str(error)
    else:
        raise AssertionError("a difference between ranks went unnoticed")


def shuffled_keys(images: torch.Tensor, batch: int) -> torch.Tensor:
    """Keys of this rank's part of the first `batch` images, with shuffled statistics."""
    torch.manual_seed(0)
    branch = Branch(Encoder("resnet18", width=0.125, output_stride=8), 16, None, local=False)
    model = MoCo(
        branch,
        queue_size=4,
        momentum=0.9,
        temperature=0.2,
        key_norm="shuffle",
        local="none",
        global_weight=1.0,
        local_weight=0.5,
        covariance_weight=0.0,
        regions=2,
    )
    generator = torch.Generator().manual_seed(2)
    return model.encode_keys(own_part(images[:batch]), generator).projection


def main() -> int:
    mode, *arguments = sys.argv[1:]
    if mode == "killed":
        if launch().rank == 1:
            attempt = launch().restarts
            at_step(5 + attempt, lambda: signal_self(signal.SIGKILL))
        return run_command(pretrain.main, arguments)
    pretrain.write_plots = lambda folder: None  # slow, and no matter of ranks
    pretrain.write_report = lambda folders, path: path
    torch.manual_seed(0)
    images = functional.interpolate(torch.rand(96, 1, 4, 4), 16)
    # Whole splits of 32 for each rank; parts of splits; splits of a length that nothing divides.
    alone = {batch: shuffled_keys(images, batch) for batch in (64, 96)}
    statuses = []
    with joined(torch.device("cpu")):
        check_norm()
        check_gather()
        check_difference_is_told()
        for batch, keys in alone.items():
            torch.testing.assert_close(shuffled_keys(images, batch), own_part(keys))
        for run in json.loads(Path(arguments[0]).read_text()):
            if run.get("stopped_rank") == rank():
                at_step(3, lambda: signal_self(signal.SIGTERM))
            statuses.append(run_command(pretrain.main, run["argv"]))
            Pretraining._train_step = take_step
    print(json.dumps(statuses))
    return 0


if __name__ == "__main__":
    sys.exit(main())
