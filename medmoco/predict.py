"""Segments new volumes: NIfTI in, NIfTI label maps out, on the grid of the input's own files."""

import dataclasses
import hashlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from tqdm import tqdm

from medmoco.command import run_command
from medmoco.config import option, parse
from medmoco.data.inputs import Input, check_header, find_inputs
from medmoco.data.nifti import VolumeError
from medmoco.errors import Fault, UserError
from medmoco.json_file import read_object
from medmoco.launch import choose_device, create_run
from medmoco.models.segmenter import Segmenter, find_segmenters, load_segmenter
from medmoco.output import CONFIG_NAME, check_output, remove_leftovers
from medmoco.prediction import INSIDE
from medmoco.printing import say
from medmoco.signals import stopping_at_once
from medmoco.volume_prediction import VolumePredictor


@dataclass(frozen=True)
class PredictConfig:
    """Flags of prediction."""

    model: tuple[Path, ...] = option(
        (),
        "a run, whose fine-tuned model is taken, else the linear one (a file in its segmenters/ "
        "chooses another); several vote",
    )
    input: Path | None = option(None, "a NIfTI file, or a folder of them; of a task, its imagesTs")
    output: Path | None = option(None, "folder of the label maps")
    channel: int | None = option(
        None,
        "of 4-D files and of nnU-Net's _0000, _0001, ...; default the model's, if not the first",
        least=0,
    )
    save_probabilities: bool = option(False, "also write <case>.npz: float16, (class, x, y, z)")
    skip_bad: bool = option(False, "go on without unreadable files and list them")
    batch_size: int | None = option(
        None,
        "slices at once; default by the larger of the slice and the model's image, one of "
        "512 x 512 on the CPU",
        least=1,
    )
    device: str | None = option(None, "cpu, cuda or cuda:N; default: cuda where there is one")
    amp_dtype: str | None = option(
        None, "autocast on CUDA; default bfloat16", choices=("bfloat16", "float32")
    )
    resume: bool = option(False, "predict only what --output lacks")
    overwrite: bool = option(False, "delete the predictions in --output first")

    RESUME_MAY_CHANGE: ClassVar[frozenset[str]] = frozenset(
        {"device", "batch_size", "skip_bad", "overwrite"}
    )
    OTHER_MEANING_IN: ClassVar[frozenset[str]] = frozenset({"pretrain", "train", "segment"})


def load_models(paths: Sequence[Path]) -> dict[Path, Segmenter]:
    """The models to predict with, by file.

    Raises:
        UserError: no model, or some that cannot vote together.
    """
    if not paths:
        raise UserError("--model: expected a run or a model's file, got none")
    files = list(dict.fromkeys(file for path in paths for file in find_segmenters(path)))
    models = {file: load_segmenter(file) for file in files}
    first = models[files[0]]
    for file, model in models.items():
        channels = model.encoder.conv1.in_channels
        if channels != 1:
            raise UserError(f"{file}: expected a model of 1 channel, got one of {channels}")
        for name, ours, theirs in (
            ("classes", model.classes, first.classes),
            ("values", model.values, first.values),
            ("slice axis", model.settings.slice_axis, first.settings.slice_axis),
            ("channel", model.settings.channel, first.settings.channel),
        ):
            if ours != theirs:
                raise UserError(f"{file}: expected the {name} of {files[0]}, {theirs}, got {ours}")
    return models


def with_channel(config: PredictConfig, trained: int) -> PredictConfig:
    """--channel, which is that of the models where they were trained on another than the first.

    The first is no default: files of one channel are read by it, too, so that a model of the first
    need not mean the first of several.

    Args:
        config: the flags.
        trained: the models' channel.
    """
    if trained == 0 or config.channel == trained:
        return config
    if config.channel is None:
        say(f"channel: {trained}, as in training")
        return dataclasses.replace(config, channel=trained)
    say(f"warning: --channel {config.channel}: the model was trained on channel {trained}")
    return config


def check_places(config: PredictConfig, models: Sequence[Path]) -> None:
    """Keeps input, output and models apart, so that nothing is read that was written or deleted.

    Raises:
        UserError: they overlap, or --output holds something else than predictions.
    """
    assert config.input is not None and config.output is not None
    given, output = config.input.resolve(), config.output.resolve()
    folder = given if given.is_dir() else given.parent
    if output == folder:
        raise UserError(f"--output {config.output}: expected another folder than that of --input")
    if output.is_relative_to(given):
        raise UserError(
            f"--output {config.output}: expected a folder outside of --input {config.input}, "
            "where its label maps would pass for images"
        )
    for place in (given, *(model.resolve() for model in models)):
        if place.is_relative_to(output):
            raise UserError(
                f"--output {config.output}: expected a folder that does not hold {place}"
            )
    check_output(config.output, resume=config.resume, overwrite=config.overwrite)
    about = output / CONFIG_NAME
    if config.overwrite and about.is_file():
        made_by = read_object(about).get("command")
        if made_by != "predict":
            raise UserError(
                f"--overwrite: {config.output} is a run of `medmoco {made_by}`; "
                "choose another --output"
            )


