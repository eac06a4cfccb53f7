"""Measures what each part of a method brings to segmentation: variants x seeds, a row a run.

    python benchmarks/ablation.py --task DIR --split FILE --output DIR
    python benchmarks/ablation.py --output DIR --quick

A run pretrains one variant with one seed, then trains a linear decoder on its frozen features and
fine-tunes U-Nets with few labelled volumes, always the same ones. As soon as it is done OUTPUT gets
a row in runs.csv, the Dice of every test volume, model and class in dice.csv, loss and diagnostics
of every epoch in epochs.csv, and the eigenvalues of features and embeddings in spectra.jsonl. Runs
that have their row are left out, one that was stopped goes on where it was. A row's settings tell
the flags that are searched for, defaults included; rows that another version left with other
defaults are not told apart. --cross-validate compares flags (--set) on the labelled volumes alone,
and writes search.csv. Several calls may fill one OUTPUT side by side, with different seeds or
variants, or under torchrun, whose ranks share out the rows: one a GPU, or one a core with
OMP_NUM_THREADS=1, which does more than one process on all cores. `random` is the control: nothing
is pretrained. --quick is a run of minutes, on phantoms unless there is a task, that says nothing
about any method.
"""

import argparse
import csv
import dataclasses
import fcntl
import io
import os
import sys
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ablation_run import DIAGNOSTICS, PARTS, Experiment, Score, run
from flags import parser_for
from medmoco.command import run_command
from medmoco.data.phantom import generate_phantom
from medmoco.data.splits import split_task, write_split
from medmoco.data.task import read_task
from medmoco.distributed import launch, own_device
from medmoco.errors import UserError
from medmoco.launch import choose_device
from medmoco.output import append_jsonl
from medmoco.pretrain import PretrainConfig
from reporting import commit
from variants import CONTROLS, FACTORIAL, RANDOM, SCALES, VARIANTS

RUNS, DICE, EPOCHS, SPECTRA = "runs.csv", "dice.csv", "epochs.csv", "spectra.jsonl"
SEARCH = "search.csv"  # in place of runs.csv, and alone, where flags are to be chosen
OF_FEATURES = [f"{part}_{name}" for part in PARTS for name in DIAGNOSTICS]
OF_EPOCHS = ["variant", "seed", "epoch", "loss", "loss_of_chance", *OF_FEATURES, "warnings"]
HIPPOCAMPUS = Path(__file__).parent / "splits" / "hippocampus.json"


