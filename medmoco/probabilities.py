"""Probabilities of every class at every voxel, in a file that grows batch by batch."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from nibabel.orientations import apply_orientation, io_orientation
from torch import Tensor

from medmoco.data.nifti import read_layout
from medmoco.data.volumes import to_stack
from medmoco.output import atomic_file
from medmoco.prediction import OnProbabilities


@contextmanager
def probability_file(
    path: Path, like: Path, axis: int, classes: Sequence[str], values: Sequence[int]
) -> Iterator[OnProbabilities]:
    """Collects batches of probabilities and writes them at the end, whole or not at all.

    The file holds "probabilities" (classes, x, y, z) float16, whose voxels are in the order of the
    image's file as nibabel reads it, so that `values[probabilities.argmax(0)]` is the label map up
    to rounding; "classes" and "values". Meanwhile they lie on disk beside `path`, since they can
    take many times the memory of the volume.

    Args:
        path: .npz.
        like: the image's file.
        axis: along which the slices are cut.
        classes: names.
        values: the value that stands for each class.

    Yields:
        A function of the place in the stack and the probabilities (B, classes, h, w).
    """
    layout = read_layout(Path(like))
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        shape = (len(classes), *layout.shape)
        stored = np.memmap(temporary, np.float16, mode="w+", shape=shape)
        to_canonical = io_orientation(layout.affine)
        # Views: what is written to a stack goes to its place in the file.
        stacks = [
            to_stack(apply_orientation(np.asarray(voxels), to_canonical), axis) for voxels in stored
        ]

        def add(part: slice, probabilities: Tensor) -> None:
            for stack, of_class in zip(stacks, probabilities.unbind(1), strict=True):
                stack[part] = of_class.half().cpu().numpy()

        yield add
        with atomic_file(path) as file:
            np.savez_compressed(
                file, probabilities=stored, classes=np.array(classes), values=np.array(values)
            )
    finally:
        Path(temporary).unlink(missing_ok=True)
