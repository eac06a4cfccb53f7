"""Two random views of each slice, made in batches on the training device.

Geometry is kept as affines in the convention of `torch.nn.functional.grid_sample` with
align_corners=False: x before y, -1 and 1 at the outer edges of the border pixels. Nothing here
waits for the device, and coordinates are computed without matrix products, which autocast and
TF32 would round.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from medmoco.distributed import draw_part
from medmoco.errors import UserError

_CANDIDATES = 16


@dataclass(frozen=True)
class ViewConfig:
    """Random crops, rotations and changes of intensity.

    Attributes:
        size: pixels a side of a view.
        crop_scale: area of the square crop as a share of the canvas, drawn uniformly.
        rotation: largest angle in degrees, either way.
        gamma: range of the exponent, drawn log-uniformly.
        contrast: range of the factor about the mean of the view.
        brightness: largest offset, either way; intensities are in [0, 1].
        noise: largest standard deviation of Gaussian noise.
        blur: range of the standard deviation of Gaussian blur, in pixels of the view.
        blur_probability: share of the views that are blurred.
        min_overlap: least overlap of the two crops, as `overlap_share` measures it.

    Raises:
        UserError: crop_scale is no range within (0, 1], or min_overlap cannot always be reached
            because even concentric crops may overlap less when they are rotated.
    """

    size: int
    crop_scale: tuple[float, float] = (0.4, 1.0)
    rotation: float = 15.0
    gamma: tuple[float, float] = (0.7, 1.5)
    contrast: tuple[float, float] = (0.75, 1.25)
    brightness: float = 0.1
    noise: float = 0.05
    blur: tuple[float, float] = (0.1, 1.5)
    blur_probability: float = 0.5
    min_overlap: float = 0.3

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise UserError(f"crop_scale must rise within (0, 1], got {self.crop_scale}")
        angle = math.radians(min(abs(self.rotation), 45.0))
        reachable = 1 / (math.cos(angle) + math.sin(angle)) ** 2
        if not 0 <= self.min_overlap <= reachable:
            raise UserError(
                f"min_overlap must be within [0, {reachable:.2f}] for rotations of up to "
                f"{self.rotation:g} degrees, got {self.min_overlap}"
            )


class View(NamedTuple):
    """A batch of views.

    Attributes:
        image: (B, 1, size, size) in [0, 1].
        affine: (B, 2, 3), from normalised coordinates of the view to those of the canvas.
    """

    image: Tensor
    affine: Tensor


def sample_views(
    canvas: Tensor, extent: Tensor, config: ViewConfig, generator: Generator | None = None
) -> tuple[View, View]:
    """Draws two views of each slice whose crops overlap enough.

    Args:
        canvas: (B, 1, P, P) in [0, 1], content centred.
        extent: (B, 2) rows and columns of the content, in pixels of the canvas.
        config: what to draw.
        generator: on the canvas's device; the same state gives the same views, whose number of
            ranks does not matter.
    """
    first, second = _draw_pair(extent / canvas.shape[-1], config, generator)
    return (
        _render(canvas, first, config, generator),
        _render(canvas, second, config, generator),
    )


def change_intensities(
    image: Tensor, config: ViewConfig, generator: Generator | None, rows: int | None = None
) -> Tensor:
    """Random gamma, contrast, brightness, blur and noise, drawn for each image.

    Args:
        image: (B, 1, H, W) in [0, 1].
        config: their ranges; the rest of it is not used.
        generator: on the image's device.
        rows: of the global batch that `image` is this rank's part of; None where every rank has as
            many.

    Returns:
        (B, 1, H, W), clipped to [0, 1].
    """
    shape = (image.shape[0], 1, 1, 1)
    log_gamma = (math.log(config.gamma[0]), math.log(config.gamma[1]))

    def draw(bounds: tuple[float, float]) -> Tensor:
        return _uniform(shape, bounds, image, generator, rows)

    gamma = draw(log_gamma).exp()
    contrast = draw(config.contrast)
    brightness = draw((-config.brightness, config.brightness))
    sigma = draw(config.blur)
    blurred = draw((0.0, 1.0)) < config.blur_probability
    noise_level = draw((0.0, config.noise))
    image = image.clamp(0, 1).pow(gamma)
    mean = image.mean(dim=(-2, -1), keepdim=True)
    image = (image - mean) * contrast + mean + brightness
    # Noise comes last, since blur would take it away.
    image = _blur(image, sigma * blurred, config.blur[1])
    noise = draw_part(
        lambda shape: image.new_empty(shape).normal_(generator=generator), image.shape, rows
    )
    return (image + noise_level * noise).clamp(0, 1)


def sampling_grid(affine: Tensor, size: int) -> Tensor:
    """Where `torch.nn.functional.grid_sample` is to read the pixels of images of a side of `size`.

    What affine_grid gives, but of empty batches, too, and without a matrix product.

    Args:
        affine: (B, 2, 3), from normalised coordinates of the images to be made to those read from.
        size: pixels a side.

    Returns:
        (B, size, size, 2).
    """
    return _transform(affine, _cell_centres(size, affine))


def corresponding_coordinates(
    affine_from: Tensor, affine_to: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Where the cells of a map of one view lie in the other view.

    Args:
        affine_from: (B, 2, 3) of the view whose cells are asked for.
        affine_to: (B, 2, 3) of the view in which they are sought.
        size: cells a side of the square map.

    Returns:
        coordinates (B, size, size, 2) of each cell's centre, normalised to view `to`, x first;
        valid (B, size, size), whether the centre lies within view `to`.
    """
    affine = _compose(_invert(affine_to), affine_from)
    coordinates = sampling_grid(affine, size)
    return coordinates, (coordinates.abs() <= 1).all(-1)