def columns(labels: Iterable[int]) -> list[str]:
    """The header of runs.csv."""
    return [
        *(
            "variant",
            "seed",
            "flags",
            "settings",
            "scale",
            "linear_dice",
            *(f"finetune_dice_{n}" for n in labels),
        ),
        *("loss", "chance", "loss_of_chance", *OF_FEATURES, "samples", "dimensions"),
        *("weight_decay", "pretrain_seconds", "seconds", "device", "torch", "commit"),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what has no row yet."""
    flags = _parser().parse_args(argv)
    scale = SCALES["quick" if flags.quick else flags.scale]
    device = own_device(str(choose_device(flags.device)))
    unfit = sorted(set(flags.variants) & set(CONTROLS) - {RANDOM})
    if flags.cross_validate and unfit:
        raise UserError(f"--cross-validate: expected variants or random, got {', '.join(unfit)}")
    task, split = _data(flags)
    experiment = Experiment(
        task, split, flags.output, scale, str(device), dict(flags.set), flags.cross_validate
    )
    own_flags = " ".join(f"{name}={value}" for name, value in sorted(flags.set))
    header = columns(scale.labels)
    rows = flags.output / (SEARCH if flags.cross_validate else RUNS)
    dice, epochs, spectra = (flags.output / name for name in (DICE, EPOCHS, SPECTRA))
    before = read_rows(rows, header)
    if not flags.cross_validate and any(row["flags"] != own_flags for row in before):
        raise UserError(
            f"{rows}: expected rows with --set {own_flags or '(nothing)'}, got other ones: what is "
            "compared is run with the same flags; choose another --output"
        )
    done = {(row["variant"], int(row["seed"])) for row in before if row["flags"] == own_flags}
    wanted = [(variant, seed) for seed in flags.seeds for variant in flags.variants]
    wanted = wanted[launch().rank :: launch().world]
    about = {
        "flags": own_flags,
        "scale": "quick" if flags.quick else flags.scale,
        "device": str(device),
        "torch": torch.__version__,
        "commit": commit(),
    }
    for number, (variant, seed) in enumerate(wanted, 1):
        if (variant, seed) in done:
            continue
        print(f"--- {number} of {len(wanted)}: {variant}, seed {seed}", flush=True)
        found = run(experiment, variant, seed)
        row = found.row
        if not flags.cross_validate:
            names = [field.name for field in dataclasses.fields(Score)]
            append(dice, names, map(dataclasses.asdict, found.scores))
            append(epochs, OF_EPOCHS, found.epochs)
            if found.spectra:
                append_jsonl(spectra, {"variant": variant, "seed": seed} | found.spectra)
        append(rows, header, [row | about])
        print(f"{variant}, seed {seed}: linear {row['linear_dice']:.3f}, {row['seconds']:.0f} s")
    print(f"rows: {rows}")
    if not flags.cross_validate:
        print(f"Dice: {dice}\nnext: python benchmarks/ablation_report.py {flags.output}")


def _data(flags: argparse.Namespace) -> tuple[Path, Path]:
    """The task and its split: as flags say or, to try everything out, of phantoms."""
    if flags.task is not None:
        return flags.task, flags.split
    if not flags.quick:
        raise UserError("--task: expected the folder of a labelled data set, got none")
    flags.output.mkdir(parents=True, exist_ok=True)
    task = generate_phantom(flags.output / "phantom", patients=10, size=48, slices=24)
    split = flags.output / "split.json"
    write_split(split, split_task(read_task(task)))
    return task, split


def read_rows(path: Path, header: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a table; none where there is none, or where another process just begins it.

    Raises:
        UserError: its columns are other ones.
    """
    if not path.is_file() or path.stat().st_size == 0:
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if list(reader.fieldnames or ()) != list(header):
            raise UserError(f"{path}: expected the columns of this version, got other ones")
        return list(reader)


def append(path: Path, header: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Adds rows to a table, which several processes may do; what has no value stays empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, header, lineterminator="\n")
    with path.open("a", encoding="utf-8", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if file.seek(0, os.SEEK_END) == 0:
            writer.writeheader()
        writer.writerows({name: _rounded(row.get(name)) for name in header} for row in rows)
        file.write(text.getvalue())


def _rounded(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value


def _setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE: a flag of pretraining and its value."""
    name, _, value = text.partition("=")
    hints = typing.get_type_hints(PretrainConfig)
    if name not in hints:
        raise argparse.ArgumentTypeError(f"{text!r}: there is no such flag of pretraining")
    kinds = typing.get_args(hints[name]) or (hints[name],)
    return name, kinds[0](value)


def parser_for_finished(doc: str | None, variants: Sequence[str]) -> argparse.ArgumentParser:
    """Of a command that looks again at finished runs, by default of these variants."""
    parser = parser_for(doc)
    add = parser.add_argument
    add("--task", type=Path, required=True, help="labelled data")
    add("--split", type=Path, default=HIPPOCAMPUS, help="default: that of the hippocampus set")
    add("--output", type=Path, required=True, help="folder of finished runs")
    add("--scale", choices=tuple(SCALES), default="cpu", help="of these runs; default: cpu")
    add("--variants", nargs="+", choices=(RANDOM, *VARIANTS), metavar="NAME", default=variants,
        help=f"default: {' '.join(variants)}")  # fmt: skip
    add("--seeds", nargs="+", type=int, default=[0], help="default: 0")
    add("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    return parser


def _parser() -> argparse.ArgumentParser:
    parser = parser_for(__doc__)
    add = parser.add_argument
    names = (*VARIANTS, *CONTROLS)
    add("--task", type=Path, help="labelled data; its images are pretrained on")
    add("--split", type=Path, default=HIPPOCAMPUS, help="default: that of the hippocampus set")
    add("--output", type=Path, required=True, help="folder of tables and runs; may hold some")
    add("--scale", choices=("cpu", "gpu"), default="cpu", help="default: cpu")
    add("--quick", action="store_true", help="smallest sizes")
    add("--variants", nargs="+", choices=names, default=(*FACTORIAL, RANDOM), metavar="NAME",
        help=f"of {', '.join(names)}; default: the 2 x 2 and the control")  # fmt: skip
    add("--seeds", nargs="+", type=int, default=list(range(5)), help="default: 0 1 2 3 4")
    add("--set", nargs="+", type=_setting, default=[], metavar="FLAG=VALUE",
        help="flags of pretraining, such as lr=0.06 crop_min=0.2")  # fmt: skip
    add("--cross-validate", action="store_true",
        help="test on thirds of the labelled volumes instead: to choose flags")  # fmt: skip
    add("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
