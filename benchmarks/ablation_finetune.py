"""How rate and length of fine-tuning change what pretraining brings to a U-Net.

    python benchmarks/ablation_finetune.py --task DIR --output DIR

Takes the encoders of finished runs in OUTPUT, fine-tunes a U-Net with few of the labelled volumes
and tests it on the other labelled ones: the test volumes are left alone. OUTPUT/finetune.csv gets a
row for each; what has its row is left out.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence

from ablation import append, parser_for_finished, read_rows
from ablation_run import (
    Experiment,
    drawn,
    finished,
    open_pretraining,
    open_segmentation,
    run_name,
    with_labels,
)
from medmoco.command import run_command
from medmoco.models.encoder import load_encoder
from reporting import commit
from variants import RANDOM, SCALES

FINETUNE = "finetune.csv"
COLUMNS = ("variant", "seed", "labels", "draw", "steps", "rate", "dice", "seconds", "commit")


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tunes what has no row yet."""
    flags = _parser().parse_args(argv)
    experiment = Experiment(
        flags.task, flags.split, flags.output, SCALES[flags.scale], flags.device
    )
    table = flags.output / FINETUNE
    done = {tuple(row[name] for name in COLUMNS[:6]) for row in read_rows(table, COLUMNS)}
    for seed, variant in itertools.product(flags.seeds, flags.variants):
        if variant == RANDOM:
            encoder, folder = None, flags.output / "runs" / run_name(variant, seed, {})
            pretraining = open_pretraining(experiment, variant, seed, folder)
        else:
            pretraining, folder = finished(experiment, variant, seed)
            encoder, _ = load_encoder(folder / "encoder.pt")
        segmentation = open_segmentation(experiment, pretraining, seed)
        labelled = segmentation.split.train
        for draw, steps, rate in itertools.product(range(flags.draws), flags.steps, flags.rates):
            chosen = drawn(labelled, flags.labels, draw)
            key = (variant, seed, flags.labels, draw, steps, rate)
            if tuple(map(str, key)) in done:
                continue
            rest = tuple(case for case in labelled if case not in chosen)
            few = with_labels(segmentation, chosen, rest, steps, rate)
            output = folder / f"finetune-{flags.labels}-{draw}-{steps}-{rate}"
            output.mkdir(parents=True, exist_ok=True)
            result = few.run("finetune", "pretrained" if encoder else "scratch", encoder, output)
            row = dict(zip(COLUMNS, key, strict=False))
            row |= {"dice": result["dice_mean"], "seconds": result["seconds"], "commit": commit()}
            append(table, COLUMNS, [row])
            print(
                f"{variant}, seed {seed}, draw {draw}, {steps} steps at {rate}: {row['dice']:.3f}"
            )
    print(f"rows: {table}")


def _parser() -> argparse.ArgumentParser:
    parser = parser_for_finished(__doc__, (RANDOM, "mocov2", "medmoco"))
    add = parser.add_argument
    add("--labels", type=int, default=3, help="volumes to train with; default: 3")
    add("--draws", type=int, default=2, help="how often they are drawn; default: 2")
    add("--steps", nargs="+", type=int, default=[100, 300, 1000], help="default: 100 300 1000")
    add(
        "--rates",
        nargs="+",
        type=float,
        default=[0.002],
        help="peak learning rates; default: 0.002",
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
