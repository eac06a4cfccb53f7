"""Segmentation with an encoder: linear evaluation and fine-tuning, and the controls of both."""

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

import medmoco
from medmoco.command import run_command
from medmoco.config import MAX_SEED, option, parse
from medmoco.cross_validation import finished_folds, fold_lines, fold_name, over_folds
from medmoco.data.folds import FOLDS_NAME, choose_folds, label_share, split_folds, write_folds
from medmoco.data.slices import PixelGrid
from medmoco.data.splits import write_split
from medmoco.data.store import SliceCache
from medmoco.distributed import joined, launch, own_device, rank
from medmoco.downstream import Segmentation, default_stride
from medmoco.errors import UserError, keeping_what_is_finished
from medmoco.labelled import (
    image_grid,
    open_labelled,
    open_slices,
    pretraining_overlap,
    read_cases,
    without_bad,
)
from medmoco.launch import choose_device, choose_output, create_run
from medmoco.models.encoder import Encoder
from medmoco.models.weights import read_weights, with_architecture
from medmoco.models.whitening import keep_whitening
from medmoco.output import CONFIG_NAME, write_json
from medmoco.printing import say
from medmoco.report.cases import write_cases
from medmoco.signals import stopping_at_once

CONTROLS = {"linear": "random", "finetune": "scratch"}


@dataclass(frozen=True)
class SegmentConfig:
    """Flags of segmentation; None is decided by the encoder's file or by the data."""

    task: Path | None = option(None, "labelled data: Decathlon, nnU-Net or img/ and label/")
    output: Path | None = option(None, "folder of the run")
    encoder: Path | None = option(
        None, "encoder.pt of a pretraining run, weights of a torchvision ResNet, or a checkpoint "
        "of MoCo or the like; without it, the controls",
    )  # fmt: skip
    keep_whitening: bool = option(
        False, "let the last map pass through the whitening that stood after pooling in pretraining"
    )
    mode: str = option("both", "what to do", choices=("linear", "finetune", "both"))
    controls: bool = option(
        True, "also run a frozen random encoder (linear) and fine-tuning from scratch (finetune)"
    )
    label_fraction: float = option(1.0, "share of the training patients whose labels are used")
    split: Path | None = option(
        None, 'JSON file {"pretrain": [], "train": [], "test": []}, or nnU-Net\'s splits_final.json'
    )
    test_fraction: float = option(
        0.2, "share of the patients to test on, without --split and --folds"
    )
    folds: int | None = option(
        None, "cross-validation: parts of the patients, each tested once", least=2
    )
    fold: str | None = option(
        None, "all, or the number of one from 0; default: all of --folds, 0 of a list as --split"
    )
    epochs: int | None = option(
        None, "of fine-tuning: passes over the slices with foreground; default 30, less for many"
    )
    batch_size: int = option(16, "slices a step of fine-tuning")
    lr: float = option(2e-3, "peak learning rate of fine-tuning")
    schedule: str = option("cosine", "of the learning rate", choices=("cosine", "poly"))
    class_weights: str = option(
        "none", "of the cross-entropy; inverse: square root of the inverse frequency",
        choices=("none", "inverse"),
    )  # fmt: skip
    validation_fraction: float = option(
        0.0, "share of the training patients that chooses the best epoch of fine-tuning"
    )
    patience: int | None = option(
        None, "epochs without a better validation before fine-tuning stops", least=1
    )
    decoder: str = option(
        "unet", "network of fine-tuning on the encoder: U-Net or DeepLabv3+",
        choices=("unet", "deeplab"),
    )  # fmt: skip
    arch: str | None = option(
        None, "of the encoder; default the file's or resnet18",
        choices=("resnet18", "resnet34", "resnet50"),
    )  # fmt: skip
    width: float | None = option(None, "scales the encoder's channels; default the file's or 1")
    image_size: int | None = option(None, "pixels of an image, square; default holds every slice")
    spacing: float | None = option(None, "mm a pixel; default the file's or the set's median")
    output_stride: int | None = option(
        None, "of the encoder in fine-tuning; default 8 for deeplab, of a U-Net by the image size; "
        "linear evaluation is at 4",
        choices=(4, 8, 16, 32),
    )  # fmt: skip
    modality: str = option("auto", "intensity scaling", choices=("auto", "ct", "mr"))
    window_low: float | None = option(None, "lower end of the CT window, HU; default -175")
    window_high: float | None = option(None, "upper end of the CT window, HU; default 250")
    slice_axis: int | None = option(
        None, "0 sagittal, 1 coronal, 2 axial; default: coarsest spacing, else axial",
        choices=(0, 1, 2),
    )  # fmt: skip
    channel: int = option(0, "channel of 4-D files", least=0)
    patients: str | None = option(None, "CSV of case,patient or a regular expression with a group")
    exclude: Path | None = option(None, "file of case names to leave out, one a line")
    skip_bad: bool = option(False, "go on without unreadable files and list them")
    cache: Path | None = option(None, "folder of the slice cache; default beside the output")
    workers: int | None = option(
        None, "loader processes; default 0 on the CPU, else up to 8", least=0
    )
    device: str | None = option(None, "cpu, cuda or cuda:N; default: cuda where there is one")
    amp_dtype: str | None = option(
        None, "autocast on CUDA; default bfloat16", choices=("bfloat16", "float32")
    )
    seed: int = option(0, "of split, weights, order and augmentation", least=0, most=MAX_SEED)
    tensorboard: bool = option(False, "also write event files for TensorBoard, in tensorboard/")
    resume: bool = option(False, "repeat only what the run in --output has not finished")
    overwrite: bool = option(False, "delete the run in --output first")

    RESUME_MAY_CHANGE: ClassVar[frozenset[str]] = frozenset(
        {"device", "workers", "cache", "overwrite", "fold", "tensorboard"}
    )
    OTHER_MEANING_IN: ClassVar[frozenset[str]] = frozenset({"pretrain", "train"})


