"""Linear evaluation: how much of a segmentation the frozen features hold.

The decoder is BatchNorm, a 1x1 convolution and bilinear upsampling. Being linear, it commutes with
the upsampling: its logit at a pixel is a linear function of the features interpolated to that
pixel. Training it is a logistic regression on pixels, so we fit one to a random sample of pixels
with L-BFGS. There is no learning rate or schedule to favour one encoder over another, and every
fit is run to convergence.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from medmoco.data.delivery import delivered
from medmoco.errors import UserError
from medmoco.losses import dice_cross_entropy
from medmoco.models.decoders import LinearDecoder
from medmoco.models.encoder import Encoder

# Strongest first: each fit starts from the one before it.
WEIGHT_DECAYS = (1e-2, 1e-3, 1e-4, 0.0)
UNTESTED_WEIGHT_DECAY = 1e-3  # with one patient there is nothing to validate on
FOLDS = 3
# Far more than the parameters (channels x classes); 256 MiB at 2048 channels.
MAX_PIXELS = 2**16
ITERATIONS_A_ROUND = 10
MAX_ROUNDS = 30
# Converged: a round lowers the loss by less than this share of it. The fits of the cross-validation
# are only compared among themselves, and there are twelve of them.
TOLERANCE, COMPARISON_TOLERANCE = 1e-4, 1e-3


@dataclass(frozen=True)
class PixelSample:
    """Pixels of labelled slices, each with the features that upsampling gives it."""

    features: Tensor  # (channels, pixels) float16; pixels last, or softmax takes 4 times as long
    labels: Tensor  # (pixels,) int64
    weights: Tensor  # (pixels,) float32, how many pixels of the set each stands for
    items: Tensor  # (pixels,) int64, position of the slice in the data set

    def select(self, mask: Tensor) -> "PixelSample":
        return PixelSample(
            self.features[:, mask], self.labels[mask], self.weights[mask], self.items[mask]
        )


Log = Callable[[int, int, float, float | None], None]  # epoch, step, loss, learning rate
Progress = Callable[[int, float, float], None]  # L-BFGS iterations so far, loss, soft Dice


def linear_evaluation(
    encoder: Encoder,
    dataset: Dataset,
    patients: Sequence[str],
    classes: int,
    *,
    batch_size: int,
    seed: int,
    device: torch.device,
    log: Log,
) -> tuple[LinearDecoder, float]:
    """Fits a linear decoder to frozen features, its weight decay chosen by cross-validation.

    Args:
        encoder: on `device`, with the output stride to evaluate at; frozen and put in eval mode.
        dataset: SliceDataset with labels.
        patients: the patient of each item of `dataset`; folds keep a patient together.
        classes: number of classes, background included.
        batch_size: slices that are encoded at once.
        seed: of the sample of pixels and of the folds.
        log: is told the progress of the final fit: an iteration of L-BFGS, which has no learning
            rate, is a pass over the sample.

    Returns:
        The model, image to logits; the weight decay chosen.

    Raises:
        UserError: the features are not finite.
    """
    model = LinearDecoder(encoder, classes).to(device)
    generator = torch.Generator().manual_seed(seed)
    batches = DataLoader(dataset, batch_size)
    sample = sample_pixels(model.encoder, batches, classes, generator, device)
    sample, mean, variance = standardise(sample, model.norm.eps)
    if not variance.isfinite().all():
        raise UserError("the encoder's features of the labelled slices are not finite in float16")
    weight_decay = choose_weight_decay(sample, patients, classes, generator)
    start = torch.zeros(classes, len(sample.features) + 1, device=device)
    with tqdm(desc="linear: fit", unit="iteration", disable=None) as bar:

        def show(iteration: int, loss: float, dice: float) -> None:
            bar.set_postfix(loss=f"{loss:.4f}", dice=f"{dice:.3f}", refresh=False)
            bar.update(iteration - bar.n)
            log(iteration, iteration, loss, None)

        coefficients = fit(sample, start, weight_decay, progress=show)
    assert model.norm.running_mean is not None and model.norm.running_var is not None
    model.norm.running_mean.copy_(mean)
    model.norm.running_var.copy_(variance)
    with torch.no_grad():
        model.classifier.weight.copy_(coefficients[:, :-1, None, None])
        assert model.classifier.bias is not None
        model.classifier.bias.copy_(coefficients[:, -1])
    return model, weight_decay


@torch.no_grad()
def sample_pixels(
    encoder: Encoder,
    batches: DataLoader,
    classes: int,
    generator: torch.Generator,
    device: torch.device,
) -> PixelSample:
    """Encodes every slice once and keeps a random sample of its pixels.

    Half of the sample is background, the other half is shared by the organs, so that small ones
    are seen; the weights undo this. Padding around a slice is left out.
    """
    counts = torch.zeros(classes, dtype=torch.int64)
    for batch in delivered(batches):
        inside = batch["label"][content_mask(batch)]
        counts += torch.bincount(inside, minlength=classes)
    quota = torch.full((classes,), MAX_PIXELS / 2 / max(1, classes - 1))
    quota[0] = MAX_PIXELS / 2
    share = (quota / counts.clamp(min=1)).clamp(max=1)

    features, labels, weights, items = [], [], [], []
    first_item = 0
    for batch in delivered(tqdm(batches, desc="linear: features", unit="batch", disable=None)):
        label = batch["label"]
        drawn = torch.rand(label.shape, generator=generator) < share[label]
        picked = drawn & content_mask(batch)
        maps = encoder(batch["image"].to(device))
        for item, (feature_map, mask) in enumerate(zip(maps, picked, strict=True)):
            features.append(features_at(feature_map, mask.to(device)).half())
            items.append(torch.full((int(mask.sum()),), first_item + item))
        labels.append(label[picked])
        weights.append(1 / share[label[picked]])
        first_item += len(label)
    return PixelSample(
        torch.cat(features, dim=1),
        torch.cat(labels).to(device),
        torch.cat(weights).to(device),
        torch.cat(items).to(device),
    )


def content_mask(batch: dict[str, Tensor]) -> Tensor:
    """(B, S, S) bool: the pixels of each canvas that its slice covers, which lies centred."""
    size = batch["image"].shape[-1]
    offset = (torch.arange(size) + 0.5 - size / 2).abs()
    rows, columns = (batch["extent"] / 2).unbind(1)
    return (offset[:, None] < rows[:, None, None]) & (offset < columns[:, None, None])


def features_at(feature_map: Tensor, mask: Tensor) -> Tensor:
    """The features that bilinear upsampling of a map (C, h, w) gives the pixels of mask (S, S).

    Returns:
        (C, pixels), in row-major order of the pixels, without making the whole upsampled map.
    """
    rows, columns = mask.nonzero().unbind(1)
    centres = torch.stack([columns, rows], dim=1) + 0.5
    grid = (2 * centres / mask.shape[0] - 1).to(feature_map.dtype)
    # Border padding is what interpolate(align_corners=False) does beyond the outermost centres.
    sampled = functional.grid_sample(
        feature_map[None], grid[None, None], padding_mode="border", align_corners=False
    )
    return sampled[0, :, 0]


def standardise(sample: PixelSample, eps: float) -> tuple[PixelSample, Tensor, Tensor]:
    """What BatchNorm in its converged state does; also returns its mean and variance (C,)."""
    features = sample.features.float()
    share = sample.weights / sample.weights.sum()
    mean = features @ share
    features -= mean[:, None]
    variance = features.square() @ share
    normal = (features / (variance + eps).sqrt()[:, None]).half()
    return PixelSample(normal, sample.labels, sample.weights, sample.items), mean, variance


def choose_weight_decay(
    sample: PixelSample, patients: Sequence[str], classes: int, generator: torch.Generator
) -> float:
    """The weight decay of the lowest loss on held-out patients, mean over the folds."""
    folds = min(FOLDS, len(set(patients)))
    if folds < 2:
        return UNTESTED_WEIGHT_DECAY
    loss = torch.zeros(len(WEIGHT_DECAYS), dtype=torch.float64)
    device = sample.features.device
    fits = folds * len(WEIGHT_DECAYS)
    with tqdm(total=fits, desc="linear: cross-validation", unit="fit", disable=None) as bar:
        for held_out in patient_folds(patients, folds, generator):
            held = held_out.to(device)[sample.items]
            training, validation = sample.select(~held), sample.select(held)
            coefficients = torch.zeros(classes, len(sample.features) + 1, device=device)
            for i, weight_decay in enumerate(WEIGHT_DECAYS):
                coefficients = fit(training, coefficients, weight_decay, COMPARISON_TOLERANCE)
                loss[i] += objective(validation, coefficients, 0.0)[0].item()
                bar.update()
    return WEIGHT_DECAYS[int(loss.argmin())]


def patient_folds(
    patients: Sequence[str], folds: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """(items,) bool per fold: its held-out slices. Each patient is held out exactly once."""
    names = sorted(set(patients))
    order = torch.randperm(len(names), generator=generator).tolist()
    fold_of = {names[place]: position % folds for position, place in enumerate(order)}
    assigned = torch.tensor([fold_of[patient] for patient in patients])
    for fold in range(folds):
        yield assigned == fold


def fit(
    sample: PixelSample,
    start: Tensor,
    weight_decay: float,
    tolerance: float = TOLERANCE,
    progress: Progress | None = None,
) -> Tensor:
    """Minimises `objective` from `start` with full-batch L-BFGS, to convergence.

    It has converged when ten iterations lower the loss by less than `tolerance` of it.

    Returns:
        coefficients (classes, channels + 1), the last column the intercepts.
    """
    coefficients = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [coefficients], max_iter=ITERATIONS_A_ROUND, history_size=20, line_search_fn="strong_wolfe"
    )
    sample = PixelSample(sample.features.float(), sample.labels, sample.weights, sample.items)
    dice = torch.zeros(())

    def closure() -> Tensor:
        nonlocal dice
        optimizer.zero_grad()
        loss, dice = objective(sample, coefficients, weight_decay)
        loss.backward()
        return loss

    before = float("inf")
    for round_ in range(1, MAX_ROUNDS + 1):
        optimizer.step(closure)
        loss = float(objective(sample, coefficients.detach(), weight_decay)[0])
        if progress:
            progress(round_ * ITERATIONS_A_ROUND, loss, float(dice))
        if before - loss < tolerance * loss:
            break
        before = loss
    return coefficients.detach()


def objective(
    sample: PixelSample, coefficients: Tensor, weight_decay: float
) -> tuple[Tensor, Tensor]:
    """Loss of the linear decoder with its L2 penalty, and soft Dice."""
    slopes, intercepts = coefficients[:, :-1], coefficients[:, -1:]
    logits = slopes @ sample.features.float() + intercepts
    loss, dice = dice_cross_entropy(logits[None], sample.labels[None], sample.weights[None])
    return loss + weight_decay / 2 * slopes.square().sum(), dice
