"""Fine-tuning: trains encoder and decoder on labelled slices, augmented on the device.

Several ranks train one network. Each takes its part of every batch; statistics, loss, gradient and
augmentation are those of the whole batch, so that they get what one rank would.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from medmoco.checkpoint import SECONDS as CHECKPOINT_SECONDS
from medmoco.data.delivery import delivered
from medmoco.data.views import ViewConfig, change_intensities, sampling_grid
from medmoco.distributed import (
    any_rank,
    average_gradients,
    await_ranks,
    draw_part,
    rank,
    require_same,
    sum_over_ranks,
    world,
)
from medmoco.errors import Fault
from medmoco.finetune_course import Course
from medmoco.losses import dice_cross_entropy
from medmoco.models.rank_norm import share_statistics
from medmoco.prediction import autocast
from medmoco.sampling import ForegroundSampler, RankBatches, own_rows
from medmoco.signals import Stopped, StopRequest, leave_stopping_to_the_trainer
from medmoco.validation import BestWeights, dice_of, mean_dice, overlap, validate

WEIGHT_DECAY = 1e-2
WARMUP = 0.05  # share of the steps
POLY_POWER = 0.9  # as nnU-Net
CLIP_NORM = 12.0  # as nnU-Net: only stops the rare explosion

ROTATION = math.radians(15)
SCALE = (0.85, 1.2)
SHIFT = 0.1  # share of the canvas, either way

Dice = list[float | None]  # of each class but the background
# Epoch, step, loss, learning rate; Dice on the batches, and on the validation's slices.
Log = Callable[[int, int, float, float, Dice, Dice | None], None]
Save = Callable[[dict[str, Any]], None]


def default_epochs(batches: int) -> int:
    """30 epochs of a small set, about 3000 steps of a larger one, and at least 5 epochs."""
    return max(5, min(30, round(3000 / batches)))


def finetune(
    model: nn.Module,
    dataset: Dataset,
    shown: Tensor,
    *,
    epochs: int | None,
    batch_size: int,
    lr: float,
    seed: int,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    workers: int,
    log: Log,
    schedule: str = "cosine",
    class_weights: Tensor | None = None,
    validation: Dataset | None = None,
    patience: int | None = None,
    begun: dict[str, Any] | None = None,
    save: Save | None = None,
) -> dict[str, Any]:
    """Trains `model` in place and leaves it in eval mode.

    AdamW, a schedule with a short warm-up, Dice + cross-entropy. The last weights count, nothing
    is selected on labels, unless there is a validation: then those of its best epoch do.

    Args:
        model: image (B, 1, S, S) to logits, on `device`.
        dataset: SliceDataset with labels.
        shown: (items, classes) bool, which classes a slice shows, see `ForegroundSampler`.
        epochs: passes over the slices with foreground; None for `default_epochs`.
        batch_size: slices a step, of all ranks together.
        lr: peak learning rate.
        seed: of the order of the slices and the augmentation.
        device: where to train.
        amp_dtype: of autocast, None for float32 throughout.
        workers: processes that read slices.
        log: is told of each epoch.
        schedule: "cosine" or "poly".
        class_weights: (classes,) of the cross-entropy, see `dice_cross_entropy`.
        validation: slices with labels of other patients.
        patience: epochs without a better Dice on the validation before the training stops.
        begun: a state that `save` was given, to go on from; all else has to be as it was then.
        save: is given the state every ten minutes, at the end, and where a signal asks to stop; of
            several ranks each gives the same.

    Returns:
        "missed": indices of the classes that the last epoch never found in the training slices.
        With a validation also "best_epoch", "epochs" trained, and "validation_dice" of the best.

    Raises:
        Stopped: SIGTERM or SIGUSR1 asked for it.
        UserError: the loss or a weight is not finite, or weights are not the same on all ranks.
        Misfit: `begun` is no state of this training.
        Fault: slices cannot be read any more; the state is saved, of several ranks by the first.
        LostRank: another rank has ended.
    """
    generator = torch.Generator(device).manual_seed(seed)
    sampler = ForegroundSampler(shown, torch.Generator().manual_seed(seed))
    chosen = RankBatches(sampler, batch_size)
    batches = DataLoader(
        dataset,
        batch_sampler=chosen,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=leave_stopping_to_the_trainer,
        generator=torch.Generator().manual_seed(seed),  # as in `make_loader`
    )
    epochs = epochs or default_epochs(len(batches))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)
    total = epochs * len(batches)
    share = SCHEDULES[schedule]
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share(step, total))
    if class_weights is not None:
        class_weights = class_weights.to(device)

    if world() > 1:
        share_statistics(model)
    best = BestWeights(patience)
    course = Course(model, optimizer, rates, sampler, generator, best)
    if begun is not None:
        course.load(begun, epochs, len(batches), shown.shape[1])
    saved = time.monotonic()

    def save_if(due: bool) -> None:
        nonlocal saved
        if due:
            state = course.finite_state(len(batches))
            if save is not None:
                save(state)
            saved = time.monotonic()

    model.train()
    done = course.steps(len(batches))
    if world() > 1:  # dropout must not draw the same for the parts of all ranks
        torch.manual_seed(seed + done * world() + rank())
    # Where a request to stop ends this rank, as it does those that are still outside of the loop.
    await_ranks()
    with (
        StopRequest() as stop,
        tqdm(
            total=total,
            initial=done,
            desc="finetune",
            unit="step",
            disable=rank() > 0 or None,
        ) as bar,
    ):
        while not course.finished:
            place = torch.tensor([course.steps(len(batches))], device=device)
            require_same([place, *model.state_dict().values()], "fine-tuning")
            course.resume_epoch(batch_size)
            for batch in delivered(batches, at_break=lambda: save_if(True)):
                rows = chosen.rows(course.batch)
                loss, counts = train_step(
                    model, optimizer, batch, rows, generator, amp_dtype, class_weights
                )
                rates.step()
                course.add(loss, counts)
                bar.update()
                late = time.monotonic() - saved > CHECKPOINT_SECONDS
                stopping, late = any_rank(stop.asked, late)
                save_if(stopping or late)
                if stopping:
                    raise Stopped(f"saved step {course.steps(len(batches))} of {total}")
            course.require_finite_losses(len(batches))
            epoch, mean = course.epoch, mean_loss(course.losses)
            dice = dice_of(torch.stack(course.counts).sum(dim=0))
            validated, last = None, epoch == epochs
            if validation is not None:
                try:
                    validated = validate(model, validation, batch_size, device, amp_dtype, stop)
                except (Stopped, Fault):
                    save_if(True)
                    raise
                last |= best.add(epoch, mean_dice(validated), model)
            tell(bar, epoch, epochs, {"loss": mean, "dice": mean_dice(dice)}, validated)
            log(epoch, epoch * len(batches), mean, float(rates.get_last_lr()[0]), dice, validated)
            course.end_epoch(dice, finished=last)
            save_if(last)
        (stopping,) = any_rank(stop.asked)
        if stopping:  # after the last step
            raise Stopped(f"saved step {course.steps(len(batches))} of {total}")
    if course.epoch < epochs:
        print(f"finetune: no better validation since epoch {best.epoch}: stopped")
    model.eval()
    shown_classes = shown.any(dim=0).tolist()
    about: dict[str, Any] = {
        "missed": [c for c, f in enumerate(course.dice, start=1) if f == 0 and shown_classes[c]]
    }
    if validation is not None:
        best.restore(model)
        about |= {"best_epoch": best.epoch, "epochs": course.epoch, "validation_dice": best.dice}
    return about


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    rows: int,
    generator: torch.Generator,
    amp_dtype: torch.dtype | None,
    class_weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A step of the optimizer on a batch, augmented.

    Args:
        model: in training mode.
        optimizer: of its weights.
        batch: as `RankBatches` chose it.
        rows: slices of the batch of all ranks.
        generator: of the augmentation, on the device of the training.
        amp_dtype: of autocast, None for float32.
        class_weights: (classes,) of the cross-entropy, None for all the same.

    Returns:
        The loss () and the `overlap` of the batch of all ranks.
    """
    device = generator.device
    batch = own_rows(batch, rows)
    image = batch["image"].to(device, non_blocking=True)
    label = batch["label"].to(device, non_blocking=True)
    image, label = augment(image, label, generator, rows)
    with autocast(device, amp_dtype):
        logits = model(image)
    loss, _ = dice_cross_entropy(logits, label, class_weights=class_weights, over_ranks=world() > 1)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    average_gradients(model.parameters())
    nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()
    return loss.detach(), sum_over_ranks(overlap(logits.detach(), label))


