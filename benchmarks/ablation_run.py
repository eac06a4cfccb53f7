"""One run of the ablation: pretrain a variant with a seed, then measure what its features hold."""

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import ablation_controls as controls
from medmoco.config import to_json
from medmoco.data.splits import Split
from medmoco.downstream import Segmentation
from medmoco.errors import UserError
from medmoco.labelled import class_pixels
from medmoco.methods import resolve
from medmoco.models.encoder import Encoder, load_encoder
from medmoco.output import write_json
from medmoco.pretrain import open_slices
from medmoco.pretraining import Pretraining
from medmoco.sampling import EMPTY_SHARE
from medmoco.segment import SegmentConfig, prepare
from medmoco.train import TrainConfig, kept_from_pretraining
from variants import ATLAS, CONTROLS, PATCHES, RANDOM, SUPERVISED, VARIANTS, WHITENED, Scale

FOLDS = 3
# Flags that do not change what is learned, and those that are searched for.
WITHOUT_EFFECT = ("output", "cache", "device", "workers", "resume", "overwrite")
SEARCHED = (
    "lr",
    "momentum",
    "temperature",
    "queue_size",
    "crop_min",
    "key_norm",
    "same",
    "clip_norm",
)
PARTS = ("features", "embeddings")
DIAGNOSTICS: tuple[str, ...] = ("rankme", "rankme_centred", "rank_share", "alpha_req")
DIAGNOSTICS += ("mean_abs_correlation", "std_sqrt_d", "mean_share")


@dataclass(frozen=True)
class Experiment:
    """What all runs share.

    Attributes:
        task: labelled folder; its images are pretrained on, too.
        split: file that tells which cases are for pretraining, labels and tests.
        output: folder of all runs and tables.
        scale: the size of a run.
        device: None for CUDA where there is some.
        flags: of pretraining; they win over the variant's and the scale's.
        cross_validate: tests on each third of the labelled volumes in turn, by the linear decoder
            alone, and leaves the test volumes for later: for choosing flags.
    """

    task: Path
    split: Path
    output: Path
    scale: Scale
    device: str | None = None
    flags: dict[str, Any] = dataclasses.field(default_factory=dict)
    cross_validate: bool = False


@dataclass(frozen=True)
class Score:
    """Dice of one test volume and class, of one trained model. None: absent, and not predicted."""

    variant: str
    seed: int
    stage: str  # linear, finetune, cross-validation
    labels: int  # labelled volumes that were trained on
    draw: int  # of those
    volume: str
    organ: str
    dice: float | None


@dataclass(frozen=True)
class Run:
    """What a run found.

    Attributes:
        row: of the table of runs.
        scores: of every model, test volume and class.
        epochs: loss and diagnostics before the first epoch and after each; none of a control.
        spectra: the last eigenvalues of features and embeddings, to four digits; none likewise.
    """

    row: dict[str, Any]
    scores: list[Score]
    epochs: list[dict[str, Any]]
    spectra: dict[str, list[float]]


def run(experiment: Experiment, variant: str, seed: int) -> Run:
    """Does what is not done yet, and reads what it found.

    Raises:
        UserError: what is wrong with task, split or flags.
    """
    started = time.monotonic()
    folder = experiment.output / "runs" / run_name(variant, seed, experiment.flags)
    folder.mkdir(parents=True, exist_ok=True)
    pretraining = open_pretraining(experiment, variant, seed, folder)
    row: dict[str, Any] = {"variant": variant, "seed": seed}
    epochs: list[dict[str, Any]] = []
    spectra = {}
    encoder = None
    if variant not in CONTROLS:
        epochs = [row | epoch for epoch in _pretrained(pretraining, folder)]
        config = pretraining.config
        row["settings"] = " ".join(f"{name}={getattr(config, name)}" for name in SEARCHED)
        row |= epochs[-1]
        spectra = _spectra(folder)
        encoder, _ = load_encoder(folder / "encoder.pt")
    row["pretrain_seconds"] = round(time.monotonic() - started, 1)
    segmentation = open_segmentation(experiment, pretraining, seed)
    if variant in CONTROLS and variant != RANDOM:
        result = _control(experiment, segmentation, variant, seed, folder)
        scores = _linear_scores(segmentation, result, row)
    elif experiment.cross_validate:
        scores = _cross_validated(segmentation, encoder, variant, folder, row)
    else:
        scores = _linear(segmentation, encoder, folder, row)
        for labels in experiment.scale.labels:
            scores += _finetuned(
                segmentation, experiment.scale, encoder, variant, labels, folder, row
            )
    row["seconds"] = round(time.monotonic() - started, 1)
    return Run(row, scores, epochs, spectra)


