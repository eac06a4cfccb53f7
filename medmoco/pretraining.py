"""The pretraining loop: calibrate, fill the queue, then steps, diagnoses and checkpoints."""

import dataclasses
import itertools
import math
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import medmoco
from medmoco.checkpoint import SECONDS as CHECKPOINT_SECONDS
from medmoco.checkpoint import Checkpoints
from medmoco.checkpoint_state import as_misfits, fitting_weights, load_optimizer, pretraining_state
from medmoco.data.delivery import delivered
from medmoco.data.slices import SliceDataset, choose_grid, oversampled
from medmoco.data.store import SliceCache
from medmoco.data.stream import EpochSampler, hold_out_patients, make_loader
from medmoco.data.views import View, ViewConfig, sample_views
from medmoco.diagnostics import collapse_warnings, diagnose
from medmoco.distributed import (
    any_rank,
    average_over_ranks,
    await_ranks,
    gather_rows,
    own_device,
    rank,
    require_same,
    world,
)
from medmoco.divergence import NonFiniteLoss, all_finite, diverged
from medmoco.errors import UserError, telling_what_is_kept
from medmoco.methods import build_model
from medmoco.metrics_log import MetricsLog, SilentLog, StepClock
from medmoco.models.encoder import save_encoder
from medmoco.models.moco import recalibrate_batchnorm, train_step
from medmoco.models.weights import read_weights
from medmoco.models.whitening import map_whitening_state
from medmoco.printing import say
from medmoco.random_state import random_state, resume_generator, set_random_state
from medmoco.signals import Stopped, StopRequest

if TYPE_CHECKING:
    from medmoco.pretrain import PretrainConfig

CALIBRATION_BATCHES = 8  # before the queue is filled, so that the first keys are normalised
LOG_EVERY = 10  # steps between two readings of the losses, each of which waits for the device
# A checkpoint goes on only where these agree: they shape the model, or the road that it takes.
IDENTITY = (
    *("method", "arch", "width", "image_size", "output_stride", "embed_dim", "queue_size"),
    *("projector", "local", "decorrelation", "whiten_group", "key_norm", "batch_size", "epochs"),
    "seed",
)


