"""The models of segmentation, trained and tested: decoders on an encoder, and their controls."""

import copy
import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from medmoco.checkpoint import Checkpoints
from medmoco.config import to_json
from medmoco.data.delivery import delivered
from medmoco.data.slices import PixelGrid, SliceDataset
from medmoco.data.splits import Split
from medmoco.data.store import SliceCache
from medmoco.distributed import exchange, own_device, rank, world
from medmoco.errors import UserError
from medmoco.evaluation import evaluate
from medmoco.finetune import finetune, start_from_frequencies
from medmoco.finetune_course import load_begun, whole_epochs
from medmoco.json_file import read_object
from medmoco.labelled import class_pixels
from medmoco.launch import choose_device, choose_workers
from medmoco.linear import linear_evaluation
from medmoco.losses import inverse_frequency_weights
from medmoco.metrics import DiceTable
from medmoco.metrics_log import MetricsLog, SilentLog
from medmoco.models.decoders import DECODERS
from medmoco.models.encoder import Encoder
from medmoco.models.moco import recalibrate_batchnorm
from medmoco.models.segmenter import FOLDER, Segmenter, save_segmenter
from medmoco.output import make_folder, write_json
from medmoco.printing import say
from medmoco.progress import ProgressPlot
from medmoco.validation import hold_out

if TYPE_CHECKING:
    from medmoco.segment import SegmentConfig

