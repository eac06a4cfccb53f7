"""The pretraining step as the trainer takes it, and the same with the operators' references."""

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from medmoco import ops
from medmoco.data.views import View, ViewConfig, sample_views
from medmoco.methods import apply_data_defaults, apply_preset, build_model
from medmoco.models import local_loss, moco, whitening
from medmoco.models.moco import MoCo, recalibrate_batchnorm, train_step
from medmoco.pretrain import PretrainConfig

BATCHES = 3  # that the steps rotate through
# What each method calls in a step.
OPERATORS = {
    "mocov2": ("queue_info_nce",),
    "densecl": ("queue_info_nce", "dense_match"),
    "medmoco": ("queue_info_nce", "zca_whiten"),
}


@dataclass(frozen=True)
class TrainCase:
    method: str
    arch: str
    width: float
    image_size: int  # pixels a side
    output_stride: int  # pixels a cell
    batch_size: int
    queue_size: int
    device: torch.device
    dtype: torch.dtype  # of autocast; float32 is none

    def config(self) -> PretrainConfig:
        """As the trainer has it.

        Raises:
            UserError: the flags contradict each other.
        """
        config = PretrainConfig(
            method=self.method,
            arch=self.arch,
            width=self.width,
            image_size=self.image_size,
            output_stride=self.output_stride,
            batch_size=self.batch_size,
            queue_size=self.queue_size,
            device=str(self.device),
            amp_dtype=self.dtype_name(),
        )
        return apply_data_defaults(apply_preset(config), slices=self.batch_size)

    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@contextlib.contextmanager
def eager_operators() -> Iterator[None]:
    """Meanwhile the models call the operators' references in PyTorch, under autocast as they do."""
    with contextlib.ExitStack() as stack:
        for name in ops.__all__:
            own = importlib.import_module(f"medmoco.ops.{name}")
            for module in (local_loss, moco, whitening):
                if hasattr(module, name) and hasattr(own, f"{name}_reference"):
                    reference = getattr(own, f"{name}_reference")
                    stack.enter_context(mock.patch.object(module, name, reference))
        yield


class Trainer:
    """A model, its optimizer and its queues, as the trainer has them before the first step.

    The learning rate is 0: all contestants see the same weights in every round.
    """

    def __init__(self, case: TrainCase) -> None:
        self.case = case
        device = case.device
        config = case.config()
        self.model: MoCo = build_model(config).to(device)
        self.clip_norm = config.clip_norm
        if device.type == "cuda":
            self.model = self.model.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            self.model.query.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4
        )
        self.generator = torch.Generator(device).manual_seed(0)
        self.canvases = [self._draw_canvas() for _ in range(BATCHES)]
        self.views = [self._draw_views(number) for number in range(BATCHES)]
        rows = torch.arange(BATCHES * case.batch_size, device=device)
        self.ids = rows.chunk(BATCHES)  # of slices, each seen once
        self._calibrate()
        self._fill_queues()

    def step(self, number: int) -> None:
        """What the trainer does with a batch once it is on the device."""
        views, ids = self._draw_views(number), self.ids[number % BATCHES]
        train_step(
            self.model,
            self.optimizer,
            views,
            ids,
            self.generator,
            self._autocast(),
            self.clip_norm,
        )

    def encode(self, number: int) -> None:
        """Of a step what the two encoders do: both forward, and that of the queries backward."""
        query, key = self.views[number % BATCHES]
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            feature_map = self.model.query.encoder(query.image)
            with torch.no_grad():
                self.model.key.encoder(key.image)
        feature_map.backward(torch.randn_like(feature_map))

    def first_step(self) -> tuple[dict[str, float], list[Tensor]]:
        """Losses by name, and gradients, of the first batch. Weights and queues stay."""
        self.generator.manual_seed(1)
        with self._autocast():
            losses, _ = self.model(*self.views[0], self.ids[0], self.generator)
        weights = list(self.model.query.parameters())
        gradients = torch.autograd.grad(losses.total, weights)
        named = {name: float(value) for name, value in losses.as_dict().items()}
        return named, list(gradients)

    def held_bytes(self) -> int:
        """What stays between steps."""
        model = [*self.model.parameters(), *self.model.buffers()]
        learned = list(self.model.query.parameters())  # with a gradient and a momentum each
        images = [view.image for pair in self.views for view in pair]
        return sum(t.nbytes for t in (*model, *learned, *learned, *self.canvases, *images))

    def _draw_canvas(self) -> Tensor:
        """Smooth noise, so that views of one slice are alike, and those of two are not."""
        size = self.case.image_size
        coarse = torch.rand(
            (self.case.batch_size, 1, *[max(2, size // 16)] * 2),
            generator=self.generator,
            device=self.case.device,
        )
        return interpolate(coarse, (size, size), mode="bilinear", align_corners=False)

    def _draw_views(self, number: int) -> tuple[View, View]:
        canvas = self.canvases[number % BATCHES]
        extent = canvas.new_full((len(canvas), 2), self.case.image_size)
        return sample_views(canvas, extent, ViewConfig(self.case.image_size), self.generator)

    def _calibrate(self) -> None:
        """As before a training's first step, lest activations grow in the key branch."""
        self.model.train()
        with torch.no_grad(), self._autocast():
            recalibrate_batchnorm(self.model.query, (query.image for query, _ in self.views))
        self.model.synchronise_key()
        self.model.key.eval()

    def _fill_queues(self) -> None:
        for queue in filter(None, (self.model.queue, self.model.local_queue)):
            shape, device = queue.keys.shape, self.case.device
            keys = torch.randn(shape, generator=self.generator, device=device)
            queue.enqueue(normalize(keys, dim=1), torch.arange(shape[0], device=device))

    def _autocast(self) -> torch.autocast:
        enabled = self.case.dtype != torch.float32
        return torch.autocast(self.case.device.type, torch.bfloat16, enabled=enabled)