def readable_inputs(config: PredictConfig) -> tuple[list[Input], list[VolumeError]]:
    """The volumes whose headers make sense, and what is wrong with the others.

    Raises:
        UserError: there are none, or some are bad without --skip-bad.
    """
    assert config.input is not None
    found = find_inputs(config.input, config.channel)
    good, bad = [], []
    for item in tqdm(found, desc="headers", unit="volume", disable=None, leave=False):
        try:
            check_header(item, config.channel)
            good.append(item)
        except VolumeError as error:
            bad.append(error)
    if bad and not (config.skip_bad and good):
        lines = "".join(f"\n  {error}" for error in bad)
        way_out = "none is left" if config.skip_bad else "mend them, or add --skip-bad"
        raise UserError(f"{len(bad)} bad files among {len(found)} volumes ({way_out}):{lines}")
    return good, bad


def check_models_of_resumed(config: PredictConfig, models: dict[str, str]) -> None:
    """Refuses to go on with predictions of other weights.

    Args:
        models: digest of each file.
    """
    assert config.output is not None
    before = read_object(config.output / CONFIG_NAME).get("models")
    if before != models:
        raise UserError(
            f"--resume: the predictions in {config.output} are of other models than "
            f"{', '.join(models)} now hold; choose another --output, or --overwrite"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """The command `medmoco predict`."""
    config = parse(PredictConfig, argv, prog="medmoco predict", description=__doc__)
    for name in ("input", "output"):
        if getattr(config, name) is None:
            raise UserError(f"--{name}: expected a folder, got none")
    device = choose_device(config.device)
    models = load_models(config.model)
    check_places(config, list(models))
    config = with_channel(config, next(iter(models.values())).settings.channel)
    assert config.output is not None
    inputs, bad = readable_inputs(config)
    digests = {str(file): _digest(file) for file in models}
    if config.resume:
        check_models_of_resumed(config, digests)
    create_run(config, "predict", models=digests)
    for file, model in models.items():
        say(f"model: {file} ({model.decoder}, {model.encoder.arch}, {len(model.classes)} classes)")

    predictor = VolumePredictor(
        list(models.values()),
        config.output,
        batch_size=config.batch_size,
        device=device,
        amp_dtype=None if config.amp_dtype == "float32" else torch.bfloat16,
        save_probabilities=config.save_probabilities,
    )
    failed = predict_all(predictor, inputs, config)
    for error in bad + failed:
        say(f"left out: {error}")
    if len(failed) == len(inputs):
        raise UserError(f"no volume could be predicted: {failed[0]}")
    say(f"label maps:  {config.output}")
    say(f"next:        python -m medmoco.evaluate --pred {config.output} --truth FOLDER_OF_LABELS")


def predict_all(
    predictor: VolumePredictor, inputs: Sequence[Input], config: PredictConfig
) -> list[VolumeError]:
    """Predicts what is missing, and says how fast it was.

    Returns:
        What was wrong with volumes that --skip-bad left out.

    Raises:
        UserError: a volume is bad without --skip-bad.
        Fault: a label map cannot be written.
    """
    bad: list[VolumeError] = []
    # Unlike Path.is_file, this is no error where the name is too long for the disk.
    todo = [item for item in inputs if not os.path.isfile(predictor.label_map(item))]
    if len(todo) < len(inputs):
        say(f"finished before: {len(inputs) - len(todo)} of {len(inputs)} volumes")
    clock, started, slices = predictor.clock, time.perf_counter(), 0
    with (
        stopping_at_once("in prediction; finished label maps are kept"),
        tqdm(todo, desc="predict", unit="volume", disable=None) as bar,
    ):
        for item in bar:
            remove_leftovers(predictor.label_map(item))
            remove_leftovers(predictor.probabilities(item))
            try:
                count, warning = predictor.run(item)
            except VolumeError as error:
                if not config.skip_bad:
                    raise UserError(
                        f"{error}; finished label maps are kept: mend the file and add --resume, "
                        "or --resume --skip-bad"
                    ) from error
                bad.append(error)
                continue
            except OSError as error:
                raise Fault(
                    f"{predictor.label_map(item)}: cannot be written: {error.strerror or error}; "
                    "finished label maps are kept, --resume goes on"
                ) from error
            if warning:
                bar.write(f"warning: {warning}", file=sys.stdout)
            slices += count
            bar.set_postfix_str(f"{slices / (time.perf_counter() - started):.1f} slices/s")
    if slices:
        seconds = time.perf_counter() - started
        say(
            f"{len(todo) - len(bad)} volumes, {slices:,} slices in {seconds:.1f} s: "
            f"{slices / seconds:.1f} slices/s, {clock.seconds[INSIDE] / seconds:.0%} of the time "
            "inside the model"
        )
    return bad


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(run_command(main))
