"""Do keys tell by the statistics of their batch which query is theirs?

    python benchmarks/ablation_leak.py --task DIR --output DIR

He et al. 2020 found that plain BatchNorm lets a query find its key by the statistics that both
share, and shuffle the keys' batches against it; whitening takes statistics of the whole batch. So
the global loss of finished runs of benchmarks/ablation.py is taken with keys normalised among the
images of their queries, and in batches of which a half, or three quarters, are other images. Were
the statistics a way to cheat, the loss would rise from the first to the last, and more with
whitening than without. Beside it stands the loss by the averages of training. OUTPUT gets leak.csv.
"""

import copy
import itertools
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from ablation import append, parser_for_finished, read_rows
from ablation_run import Experiment, finished
from medmoco.command import run_command
from medmoco.models.moco import MoCo
from medmoco.ops import queue_info_nce
from medmoco.pretraining import Pretraining
from reporting import commit
from variants import FACTORIAL, SCALES

LEAK = "leak.csv"
COLUMNS = ["variant", "seed", "scale", "batches", "keys", "loss", "torch", "commit"]
# Over how many batches the images of one are spread, each filled up with other images.
SPREADS = {"its query's batch": 1, "half of it": 2, "a quarter of it": 4}
AVERAGES = "averages"


def main(argv: Sequence[str] | None = None) -> None:
    """Measures what has no row yet."""
    parser = parser_for_finished(__doc__, FACTORIAL)
    parser.add_argument("--batches", type=int, default=16, help="to measure with; default: 16")
    flags = parser.parse_args(argv)
    if flags.batches < 1:
        parser.error(f"--batches: expected at least 1, got {flags.batches}")
    experiment = Experiment(
        flags.task, flags.split, flags.output, SCALES[flags.scale], flags.device
    )
    table = flags.output / LEAK
    done = {tuple(row[name] for name in COLUMNS[:4]) for row in read_rows(table, COLUMNS)}
    for seed, variant in itertools.product(flags.seeds, flags.variants):
        key = (variant, seed, flags.scale, flags.batches)
        if tuple(map(str, key)) in done:
            continue
        pretraining, _ = finished(experiment, variant, seed)
        pretraining.restore()
        losses = measure(pretraining, flags.batches)
        about = dict(zip(COLUMNS, key, strict=False))
        about |= {"torch": torch.__version__, "commit": commit()}
        rows = [about | {"keys": keys, "loss": loss} for keys, loss in losses.items()]
        append(table, COLUMNS, rows)
        shown = ", ".join(f"{keys} {loss:.3f}" for keys, loss in losses.items())
        print(f"{variant}, seed {seed}: loss by keys of {shown}", flush=True)
    print(f"rows: {table}")


@torch.no_grad()
def measure(pretraining: Pretraining, batches: int) -> dict[str, float]:
    """Global loss by how the keys were normalised.

    Args:
        pretraining: a finished run, restored.
        batches: how many; each is filled up with images of the one before it.
    """
    model, generator = pretraining.model, pretraining.generator
    model.query.train()
    averaged = copy.deepcopy(model.key).eval()  # first: keys in training mode move the averages
    found: dict[str, list[float]] = {}
    others: Tensor | None = None
    for batch in itertools.islice(pretraining.unseen_batches(), batches + 1):
        views, ids = pretraining.draw_views(batch), pretraining.ids_of(batch["index"])
        images = views[1].image
        if others is not None:
            query = model.query(views[0].image).projection
            keys = {
                name: spread_keys(model, images, others, spread, generator)
                for name, spread in SPREADS.items()
            }
            keys[AVERAGES] = averaged(images).projection
            for name, key in keys.items():
                loss, _ = queue_info_nce(
                    query, key, model.queue.keys, model.temperature, ids, model.queue.ids
                )
                found.setdefault(name, []).append(float(loss.mean()))
        others = images
    return {name: sum(losses) / len(losses) for name, losses in found.items()}


def spread_keys(
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


if __name__ == "__main__":
    sys.exit(run_command(main))