def run_name(variant: str, seed: int, flags: dict[str, Any]) -> str:
    """The folder of a run, within that of all runs."""
    return "-".join([variant, str(seed), *(f"{name}={flags[name]}" for name in sorted(flags))])


def open_pretraining(experiment: Experiment, variant: str, seed: int, folder: Path) -> Pretraining:
    """The run in a folder, as far as it has come."""
    flags = experiment.scale.flags | VARIANTS.get(variant, VARIANTS["mocov2"])
    flags |= experiment.flags | {"device": experiment.device}
    config = TrainConfig(
        **flags,
        data=experiment.task,
        task=experiment.task,
        split=experiment.split,
        output=folder,
        cache=experiment.output / "cache",
        seed=seed,
        resume=(folder / "checkpoints" / "last.pt").is_file(),
    )
    cache = open_slices(config, exclude=kept_from_pretraining(config))
    return Pretraining(resolve(config, cache), cache)


def check_flags(pretraining: Pretraining, folder: Path) -> dict[str, Any]:
    """What a run is to be made with, unless the folder holds one that was made otherwise.

    Raises:
        UserError: the folder holds a run with other flags, such as the defaults of another version.
    """
    path, flags = folder / "flags.json", to_json(pretraining.config)
    flags = {name: value for name, value in flags.items() if name not in WITHOUT_EFFECT}
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != flags:
        raise UserError(f"{path}: expected the flags of this run, got other ones; delete {folder}")
    return flags


def finished(experiment: Experiment, variant: str, seed: int) -> tuple[Pretraining, Path]:
    """A run that has its encoder, as it was opened for its training, and its folder.

    Raises:
        UserError: it has none, or was made with other flags.
    """
    folder = experiment.output / "runs" / run_name(variant, seed, experiment.flags)
    if not (folder / "encoder.pt").is_file():
        raise UserError(f"{folder}: expected a finished run, found no encoder.pt")
    pretraining = open_pretraining(experiment, variant, seed, folder)
    check_flags(pretraining, folder)
    return pretraining, folder


def _pretrained(pretraining: Pretraining, folder: Path) -> list[dict[str, Any]]:
    """Trains unless that is done; what was known of loss and features, epoch by epoch."""
    write_json(folder / "flags.json", check_flags(pretraining, folder))
    if not (folder / "encoder.pt").is_file():
        pretraining.run()
    return [_of_epoch(record, pretraining.chance) for record in _diagnoses(folder)]


def _diagnoses(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["stage"] == "diagnostics"]


def _of_epoch(record: dict[str, Any], chance: float) -> dict[str, Any]:
    loss, features = record["loss"], record["features"]
    found = {"epoch": record["epoch"], "loss": loss, "chance": chance}
    found["loss_of_chance"] = None if loss is None else loss / chance
    found |= {f"{part}_{name}": record[part][name] for part in PARTS for name in DIAGNOSTICS}
    found |= {"samples": features["samples"], "dimensions": features["dimensions"]}
    return found | {"warnings": len(record["warnings"])}


def _spectra(folder: Path) -> dict[str, list[float]]:
    last = _diagnoses(folder)[-1]
    return {part: [float(f"{value:.4g}") for value in last[part]["spectrum"]] for part in PARTS}


def open_segmentation(experiment: Experiment, pretraining: Pretraining, seed: int) -> Segmentation:
    """The labelled volumes, on the grid of the pretraining."""
    config = pretraining.config
    return prepare(
        SegmentConfig(
            task=experiment.task,
            split=experiment.split,
            cache=config.cache,
            arch=config.arch,
            width=config.width,
            device=config.device,
            seed=seed,
        ),
        pretraining.metadata(),
    )


def _linear(
    segmentation: Segmentation,
    encoder: Encoder | None,
    folder: Path,
    row: dict[str, Any],
) -> list[Score]:
    result = segmentation.run("linear", "pretrained" if encoder else "random", encoder, folder)
    return _linear_scores(segmentation, result, row)