def prepare(config: SegmentConfig, metadata: dict[str, Any] | None = None) -> Segmentation:
    """Reads and checks all that segmentation needs, so that nothing can be wrong with it later.

    Args:
        config: --cache, --arch and --width are set.
        metadata: of the encoder's file (image_size, spacing, modality, window, slice_axis).

    Raises:
        UserError: what is wrong with the task, its files, the split or the flags.
    """
    metadata = metadata or {}
    check_flags(config)
    cache, split = open_labelled(config, metadata)
    return Segmentation(config, cache, split, usable_grid(config, cache, metadata))


def check_flags(config: SegmentConfig) -> None:
    """Raises a UserError where a flag can be seen to be wrong without the data."""
    for name in ("epochs", "batch_size", "lr", "image_size", "spacing", "width"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')}: expected a value above 0, got {value}")
    if config.patience is not None and not config.validation_fraction:
        raise UserError("--patience: expected --validation-fraction above 0 with it, got none")


def usable_grid(config: SegmentConfig, cache: SliceCache, metadata: dict[str, Any]) -> PixelGrid:
    """The pixels of the images.

    Raises:
        UserError: they are too few for the U-Net.
    """
    grid = image_grid(cache, config, metadata)
    stride = config.output_stride or default_stride(config.decoder, grid.size)
    if config.mode != "linear" and grid.size <= stride:
        raise UserError(
            f"--image-size {grid.size}: expected more than the {stride} pixels of a cell of the "
            "deepest map (--output-stride), for a single cell has no statistics"
        )
    return grid


def with_encoder(config: SegmentConfig) -> tuple[SegmentConfig, Encoder | None, dict[str, Any]]:
    """Reads --encoder; --arch and --width become those of its file, or the defaults.

    Raises:
        UserError: the file is no encoder, contradicts --arch or --width, or has no whitening.
    """
    if config.encoder is None:
        if config.keep_whitening:
            raise UserError("--keep-whitening: expected --encoder with it, got none")
        arch, width = config.arch or "resnet18", 1.0 if config.width is None else config.width
        return dataclasses.replace(config, arch=arch, width=width), None, {}
    weights = read_weights(config.encoder)
    config = with_architecture(config, weights)
    say(f"encoder: {weights.about}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # for what the file may not have
        encoder = Encoder(weights.arch, weights.width)
    weights.load_into(encoder)
    if config.keep_whitening:
        try:
            keep_whitening(encoder, weights.metadata.get("whitening"))
        except UserError as error:
            raise UserError(f"--keep-whitening: {config.encoder}: {error}") from error
    return config, encoder.eval(), weights.metadata


def run_stages(segmentation: Segmentation, encoder: Encoder | None, output: Path) -> dict[str, Any]:
    """Runs what --mode and --controls ask for, and keeps what the report shows of the test cases.

    All ranks come here.

    Returns:
        The entries "linear", "finetune" (null without an encoder) and "controls" of summary.json.
    """
    config = segmentation.config
    results: dict[str, Any] = {"linear": None, "finetune": None, "controls": {}}
    for stage, control in CONTROLS.items():
        if config.mode not in (stage, "both"):
            continue
        if encoder is not None:
            results[stage] = segmentation.run(stage, "pretrained", encoder, output)
        if encoder is None or config.controls:
            result = segmentation.run(stage, control, None, output)
            results["controls"][f"{stage}_{control}"] = result
    if rank() == 0:
        write_cases(output, segmentation.cache, results)
    return results


def stage_seconds(results: dict[str, Any]) -> float:
    """Seconds of all models together, those that were finished before --resume among them."""
    found = (results["linear"], results["finetune"], *results["controls"].values())
    return round(math.fsum(result["seconds"] for result in found if result is not None), 1)


def dice_table(results: dict[str, Any]) -> str:
    """Dice of every model, a row a class, as text for the terminal."""
    columns = {
        "linear": results["linear"],
        "linear, random": results["controls"].get("linear_random"),
        "finetune": results["finetune"],
        "from scratch": results["controls"].get("finetune_scratch"),
    }
    columns = {name: result for name, result in columns.items() if result}
    first = next(iter(columns.values()))
    rows = [("", *columns), ("mean", *(_shown(r["dice_mean"]) for r in columns.values()))]
    for name in first["dice_per_class"]:
        rows.append((name, *(_shown(r["dice_per_class"][name]) for r in columns.values())))
    rows.append(("seconds", *(f"{r['seconds']:.0f}" for r in columns.values())))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def _shown(dice: float | None) -> str:
    return "-" if dice is None else f"{dice:.3f}"


@stopping_at_once("outside of a training; what is finished is kept")
@keeping_what_is_finished()
def run_and_summarise(
    segmentation: Segmentation, encoder: Encoder | None, metadata: dict[str, Any]
) -> None:
    """Runs the stages; rank 0 writes split.json and summary.json to --output, which it has made."""
    config, cache = segmentation.config, segmentation.cache
    output = config.output
    assert output is not None
    if rank() == 0:
        write_split(output / "split.json", segmentation.split)
    warnings = pretraining_overlap(cache, segmentation.split, metadata)
    for warning in warnings:
        say(f"warning: {warning}")
    if encoder is not None and not metadata.get("calibrated", True):
        segmentation.recalibrate(encoder)
    results = run_stages(segmentation, encoder, output)
    if rank():
        return
    summary = {
        "medmoco": medmoco.__version__,
        "method": metadata.get("method"),
        "seed": config.seed,
        "classes": list(cache.classes),
        **results,
        "bad_files": [dataclasses.asdict(file) for file in cache.bad],
        "warnings": warnings,
        "seconds": {"segment": stage_seconds(results)},
    }
    write_json(output / "summary.json", summary)
    say(f"\nDice on {len(segmentation.split.test)} test volumes\n{dice_table(results)}")
    say(f"\nsummary:     {output / 'summary.json'}\npredictions: {output / 'predictions'}")


def run_folds(config: SegmentConfig, encoder: Encoder | None, metadata: dict[str, Any]) -> None:
    """Cross-validation: a run in OUTPUT/fold_N for each fold asked for, and a summary over all.

    Each of those is a run like any other, with its own split.json as --split. OUTPUT itself gets
    splits_final.json, and the summary.json of the folds that are finished by then.

    Raises:
        UserError: what is wrong with the task, its files, the folds or the flags.
    """
    check_flags(config)
    output = config.output
    assert output is not None
    if config.resume and (output / "split.json").is_file():
        raise UserError(f"--fold: {output} is a run of one split; choose another --output")
    task = read_cases(config)
    splits = split_folds(task, config.split, config.folds, config.seed)
    chosen = choose_folds(config.fold, len(splits))
    labelled = [label_share(task, s, config.label_fraction, config.seed) for s in splits]
    cache = open_slices(config, task, metadata)
    if cache.bad and config.split is None:  # folds of those that can be read
        good = set(cache.volumes.names("case"))
        task = dataclasses.replace(task, cases=tuple(c for c in task.cases if c.name in good))
        splits = split_folds(task, None, config.folds, config.seed)
        labelled = [label_share(task, s, config.label_fraction, config.seed) for s in splits]
    grid = usable_grid(config, cache, metadata)
    segmentations: dict[Path, Segmentation] = {}
    for number in chosen:
        folder = output / fold_name(number)
        own = dataclasses.replace(
            config,
            output=folder,
            split=folder / "split.json",
            folds=None,
            fold=None,
            label_fraction=1.0,
            overwrite=False,
        )
        split = without_bad(labelled[number], cache)
        segmentations[folder] = Segmentation(own, cache, split, grid)
    with joined(own_device(str(choose_device(config.device)))):
        if rank() == 0:
            create_run(config, "segment")
            write_folds(output / FOLDS_NAME, splits)
        for folder, segmentation in segmentations.items():
            say(f"\n{folder.name} of {len(splits)}")
            if rank() == 0:
                begun = (folder / CONFIG_NAME).is_file()
                create_run(dataclasses.replace(segmentation.config, resume=begun), "segment")
            run_and_summarise(segmentation, encoder, metadata)
    if launch().rank == 0:
        summarise_folds(output, len(splits))


def summarise_folds(output: Path, count: int) -> None:
    """Writes the summary.json of those of `count` folds that are finished."""
    finished = finished_folds(output, count)
    summary = over_folds(finished, count)
    write_json(output / "summary.json", summary)
    say(f"\n{len(finished)} of {count} folds, their cases together\n{dice_table(summary)}")
    say(f"{fold_lines(summary)}\n\nsummary:     {output / 'summary.json'}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command `medmoco segment`."""
    config = parse(SegmentConfig, argv, prog="medmoco segment", description=__doc__)
    config, encoder, metadata = with_encoder(choose_output(config, "segment"))
    if config.folds is not None or config.fold is not None:
        run_folds(config, encoder, metadata)
    else:
        segmentation = prepare(config, metadata)
        with joined(segmentation.device):
            if rank() == 0:
                create_run(config, "segment")
            run_and_summarise(segmentation, encoder, metadata)
    say(f"next:        python -m medmoco.report {config.output}")


if __name__ == "__main__":
    sys.exit(run_command(main))
