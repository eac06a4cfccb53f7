"""Segmentation of whole volumes: label maps on each volume's own grid, and Dice."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from medmoco.data.slices import PixelGrid, SliceDataset, unfit
from medmoco.data.store import SliceCache
from medmoco.data.volumes import write_label_map
from medmoco.metrics import DiceTable


@torch.no_grad()
def predict_volume(
    model: nn.Module,
    cache: SliceCache,
    number: int,
    grid: PixelGrid,
    *,
    batch_size: int,
    device: torch.device,
    amp_dtype: torch.dtype | None,
) -> np.ndarray:
    """Segments volume `number` of the cache.

    The logits, not the labels, are brought back to the volume's own pixels, so that boundaries
    stay smooth.

    Returns:
        (n, h, w) uint8 class indices on the grid of the cache's slices.
    """
    volume = cache.volumes[number]
    dataset = SliceDataset(cache, np.flatnonzero(cache.slice_volume == number), grid)
    slices = []
    for batch in DataLoader(dataset, batch_size):
        with autocast(device, amp_dtype):
            logits = model(batch["image"].to(device))
        native = unfit(logits.float(), volume.shape[1:], volume.spacing[1:], grid)
        slices.append(native.argmax(dim=1).byte().cpu())
    return torch.cat(slices).numpy()


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
) -> dict[str, Any]:
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

    Returns:
        The result of `DiceTable`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {volume.case: number for number, volume in enumerate(cache.volumes)}
    value_of = np.asarray(cache.values, dtype=np.uint8)
    table = DiceTable(cache.classes)
    with tqdm(cases, desc="test", unit="volume", disable=None) as bar:
        for case in bar:
            number = numbers[case]
            prediction = predict_volume(
                model,
                cache,
                number,
                grid,
                batch_size=batch_size,
                device=device,
                amp_dtype=amp_dtype,
            )
            table.add(case, prediction, np.asarray(cache.labels(number)))
            original = Path(cache.volumes[number].path)
            write_label_map(folder / f"{case}.nii.gz", value_of[prediction], original, cache.axis)
            mean = table.result()["dice_mean"]
            bar.set_postfix(dice="none" if mean is None else f"{mean:.3f}")
    return table.result()


def autocast(device: torch.device, amp_dtype: torch.dtype | None) -> torch.autocast:
    """Lower precision on CUDA only; on the CPU it costs more than it saves."""
    return torch.autocast(
        device.type, dtype=amp_dtype, enabled=amp_dtype is not None and device.type == "cuda"
    )
