"""Steps of training in float64, of which one rank and several must give the same but for rounding.

float32 shows less: whitening of an untrained encoder multiplies its rounding within a few steps.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional

from medmoco.data.views import View, ViewConfig, sample_views
from medmoco.distributed import average_gradients, gather_rows, own_part, rank, world
from medmoco.models.branch import Branch
from medmoco.models.encoder import Encoder
from medmoco.models.moco import MoCo, train_step
from medmoco.models.whitening import IterNorm, ZCAWhitening, replace_last_norm

BATCH, SIDE, STEPS, CHANNELS = 64, 16, 2, 64
# Local loss, decorrelation, normalisation of the keys.
CASES = [
    ("none", "zca", "ema"),
    ("coordinates", "zca", "shuffle"),
    ("dense", "covariance", "shuffle"),
    ("regions", "iternorm", "shuffle"),
    ("dense", "none", "ema"),
]


@contextmanager
def in_float64() -> Iterator[None]:
    """Where losses turn to float32 to leave bfloat16, float64 stays what it is."""
    single = torch.Tensor.float
    torch.Tensor.float = lambda self: self if self.dtype == torch.float64 else single(self)
    try:
        yield
    finally:
        torch.Tensor.float = single


def random_images(batches: int, seed: int) -> Tensor:
    """(batches, BATCH, 1, SIDE, SIDE) smooth images."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batches * BATCH, 1, 4, 4, generator=generator, dtype=torch.float64)
    return functional.interpolate(coarse, SIDE).unflatten(0, (batches, BATCH))


def small_model(local: str, decorrelation: str, key_norm: str, over_ranks: bool = True) -> MoCo:
    torch.manual_seed(0)
    encoder = Encoder("resnet18", width=CHANNELS / 512, output_stride=4)
    if decorrelation == "iternorm":
        replace_last_norm(encoder, IterNorm(CHANNELS, 16, affine=True))
    whitening = ZCAWhitening(CHANNELS, 16) if decorrelation == "zca" else None
    model = MoCo(
        Branch(encoder, 16, whitening, local != "none"),
        queue_size=64,
        momentum=0.9,
        temperature=0.1,
        key_norm=key_norm,
        local=local,
        global_weight=1.0,
        local_weight=0.5,
        covariance_weight=0.1 if decorrelation == "covariance" else 0.0,
        regions=2,
        over_ranks=over_ranks,
    )
    return model.double().train()


def draw_views(images: Tensor, generator: torch.Generator) -> tuple[View, View]:
    extent = torch.full((len(images), 2), float(SIDE), dtype=torch.float64)
    views = sample_views(images, extent, ViewConfig(size=SIDE), generator)
    return tuple(View(*(part.double() for part in view)) for view in views)


def gradient_of(model: MoCo) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.query.parameters() if p.grad is not None])


def trained(case: Sequence[str]) -> list[Tensor]:
    """Loss and gradient of every step, then weights, running statistics and queues at the end."""
    model = small_model(*case)
    optimizer = torch.optim.SGD(model.query.parameters(), lr=0.03, momentum=0.9)
    generator = torch.Generator().manual_seed(5)
    clip_norm = 1.0 if case[1] == "zca" else 0.0  # which would hide a wrong scale
    found = []
    for step, images in enumerate(random_images(STEPS, seed=1)):
        ids = own_part(torch.arange(BATCH) + step * BATCH)
        views = draw_views(own_part(images), generator)
        losses = train_step(model, optimizer, views, ids, generator, nullcontext(), clip_norm)
        loss = gather_rows(losses.total.detach()[None]).mean()
        found += [loss, gradient_of(model)]
    parts = (model.query, model.queue, model.local_queue)
    return found + [v for part in parts if part is not None for v in part.state_dict().values()]


def gradient_of_own_statistics(parts: int) -> Tensor:
    """The mean gradient of `parts` parts of a batch, each with statistics of its own.

    With several ranks one part is this rank's.
    """
    views = [random_images(1, seed)[0] for seed in (1, 2)]
    gradients = []
    for part in range(parts):
        model = small_model("none", "covariance", "ema", over_ranks=False)
        number, count = (rank(), world()) if world() > 1 else (part, parts)
        query, key = (View(view.chunk(count)[number], torch.empty(0)) for view in views)
        losses, _ = model(query, key, torch.arange(len(query.image)), torch.Generator())
        losses.total.backward()
        average_gradients(model.query.parameters())
        gradients.append(gradient_of(model))
    return torch.stack(gradients).mean(0)
