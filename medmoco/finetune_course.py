"""Where a fine-tuning stands: all that it needs to go on from any of its steps, bit for bit."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from medmoco.checkpoint import AnotherRun, Checkpoints
from medmoco.checkpoint_state import (
    as_misfits,
    begun_state,
    course_state,
    fitting_weights,
    load_optimizer,
)
from medmoco.divergence import all_finite
from medmoco.errors import UserError
from medmoco.random_state import random_state, resume_generator, set_random_state
from medmoco.sampling import ForegroundSampler
from medmoco.validation import BestWeights

ADVICE = "start again with a lower --lr, or with --amp-dtype float32"


class Course:
    """The state of a fine-tuning.

    Args:
        model: on the device of the training.
        optimizer: of its weights.
        rates: of the optimizer.
        sampler: of the order of the slices.
        generator: of the augmentation.
        best: of the validation.

    Attributes:
        epoch: that is under way, or the last one; from 1.
        batch: batches of it that were trained on.
        losses: of those batches, each ().
        counts: of those batches, see `overlap`.
        dice: of each class but the background on the batches of the last whole epoch.
        finished: whether no further epoch follows.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rates: torch.optim.lr_scheduler.LambdaLR,
        sampler: ForegroundSampler,
        generator: torch.Generator,
        best: BestWeights,
    ) -> None:
        self.model, self.optimizer, self.rates = model, optimizer, rates
        self.sampler, self.generator, self.best = sampler, generator, best
        self._order = sampler.generator.get_state()  # when the epoch began
        self.epoch, self.batch = 1, 0
        self.losses: list[Tensor] = []
        self.counts: list[Tensor] = []
        self.dice: list[float | None] = []
        self.finished = False

    def resume_epoch(self, batch_size: int) -> None:
        """Leaves out the slices that the epoch has shown; to be called before every epoch."""
        self._order = self.sampler.generator.get_state()
        self.sampler.first = self.batch * batch_size

    def steps(self, batches: int) -> int:
        """Taken since the beginning, of epochs of `batches` steps."""
        return (self.epoch - 1) * batches + self.batch

    def add(self, loss: Tensor, counts: Tensor) -> None:
        """Takes what a batch gave."""
        self.losses.append(loss)
        self.counts.append(counts)
        self.batch += 1

    def end_epoch(self, dice: list[float | None], finished: bool) -> None:
        self.dice, self.finished = dice, finished
        if not finished:
            self.epoch, self.batch = self.epoch + 1, 0
            self.losses, self.counts = [], []
            self._order = self.sampler.generator.get_state()

    def require_finite_losses(self, batches: int) -> None:
        """Waits for the device.

        Args:
            batches: steps an epoch.

        Raises:
            UserError: a loss of this epoch is NaN or infinite; names the first such step.
        """
        for batch, loss in enumerate(torch.stack(self.losses).tolist() if self.losses else (), 1):
            if not math.isfinite(loss):
                step = self.steps(batches) - self.batch + batch
                raise UserError(f"the loss is {loss} at step {step} of fine-tuning; {ADVICE}")

    def finite_state(self, batches: int) -> dict[str, Any]:
        """What may be saved; waits for the device.

        Args:
            batches: steps an epoch.

        Raises:
            UserError: a loss or a weight is not finite; names the step.
        """
        self.require_finite_losses(batches)
        state = self.state()
        if not all_finite(state):  # a gradient can overflow where its loss did not
            step = self.steps(batches)
            raise UserError(f"the weights are not finite at step {step} of fine-tuning; {ADVICE}")
        return state

    def state(self) -> dict[str, Any]:
        """Tensors and plain values, for `load`."""
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "losses": torch.stack(self.losses) if self.batch else None,
            "counts": torch.stack(self.counts) if self.batch else None,
            "dice": self.dice,
            "finished": self.finished,
            "order": self._order,
            "generator": self.generator.get_state(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best.state(),
            "random": random_state(),
        }

    def load(self, state: dict[str, Any], epochs: int, batches: int, classes: int) -> None:
        """Goes on from a state; on another kind of device with other random numbers.

        Args:
            state: as `state` gave it.
            epochs: of the training.
            batches: steps an epoch.
            classes: with the background.

        Raises:
            Misfit: it is no state of this training; part of it may be loaded.
        """
        device = self.generator.device
        with as_misfits():
            state = course_state(state, epochs, batches, classes)
            self.epoch, self.batch = state["epoch"], state["batch"]
            if self.batch:
                self.losses = list(state["losses"].to(device))
                self.counts = list(state["counts"].to(device))
            self.dice, self.finished = state["dice"], state["finished"]
            self.sampler.generator.set_state(state["order"])
            resume_generator(self.generator, state["generator"], self.epoch)
            self.model.load_state_dict(fitting_weights(self.model, state["model"], "model"))
            steps = self.steps(batches)
            load_optimizer(
                self.optimizer, state["optimizer"]["state"], steps, self._set_rates(steps)
            )
            best = state["best"]
            if best["weights"] or best["dice"] is not None:
                best["weights"] = fitting_weights(self.model, best["weights"], "best.weights")
            self.best.load(best)
            set_random_state(state["random"])

    def _set_rates(self, steps: int) -> float:
        """The learning rate, a function of the step: nothing of a file is taken for it."""
        (base,), (share,) = self.rates.base_lrs, self.rates.lr_lambdas
        lr = float(base * share(steps))
        place = {"last_epoch": steps, "_step_count": steps + 1, "_last_lr": [lr]}
        self.rates.load_state_dict(self.rates.state_dict() | place)
        return lr


def whole_epochs(state: dict[str, Any]) -> int:
    """Epochs that a state has behind it, validation included."""
    return state["epoch"] if state["finished"] else state["epoch"] - 1


def load_begun(checkpoints: Checkpoints) -> dict[str, Any] | None:
    """The "course" that a fine-tuning has behind it, and its "seconds"; None where it begins.

    Raises:
        UserError: no checkpoint is whole, or the last one that is holds something else.
    """
    try:
        begun = checkpoints.load()
    except AnotherRun:  # of other inputs: as their result, it is replaced
        return None
    if begun is not None:
        with checkpoints.naming_misfits(), as_misfits():
            begun = begun_state(begun)
        print(f"{checkpoints.path.stem}: going on in epoch {begun['course']['epoch']}")
    return begun
