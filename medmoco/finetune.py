"""Fine-tuning: trains encoder and decoder on labelled slices, augmented on the device."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from medmoco.data.views import ViewConfig, change_intensities
from medmoco.errors import UserError
from medmoco.losses import dice_cross_entropy
from medmoco.prediction import autocast
from medmoco.signals import leave_stopping_to_the_trainer

EMPTY_SHARE = 1 / 3  # slices without foreground, per slice with foreground
WEIGHT_DECAY = 1e-2
WARMUP = 0.05  # share of the steps
CLIP_NORM = 12.0  # as nnU-Net: only stops the rare explosion

ROTATION = math.radians(15)
SCALE = (0.85, 1.2)
SHIFT = 0.1  # share of the canvas, either way

Log = Callable[[int, int, float, float], None]  # epoch, step, loss, learning rate


def default_epochs(batches: int) -> int:
    """30 epochs of a small set, about 3000 steps of a larger one, and at least 5 epochs."""
    return max(5, min(30, round(3000 / batches)))


def finetune(
    model: nn.Module,
    dataset: Dataset,
    has_foreground: Tensor,
    *,
    epochs: int | None,
    batch_size: int,
    lr: float,
    seed: int,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    workers: int,
    log: Log,
) -> None:
    """Trains `model` in place and leaves it in eval mode.

    AdamW, cosine schedule after a short warm-up, Dice + cross-entropy. The last weights count:
    nothing is selected on labels.

    Args:
        model: image (B, 1, S, S) to logits, on `device`.
        dataset: SliceDataset with labels.
        has_foreground: (items,) bool; slices without any are drawn less.
        epochs: passes over the slices with foreground; None for `default_epochs`.
        batch_size: slices a step.
        lr: peak learning rate.
        seed: of the order of the slices and the augmentation.
        device: where to train.
        amp_dtype: of autocast, None for float32 throughout.
        workers: processes that read slices.
        log: is told the mean loss after each epoch.

    Raises:
        UserError: the loss is not finite.
    """
    order_generator = torch.Generator().manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    sampler = ForegroundSampler(has_foreground, order_generator)
    batches = DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=leave_stopping_to_the_trainer,
    )
    epochs = epochs or default_epochs(len(batches))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)
    total = epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, total))

    model.train()
    with tqdm(total=total, desc="finetune", unit="step", disable=None) as bar:
        for epoch in range(1, epochs + 1):
            seen = []
            for batch in batches:
                image = batch["image"].to(device, non_blocking=True)
                label = batch["label"].to(device, non_blocking=True)
                image, label = augment(image, label, generator)
                with autocast(device, amp_dtype):
                    logits = model(image)
                loss, dice = dice_cross_entropy(logits, label)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
                optimizer.step()
                schedule.step()
                seen.append(torch.stack([loss.detach(), dice]))
                bar.update()
            mean_loss, mean_dice = torch.stack(seen).mean(0).tolist()
            if not math.isfinite(mean_loss):
                raise UserError(f"--lr {lr}: the loss of fine-tuning is {mean_loss}; lower it")
            rate = float(schedule.get_last_lr()[0])
            bar.set_postfix(epoch=epoch, loss=f"{mean_loss:.4f}", dice=f"{mean_dice:.3f}")
            if bar.disable:  # no terminal: a line an epoch for the log
                shown = f"loss {mean_loss:.4f}, dice {mean_dice:.3f}"
                print(f"finetune: epoch {epoch} of {epochs}: {shown}", flush=True)
            log(epoch, epoch * len(batches), mean_loss, rate)
    model.eval()


class ForegroundSampler(torch.utils.data.Sampler[int]):
    """Every slice with foreground once an epoch, and a third as many without, drawn anew."""

    def __init__(self, has_foreground: Tensor, generator: torch.Generator):
        self.generator = generator
        self.full = has_foreground.nonzero().squeeze(1)
        self.empty = (~has_foreground).nonzero().squeeze(1)
        few = math.ceil(EMPTY_SHARE * len(self.full))
        self.empty_drawn = min(len(self.empty), few) if len(self.full) else len(self.empty)

    def __len__(self) -> int:
        return len(self.full) + self.empty_drawn

    def __iter__(self) -> Iterator[int]:
        drawn = torch.randperm(len(self.empty), generator=self.generator)[: self.empty_drawn]
        items = torch.cat([self.full, self.empty[drawn]])
        yield from items[torch.randperm(len(items), generator=self.generator)].tolist()


def warmup_cosine(step: int, total: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine to zero."""
    warmup = max(1, int(WARMUP * total))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def augment(image: Tensor, label: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rotates, scales and shifts each slice with its label, then changes its intensities.

    No flips: left and right differ.

    Args:
        image: (B, 1, S, S) in [0, 1].
        label: (B, S, S) int64; pixels from beyond the canvas become background.
        generator: on the device of both.
    """
    affine = random_affines(len(image), generator)
    grid = functional.affine_grid(affine, list(image.shape), align_corners=False)
    image = functional.grid_sample(image, grid, align_corners=False)
    # float32 holds every class index exactly, and `nearest` copies it.
    moved = functional.grid_sample(
        label[:, None].float(), grid, mode="nearest", align_corners=False
    )
    image = change_intensities(image, ViewConfig(size=image.shape[-1]), generator)
    return image, moved[:, 0].long()


def random_affines(count: int, generator: torch.Generator) -> Tensor:
    """(count, 2, 3) rotations, scales and shifts in the convention of grid_sample."""
    draw = torch.rand(count, 4, generator=generator, device=generator.device)
    angle = ROTATION * (2 * draw[:, 0] - 1)
    scale = SCALE[0] + (SCALE[1] - SCALE[0]) * draw[:, 1]
    shift = SHIFT * 2 * (2 * draw[:, 2:] - 1)  # the canvas spans 2
    cosine, sine = angle.cos() / scale, angle.sin() / scale
    linear = torch.stack([cosine, -sine, sine, cosine], dim=1).unflatten(1, (2, 2))
    return torch.cat([linear, shift[:, :, None]], dim=2)