class Pretraining:
    """One pretraining run: its state, and how to go on from it.

    Args:
        config: resolved: no flag is left for the method or the data to decide.
        cache: the slices; patients held out for the diagnostics are chosen among them.

    Raises:
        UserError: flags contradict each other, the data is too small for them, or the ranks do not
            divide the batch.
    """

    def __init__(self, config: "PretrainConfig", cache: SliceCache) -> None:
        if config.batch_size % world():
            raise UserError(
                f"--batch-size {config.batch_size}: expected a multiple of the {world()} ranks, "
                "which take equal parts of it"
            )
        self.config = config
        self.cache = cache
        self.output = output = config.output
        self.device = own_device(config.device)
        self.checkpoints = Checkpoints(output / "checkpoints" / "last.pt", self._identity())
        initial = None
        if config.init is not None and not (config.resume and self.checkpoints.exist()):
            initial = read_weights(config.init)
        self.model = build_model(config, initial).to(self.device)
        if self.device.type == "cuda":
            self.model = self.model.to(memory_format=torch.channels_last)
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        learned, held_out = hold_out_patients(cache, config.seed)
        self.grid = choose_grid(cache, config.image_size, config.spacing)
        canvas = oversampled(self.grid, cache)
        self.views = ViewConfig(size=config.image_size, crop_scale=(config.crop_min, 1.0))
        self.held_out_slices = len(held_out)
        dataset = SliceDataset(cache, learned, canvas)
        self.sampler = EpochSampler(len(learned), config.batch_size, config.seed)
        self.loader = make_loader(dataset, self.sampler, config.workers, self.device)
        self.held_out = DataLoader(SliceDataset(cache, held_out, self.grid), config.batch_size)
        self.volume_ends = torch.from_numpy(cache.volumes.ends).to(self.device)
        self.optimizer = torch.optim.SGD(
            self.model.query.parameters(),
            lr=config.lr,
            momentum=0.9,
            weight_decay=config.weight_decay,
        )
        self.total_steps = config.epochs * self.sampler.batches
        self.step = 0  # steps taken
        log = SilentLog if rank() else MetricsLog  # what is written, rank 0 writes
        self.metrics = log(output / "metrics.jsonl", config.tensorboard)
        self.chance = math.log(config.queue_size + 1)  # the loss of guessing, in nats
        self.losses = [0.0, 0]  # global losses of the epoch so far: their sum and number
        self.diagnostics: dict[str, Any] = {}
        self.last: dict[str, Any] = {}  # record that was read back from the device
        self.seconds = 0.0  # that the training took in this process
        # Slice numbers of the last batches: what goes wrong is noticed when losses are read back.
        self.batches: deque[tuple[int, Tensor]] = deque(maxlen=LOG_EVERY)

    # --- the loop ---------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Trains to the end and writes encoder.pt. All ranks take every decision alike.

        Returns:
            The last diagnostics, as in metrics.jsonl.

        Raises:
            Stopped: a signal asked for it; the state is saved.
            UserError: the loss or a weight is not finite.
            Fault: a file cannot be written, or the loader died.
        """
        if self.config.resume:
            self.restore()
        await_ranks()  # rank 0 made the folder meanwhile, any of them the slice cache
        self._require_agreement()
        say(self._introduction())
        started = time.monotonic()
        with (
            telling_what_is_kept(self._kept),
            self.metrics,
            StopRequest() as stop,
            self._progress_bar() as bar,
        ):
            if not self.diagnostics:
                bar.set_postfix_str(f"filling the queue with {self.config.queue_size:,} keys")
                self._start(stop)
            while self._diagnosis_due() or self.step < self.total_steps:
                if self._diagnosis_due():  # also where a run was stopped right before it
                    self._require_agreement()
                    self._require_finite_state()
                    self._diagnose()
                    self.save()
                    if bar.disable and self.last:  # no terminal: a line an epoch for the log
                        say(f"epoch {self.diagnostics['epoch']}: {self._status()}")
                else:
                    self._train_epoch(bar, stop)
            (stopping,) = any_rank(stop.asked)
            if stopping:  # after the last step, so that what follows does not keep it waiting
                raise Stopped(f"saved step {self.step} of {self.total_steps}")
        self.seconds = time.monotonic() - started
        if self.checkpoints.written:  # by rank 0
            say(f"pretrain: {self.checkpoints.cost(self.seconds)}")
        if rank() == 0:
            encoder = self.model.query.encoder
            with telling_what_is_kept(self._kept):
                save_encoder(self.output / "encoder.pt", encoder, **self.metadata())
        return self.diagnostics

    def _train_epoch(self, bar: tqdm, stop: StopRequest) -> None:
        epoch, first = divmod(self.step, self.sampler.batches)
        if first == 0:
            self.losses = [0.0, 0]
        self.sampler.start(epoch, first)
        self.model.train()
        clock = StepClock()
        saved = time.monotonic()
        for batch in delivered(self.loader, lambda: self._save_between_steps(bar, clock)):
            clock.data_ready()
            self.metrics.hold(self._train_step(batch))
            clock.step_done(self.config.batch_size)
            bar.update()
            late = time.monotonic() - saved > CHECKPOINT_SECONDS
            stopping, late = any_rank(stop.asked, late)
            if stopping or late:
                self._save_between_steps(bar, clock)
                saved = time.monotonic()
            elif self.step % LOG_EVERY == 0 or self.step % self.sampler.batches == 0:
                self._log(bar, clock)
            if stopping:
                raise Stopped(f"saved step {self.step} of {self.total_steps}")

    def _save_between_steps(self, bar: tqdm, clock: StepClock) -> None:
        if self.metrics.holds_any():
            self._log(bar, clock)
        self._require_finite_state()
        self.save()

    def _train_step(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        lr = self._lr(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        views, ids = self.draw_views(batch), self.ids_of(batch["index"])
        losses = train_step(
            self.model,
            self.optimizer,
            views,
            ids,
            self.generator,
            self._autocast(),
            self.config.clip_norm,
        )
        self.step += 1
        self.batches.append((self.step, gather_rows(batch["index"])))
        record = {
            "stage": "pretrain",
            "epoch": math.ceil(self.step / self.sampler.batches),
            "step": self.step,
            "lr": lr,
            "chance": self.chance,
        }
        parts = losses.as_dict()
        average_over_ranks(list(parts.values()))
        return record | parts

    def _lr(self, step: int) -> float:
        """Of a step, from 0: half a cosine."""
        return 0.5 * self.config.lr * (1 + math.cos(math.pi * step / self.total_steps))

    # --- what a step needs ------------------------------------------------------------------

    def draw_views(self, batch: dict[str, Tensor]) -> tuple[View, View]:
        """What the query and the key branch see of a batch of the loader."""
        canvas = batch["image"].to(self.device, non_blocking=True)
        extent = batch["extent"].to(self.device, non_blocking=True)
        return sample_views(canvas, extent, self.views, self.generator)

    def ids_of(self, index: Tensor) -> Tensor:
        """Keys of equal id are no negatives of each other; -1 is nobody's equal."""
        index = index.to(self.device, non_blocking=True)
        if self.config.same == "volume":
            return torch.searchsorted(self.volume_ends, index, right=True)
        if self.config.same == "none":
            return torch.full_like(index, -1)
        return index

    def _autocast(self) -> torch.autocast:
        enabled = self.config.amp_dtype == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    # --- before the first step --------------------------------------------------------------

    def _start(self, stop: StopRequest) -> None:
        """Calibrates the normalisations, fills the queues, looks at the untrained encoder."""
        self.model.train()
        batches = itertools.islice(self.unseen_batches(), CALIBRATION_BATCHES)
        recalibrate_batchnorm(self.model.query, (self.draw_views(b)[0].image for b in batches))
        self.model.average_statistics()
        self.model.synchronise_key()
        self._fill_queues(stop)
        self._diagnose()
        self.save()

    def _fill_queues(self, stop: StopRequest) -> None:
        """Keys of real slices in every place, so that the first loss means something."""
        filled = 0
        for batch in self.unseen_batches():
            ids = self.ids_of(batch["index"])
            with self._autocast():
                key = self.model.encode_keys(self.draw_views(batch)[1].image, self.generator)
            self.model.enqueue(key, ids, self.generator)
            filled += self.config.batch_size
            if filled >= self.config.queue_size:
                return
            (stopping,) = any_rank(stop.asked)
            if stopping:  # nothing is learned yet, so there is nothing to save
                raise Stopped("stopped before the first step")

    def unseen_batches(self) -> Iterator[dict[str, Tensor]]:
        """Batches in the orders of epochs that the training does not reach."""
        for epoch in itertools.count(self.config.epochs):
            self.sampler.start(epoch)
            yield from delivered(self.loader)

    # --- diagnostics, saving, export ----------------------------------------------------------

    def _diagnosis_due(self) -> bool:
        """After every epoch, and before the first."""
        return self.step % self.sampler.batches == 0 and self.diagnostics["step"] < self.step

    @torch.no_grad()
    def _diagnose(self) -> None:
        """Looks at features and embeddings of held-out slices, un-augmented, in eval mode."""
        self.model.query.eval()
        features, embeddings = [], []
        # A step is lost that was taken since the last checkpoint; before the first there is none.
        at_break = self.save if self.diagnostics else None
        for batch in delivered(self.held_out, at_break):
            embedding = self.model.query(batch["image"].to(self.device))
            features.append(embedding.pooled.float().cpu())
            embeddings.append(embedding.projection.float().cpu())
        looked = {
            "features": diagnose(torch.cat(features)),
            "embeddings": diagnose(torch.cat(embeddings)),
        }
        # An untrained encoder is expected to look collapsed; later, only news is told.
        told = len(self.diagnostics["warnings"]) if self.diagnostics.get("step") else 0
        loss = self.losses[0] / self.losses[1] if self.losses[1] else None
        warnings = collapse_warnings(loss, self.chance, looked["embeddings"])
        self.diagnostics = {
            "stage": "diagnostics",
            "epoch": self.step // self.sampler.batches,
            "step": self.step,
            "loss": loss,
            **{name: dataclasses.asdict(value) for name, value in looked.items()},
            "effective_rank": looked["features"].rankme,
            "warnings": warnings,
        }
        self.metrics.write(self.diagnostics)
        if self.step and len(warnings) > told and rank() == 0:
            epoch = self.diagnostics["epoch"]
            tqdm.write("\n".join(f"epoch {epoch}: {text}" for text in warnings), file=sys.stderr)

    def _require_finite_state(self) -> None:
        """A gradient can overflow where its loss did not; what comes of it must not be saved."""
        if not all_finite([self.model.state_dict(), self.optimizer.state_dict()]):
            raise self._diverged("the weights are not finite", self.step)

    def _diverged(self, what: str, step: int) -> UserError:
        slices = dict(self.batches).get(step, torch.empty(0)).tolist()
        return diverged(what, step, slices, self.cache, self.checkpoints.newest())

    def save(self) -> None:
        """Writes the full state, the same on all ranks; `restore` goes on from it bit for bit."""
        if rank():
            return
        state = {
            "step": self.step,
            "losses": self.losses,
            "diagnostics": self.diagnostics,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "random": random_state(),
        }
        self.metrics.sync()
        self.checkpoints.save(state)

    def _kept(self) -> str:
        path = self.checkpoints.newest()
        if path is not None:
            return f"{path} is whole, and --resume goes on from it"
        return "no checkpoint was written yet, and --resume begins again"

    def restore(self) -> None:
        """Goes on from the last checkpoint, or from the beginning where none was written yet.

        Bit for bit on the same kind of device; on another one with other random numbers.

        Raises:
            UserError: the last checkpoint and the one before it are damaged, or the one that is
                whole belongs to another run, or holds what is no state of this one.
        """
        state = self.checkpoints.load()
        if state is None:
            self.metrics.forget_after(-1, -1)
            return
        with self.checkpoints.naming_misfits(), as_misfits():
            state = pretraining_state(state, self.total_steps, self.sampler.batches)
            self.step, self.losses = state["step"], state["losses"]
            self.diagnostics = state["diagnostics"]
            self.model.load_state_dict(fitting_weights(self.model, state["model"], "model"))
            lr = self._lr(max(self.step - 1, 0))
            load_optimizer(self.optimizer, state["optimizer"]["state"], self.step, lr)
            resume_generator(self.generator, state["generator"], self.config.seed + self.step)
            set_random_state(state["random"])
        self.metrics.forget_after(self.step, self.diagnostics["step"])

    def _require_agreement(self) -> None:
        """Raises a UserError where ranks have other weights, statistics, queues or step numbers."""
        model = self.model
        place = torch.tensor([self.step], device=self.device)
        queues = [queue for queue in (model.queue, model.local_queue) if queue is not None]
        tensors = [t for part in (*queues, model.query) for t in part.state_dict().values()]
        if self.config.key_norm == "ema":  # shuffled keys have no use for running statistics
            tensors += model.key.state_dict().values()
        require_same([place, *tensors], f"state after step {self.step}")

    def summary(self) -> dict[str, Any]:
        """The part of summary.json that pretraining knows."""
        features, embeddings = self.diagnostics["features"], self.diagnostics["embeddings"]
        return {
            "medmoco": medmoco.__version__,
            "method": self.config.method,
            "seed": self.config.seed,
            "effective_rank": {"features": features["rankme"], "embeddings": embeddings["rankme"]},
            "samples": features["samples"],
            "dimensions": features["dimensions"],
            "linear": None,
            "finetune": None,
            "controls": {},
            "bad_files": [dataclasses.asdict(file) for file in self.cache.bad],
            "warnings": self.diagnostics["warnings"],
            "seconds": {
                "pretrain": round(self.seconds, 1),
                "checkpoints": round(self.checkpoints.seconds, 3),
            },
        }

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with, see IDENTITY."""
        config = self.config
        data = self.cache.directory.name  # a digest of files and settings
        return {"data": data} | {name: getattr(config, name) for name in IDENTITY}

    def metadata(self) -> dict[str, Any]:
        """What goes into encoder.pt, so that segmentation treats images alike."""
        config = self.config
        return {
            "method": config.method,
            "image_size": config.image_size,
            "spacing": self.grid.spacing,
            "modality": self.cache.modality,
            "window": (config.window_low, config.window_high),
            "slice_axis": self.cache.axis,
            "whitening": map_whitening_state(self.model.query.whitening),
            "patients": sorted(set(self.cache.volumes.names("patient"))),
        }

    # --- progress -----------------------------------------------------------------------------

    def _progress_bar(self) -> tqdm:
        return tqdm(
            total=self.total_steps,
            initial=self.step,
            unit="step",
            desc="pretrain",
            disable=rank() > 0 or None,
        )

    def _log(self, bar: tqdm, clock: StepClock) -> None:
        try:
            records = self.metrics.flush(**clock.read())
        except NonFiniteLoss as error:
            raise self._diverged(str(error), error.step) from error
        for record in records:
            self.losses = [self.losses[0] + record["loss_global"], self.losses[1] + 1]
        self.last = records[-1]
        bar.set_postfix_str(self._status())

    def _introduction(self) -> str:
        """What was chosen, in two lines."""
        config, learned = self.config, self.sampler.length
        begun = f", from step {self.step:,}" if self.step else ""
        return (
            f"pretrain: {config.method}, {config.arch} x {config.width:g} on {self.device}, "
            f"{config.image_size} px of {self.grid.spacing:.3g} mm, output stride "
            f"{config.output_stride}; {learned:,} slices to learn from, "
            f"{self.held_out_slices:,} held out\n"
            f"pretrain: {config.epochs} epochs of {self.sampler.batches} steps{begun}, batch "
            f"{config.batch_size}, lr {config.lr:.3g}, queue {config.queue_size:,}, local "
            f"{config.local}, decorrelation {config.decorrelation}"
        )

    def _status(self) -> str:
        """The last step and the last diagnosis in a line."""
        last, rank = self.last, self.diagnostics["effective_rank"]
        return (
            f"loss {last['loss']:.3f}, global {last['loss_global']:.3f} (chance "
            f"{self.chance:.2f}), acc1 {last['acc1']:.2f}, "
            f"rank {'-' if rank is None else f'{rank:.1f}'}, "
            f"{last['images_per_second']:.0f} images/s, waiting {last['data_wait']:.0%}"
        )
