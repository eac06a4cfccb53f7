"""Self-supervised pretraining of an encoder on the slices of a folder of volumes."""

import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from medmoco.command import run_command
from medmoco.config import MAX_SEED, option, parse
from medmoco.data.cache import build_cache
from medmoco.data.sources import folder_sources, read_case_list
from medmoco.data.store import CacheSettings, SliceCache
from medmoco.distributed import joined, launch, own_device
from medmoco.errors import UserError, keeping_what_is_finished
from medmoco.launch import choose_output, create_run
from medmoco.methods import COMMON, MAX_IMAGE_SIZE, PRESETS, Config, resolve
from medmoco.models.weights import read_weights, with_architecture
from medmoco.output import write_json
from medmoco.pretraining import Pretraining
from medmoco.printing import say
from medmoco.report import write_plots, write_report
from medmoco.signals import stopping_at_once


@dataclass(frozen=True)
class PretrainConfig:
    """Flags of pretraining; a default of None is decided by the method or by the data."""

    data: Path | None = option(None, "folder of .nii/.nii.gz volumes, searched recursively")
    output: Path = option(None, "folder of the run; default runs/<time>-<method>")
    method: str = option("medmoco", "preset of other flags", choices=tuple(PRESETS))
    init: Path | None = option(
        None,
        "weights to start from: encoder.pt, a torchvision ResNet, or a checkpoint of MoCo or the "
        "like",
    )
    arch: str = option(
        None,
        "encoder; default that of --init, else resnet18 below 50,000 slices, then resnet50",
        choices=("resnet18", "resnet34", "resnet50"),
    )
    width: float = option(None, "scales the encoder's channels; default that of --init, else 1")
    image_size: int = option(
        None,
        f"pixels of a view, square; default {MAX_IMAGE_SIZE}, less where all slices are smaller",
        least=4,
    )
    spacing: float | None = option(
        None, "mm a pixel; default: the set's median, or what fits", above=0
    )
    output_stride: int = option(
        None,
        "input pixels a cell; default 4 up to 96 pixels, 8 up to 256, else 16",
        choices=(4, 8, 16, 32),
    )
    epochs: int = option(None, f"passes over the slices; default {COMMON['epochs']}", least=1)
    batch_size: int = option(None, "slices a step; default up to 256, by their number", least=2)
    lr: float = option(None, "learning rate; default 0.3 * batch size / 256", above=0)
    weight_decay: float = option(None, f"of SGD; default {COMMON['weight_decay']}", least=0)
    clip_norm: float = option(
        None,
        "largest norm of a step's gradient, over all weights, 0 for no limit; default 1 with zca, "
        "else 0",
        least=0,
    )
    projector: str = option(
        None,
        "between pooled features and embedding; none takes the first features as they are; "
        f"default {COMMON['projector']}",
        choices=("mlp", "none"),
    )
    embed_dim: int = option(
        None, "length of an embedding; default 128, or 18% of the features without projector",
        least=1,
    )  # fmt: skip
    queue_size: int = option(
        None, "keys in the queue; default a quarter of the slices, up to 65536", least=1
    )
    momentum: float = option(
        None,
        "of the key encoder's moving average; default 0.99 below 20,000 steps, else 0.999",
        least=0,
        most=1,
    )
    temperature: float = option(
        None, f"divides the logits; default {COMMON['temperature']}", above=0
    )
    key_norm: str = option(
        None, f"statistics of the keys; default {COMMON['key_norm']}", choices=("ema", "shuffle")
    )
    same: str = option(
        None,
        f"whose keys are no negatives of a slice; default {COMMON['same']}",
        choices=("slice", "volume", "none"),
    )
    local: str = option(
        None,
        "local feature learning; default the method's",
        choices=("none", "regions", "coordinates", "dense"),
    )
    global_weight: float = option(
        None,
        "weight of the global loss; default 1, of densecl 1 - --local-weight",
        least=0,
    )
    local_weight: float = option(0.5, "weight of the local loss", least=0)
    regions: int = option(3, "the region grid is regions x regions", least=2)
    decorrelation: str = option(
        None,
        "feature decorrelation; default the method's",
        choices=("none", "zca", "iternorm", "covariance"),
    )
    whiten_at: str = option(
        None,
        f"place of zca and iternorm; default {COMMON['whiten_at']}",
        choices=("pooled", "last-norm"),
    )
    whiten_group: int | None = option(
        None, "channels whitened together; default up to 64, as the batch allows", least=1
    )
    whiten_eps: float = option(1e-3, "added to the eigenvalues of zca", above=0)
    iternorm_steps: int = option(5, "Newton-Schulz steps of iternorm", least=1)
    covariance_weight: float = option(0.1, "weight of the covariance penalty", least=0)
    crop_min: float = option(
        None,
        f"smallest share of the area that a view shows; default {COMMON['crop_min']}",
        above=0,
        most=1,
    )
    modality: str = option("auto", "intensity scaling", choices=("auto", "ct", "mr"))
    window_low: float = option(-175.0, "lower end of the CT window, HU")
    window_high: float = option(250.0, "upper end of the CT window, HU")
    slice_axis: int | None = option(
        None,
        "0 sagittal, 1 coronal, 2 axial; default: coarsest spacing, else axial",
        choices=(0, 1, 2),
    )
    channel: int = option(0, "channel of 4-D files", least=0)
    patients: str | None = option(None, "CSV of case,patient or a regular expression with a group")
    exclude: Path | None = option(None, "file of case names to leave out, one a line")
    statistics: str = option(
        "global",
        "of normalisation, whitening and covariance on several ranks: of the whole batch, as on "
        "one, or of each rank's part",
        choices=("global", "rank"),
    )
    skip_bad: bool = option(False, "go on without unreadable files and list them")
    cache: Path = option(None, "folder of the slice cache; default beside the output")
    workers: int = option(None, "loader processes; default 0 on the CPU, else up to 8", least=0)
    device: str = option(None, "cpu, cuda or cuda:N; default: cuda where there is one")
    amp_dtype: str = option(
        None, "autocast; default bfloat16 on CUDA", choices=("bfloat16", "float32")
    )
    seed: int = option(0, "of weights, order and views", least=0, most=MAX_SEED)
    tensorboard: bool = option(False, "also write event files for TensorBoard, in tensorboard/")
    resume: bool = option(False, "go on with the run in --output")
    overwrite: bool = option(False, "delete the run in --output first")

    RESUME_MAY_CHANGE: ClassVar[frozenset[str]] = frozenset(
        {"device", "workers", "cache", "overwrite", "tensorboard"}
    )
    OTHER_MEANING_IN: ClassVar[frozenset[str]] = frozenset({"segment"})


