"""Segmentation of whole volumes: label maps on each volume's own grid, and Dice."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from medmoco.data.slices import PixelGrid
from medmoco.data.store import SliceCache
from medmoco.data.volumes import label_type, write_label_map
from medmoco.distributed import rank
from medmoco.metrics import DiceTable
from medmoco.output import make_folder
from medmoco.prediction import Member, predict_stack


def evaluate(
    model: nn.Module,
    cache: SliceCache,
    cases: Sequence[str],
    grid: PixelGrid,
    folder: Path,
    *,
    batch_size: int,
    device: torch.device,
    amp_dtype: torch.dtype | None,
) -> DiceTable:
    """Segments the test volumes, writes a label map of each, and scores them.

    Args:
        model: image to logits, in eval mode on `device`.
        cache: slices with labels.
        cases: names of the volumes.
        grid: of the model's images.
        folder: of the label maps, `<case>.nii.gz`; made if need be.
        batch_size: slices at once.
        device: of the model.
        amp_dtype: of autocast, None for float32.
    """
    make_folder(folder)
    numbers = {case: number for number, case in enumerate(cache.volumes.names("case"))}
    value_of = np.asarray(cache.values, label_type(cache.values))
    table = DiceTable(cache.classes)
    with tqdm(cases, desc="test", unit="volume", disable=rank() > 0 or None) as bar:
        for case in bar:
            number = numbers[case]
            prediction = predict_stack(
                [Member(model, grid, cache.images(number))],
                cache.volumes[number].spacing[1:],
                batch_size=batch_size,
                device=device,
                amp_dtype=amp_dtype,
            )
            table.add(case, prediction, np.asarray(cache.labels(number)))
            original = Path(cache.volumes[number].path)
            write_label_map(folder / f"{case}.nii.gz", value_of[prediction], original, cache.axis)
            mean = table.result()["dice_mean"]
            bar.set_postfix(dice="none" if mean is None else f"{mean:.3f}")
    return table