LINEAR_STRIDE = 4  # input pixels a cell of the map that the linear decoder reads
CALIBRATION_SLICES = 512
# Flags that change neither the data nor the training.
WITHOUT_EFFECT = frozenset(
    {"output", "mode", "controls", "encoder", "cache", "device", "workers", "resume", "overwrite"}
    | {"tensorboard"}
    # What they gave is in the split.
    | {"split", "folds", "fold", "label_fraction", "test_fraction"}
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
        self.device = own_device(str(choose_device(config.device)))
        self.amp_dtype = None if config.amp_dtype == "float32" else torch.bfloat16
        slices = cache.indices_of(split.train)
        self.dataset = SliceDataset(cache, slices, grid, with_labels=True)
        patients = cache.volumes.names("patient")
        self.patients = [patients[number] for number in cache.locate(slices)[0]]
        self.pixels = class_pixels(cache, slices, grid)
        self.trained, self.validated = hold_out(
            self.patients,
            0.0 if config.mode == "linear" else config.validation_fraction,
            config.seed,
        )
        for purpose, items in (("train", self.trained), ("validate", self.validated)):
            if items and not self.pixels[items, 1:].any():
                raise UserError(
                    f"{config.task}: expected labelled voxels in the cases to {purpose} on, "
                    f"{len({self.patients[i] for i in items})} patients, got background alone"
                )

    def run(
        self, stage: str, initialisation: str, encoder: Encoder | None, output: Path
    ) -> dict[str, Any]:
        """Trains and tests one model, or reads the result that `output` holds of the same inputs.

        Fine-tuning goes on from the checkpoint that `output` holds of it; a linear decoder that was
        not finished is fitted anew. Writes segmenters/<stage>-<initialisation>.pt and
        predictions/<stage>-<initialisation>/ (a label map of each test case, result.json), adds to
        metrics.jsonl. All ranks come here: fine-tuning and its test cases are shared out over them,
        the linear decoder is the work of rank 0.

        Args:
            stage: "linear", a linear decoder on a frozen encoder, or "finetune", of --decoder.
            initialisation: "pretrained", or the control: "random" for the linear decoder (BatchNorm
                recalibrated on slices), "scratch" for fine-tuning.
            encoder: the pretrained one, which stays as it is; None for a control.
            output: folder of the run, which exists.

        Returns:
            What `DiceTable.result` gives, "seconds", and "weight_decay" of the linear decoder.

        Raises:
            LostRank: another rank has ended.
        """
        name = f"{stage}-{initialisation}"
        folder = output / "predictions" / name
        identity = self.identity(encoder)
        weights = output / FOLDER / f"{name}.pt"
        checkpoints = Checkpoints(output / "checkpoints" / f"{name}.pt", {"inputs": identity})
        # What rank 0 finds decides: others may see its files late.
        finished = read_result(folder / "result.json", identity) if weights.is_file() else None
        finished = exchange(finished)[0]
        if finished is not None:
            if rank() == 0:
                checkpoints.remove()
            say(f"{name}: finished before, {folder / 'result.json'}")
            return finished
        if stage == "linear" and rank() > 0:
            return exchange(None)[0]
        begun = load_begun(checkpoints)
        started = time.monotonic() - (begun["seconds"] if begun else 0.0)
        course = begun["course"] if begun else None
        closing = ExitStack()

        @functools.cache
        def written() -> tuple[MetricsLog, ProgressPlot]:
            """Not before there is something to write: a checkpoint that does not fit this training
            is refused with all that the run has written left as it is."""
            kind = SilentLog if rank() else MetricsLog  # what is written, rank 0 writes
            metrics = kind(output / "metrics.jsonl", self.config.tensorboard)
            # Of an attempt that was cut short, what is now trained again.
            metrics.forget_training(stage, initialisation, whole_epochs(course) if course else 0)
            return closing.enter_context(metrics), ProgressPlot(output)

        def save(state: dict[str, Any]) -> None:
            if rank():
                return
            written()[0].sync()
            checkpoints.save({"seconds": time.monotonic() - started, "course": state})

        def log(*place: Any, **measured: Any) -> None:
            self._log(*written(), about_model, *place, **measured)

        train: Callable[..., tuple[nn.Module, dict[str, Any]]] = self._train_linear
        if stage == "finetune":
            train = functools.partial(self._train_whole, begun=course, save=save)
        about_model = {"stage": stage, "encoder": initialisation}
        with closing, checkpoints.naming_misfits(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            copied = copy.deepcopy(encoder) if encoder else self._new_encoder()
            model, about = train(copied.to(self.device), encoder is not None, log)
            if rank() == 0:
                written()[1].draw()
        if rank() == 0:
            (folder / "result.json").unlink(missing_ok=True)  # of a model that is now replaced
            self._save(weights, model, "linear" if stage == "linear" else self.config.decoder)
        result = self._test(model, folder, shared=stage == "finetune")
        result |= about | {"seconds": round(time.monotonic() - started, 2)}
        if rank() == 0:
            write_json(folder / "result.json", {"identity": identity, "result": result})
            checkpoints.remove()
        return exchange(result)[0]

    def _test(self, model: nn.Module, folder: Path, shared: bool) -> dict[str, Any]:
        """The result of all test cases, `shared` out over the ranks or all predicted here."""
        cases = self.split.test
        table = evaluate(
            model,
            self.cache,
            cases[rank() :: world()] if shared else cases,
            self.grid,
            folder,
            batch_size=self.config.batch_size,
            device=self.device,
            amp_dtype=self.amp_dtype,
        )
        found: dict[str, np.ndarray] = {}
        for counts in exchange(table.counts) if shared else [table.counts]:
            found |= counts
        whole = DiceTable(self.cache.classes)
        whole.counts = {case: found[case] for case in cases}
        return whole.result()

    def _save(self, path: Path, model: nn.Module, decoder: str) -> None:
        cache = self.cache
        make_folder(path.parent)
        save_segmenter(
            path,
            Segmenter(model, decoder, cache.classes, cache.values, self.grid, cache.settings),
        )

    def _train_linear(
        self, encoder: Encoder, pretrained: bool, log: Callable[..., None]
    ) -> tuple[nn.Module, dict[str, Any]]:
        encoder.set_output_stride(LINEAR_STRIDE)
        if not pretrained:
            self.recalibrate(encoder)
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

    def _train_whole(
        self,
        encoder: Encoder,
        pretrained: bool,
        log: Callable[..., None],
        begun: dict[str, Any] | None,
        save: Callable[[dict[str, Any]], None],
    ) -> tuple[nn.Module, dict[str, Any]]:
        decoder = self.config.decoder
        stride = self.config.output_stride or default_stride(decoder, self.grid.size)
        encoder.set_output_stride(stride)
        model = DECODERS[decoder](encoder, len(self.cache.classes)).to(self.device)
        if self.device.type == "cuda":
            model = model.to(memory_format=torch.channels_last)
        pixels = self.pixels[self.trained]
        classifier = model.classifier
        assert isinstance(classifier, nn.Conv2d)
        start_from_frequencies(classifier, pixels.sum(dim=0))
        about = finetune(
            model,
            Subset(self.dataset, self.trained),
            pixels > 0,
            epochs=self.config.epochs,
            batch_size=self.config.batch_size,
            lr=self.config.lr,
            seed=self.config.seed,
            device=self.device,
            amp_dtype=self.amp_dtype,
            workers=choose_workers(self.config.workers, self.device),
            log=log,
            schedule=self.config.schedule,
            class_weights=self._class_weights(pixels.sum(dim=0)),
            validation=Subset(self.dataset, self.validated) if self.validated else None,
            patience=self.config.patience,
            begun=begun,
            save=save,
        )
        about["missed"] = [self.cache.classes[c] for c in about["missed"]]
        if about["missed"]:
            say(
                f"warning: fine-tuning does not find {', '.join(about['missed'])} even in slices "
                "that it was trained on: try --class-weights inverse, or more --epochs"
            )
        if self.validated:
            about["validation_patients"] = sorted({self.patients[i] for i in self.validated})
        return model, about

    def _class_weights(self, pixels: Tensor) -> Tensor | None:
        return None if self.config.class_weights == "none" else inverse_frequency_weights(pixels)

    def _new_encoder(self) -> Encoder:
        assert self.config.arch is not None and self.config.width is not None
        return Encoder(self.config.arch, self.config.width)

    @torch.no_grad()
    def recalibrate(self, encoder: Encoder) -> None:
        """Gives an encoder the statistics of slices: a random one, or one that was trained on other
        images, would have features off scale. They are those of the linear evaluation's
        map; fine-tuning goes on with statistics of its own.
        """
        slices = self.cache.indices_of(self.split.pretrain or self.split.train)
        step = -(-len(slices) // CALIBRATION_SLICES)
        encoder.to(self.device).set_output_stride(LINEAR_STRIDE)
        dataset = SliceDataset(self.cache, slices[::step], self.grid)
        batches = delivered(DataLoader(dataset, self.config.batch_size))
        recalibrate_batchnorm(encoder, (batch["image"].to(self.device) for batch in batches))

    def identity(self, encoder: Encoder | None) -> str:
        """A digest of all that a result depends on: flags, slices, split, pixels and weights."""
        flags = {k: v for k, v in to_json(self.config).items() if k not in WITHOUT_EFFECT}
        parts = [flags, self.cache.directory.name, dataclasses.asdict(self.split)]
        digest = hashlib.blake2b(json.dumps([*parts, dataclasses.asdict(self.grid)]).encode())
        for name, tensor in encoder.state_dict().items() if encoder else ():
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _log(
        self,
        metrics: MetricsLog,
        progress: ProgressPlot,
        model: dict[str, str],
        epoch: int,
        step: int,
        loss: float,
        lr: float | None,
        dice: list[float | None] | None = None,
        validated: list[float | None] | None = None,
    ) -> None:
        """Writes an epoch down; one of fine-tuning has Dice by class, and is drawn."""
        record: dict[str, Any] = {**model, "epoch": epoch, "step": step, "loss": loss, "lr": lr}
        names = self.cache.classes[1:]
        for key, values in (("dice", dice), ("dice_validation", validated)):
            if values is not None:
                record[key] = dict(zip(names, values, strict=True))
        metrics.write(record)
        if dice is not None and rank() == 0:
            progress.add(record)


def read_result(path: Path, identity: str) -> dict[str, Any] | None:
    """The result of a finished stage, if it came from the same inputs."""
    try:
        content = read_object(path)
        return content["result"] if content["identity"] == identity else None
    except (UserError, KeyError):
        return None


def default_stride(decoder: str, image_size: int) -> int:
    """Of the encoder in fine-tuning: DeepLabv3+'s is 8, a U-Net's by the size of the images."""
    return 8 if decoder == "deeplab" else unet_stride(image_size)


def unet_stride(image_size: int) -> int:
    """The largest output stride that leaves the U-Net's deepest map 4 cells a side."""
    return next((stride for stride in (32, 16, 8) if image_size >= 4 * stride), 4)
