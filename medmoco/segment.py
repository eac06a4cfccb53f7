"""Segmentation with an encoder: linear evaluation and fine-tuning, and the controls of both."""

import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import medmoco
from medmoco.command import run_command
from medmoco.config import MAX_SEED, option, parse
from medmoco.data.splits import write_split
from medmoco.downstream import Segmentation, unet_stride
from medmoco.errors import UserError
from medmoco.labelled import image_grid, open_labelled, pretraining_overlap
from medmoco.launch import choose_output, create_run
from medmoco.models.encoder import Encoder, load_encoder
from medmoco.output import write_json
from medmoco.report.cases import write_cases
from medmoco.signals import stopping_at_once

CONTROLS = {"linear": "random", "finetune": "scratch"}


@dataclass(frozen=True)
class SegmentConfig:
    """Flags of segmentation; None is decided by the encoder's file or by the data."""

    task: Path | None = option(None, "labelled data: Decathlon, nnU-Net or img/ and label/")
    output: Path | None = option(None, "folder of the run")
    encoder: Path | None = option(None, "encoder.pt of a pretraining run; without it, the controls")
    mode: str = option("both", "what to do", choices=("linear", "finetune", "both"))
    controls: bool = option(
        True, "also run a frozen random encoder (linear) and a U-Net from scratch (finetune)"
    )
    label_fraction: float = option(1.0, "share of the training patients whose labels are used")
    split: Path | None = option(None, 'JSON file {"pretrain": [], "train": [], "test": []}')
    test_fraction: float = option(0.2, "share of the patients to test on, without --split")
    epochs: int | None = option(
        None, "of fine-tuning: passes over the slices with foreground; default 30, less for many"
    )
    batch_size: int = option(16, "slices a step of fine-tuning")
    lr: float = option(2e-3, "peak learning rate of fine-tuning")
    arch: str | None = option(
        None, "of the encoder; default the file's or resnet18",
        choices=("resnet18", "resnet34", "resnet50"),
    )  # fmt: skip
    width: float | None = option(None, "scales the encoder's channels; default the file's or 1")
    image_size: int | None = option(None, "pixels of an image, square; default holds every slice")
    spacing: float | None = option(None, "mm a pixel; default the file's or the set's median")
    output_stride: int | None = option(
        None, "of the U-Net's encoder; linear evaluation is at 4", choices=(4, 8, 16, 32)
    )
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
        {"device", "workers", "cache", "overwrite", "tensorboard"}
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
    for name in ("epochs", "batch_size", "lr", "image_size", "spacing", "width"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')}: expected a value above 0, got {value}")
    cache, split = open_labelled(config, metadata)
    grid = image_grid(cache, config, metadata)
    stride = config.output_stride or unet_stride(grid.size)
    if config.mode != "linear" and grid.size <= stride:
        raise UserError(
            f"--image-size {grid.size}: expected more than the {stride} pixels of a cell of the "
            "U-Net's deepest map (--output-stride), for a single cell has no statistics"
        )
    return Segmentation(config, cache, split, grid)


def with_encoder(config: SegmentConfig) -> tuple[SegmentConfig, Encoder | None, dict[str, Any]]:
    """Reads --encoder; --arch and --width become those of its file, or the defaults.

    Raises:
        UserError: the file is no encoder, or contradicts --arch or --width.
    """
    if config.encoder is None:
        arch, width = config.arch or "resnet18", 1.0 if config.width is None else config.width
        return dataclasses.replace(config, arch=arch, width=width), None, {}
    encoder, metadata = load_encoder(config.encoder)
    for name in ("arch", "width"):
        asked, found = getattr(config, name), getattr(encoder, name)
        if asked not in (None, found):
            raise UserError(f"{config.encoder}: --{name} {asked} was given, the file has {found}")
    config = dataclasses.replace(config, arch=encoder.arch, width=encoder.width)
    return config, encoder, metadata


def run_stages(segmentation: Segmentation, encoder: Encoder | None, output: Path) -> dict[str, Any]:
    """Runs what --mode and --controls ask for, and keeps what the report shows of the test cases.

    Returns:
        The entries "linear", "finetune" (null without an encoder) and "controls" of summary.json.
    """
    config = segmentation.config
    results: dict[str, Any] = {"linear": None, "finetune": None, "controls": {}}
    with stopping_at_once("in segmentation; finished models are kept"):
        for stage, control in CONTROLS.items():
            if config.mode not in (stage, "both"):
                continue
            if encoder is not None:
                results[stage] = segmentation.run(stage, "pretrained", encoder, output)
            if encoder is None or config.controls:
                result = segmentation.run(stage, control, None, output)
                results["controls"][f"{stage}_{control}"] = result
        write_cases(output, segmentation.cache, results)
    return results


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


def main(argv: Sequence[str] | None = None) -> None:
    """The command `medmoco segment`."""
    config = parse(SegmentConfig, argv, prog="medmoco segment", description=__doc__)
    started = time.monotonic()
    config, encoder, metadata = with_encoder(choose_output(config, "segment"))
    segmentation = prepare(config, metadata)
    warnings = pretraining_overlap(segmentation.cache, segmentation.split, metadata)
    for warning in warnings:
        print(f"warning: {warning}")
    create_run(config, "segment")
    output = config.output
    assert output is not None
    write_split(output / "split.json", segmentation.split)
    results = run_stages(segmentation, encoder, output)
    summary = {
        "medmoco": medmoco.__version__,
        "method": metadata.get("method"),
        "seed": config.seed,
        "classes": list(segmentation.cache.classes),
        **results,
        "bad_files": [dataclasses.asdict(file) for file in segmentation.cache.bad],
        "warnings": warnings,
        "seconds": {"segment": round(time.monotonic() - started, 1)},
    }
    write_json(output / "summary.json", summary)
    print(f"\nDice on {len(segmentation.split.test)} test volumes\n{dice_table(results)}")
    print(f"\nsummary:     {output / 'summary.json'}\npredictions: {output / 'predictions'}")
    print(f"next:        python -m medmoco.report {output}")


if __name__ == "__main__":
    sys.exit(run_command(main))
