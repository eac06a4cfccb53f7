"""Segmentation of whole volumes: label maps on each volume's own grid, Dice, and pictures."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from medmoco.data.slices import PixelGrid, SliceDataset, fit_slice
from medmoco.data.store import SliceCache
from medmoco.data.volumes import label_type, write_label_map
from medmoco.metrics import DiceTable
from medmoco.output import write_bytes_atomic
from medmoco.prediction import Member, predict_stack

MAX_PICTURES = 6  # test volumes of which a slice is kept for the report
OVERLAYS_NAME = "overlays.npz"


@dataclass(frozen=True)
class Picture:
    """One slice of a test volume on the canvas: image, truth and prediction (S, S) uint8."""

    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    case: str
    slice: int


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
) -> tuple[dict[str, Any], list[Picture]]:
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
        The result of `DiceTable`; a few slices to look at.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {volume.case: number for number, volume in enumerate(cache.volumes)}
    value_of = np.asarray(cache.values, label_type(cache.values))
    table = DiceTable(cache.classes)
    pictures: list[Picture] = []
    with tqdm(cases, desc="test", unit="volume", disable=None) as bar:
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
            if len(pictures) < MAX_PICTURES:
                pictures.append(picture(cache, number, prediction, grid))
            mean = table.result()["dice_mean"]
            bar.set_postfix(dice="none" if mean is None else f"{mean:.3f}")
    return table.result(), pictures


def picture(cache: SliceCache, number: int, prediction: np.ndarray, grid: PixelGrid) -> Picture:
    """The slice of volume `number` that shows most foreground."""
    truth = np.asarray(cache.labels(number))
    position = int((truth > 0).sum(axis=(1, 2)).argmax())
    volume = cache.volumes[number]
    index = np.flatnonzero(cache.slice_volume == number)[position : position + 1]
    image = SliceDataset(cache, index, grid)[0]["image"]
    true, predicted = (
        fit_slice(labels[position], volume.spacing[1:], grid) for labels in (truth, prediction)
    )
    shown = (image[0] * 255).round().byte().numpy()
    return Picture(shown, true, predicted, volume.case, position)


def write_pictures(path: Path, stage: str, pictures: Sequence[Picture]) -> None:
    """Puts the pictures of one stage into overlays.npz, beside those of other stages.

    Arrays, no pickles: image, truth, prediction (n, S, S) uint8; case, slice, stage (n,).
    """
    new = {
        name: np.stack([getattr(picture, name) for picture in pictures])
        for name in ("image", "truth", "prediction", "case", "slice")
    }
    new["stage"] = np.full(len(pictures), stage)
    if path.is_file():
        with np.load(path, allow_pickle=False) as old:
            others = old["stage"] != stage
            new = {name: np.concatenate([old[name][others], new[name]]) for name in new}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **new)  # type: ignore[arg-type]
    write_bytes_atomic(path, buffer.getvalue())