def overlap_regions(affine_a: Tensor, affine_b: Tensor, grid: int) -> tuple[Tensor, Tensor, Tensor]:
    """A grid of points over the rectangle that two crops share, seen from both views.

    Args:
        affine_a: (B, 2, 3).
        affine_b: (B, 2, 3).
        grid: points a side; each is the centre of one of grid x grid equal regions.

    Returns:
        coordinates (B, grid, grid, 2) normalised to view a, the same normalised to view b, and
        valid (B, grid, grid), False where the crops share nothing.
    """
    low, high = _shared_rectangle(affine_a, affine_b)
    centre, half = (high + low) / 2, (high - low) / 2
    points = centre[:, None, None] + half[:, None, None] * _cell_centres(grid, low)
    valid = (high > low).all(-1)[:, None, None].expand(points.shape[:-1])
    return _transform(_invert(affine_a), points), _transform(_invert(affine_b), points), valid


def overlap_share(affine_a: Tensor, affine_b: Tensor) -> Tensor:
    """Area that two crops share, as a share of the smaller crop.

    The area is that of the rectangle, parallel to the canvas, common to the largest such squares
    inside the two rotated crops: the part in which `overlap_regions` places its points.

    Args:
        affine_a: (..., 2, 3).
        affine_b: (..., 2, 3).

    Returns:
        (...), in [0, 1].
    """
    low, high = _shared_rectangle(affine_a, affine_b)
    smaller = torch.minimum(_determinant(affine_a), _determinant(affine_b))
    return (high - low).clamp(min=0).prod(-1) / (4 * smaller)  # a crop spans 2 in each direction


def _draw_pair(
    extent: Tensor, config: ViewConfig, generator: Generator | None
) -> tuple[Tensor, Tensor]:
    """Two (B, 2, 3) affines; `extent` (B, 2) is the content's share of the canvas."""
    first = _draw_affines(extent, config, generator)
    second = _draw_affines(extent, config, generator)
    enough = overlap_share(first, second) >= config.min_overlap
    enough[:, -1] = True  # concentric, so it overlaps enough by the check of ViewConfig
    chosen = enough.byte().argmax(1)[:, None, None, None].expand(-1, 1, 2, 3)
    return first.gather(1, chosen).squeeze(1), second.gather(1, chosen).squeeze(1)


def _draw_affines(extent: Tensor, config: ViewConfig, generator: Generator | None) -> Tensor:
    """Candidates (B, candidates, 2, 3); the last one has its crop centred on the content."""
    shape = (extent.shape[0], _CANDIDATES)
    side = _uniform(shape, config.crop_scale, extent, generator).sqrt()
    limit = math.radians(config.rotation)
    angle = _uniform(shape, (-limit, limit), extent, generator)
    position = _uniform((*shape, 2), (-1.0, 1.0), extent, generator)
    position[:, -1] = 0
    # A crop smaller than the content stays within it, a larger one contains it. The canvas spans
    # 2 in normalised coordinates, so half of a difference of shares is the share itself.
    reach = (extent.flip(-1)[:, None, :] - side[..., None]).abs()
    cosine, sine = side * angle.cos(), side * angle.sin()
    linear = torch.stack([cosine, -sine, sine, cosine], dim=-1).unflatten(-1, (2, 2))
    return torch.cat([linear, (position * reach)[..., None]], dim=-1)