def open_slices(config: PretrainConfig, exclude: Iterable[str] = ()) -> SliceCache:
    """The slices of all volumes below --data but those of the cases or patients in `exclude`.

    Raises:
        UserError: what is wrong with the folder or with any of its files.
    """
    if config.data is None:
        raise UserError("--data: expected a folder of .nii or .nii.gz volumes, got none")
    listed = read_case_list(config.exclude) if config.exclude else frozenset()
    sources = folder_sources(config.data, config.patients, listed.union(exclude))
    settings = CacheSettings(
        modality=config.modality,
        slice_axis=config.slice_axis,
        window=(config.window_low, config.window_high),
        channel=config.channel,
    )
    return build_cache(
        sources, settings, config.cache, skip_bad=config.skip_bad, workers=config.workers
    )


def with_init(config: Config) -> Config:
    """Looks at --init; --arch and --width become those of its file.

    Raises:
        UserError: the file holds no weights that fit, or contradicts --arch or --width.
    """
    if config.init is None or config.resume:  # a run that goes on has written them down
        return config
    weights = read_weights(config.init)
    config = with_architecture(config, weights)
    say(f"init: {weights.about}")
    return config


@keeping_what_is_finished()
def write_summary(run: Pretraining) -> None:
    """Writes summary.json, the plots and report.html of a run that is over."""
    output = run.output
    write_json(output / "summary.json", run.summary())
    write_plots(output)
    report = write_report([output], output / "report.html")
    encoder = output / "encoder.pt"
    say(f"\nencoder: {encoder}\nreport:  {report}")
    say(f"next:    python -m medmoco.segment --task DIR --encoder {encoder}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command `medmoco pretrain`."""
    config = parse(PretrainConfig, argv, prog="medmoco pretrain", description=__doc__)
    config = with_init(choose_output(config, config.method))
    cache = open_slices(config)
    config = resolve(config, cache, launch().world)
    with ExitStack() as stack:
        with joined(own_device(config.device)):
            run = Pretraining(config, cache)
            if launch().rank == 0:
                create_run(config, "pretrain")
            # From here on --resume goes on, wherever the steps do not notice a stop themselves.
            stack.enter_context(
                stopping_at_once("outside of the training; what is finished is kept")
            )
            run.run()
        if launch().rank == 0:
            write_summary(run)


if __name__ == "__main__":
    sys.exit(run_command(main))
