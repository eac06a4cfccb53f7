"""One volume from file to file: read, scaled as for training, segmented, written as it was."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from medmoco.data.convert import guess_modality, to_pixels
from medmoco.data.inputs import Input
from medmoco.data.nifti import VolumeError
from medmoco.data.volumes import label_type, read_volume, stack_axes, write_label_map
from medmoco.errors import UserError
from medmoco.models.metadata import MAX_CANVAS
from medmoco.models.segmenter import Segmenter
from medmoco.prediction import Clock, Member, predict_stack
from medmoco.probabilities import probability_file

PIXELS_AT_ONCE = {"cpu": 2**18, "cuda": 2**22}


class VolumePredictor:
    """Predicts volumes one after another with the same models.

    Beside the models, memory holds a volume's voxels in float32 and its slices in 16 bits while it
    is read, then the slices, the label map and one batch.

    Args:
        segmenters: of the same classes, values and slice axis; are moved to the device.
        output: folder of the label maps.
        batch_size: slices at once; None for as many as `slices_at_once` says.
        device: where to predict.
        amp_dtype: of autocast on CUDA, None for float32.
        save_probabilities: also write .npz files.
    """

    def __init__(
        self,
        segmenters: Sequence[Segmenter],
        output: Path,
        *,
        batch_size: int | None,
        device: torch.device,
        amp_dtype: torch.dtype | None,
        save_probabilities: bool = False,
    ) -> None:
        self.segmenters = segmenters
        self.output = output
        self.batch_size = batch_size
        self.device = device
        self.amp_dtype = amp_dtype
        self.save_probabilities = save_probabilities
        self.clock = Clock(device)
        for segmenter in segmenters:
            segmenter.model.to(device).to(memory_format=torch.channels_last)

    def label_map(self, item: Input) -> Path:
        """The file that the label map goes to; it is written last."""
        return self.output / f"{item.name}.nii.gz"

    def probabilities(self, item: Input) -> Path:
        return self.output / f"{item.name}.npz"

    def run(self, item: Input) -> tuple[int, str | None]:
        """Predicts one volume.

        Returns:
            The number of slices; a warning, or None.

        Raises:
            VolumeError: the volume cannot be read, or its slices are too large.
            OSError: a file cannot be written.
            UserError: the memory of the device does not suffice.
        """
        first = self.segmenters[0]
        axis = first.settings.slice_axis
        assert axis is not None
        members, spacing, warning = self._read(item, axis)
        batch_size = self.batch_size or slices_at_once(members, self.device)
        path = self.label_map(item)
        path.parent.mkdir(parents=True, exist_ok=True)
        keep = (
            probability_file(
                self.probabilities(item), item.image, axis, first.classes, first.values
            )
            if self.save_probabilities
            else nullcontext()
        )
        try:
            with keep as on_probabilities:
                classes = predict_stack(
                    members,
                    spacing,
                    batch_size=batch_size,
                    device=self.device,
                    amp_dtype=self.amp_dtype,
                    clock=self.clock,
                    on_probabilities=on_probabilities,
                )
        except torch.OutOfMemoryError:
            raise UserError(
                f"{item.image}: {self.device} has too little memory for --batch-size "
                f"{batch_size}; lower it"
            ) from None
        del members
        with self.clock.part("write"):
            values = np.asarray(first.values, label_type(first.values))
            write_label_map(path, values[classes], item.image, axis)
        return len(classes), warning

    def _read(self, item: Input, axis: int) -> tuple[list[Member], tuple[float, float], str | None]:
        with self.clock.part("read"):
            volume = read_volume(item.image, item.channel)
            _, height, width = (volume.voxels.shape[i] for i in stack_axes(axis))
            _, row, column = volume.spacing[list(stack_axes(axis))].tolist()
            self._check_extent(item, (height, width), (row, column))
            warning = self._other_modality(item, volume.voxels)
            stacks: dict[tuple[str, tuple[float, float]], np.ndarray] = {}
            members = []
            for segmenter in self.segmenters:
                scaling = segmenter.settings.modality, segmenter.settings.window
                if scaling not in stacks:
                    stacks[scaling] = to_pixels(item.image, volume.voxels, *scaling, axis)
                members.append(Member(segmenter.model, segmenter.grid, stacks[scaling]))
        return members, (row, column), warning

    def _check_extent(
        self, item: Input, shape: tuple[int, int], spacing: tuple[float, float]
    ) -> None:
        for segmenter in self.segmenters:
            rows, columns = segmenter.grid.content(shape, spacing)
            if max(rows, columns) > MAX_CANVAS:
                raise VolumeError(
                    item.image,
                    f"expected slices of at most {MAX_CANVAS} pixels at the model's "
                    f"{segmenter.grid.spacing:g} mm, got {rows} x {columns} from a spacing of "
                    f"{spacing[0]:g} x {spacing[1]:g} mm; are its units mm?",
                )

    def _other_modality(self, item: Input, voxels: np.ndarray) -> str | None:
        found = guess_modality(voxels)
        wanted = self.segmenters[0].settings.modality
        if found == wanted:
            return None
        range_text = f"voxels from {voxels.min():g} to {voxels.max():g}"
        if wanted == "ct":
            return (
                f"{item.image}: the model was trained on CT in Hounsfield units, but hardly a "
                f"voxel is as dark as air there ({range_text})"
            )
        return f"{item.image}: the model was trained on MR, but this looks like CT ({range_text})"


def slices_at_once(members: Sequence[Member], device: torch.device) -> int:
    """As many as their own pixels and the models' images allow, whichever are more."""
    pixels = max(max(m.grid.size**2, math.prod(m.pixels.shape[1:])) for m in members)
    return max(1, PIXELS_AT_ONCE[device.type] // pixels)