def _render(
    canvas: Tensor, affine: Tensor, config: ViewConfig, generator: Generator | None
) -> View:
    # A canvas finer than the view is read at more points, and averaged, lest it alias.
    oversampling = math.ceil(canvas.shape[-1] / config.size)
    points = sampling_grid(affine.to(canvas), config.size * oversampling)
    image = F.grid_sample(canvas, points, align_corners=False)
    if oversampling > 1:
        image = F.avg_pool2d(image, oversampling)
    return View(change_intensities(image, config, generator), affine)


def _blur(image: Tensor, sigma: Tensor, largest: float) -> Tensor:
    """Gaussian blur of (B, 1, H, W) with a sigma (B, 1, 1, 1) of its own for each; 0 leaves it."""
    radius = math.ceil(3 * largest)
    offset = torch.arange(-radius, radius + 1, device=image.device, dtype=image.dtype)
    # Below 0.05 pixels the kernel is 1 at the centre and 0 elsewhere, in float32 exactly.
    kernel = torch.exp(-0.5 * (offset / sigma.clamp(min=0.05)) ** 2)
    kernel = kernel / kernel.sum(-1, keepdim=True)
    image = F.pad(image, (radius,) * 4, mode="replicate")
    for axis in (-1, -2):
        image = _correlate(image, kernel, axis)
    return image


def _correlate(image: Tensor, kernel: Tensor, axis: int) -> Tensor:
    """Correlation along one axis, without padding; kernel (B, 1, 1, taps).

    Shifted sums in place of a convolution: autocast and TF32 would round the image there.
    """
    taps = kernel.shape[-1]
    length = image.shape[axis] - taps + 1
    total = torch.zeros_like(image.narrow(axis, 0, length))
    for tap in range(taps):
        total.addcmul_(image.narrow(axis, tap, length), kernel[..., tap : tap + 1])
    return total


def _uniform(
    shape: tuple[int, ...],
    bounds: tuple[float, float],
    like: Tensor,
    generator: Generator | None,
    rows: int | None = None,
) -> Tensor:
    low, high = bounds
    draw = draw_part(
        lambda shape: torch.rand(shape, generator=generator, device=like.device, dtype=like.dtype),
        shape,
        rows,
    )
    return low + (high - low) * draw


def _shared_rectangle(affine_a: Tensor, affine_b: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper corner (..., 2) of the canvas-parallel rectangle inside both crops."""
    corners = []
    for affine in (affine_a, affine_b):
        centre = affine[..., 2]
        # The largest such square in a square of half side s turned by t has s/(|cos t| + |sin t|).
        half = _determinant(affine) / affine[..., 0].abs().sum(-1)
        corners.append((centre - half[..., None], centre + half[..., None]))
    (low_a, high_a), (low_b, high_b) = corners
    return torch.maximum(low_a, low_b), torch.minimum(high_a, high_b)


def _determinant(affine: Tensor) -> Tensor:
    return affine[..., 0, 0] * affine[..., 1, 1] - affine[..., 0, 1] * affine[..., 1, 0]


def _invert(affine: Tensor) -> Tensor:
    """(B, 2, 3) inverse in closed form; torch.linalg.inv would wait for the device."""
    (a, b), (c, d) = affine[:, 0, :2].unbind(-1), affine[:, 1, :2].unbind(-1)
    linear = torch.stack([d, -b, -c, a], dim=-1).unflatten(-1, (2, 2))
    linear = linear / _determinant(affine)[:, None, None]
    shift = (linear * affine[:, None, :, 2]).sum(-1, keepdim=True)
    return torch.cat([linear, -shift], dim=-1)


def _compose(outer: Tensor, inner: Tensor) -> Tensor:
    """The (B, 2, 3) affine that applies `inner` first."""
    product = (outer[:, :, :2, None] * inner[:, None]).sum(2)
    return torch.cat([product[:, :, :2], product[:, :, 2:] + outer[:, :, 2:]], dim=-1)


def _transform(affine: Tensor, points: Tensor) -> Tensor:
    """points (B or 1, h, w, 2) through affine (B, 2, 3)."""
    column_x, column_y, shift = affine[:, None, None].unbind(-1)
    return points[..., :1] * column_x + points[..., 1:] * column_y + shift


def _cell_centres(size: int, like: Tensor) -> Tensor:
    """(1, size, size, 2) normalised coordinates of the cells of a map, x first."""
    steps = (torch.arange(size, device=like.device, dtype=like.dtype) * 2 + 1) / size - 1
    return torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1)[None]
