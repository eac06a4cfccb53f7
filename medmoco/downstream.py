"""The models of segmentation, trained and tested: linear decoders, U-Nets, and their controls."""

import copy
import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from medmoco.config import to_json
from medmoco.data.slices import PixelGrid, SliceDataset
from medmoco.data.splits import Split
from medmoco.data.store import SliceCache
from medmoco.errors import UserError
from medmoco.evaluation import evaluate
from medmoco.finetune import finetune
from medmoco.labelled import foreground_slices
from medmoco.launch import choose_device, choose_workers
from medmoco.linear import linear_evaluation
from medmoco.metrics_log import MetricsLog
from medmoco.models.decoders import UNet
from medmoco.models.encoder import Encoder
from medmoco.models.moco import recalibrate_batchnorm
from medmoco.output import write_json

if TYPE_CHECKING:
    from medmoco.segment import SegmentConfig

LINEAR_STRIDE = 4  # input pixels a cell of the map that the linear decoder reads
CALIBRATION_SLICES = 512
# Flags that change neither the data nor the training.
WITHOUT_EFFECT = frozenset(
    {"output", "mode", "controls", "encoder", "cache", "device", "workers", "resume", "overwrite"}
    | {"tensorboard"}
)


class Segmentation:
    """A labelled task, read and checked, and the models that can be trained and tested on it.

    Args:
        config: arch and width are set.
        cache: the slices of all cases, with labels.
        split: cases to train and test on.
        grid: of the images.

    Raises:
        UserError: the cases to train on show nothing but background.
    """

    def __init__(
        self, config: "SegmentConfig", cache: SliceCache, split: Split, grid: PixelGrid
    ) -> None:
        self.config = config
        self.cache = cache
        self.split = split
        self.grid = grid
        self.device = choose_device(config.device)
        self.amp_dtype = None if config.amp_dtype == "float32" else torch.bfloat16
        slices = cache.indices_of(split.train)
        self.dataset = SliceDataset(cache, slices, grid, with_labels=True)
        self.patients = [cache.volumes[v].patient for v in cache.slice_volume[slices]]
        self.has_foreground = foreground_slices(cache, slices)
        if not self.has_foreground.any():
            raise UserError(
                f"{config.task}: expected labelled voxels in the {len(split.train)} cases to train "
                "on, got background alone"
            )

    def run(
        self, stage: str, initialisation: str, encoder: Encoder | None, output: Path
    ) -> dict[str, Any]:
        """Trains and tests one model, or reads the result that `output` holds of the same inputs.

        Writes predictions/<stage>-<initialisation>/ (a label map of each test case, result.json),
        adds to metrics.jsonl.

        Args:
            stage: "linear", a linear decoder on a frozen encoder, or "finetune", a U-Net.
            initialisation: "pretrained", or the control: "random" for the linear decoder (BatchNorm
                recalibrated on slices), "scratch" for the U-Net.
            encoder: the pretrained one, which stays as it is; None for a control.
            output: folder of the run, which exists.

        Returns:
            What `DiceTable.result` gives, "seconds", and "weight_decay" of the linear decoder.
        """
        name = f"{stage}-{initialisation}"
        folder = output / "predictions" / name
        identity = self.identity(encoder)
        finished = read_result(folder / "result.json", identity)
        if finished is not None:
            print(f"{name}: finished before, {folder / 'result.json'}")
            return finished
        started = time.monotonic()
        train = {"linear": self._train_linear, "finetune": self._train_unet}[stage]
        metrics = MetricsLog(output / "metrics.jsonl", self.config.tensorboard)
        metrics.forget_training(stage, initialisation)  # of an attempt that was cut short
        log = functools.partial(self._log, metrics, stage, initialisation)
        with metrics, torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            copied = copy.deepcopy(encoder) if encoder else self._new_encoder()
            model, about = train(copied.to(self.device), encoder is not None, log)
        result = evaluate(
            model,
            self.cache,
            self.split.test,
            self.grid,
            folder,
            batch_size=self.config.batch_size,
            device=self.device,
            amp_dtype=self.amp_dtype,
        )
        result |= about | {"seconds": round(time.monotonic() - started, 2)}
        write_json(folder / "result.json", {"identity": identity, "result": result})
        return result

    def _train_linear(
        self, encoder: Encoder, pretrained: bool, log: Callable[..., None]
    ) -> tuple[nn.Module, dict[str, Any]]:
        encoder.set_output_stride(LINEAR_STRIDE)
        if not pretrained:
            self._recalibrate(encoder)
        model, weight_decay = linear_evaluation(
            encoder,
            self.dataset,
            self.patients,
            len(self.cache.classes),
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            device=self.device,
            log=log,
        )
        return model, {"weight_decay": weight_decay}

    def _train_unet(
        self, encoder: Encoder, pretrained: bool, log: Callable[..., None]
    ) -> tuple[nn.Module, dict[str, Any]]:
        encoder.set_output_stride(self.config.output_stride or unet_stride(self.grid.size))
        model = UNet(encoder, len(self.cache.classes)).to(self.device)
        if self.device.type == "cuda":
            model = model.to(memory_format=torch.channels_last)
        finetune(
            model,
            self.dataset,
            self.has_foreground,
            epochs=self.config.epochs,
            batch_size=self.config.batch_size,
            lr=self.config.lr,
            seed=self.config.seed,
            device=self.device,
            amp_dtype=self.amp_dtype,
            workers=choose_workers(self.config.workers, self.device),
            log=log,
        )
        return model, {}

    def _new_encoder(self) -> Encoder:
        assert self.config.arch is not None and self.config.width is not None
        return Encoder(self.config.arch, self.config.width)

    @torch.no_grad()
    def _recalibrate(self, encoder: Encoder) -> None:
        """Gives a random encoder the statistics of slices, else its features would be off scale."""
        slices = self.cache.indices_of(self.split.pretrain or self.split.train)
        step = -(-len(slices) // CALIBRATION_SLICES)
        dataset = SliceDataset(self.cache, slices[::step], self.grid)
        batches = DataLoader(dataset, self.config.batch_size)
        recalibrate_batchnorm(encoder, (batch["image"].to(self.device) for batch in batches))

    def identity(self, encoder: Encoder | None) -> str:
        """A digest of all that a result depends on: flags, slices, split, pixels and weights."""
        flags = {k: v for k, v in to_json(self.config).items() if k not in WITHOUT_EFFECT}
        parts = [flags, self.cache.directory.name, dataclasses.asdict(self.split)]
        digest = hashlib.blake2b(json.dumps([*parts, dataclasses.asdict(self.grid)]).encode())
        for name, tensor in encoder.state_dict().items() if encoder else ():
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @staticmethod
    def _log(
        metrics: MetricsLog,
        stage: str,
        encoder: str,
        epoch: int,
        step: int,
        loss: float,
        lr: float | None,
    ) -> None:
        record = {"stage": stage, "encoder": encoder, "epoch": epoch, "step": step}
        metrics.write(record | {"loss": loss, "lr": lr})


def read_result(path: Path, identity: str) -> dict[str, Any] | None:
    """The result of a finished stage, if it came from the same inputs."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content["result"] if content["identity"] == identity else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def unet_stride(image_size: int) -> int:
    """The largest output stride that leaves the U-Net's deepest map 4 cells a side."""
    return next((stride for stride in (32, 16, 8) if image_size >= 4 * stride), 4)