def _control(
    experiment: Experiment, segmentation: Segmentation, variant: str, seed: int, folder: Path
) -> dict[str, Any]:
    """The linear decoder's result on what is not pretrained, or not as it is."""
    if variant == ATLAS:
        return controls.blind_atlas(segmentation)
    encoder: Any
    if variant == PATCHES:
        encoder = controls.IntensityPatches()
    elif variant == SUPERVISED:
        encoder = controls.supervised_encoder(segmentation, experiment.scale.steps)
    else:
        assert variant == WHITENED
        trained = folder.with_name(run_name("mocov2", seed, experiment.flags))
        if not (trained / "encoder.pt").is_file():
            trained = folder  # of its own, for mocov2 may just be learning beside us
        _pretrained(open_pretraining(experiment, "mocov2", seed, trained), trained)
        encoder, _ = load_encoder(trained / "encoder.pt")
        encoder = controls.whiten_afterwards(segmentation, encoder)
    return segmentation.run("linear", "pretrained", encoder, folder)


def _linear_scores(
    segmentation: Segmentation, result: dict[str, Any], row: dict[str, Any]
) -> list[Score]:
    row["linear_dice"] = result["dice_mean"]
    row["weight_decay"] = result["weight_decay"]
    labels = len(segmentation.split.train)
    return _scores(result, row["variant"], row["seed"], "linear", labels, 0)


def _finetuned(
    segmentation: Segmentation,
    scale: Scale,
    encoder: Encoder | None,
    variant: str,
    labels: int,
    folder: Path,
    row: dict[str, Any],
) -> list[Score]:
    train = segmentation.split.train
    scores, means = [], []
    for draw in range(1 if labels >= len(train) else scale.draws):
        chosen = drawn(train, labels, draw)
        test, rate = segmentation.split.test, segmentation.config.lr
        few = with_labels(segmentation, chosen, test, scale.steps, rate)
        output = folder / f"labels-{len(chosen)}-draw-{draw}"
        output.mkdir(exist_ok=True)
        result = few.run("finetune", "pretrained" if encoder else "scratch", encoder, output)
        means.append(result["dice_mean"])
        scores += _scores(result, variant, row["seed"], "finetune", len(chosen), draw)
    row[f"finetune_dice_{labels}"] = sum(means) / len(means)
    return scores


def _cross_validated(
    segmentation: Segmentation,
    encoder: Encoder | None,
    variant: str,
    folder: Path,
    row: dict[str, Any],
) -> list[Score]:
    train, pretrain = segmentation.split.train, segmentation.split.pretrain
    order = np.random.default_rng(0).permutation(len(train))
    scores: list[Score] = []
    for fold in range(FOLDS):
        held_out = tuple(sorted(train[i] for i in order[fold::FOLDS]))
        rest = tuple(case for case in train if case not in held_out)
        output = folder / f"fold-{fold}"
        output.mkdir(exist_ok=True)
        held = Segmentation(
            segmentation.config,
            segmentation.cache,
            Split(pretrain, rest, held_out),
            segmentation.grid,
        )
        result = held.run("linear", "pretrained" if encoder else "random", encoder, output)
        scores += _scores(result, variant, row["seed"], "cross-validation", len(rest), fold)
    row["linear_dice"] = float(np.mean([s.dice for s in scores if s.dice is not None]))
    return scores


def drawn(train: tuple[str, ...], labels: int, draw: int) -> tuple[str, ...]:
    """So many of the volumes, the same for every variant and seed; more hold the fewer."""
    order = np.random.default_rng(draw).permutation(len(train))
    return tuple(sorted(train[i] for i in order[:labels]))


def with_labels(
    segmentation: Segmentation,
    chosen: tuple[str, ...],
    test: tuple[str, ...],
    steps: int,
    rate: float,
) -> Segmentation:
    """The same task with these labels alone, tested on these volumes.

    Args:
        steps: of fine-tuning, to the nearest whole epoch.
        rate: of learning, at its peak.
    """
    cache, config = segmentation.cache, segmentation.config
    pixels = class_pixels(cache, cache.indices_of(chosen), segmentation.grid)
    full = int((pixels[:, 1:] > 0).any(dim=1).sum())
    batches = math.ceil(full * (1 + EMPTY_SHARE) / config.batch_size)
    config = dataclasses.replace(config, epochs=max(1, round(steps / batches)), lr=rate)
    split = Split(segmentation.split.pretrain, chosen, test)
    return Segmentation(config, cache, split, segmentation.grid)


def _scores(
    result: dict[str, Any], variant: str, seed: int, stage: str, labels: int, draw: int
) -> list[Score]:
    return [
        Score(variant, seed, stage, labels, draw, volume, organ, dice)
        for volume, organs in result["dice_per_volume"].items()
        for organ, dice in organs.items()
    ]