def mean_loss(losses: list[Tensor]) -> float:
    """Of the batches of an epoch; waits for the device."""
    return torch.stack(losses).mean().item() if losses else 0.0


def tell(
    bar: tqdm, epoch: int, epochs: int, means: dict[str, float | None], validated: Dice | None
) -> None:
    """Shows an epoch at the progress bar; without a terminal, as a line of the log."""
    if validated is not None:
        means = means | {"validation": mean_dice(validated)}
    shown = {name: "none" if mean is None else f"{mean:.4f}" for name, mean in means.items()}
    bar.set_postfix({"epoch": epoch, **shown})
    if bar.disable:
        words = ", ".join(f"{name} {value}" for name, value in shown.items())
        print(f"finetune: epoch {epoch} of {epochs}: {words}", flush=True)


def warmup_cosine(step: int, total: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine to zero."""
    return _warmed_up(step, total, lambda done: 0.5 * (1 + math.cos(math.pi * done)))


def warmup_poly(step: int, total: int) -> float:
    """Share of the peak learning rate: linear warm-up, then (1 - done)^0.9."""
    return _warmed_up(step, total, lambda done: (1 - done) ** POLY_POWER)


SCHEDULES = {"cosine": warmup_cosine, "poly": warmup_poly}


def _warmed_up(step: int, total: int, falling: Callable[[float], float]) -> float:
    warmup = max(1, int(WARMUP * total))
    if step < warmup:
        return (step + 1) / warmup
    return falling(min(1.0, (step - warmup) / max(1, total - warmup)))


@torch.no_grad()
def start_from_frequencies(classifier: nn.Conv2d, pixels: Tensor) -> None:
    """Sets the bias so that an untrained network predicts each class as often as it occurs [1].

    With a bias of 0 every pixel starts at 1/classes, and the first hundred steps do nothing but
    push down the logits of small organs, so far that softmax leaves them no gradient: with few
    steps they never come back.

    Args:
        classifier: of the network, classes on its output.
        pixels: (classes,) number of pixels of each class, on the canvases to train on.

    [1] Lin et al., 2017, arXiv:1708.02002, section 4.1.
    """
    assert classifier.bias is not None
    share = pixels.double() / pixels.sum()
    logits = share.clamp(min=1 / float(pixels.sum())).log()
    classifier.bias.copy_(logits - logits.mean())


def augment(
    image: Tensor, label: Tensor, generator: torch.Generator, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Rotates, scales and shifts each slice with its label, then changes its intensities.

    No flips: left and right differ.

    Args:
        image: (B, 1, S, S) in [0, 1].
        label: (B, S, S) int64; pixels from beyond the canvas become background.
        generator: on the device of both.
        rows: of the global batch that these are this rank's part of; None where every rank has as
            many.
    """
    affine = random_affines(len(image), generator, rows)
    grid = sampling_grid(affine, image.shape[-1])
    image = functional.grid_sample(image, grid, align_corners=False)
    # float32 holds every class index exactly, and `nearest` copies it.
    moved = functional.grid_sample(
        label[:, None].float(), grid, mode="nearest", align_corners=False
    )
    image = change_intensities(image, ViewConfig(size=image.shape[-1]), generator, rows)
    return image, moved[:, 0].long()


def random_affines(count: int, generator: torch.Generator, rows: int | None = None) -> Tensor:
    """(count, 2, 3) rotations, scales and shifts in the convention of grid_sample.

    They are this rank's part of those for the `rows` of a global batch, see `draw_part`.
    """
    draw = draw_part(
        lambda shape: torch.rand(shape, generator=generator, device=generator.device),
        (count, 4),
        rows,
    )
    angle = ROTATION * (2 * draw[:, 0] - 1)
    scale = SCALE[0] + (SCALE[1] - SCALE[0]) * draw[:, 1]
    shift = SHIFT * 2 * (2 * draw[:, 2:] - 1)  # the canvas spans 2
    cosine, sine = angle.cos() / scale, angle.sin() / scale
    linear = torch.stack([cosine, -sine, sine, cosine], dim=1).unflatten(1, (2, 2))
    return torch.cat([linear, shift[:, :, None]], dim=2)
