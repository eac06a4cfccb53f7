"""The main job: pretrain an encoder, evaluate it by segmentation, report.

Without --data and --task it generates CT-like phantoms and runs on them, to show that everything
works; no claim about a method rests on phantoms.
"""

import dataclasses
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmoco.command import run_command
from medmoco.config import option, parse
from medmoco.data.phantom import generate_phantom
from medmoco.data.splits import write_split
from medmoco.distributed import await_ranks, joined, launch, own_device, rank
from medmoco.downstream import Segmentation
from medmoco.errors import UserError, keeping_what_is_finished
from medmoco.labelled import read_split
from medmoco.launch import choose_output, create_run
from medmoco.methods import resolve
from medmoco.models.encoder import load_encoder
from medmoco.output import write_json
from medmoco.pretrain import PretrainConfig, open_slices, with_init
from medmoco.pretraining import Pretraining
from medmoco.printing import say
from medmoco.report import next_command, read_run, write_plots, write_report
from medmoco.segment import SegmentConfig, dice_table, prepare, run_stages, stage_seconds
from medmoco.signals import stopping_at_once

# What fits the phantom's few small slices, and two CPU cores in minutes; flags win.
PHANTOM_FLAGS: dict[str, Any] = {
    "arch": "resnet18",
    "width": 0.25,
    "image_size": 64,
    "output_stride": 8,
    "epochs": 15,
    "lr": 0.03,
    "label_fraction": 0.25,
    "finetune_epochs": 40,
}


@dataclass(frozen=True)
class TrainConfig(PretrainConfig):
    """Flags of the main job: those of pretraining, and of the segmentation that follows."""

    task: Path | None = option(
        None, "labelled data to evaluate on; its images are pretrained on where --data is missing"
    )
    split: Path | None = option(
        None, 'JSON file {"pretrain": [], "train": [], "test": []} of cases'
    )
    test_fraction: float = option(0.2, "share of the patients to test on, without --split")
    label_fraction: float = option(
        None, "share of the training patients whose labels are used; default 1"
    )
    finetune_epochs: int | None = option(
        None, "epochs of fine-tuning; default as segment's", least=1
    )
    decoder: str = option(
        "unet", "network of fine-tuning on the encoder: U-Net or DeepLabv3+",
        choices=("unet", "deeplab"),
    )  # fmt: skip
    controls: bool = option(
        True, "also evaluate a frozen random encoder and fine-tuning from scratch"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command `medmoco train`."""
    asked = parse(TrainConfig, argv, prog="medmoco train", description=__doc__)
    asked = with_init(choose_output(asked, asked.method))
    # Everything that can be wrong with flags and files is found before the output is made.
    located = locate_data(asked)
    cache = open_slices(located, exclude=kept_from_pretraining(located))
    config = resolve(located, cache, launch().world)
    with ExitStack() as stack:
        with joined(own_device(config.device)):
            pretraining = Pretraining(config, cache)
            segmentation = None
            if config.task is not None:
                segmentation = prepare(segment_config(config), pretraining.metadata())
            if launch().rank == 0:
                # As asked: --resume and --config then take the same road to the data, or phantoms.
                create_run(dataclasses.replace(config, data=asked.data, task=asked.task), "train")
            # From here on --resume goes on, wherever the steps do not notice a stop themselves.
            stack.enter_context(stopping_at_once("outside of a training; what is finished is kept"))
            pretraining.run()
            results = segment(config, segmentation) if segmentation is not None else {}
        if launch().rank == 0:
            summarise(config, pretraining, segmentation, results)


@keeping_what_is_finished()
def segment(config: TrainConfig, segmentation: Segmentation) -> dict[str, Any]:
    """What `run_stages` finds with the encoder that was pretrained."""
    if rank() == 0:
        write_split(config.output / "split.json", segmentation.split)
    await_ranks()  # until rank 0 has written the encoder
    encoder, _ = load_encoder(config.output / "encoder.pt")
    return run_stages(segmentation, encoder, config.output)


@keeping_what_is_finished()
def summarise(
    config: TrainConfig,
    pretraining: Pretraining,
    segmentation: Segmentation | None,
    results: dict[str, Any],
) -> None:
    """Writes summary.json, the plots and report.html.

    Args:
        config: of the run.
        pretraining: which is over.
        segmentation: that followed it, or None.
        results: of `segment`.
    """
    summary = pretraining.summary() | results
    if segmentation is not None:
        summary["classes"] = list(segmentation.cache.classes)
        bad = {
            file.path: dataclasses.asdict(file)
            for file in (*pretraining.cache.bad, *segmentation.cache.bad)
        }
        summary["bad_files"] = list(bad.values())
        summary["seconds"]["segment"] = stage_seconds(results)
    write_json(config.output / "summary.json", summary)
    write_plots(config.output)
    report = write_report([config.output], config.output / "report.html")
    say(f"\n{closing_table(summary)}\n\nreport: {report}")
    say(f"next:   {next_command(read_run(config.output))}")


def locate_data(config: TrainConfig) -> TrainConfig:
    """Where volumes and labels lie: as flags say, the task's own images, or phantoms.

    Raises:
        UserError: a split of volumes that have no labels.
    """
    if config.split is not None and config.task is None:
        raise UserError(f"--split {config.split}: expected --task with it, got none")
    if config.data is None and config.task is None:
        phantom = generate_phantom(config.output.parent / "phantom")
        flags = {k: v for k, v in PHANTOM_FLAGS.items() if getattr(config, k) is None}
        config = dataclasses.replace(config, task=phantom, **flags)
    if config.data is None:
        config = dataclasses.replace(config, data=config.task)
    return config


def kept_from_pretraining(config: TrainConfig) -> set[str]:
    """Cases of the task that pretraining must not see, and the patients to be tested on."""
    if config.task is None:
        return set()
    task, split = read_split(segment_config(config))
    allowed, tested = set(split.pretrain), set(split.test)
    kept = {case.name for case in task.cases} - allowed
    return kept | {case.patient for case in task.cases if case.name in tested}


def segment_config(config: TrainConfig) -> SegmentConfig:
    """The flags of segmentation; those that both commands have go over as they are."""
    shared = {field.name for field in dataclasses.fields(SegmentConfig)}
    shared &= {field.name for field in dataclasses.fields(TrainConfig)}
    # Batch and learning rate are pretraining's; pixels and window come with the encoder.
    own = {"epochs", "batch_size", "lr", "image_size", "spacing", "output_stride"}
    own |= {"window_low", "window_high"}
    flags = {name: getattr(config, name) for name in shared - own}
    flags["epochs"] = config.finetune_epochs
    return SegmentConfig(**{name: value for name, value in flags.items() if value is not None})


def closing_table(summary: dict[str, Any]) -> str:
    """What a person wants to know first: Dice, its controls, and the effective rank."""
    rank = summary["effective_rank"]["features"]
    size = f"N={summary['samples']}, D={summary['dimensions']}"
    effective = f"effective rank of the features: {'-' if rank is None else f'{rank:.1f}'} ({size})"
    lines = [f"method {summary['method']}, seed {summary['seed']}; {effective}"]
    if summary["linear"] or summary["controls"]:
        lines += ["mean Dice per volume, test patients:", dice_table(summary)]
    return "\n".join(lines + [f"warning: {text}" for text in summary["warnings"]])


if __name__ == "__main__":
    sys.exit(run_command(main))
