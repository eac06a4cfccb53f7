"""Do keys tell by the statistics of their batch which query is theirs?

    python benchmarks/ablation_leak.py --task DIR --output DIR

He et al. 2020 found that plain BatchNorm lets a query find its key by the statistics that both
share, and shuffle the keys' batches against it; whitening uses statistics of the whole batch. So
the global loss of finished runs of benchmarks/ablation.py is taken with keys that were normalised
among the images of their queries, among others by a half and by three quarters, and by averages.
Were the statistics a way to cheat, the loss would rise along this road. OUTPUT gets leak.csv.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ablation import HIPPOCAMPUS, append, read_rows
from ablation_run import Experiment, open_pretraining, run_name
from flags import parser_for
from medmoco.command import run_command
from medmoco.data.views import View, sample_views
from medmoco.errors import UserError
from medmoco.models.moco import MoCo
from medmoco.ops import queue_info_nce
from medmoco.pretraining import Pretraining
from variants import FACTORIAL, SCALES, VARIANTS

LEAK = "leak.csv"
COLUMNS = ["variant", "seed", "scale", "keys", "loss", "acc1", "batches"]
# Among how many batches the images of one are spread, each time filled up with other images.
SPREADS = {"its query's batch": 1, "one half of it": 2, "a quarter of it": 4}
AVERAGES = "averages"


def main(argv: Sequence[str] | None = None) -> None:
    """Measures what has no row yet."""
    flags = _parser().parse_args(argv)
    experiment = Experiment(
        flags.task, flags.split, flags.output, SCALES[flags.scale], flags.device
    )
    table = flags.output / LEAK
    done = {(row["variant"], row["seed"], row["scale"]) for row in read_rows(table, COLUMNS)}
    for seed, variant in itertools.product(flags.seeds, flags.variants):
        if (variant, str(seed), flags.scale) in done:
            continue
        folder = flags.output / "runs" / run_name(variant, seed, {})
        if not (folder / "encoder.pt").is_file():
            raise UserError(f"{folder}: expected a finished run, found no encoder.pt")
        pretraining = open_pretraining(experiment, variant, seed, folder)
        pretraining.restore()
        about = {"variant": variant, "seed": seed, "scale": flags.scale, "batches": flags.batches}
        losses = measure(pretraining, flags.batches)
        rows = [
            about | {"keys": keys, "loss": loss, "acc1": acc1}
            for keys, (loss, acc1) in losses.items()
        ]
        append(table, COLUMNS, rows)
        shown = ", ".join(f"{keys} {loss:.3f}" for keys, (loss, _) in losses.items())
        print(f"{variant}, seed {seed}: loss by keys of {shown}", flush=True)
    print(f"rows: {table}")


@torch.no_grad()
def measure(pretraining: Pretraining, batches: int) -> dict[str, tuple[float, float]]:
    """Global loss and top-1 accuracy by how the keys were normalised.

    Args:
        pretraining: a finished run, restored.
        batches: how many; each is filled up with images of the one before it.
    """
    model, generator = pretraining.model, pretraining.generator
    found: dict[str, list[Tensor]] = {}
    others: Tensor | None = None
    for views, ids in itertools.islice(_views(pretraining), batches + 1):
        images = views[1].image
        if others is not None:
            model.query.train()
            query = model.query(views[0].image).projection
            keys = {
                name: _spread_keys(model, images, others, spread, generator)
                for name, spread in SPREADS.items()
            }
            model.key.eval()
            keys[AVERAGES] = model.key(images).projection
            for name, key in keys.items():
                loss, rank = queue_info_nce(
                    query, key, model.queue.keys, model.temperature, ids, model.queue.ids
                )
                top1 = (rank == 0).float().mean()
                found.setdefault(name, []).append(torch.stack([loss.mean(), top1]))
        others = images
    means = {name: torch.stack(values).mean(0).tolist() for name, values in found.items()}
    return {name: (loss, acc1) for name, (loss, acc1) in means.items()}


def _views(pretraining: Pretraining) -> Iterator[tuple[tuple[View, View], Tensor]]:
    """Two views of each batch, in an order that the training did not see; the slices' ids."""
    pretraining.sampler.start(pretraining.config.epochs)
    for batch in pretraining.loader:
        image, extent, index = (
            batch[name].to(pretraining.device) for name in ("image", "extent", "index")
        )
        yield sample_views(image, extent, pretraining.views, pretraining.generator), index


def _spread_keys(
    model: MoCo, images: Tensor, others: Tensor, spread: int, generator: torch.Generator
) -> Tensor:
    """Keys of images, every `spread`-th in one batch that other images fill up."""
    keys = []
    for part in range(spread):
        own = images[part::spread]
        batch = torch.cat([own, others[: len(images) - len(own)]])
        keys.append(model.encode_keys(batch, generator).projection[: len(own)])
    joined = torch.cat(keys)
    order = torch.cat([torch.arange(part, len(images), spread) for part in range(spread)])
    return joined[torch.argsort(order).to(joined.device)]


def _parser() -> argparse.ArgumentParser:
    parser = parser_for(__doc__)
    add = parser.add_argument
    add("--task", type=Path, required=True, help="labelled data")
    add("--split", type=Path, default=HIPPOCAMPUS, help="default: that of the hippocampus set")
    add("--output", type=Path, required=True, help="folder of finished runs")
    add("--scale", choices=tuple(SCALES), default="cpu", help="of these runs; default: cpu")
    add("--variants", nargs="+", choices=tuple(VARIANTS), metavar="NAME", default=FACTORIAL,
        help="default: the 2 x 2")  # fmt: skip
    add("--seeds", nargs="+", type=int, default=[0], help="default: 0")
    add("--batches", type=int, default=16, help="to measure with; default: 16")
    add("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
