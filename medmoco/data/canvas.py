"""Drawing in three dimensions with signed distances, and the texture and noise of CT.

A distance is a float32 array over the voxels: millimetres to a surface, negative inside.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from scipy import fft, sparse


class Canvas:
    """A volume that is painted: HU and class indices.

    Attributes:
        hu, labels: (x, y, z) float32 and uint8.
        straight: (3, x, y, z) coordinates of the voxels in mm.
        bent: the same, gently deformed, so that what is drawn in it has no straight edges.
    """

    def __init__(
        self,
        random: np.random.Generator,
        affine: np.ndarray,
        shape: tuple[int, int, int],
        background: float,
    ):
        self.random = random
        self.pixel = abs(float(affine[0, 0]))
        self.hu = np.full(shape, background, np.float32)
        self.labels = np.zeros(shape, np.uint8)
        self._axes = [
            (affine[i, i] * np.arange(count) + affine[i, 3]).astype(np.float32)
            for i, count in enumerate(shape)
        ]
        self.straight = np.stack(np.meshgrid(*self._axes, indexing="ij"))
        self.bent = self.straight + np.stack([self.smooth(70, 5) for _ in range(3)])

    def smooth(self, size: float, deviation: float) -> np.ndarray:
        """A random field whose structures have about this size in mm: bumps on a lattice."""
        bumps = [_bumps(axis, max(0.5 * size, abs(axis[1] - axis[0]))) for axis in self._axes]
        heights = self.random.standard_normal([bump.shape[1] for bump in bumps], np.float32)
        for bump in bumps:  # each turn takes the first axis from nodes to voxels and puts it last
            rest = heights.shape[1:]
            lines = bump @ heights.reshape(len(heights), -1)
            heights = np.moveaxis(lines.reshape(-1, *rest), 0, -1)
        return heights * np.float32(deviation / heights.std())

    def ellipsoid(
        self,
        centre: np.ndarray,
        semi: tuple[float, float, float],
        *,
        tilt: float = 0.0,
        turn: float = 0.0,
    ) -> np.ndarray:
        """Distance to an ellipsoid, tilted in the coronal plane and turned in the axial one.

        To first order, which is exact on the surface (Quilez, "ellipsoid distance bound").

        Args:
            centre: (3,) mm.
            semi: half axes in mm.
            tilt, turn: radians.
        """
        x, y, z = (axis - np.float32(start) for axis, start in zip(self.bent, centre, strict=True))
        x, z = _rotated(x, z, tilt)
        x, y = _rotated(x, y, turn)
        a, b, c = semi
        radius = np.sqrt((x / a) ** 2 + (y / b) ** 2 + (z / c) ** 2) + 1e-6
        slope = np.sqrt((x / a**2) ** 2 + (y / b**2) ** 2 + (z / c**2) ** 2) + 1e-9
        return radius * (radius - 1) / slope

    def tube(self, path: Sequence[np.ndarray], radii: Sequence[float]) -> np.ndarray:
        """Distance to a chain of cones with round ends, through the points of a path."""
        nearest = np.full(self.hu.shape, np.inf, np.float32)
        points = [point.astype(np.float32)[:, None, None, None] for point in path]
        for i, (start, end) in enumerate(pairwise(points)):
            along, relative = end - start, self.bent - start
            t = ((relative * along).sum(0) / (along**2).sum()).clip(0, 1)
            apart = np.sqrt(((relative - along * t) ** 2).sum(0))
            nearest = np.minimum(nearest, apart - radii[i] - (radii[i + 1] - radii[i]) * t)
        return nearest

    def paint(self, distance: np.ndarray, hu: float | np.ndarray, label: int = 0) -> None:
        """Blends an attenuation in by the share of each pixel that lies inside (partial volume)."""
        share = np.clip(0.5 - distance / self.pixel, 0, 1)
        self.hu += share * (hu - self.hu)
        self.labels[share > 0.5] = label

    def add_noise(self, sigma: float) -> None:
        """Quantum noise after filtered back projection, slice by slice.

        Its power rises with the spatial frequency as the ramp filter does, and falls with the
        kernel (Kijewski and Judy, 1987, Phys Med Biol 32:565).

        Args:
            sigma: standard deviation in HU.
        """
        rows, columns, _ = self.hu.shape
        frequency = np.hypot(fft.fftfreq(rows)[:, None], fft.rfftfreq(columns)[None])
        transfer = np.sqrt(frequency) * np.exp(-0.5 * (frequency / 0.3) ** 2)
        white = self.random.standard_normal(self.hu.shape, np.float32)
        spectrum = fft.rfft2(white, axes=(0, 1)) * transfer[..., None].astype(np.float32)
        noise = fft.irfft2(spectrum, (rows, columns), axes=(0, 1))
        self.hu += noise * np.float32(sigma / noise.std())


def _bumps(axis: np.ndarray, step: float) -> sparse.csr_array:
    """(voxels, nodes): Gaussians around nodes this far apart. Sparse, for few reach a voxel."""
    nodes = np.arange(axis.min() - step, axis.max() + 2 * step, step, dtype=np.float32)
    away = (axis[:, None] - nodes) / (0.7 * step)
    return sparse.csr_array(np.where(np.abs(away) < 3, np.exp(-0.5 * away**2), 0))


def superellipse(
    x: np.ndarray, y: np.ndarray, semi: tuple[float, float], power: float
) -> np.ndarray:
    """Distance to |x/a|^power + |y/b|^power = 1, to first order."""
    u, v = np.abs(x) / semi[0] + 1e-6, np.abs(y) / semi[1] + 1e-6
    radius = (u**power + v**power) ** (1 / power)
    slope_x, slope_y = (u / radius) ** (power - 1) / semi[0], (v / radius) ** (power - 1) / semi[1]
    return (radius - 1) / np.hypot(slope_x, slope_y)


def _rotated(u: np.ndarray, v: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return u * cos + v * sin, v * cos - u * sin
