"""What each `--method` stands for, and the defaults that depend on the data."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from medmoco.data.cache import SliceCache
from medmoco.data.slices import choose_grid, holding_all
from medmoco.data.stream import hold_out_patients
from medmoco.distributed import world
from medmoco.errors import UserError
from medmoco.launch import choose_device, choose_workers
from medmoco.models.branch import Branch
from medmoco.models.encoder import Encoder, default_output_stride
from medmoco.models.moco import SHUFFLE_SPLIT, MoCo
from medmoco.models.weights import Weights
from medmoco.models.whitening import (
    SAMPLES_A_CHANNEL,
    IterNorm,
    ZCAWhitening,
    replace_last_norm,
)

if TYPE_CHECKING:
    from medmoco.pretrain import PretrainConfig

Config = TypeVar("Config", bound="PretrainConfig")

# A preset is a combination of flags; a flag that the user gives wins over it.
PRESETS: dict[str, dict[str, Any]] = {
    "mocov2": {"local": "none", "decorrelation": "none"},
    "densecl": {"local": "dense", "decorrelation": "none"},
    "medmoco": {"local": "coordinates", "decorrelation": "zca"},
    # Jing et al. 2022: no projector.
    "directclr": {"local": "none", "decorrelation": "none", "projector": "none"},
    # Hassanpour et al. 2024 as described, with the settings of the code that was released.
    "paper": {
        "local": "regions",
        "decorrelation": "iternorm",
        "whiten_at": "last-norm",
        "same": "none",
        "temperature": 0.2,
        "arch": "resnet50",
        "image_size": 336,
        "output_stride": 32,
        "crop_min": 0.2,
        "queue_size": 65536,
        "momentum": 0.999,
        "weight_decay": 1e-6,
        "epochs": 300,
        "batch_size": 64,
        "lr": 0.03,
    },
}
COMMON: dict[str, Any] = {
    "width": 1.0,
    "projector": "mlp",
    # Chosen by benchmarks/results/ablation, like crop_min.
    "temperature": 0.1,
    "key_norm": "shuffle",
    "whiten_at": "pooled",
    "same": "slice",
    "crop_min": 0.2,
    "weight_decay": 1e-4,
    "epochs": 200,
}
MAX_IMAGE_SIZE = 224  # where neither flags nor method decide
MAX_WHITEN_GROUP = 64
EMBED_DIM = 128
DIRECT_SHARE = 360 / 2048  # of the features that directclr compares


def resolve(config: Config, cache: SliceCache, ranks: int = 1) -> Config:
    """The configuration with every flag decided: by the user, else the method, else the data.

    Args:
        ranks: that are going to train it together.

    Raises:
        UserError: fewer slices than one batch, too few to whiten, or --same volume with a single
            volume to learn from.
    """
    config = apply_preset(config)
    learned, _ = hold_out_patients(cache, config.seed)
    if config.same == "volume" and len(np.unique(cache.locate(learned)[0])) == 1:
        raise UserError(
            "--same volume: expected two volumes or more to learn from, got one, whose slices have "
            "no negatives then; --same slice leaves them some"
        )
    spacing = choose_grid(cache, MAX_IMAGE_SIZE, config.spacing).spacing
    size = min(MAX_IMAGE_SIZE, holding_all(cache, spacing))
    return apply_data_defaults(config, len(learned), size, ranks)


def apply_preset(config: Config) -> Config:
    """Fills the flags that the method decides.

    Raises:
        UserError: densecl's local weight leaves nothing for the global loss.
    """
    preset = {**COMMON, **PRESETS[config.method]}
    config = dataclasses.replace(config, **_unset(config, preset))
    shared = _unset(config, {"global_weight": _global_weight, "clip_norm": _clip_norm})
    return dataclasses.replace(config, **{name: share(config) for name, share in shared.items()})


def _global_weight(config: "PretrainConfig") -> float:
    """1, but in DenseCL what the local loss leaves of it [Wang et al., 2021]."""
    if config.method != "densecl" or config.local == "none":
        return 1.0
    if config.local_weight > 1:
        raise UserError(
            f"--local-weight {config.local_weight:g}: densecl shares a weight of 1 between both "
            "losses: expected at most 1; --global-weight sets the other one apart"
        )
    return 1 - config.local_weight


def _clip_norm(config: "PretrainConfig") -> float:
    """A limit where ZCA whitens features.

    Before training those of all images are nearly alike, and whitening multiplies the gradient by
    as much as it spreads them. One step would then replace the stem's weights, by such large ones
    that batch normalisation lets them hardly move again. Chosen by benchmarks/results/ablation.
    """
    return 1.0 if config.decorrelation == "zca" else 0.0


def apply_data_defaults(
    config: Config, slices: int, image_size: int = MAX_IMAGE_SIZE, ranks: int = 1
) -> Config:
    """Fills the flags that depend on the slices there are to learn from, and on the machine.

    Args:
        slices: how many there are.
        image_size: pixels of a side that hold the largest.
        ranks: among which the batch is divided.

    Raises:
        UserError: fewer slices than one batch, or too few to whiten.
    """
    # 16 steps an epoch or more, as long as that leaves 32 slices a batch.
    fitting = 2 ** int(math.log2(max(slices / 16, 32)))
    fitting = max(ranks, min(256, fitting) // ranks * ranks)
    batch = fitting if config.batch_size is None else config.batch_size
    if slices < batch:
        raise UserError(
            f"--batch-size {batch}: expected at most the {slices} slices there are to learn from"
        )
    device = choose_device(config.device)
    config = dataclasses.replace(config, **_unset(config, {"image_size": image_size}))
    sized = {
        "batch_size": batch,
        "arch": "resnet18" if slices < 50_000 else "resnet50",
        "output_stride": default_output_stride(config.image_size),
        "queue_size": min(65536, max(1, slices // 4)),
        "momentum": 0.99 if config.epochs * (slices // batch) < 20_000 else 0.999,
        # Ten times MoCo's, which a million steps suit; see benchmarks/results/ablation.
        "lr": 0.3 * batch / 256,
        "device": str(device),
        "amp_dtype": "float32" if device.type == "cpu" else "bfloat16",
        "workers": choose_workers(config.workers, device),
    }
    config = dataclasses.replace(config, **_unset(config, sized))
    widths = {
        "embed_dim": embed_dim(config),
        "whiten_group": default_whitening_group(config, ranks),
    }
    return dataclasses.replace(config, **_unset(config, widths))


def embed_dim(config: "PretrainConfig") -> int:
    """Length of an embedding where --embed-dim leaves it open."""
    if config.projector != "none":
        return EMBED_DIM
    return max(1, round(DIRECT_SHARE * _channels(config)))


def default_whitening_group(config: "PretrainConfig", ranks: int) -> int | None:
    """--whiten-group, else what fits the batch; None for all channels, or no whitening.

    It stays what it is when the run goes on with another number of ranks.
    """
    everywhere = config.decorrelation == "iternorm" and config.whiten_at == "last-norm"
    whitens = config.decorrelation in ("zca", "iternorm")
    if config.whiten_group is not None or everywhere or not whitens:
        return config.whiten_group
    return whitening_group(config, _channels(config), ranks)


def _channels(config: "PretrainConfig") -> int:
    """Of the encoder's last feature map."""
    with torch.device("meta"):
        return Encoder(config.arch, config.width).channels[-1]


