"""What a rank of test_distributed_segmentation.py runs.

    segment_ranks_program.py FILE    trainings in float64, then the calls in a JSON file

With WORLD_SIZE unset it is the only rank.
"""

import json
import os
import signal
import sys
import threading
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from labelled_slices import Slices
from rank_steps import in_float64
from torch import Tensor, nn

from medmoco import downstream, finetune, segment
from medmoco.command import run_command
from medmoco.distributed import exchange, joined, rank
from medmoco.models.decoders import DECODERS
from medmoco.models.encoder import Encoder

take_step = finetune.train_step


def trained(decoder: str) -> tuple[list[Any], dict[str, Tensor]]:
    """What is logged of a fine-tuning in float64, and the weights and running statistics.

    Of 7 slices in batches of 3: two ranks have 1 and 2 of a batch, and 0 and 1 of the last one.
    """
    torch.manual_seed(0)
    model = DECODERS[decoder](Encoder("resnet18", 0.125, output_stride=8), 3).double()
    model.register_forward_pre_hook(lambda layer, arguments: (arguments[0].double(),))
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):  # each rank draws for its own part
            layer.p = 0.0
    slices = Slices(7)
    logged: list[Any] = []
    finetune.finetune(
        model,
        slices,
        slices.shown,
        epochs=2,
        batch_size=3,
        lr=1e-2,
        seed=3,
        device=torch.device("cpu"),
        amp_dtype=None,
        workers=0,
        log=lambda *row: logged.append(row),
        class_weights=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
        validation=Slices(4),
    )
    return logged, model.state_dict()


def stop_at(step: int) -> None:
    """This rank is told to stop in a step of the fine-tuning."""
    taken = 0

    def stop_then_step(*arguments):
        nonlocal taken
        taken += 1
        if taken == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(*arguments)

    finetune.train_step = stop_then_step


def stop_before_the_training() -> None:
    """Both ranks are told to stop when the second one already waits for the first."""
    if rank():
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        return

    def come_late(*arguments, **settings):
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGUSR1)

    downstream.finetune = come_late


def main() -> int:
    with in_float64(), redirect_stdout(None):
        alone = {decoder: trained(decoder) for decoder in ("unet", "deeplab")}
    statuses = []
    with joined(torch.device("cpu")):
        with in_float64(), redirect_stdout(None):
            for decoder, expected in alone.items():
                torch.testing.assert_close(trained(decoder), expected, rtol=1e-6, atol=1e-6)
                assert len(set(exchange(torch.initial_seed()))) == 2  # of dropout
        for run in json.loads(Path(sys.argv[1]).read_text()):
            if run.get("stopped_rank") == rank():
                stop_at(5)
            if run.get("stopped_before"):  # the last run: rank 0 leaves its place there
                stop_before_the_training()
            statuses.append(run_command(segment.main, run["argv"]))
            finetune.train_step = take_step
    print(json.dumps(statuses))
    return 0


if __name__ == "__main__":
    sys.exit(main())
