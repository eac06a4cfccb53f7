"""What a rank of test_distributed_training.py runs.

    ranks_program.py runs FILE     the calls of `medmoco pretrain` in a JSON file, one after another
    ranks_program.py killed FLAGS  one call, whose rank 1 is killed in every attempt

With WORLD_SIZE unset it is the only rank.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rank_steps import (
    CASES,
    gradient_of_own_statistics,
    in_float64,
    random_images,
    small_model,
    trained,
)
from torch import nn

from medmoco import pretrain
from medmoco.command import run_command
from medmoco.distributed import gather_rows, joined, launch, own_part, rank, require_same, world
from medmoco.errors import UserError
from medmoco.models.rank_norm import share_statistics
from medmoco.pretraining import Pretraining

take_step = Pretraining._train_step


def at_step(step: int, act: Callable[[Pretraining], None]) -> None:
    """Lets this rank act before a step, in the runs from here on."""

    def act_then_step(self, batch):
        if self.step + 1 == step:
            act(self)
        return take_step(self, batch)

    Pretraining._train_step = act_then_step


def spoil(run: Pretraining) -> None:
    next(run.model.query.parameters()).data.fill_(torch.nan)


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


def shuffled_keys(images: torch.Tensor, over_ranks: bool = True) -> torch.Tensor:
    """Keys of this rank's part of the images."""
    model = small_model("none", "none", "shuffle", over_ranks)
    generator = torch.Generator().manual_seed(2)
    return model.encode_keys(own_part(images), generator).projection


def check_shuffle(images: torch.Tensor, alone: torch.Tensor) -> None:
    """Splits that ranks share have the keys of one rank; else each rank's share is a split."""
    torch.testing.assert_close(shuffled_keys(images), own_part(alone), rtol=0, atol=1e-9)
    model = small_model("none", "none", "shuffle", over_ranks=False)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        maps = torch.cat([model.key.encoder(images[share]) for share in order.chunk(world())])
        expected = model.key.embed(own_part(maps[torch.argsort(order)])).projection
    found = shuffled_keys(images, over_ranks=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def check_steps(alone: dict[Sequence[str], list[torch.Tensor]], own: torch.Tensor) -> None:
    """Several ranks learn what one learned `alone`; with their own statistics, the mean `own`."""
    for case, expected in alone.items():
        for one, several in zip(expected, trained(case), strict=True):
            torch.testing.assert_close(
                several, one, rtol=1e-9, atol=1e-9, msg=lambda told, case=case: f"{case}: {told}"
            )
    torch.testing.assert_close(gradient_of_own_statistics(1), own, rtol=1e-9, atol=1e-9)


def begin_late() -> None:
    """Lets rank 0 make the folders late; no rank may need the others before that."""
    create_run, require_agreement = pretrain.create_run, Pretraining._require_agreement

    def create_late(config, command):
        time.sleep(0.3)
        create_run(config, command)

    def see_then_require(self):
        assert (self.output / "config.json").is_file()
        require_agreement(self)

    pretrain.create_run = create_late
    Pretraining._require_agreement = see_then_require


def main() -> int:
    mode, *arguments = sys.argv[1:]
    if mode == "killed":
        if launch().rank == 1:
            attempt = launch().restarts
            at_step(5 + attempt, lambda run: os.kill(os.getpid(), signal.SIGKILL))
        return run_command(pretrain.main, arguments)
    pretrain.write_plots = lambda folder: None  # slow, and no matter of ranks
    pretrain.write_report = lambda folders, path: path
    begin_late()
    statuses = []
    with in_float64():
        images = random_images(2, seed=3).flatten(0, 1)[:96]
        alone = shuffled_keys(images)
        steps = {case: trained(case) for case in CASES}
        mean = gradient_of_own_statistics(2)
    with joined(torch.device("cpu")):
        check_norm()
        check_gather()
        check_difference_is_told()
        with in_float64():
            check_shuffle(images, alone)
            check_steps(steps, mean)
        for run in json.loads(Path(arguments[0]).read_text()):
            if run.get("stopped_rank") == rank():
                at_step(3, lambda run: os.kill(os.getpid(), signal.SIGTERM))
            if run.get("spoiled"):
                at_step(2, spoil)
            statuses.append(run_command(pretrain.main, run["argv"]))
            Pretraining._train_step = take_step
    print(json.dumps(statuses))
    return 0


if __name__ == "__main__":
    sys.exit(main())