def whitening_group(config: "PretrainConfig", channels: int, ranks: int) -> int:
    """Channels whitened together: --whiten-group, else the largest power of two that fits.

    Raises:
        UserError: the group does not divide the channels, or the batch is too small for it.
    """
    samples, kind = config.batch_size, "slices"
    if config.statistics == "rank":
        samples //= ranks
    if config.whiten_at == "last-norm":
        together = min(samples, SHUFFLE_SPLIT) if config.key_norm == "shuffle" else samples
        samples = together * math.ceil(config.image_size / config.output_stride) ** 2
        kind = "cells of a feature map"
    affordable = samples // SAMPLES_A_CHANNEL
    if config.whiten_group is None:
        group = 1
        while 2 * group <= min(affordable, MAX_WHITEN_GROUP) and channels % (2 * group) == 0:
            group *= 2
        if group < 2:
            raise UserError(
                f"--batch-size {config.batch_size}: whitening needs at least "
                f"{2 * SAMPLES_A_CHANNEL} {kind}, got {samples}; raise it, or choose another "
                "--decorrelation"
            )
        return group
    group = config.whiten_group
    if group < 1 or channels % group:
        raise UserError(f"--whiten-group {group}: expected a divisor of {channels} channels")
    if group > affordable:
        raise UserError(
            f"--whiten-group {group}: the batch is too small for whitening: expected at least "
            f"{SAMPLES_A_CHANNEL * group} {kind} ({SAMPLES_A_CHANNEL} a channel), got {samples}; "
            "raise --batch-size, or lower --whiten-group"
        )
    return group


def build_model(config: "PretrainConfig", initial: Weights | None = None) -> MoCo:
    """The model that a resolved configuration describes, on the CPU, seeded.

    Args:
        initial: what both encoders start from, instead of random weights.

    Raises:
        UserError: the feature map is smaller than the region grid, or the batch too small to
            whiten.
    """
    torch.manual_seed(config.seed)
    encoder = Encoder(config.arch, config.width, config.output_stride)
    if initial is not None:
        initial.load_into(encoder)
    cells = config.image_size // config.output_stride
    if config.local == "regions" and cells < config.regions:
        raise UserError(
            f"--regions {config.regions}: the feature map is smaller than the region grid: "
            f"expected at least {config.regions} x {config.regions} cells, got {cells} x {cells} "
            f"(--image-size {config.image_size}, --output-stride {config.output_stride})"
        )
    if config.projector == "none" and config.embed_dim > encoder.channels[-1]:
        raise UserError(
            f"--embed-dim {config.embed_dim}: without projector an embedding is taken from the "
            f"features: expected at most {encoder.channels[-1]}"
        )
    whitening = _whitening(config, encoder)
    if whitening is not None and config.whiten_at == "last-norm":
        replace_last_norm(encoder, whitening)
        whitening = None
    return MoCo(
        Branch(encoder, config.embed_dim, whitening, config.local != "none", config.projector),
        queue_size=config.queue_size,
        momentum=config.momentum,
        temperature=config.temperature,
        key_norm=config.key_norm,
        local=config.local,
        global_weight=config.global_weight,
        local_weight=config.local_weight,
        covariance_weight=(
            config.covariance_weight if config.decorrelation == "covariance" else 0.0
        ),
        regions=config.regions,
        over_ranks=config.statistics == "global",
    )


def _whitening(config: "PretrainConfig", encoder: Encoder) -> torch.nn.Module | None:
    channels = encoder.channels[-1]
    if config.decorrelation == "zca":
        fitting = whitening_group(config, channels, world())
        return ZCAWhitening(channels, fitting, config.whiten_eps)
    if config.decorrelation == "iternorm":
        group = config.whiten_group
        affine = config.whiten_at == "last-norm"  # takes the place of an affine BatchNorm
        return IterNorm(channels, group, iterations=config.iternorm_steps, affine=affine)
    return None


def _unset(config: Any, values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if getattr(config, name) is None}
