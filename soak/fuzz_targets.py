"""What is fuzzed: for each format a valid seed, its mutation, and the readers that meet it."""

import os
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import torch

from fuzz_cache import read_cache, write_cache
from fuzz_documents import (
    draw_run,
    read_config,
    read_description,
    read_lines,
    read_log,
    read_run,
    read_split,
    write_config,
    write_description,
    write_lines,
    write_run,
    write_split,
)
from fuzz_files import link_or_pipe, put
from fuzz_runner import Target
from fuzz_states import (
    read_finetuning,
    read_pretraining,
    write_finetuning,
    write_pretraining,
)
from fuzz_tensors import tensor_file
from fuzz_volumes import nifti_file
from medmoco.checkpoint import load_checkpoint, save_checkpoint
from medmoco.data.convert import guess_modality, to_classes, to_pixels
from medmoco.data.slices import PixelGrid
from medmoco.data.store import CacheSettings
from medmoco.data.volumes import read_grid, read_volume, write_label_map
from medmoco.errors import UserError
from medmoco.models.decoders import DECODERS
from medmoco.models.encoder import Encoder, load_encoder, save_encoder
from medmoco.models.segmenter import Segmenter, load_segmenter, save_segmenter
from medmoco.models.weights import read_weights

IDENTITY = {"method": "medmoco", "arch": "resnet18", "width": 0.125}


def _write_nifti(random: Random, folder: Path) -> Path:
    name, content = nifti_file(random)
    return link_or_pipe(random, put(folder / name, content))


def _read_nifti(path: Path, output: Path) -> None:
    grid = read_grid(path)
    tried: list[UserError] = []
    try:
        label = read_volume(path, label=True)
        to_classes(path, label, grid, (0, 1, 2))
    except UserError as error:
        tried.append(error)
    volume = read_volume(path)
    pixels = to_pixels(path, volume.voxels, guess_modality(volume.voxels), (-175.0, 250.0), 2)
    write_label_map(output / "label.nii.gz", (pixels > 2**15).astype("uint8"), path, 2)
    read_volume(output / "label.nii.gz", label=True)
    if tried:
        raise tried[0]


@lru_cache(maxsize=3)
def _seed(kind: str) -> dict[str, Any]:
    """The content of a valid file, small as they go."""
    torch.manual_seed(0)
    encoder = Encoder("resnet18", 0.125, 8).eval()
    handle, name = tempfile.mkstemp(".pt")
    os.close(handle)
    path = Path(name)
    if kind == "encoder":
        entries: dict[str, Any] = {"method": "medmoco", "image_size": 48, "spacing": 1.5}
        entries |= {"modality": "ct", "window": (-175.0, 250.0), "slice_axis": 2}
        entries |= {"patients": ["a"], "whitening": None}
        save_encoder(path, encoder, **entries)
    elif kind == "segmenter":
        model = DECODERS["linear"](encoder, 2).eval()
        settings = CacheSettings("ct", 2)
        grid = PixelGrid(48, 1.5)
        save_segmenter(
            path, Segmenter(model, "linear", ("background", "x"), (0, 1), grid, settings)
        )
    else:
        state = {"step": 3, "losses": [2.0, 4], "weight": torch.arange(6.0), "names": ["a", "b"]}
        save_checkpoint(path, IDENTITY, {**state, "generator": torch.Generator().get_state()})
    content = torch.load(path, weights_only=True)
    path.unlink()
    return content


def _write_tensors(kind: str) -> Callable[[Random, Path], Path]:
    def write(random: Random, folder: Path) -> Path:
        return put(folder / f"{kind}.pt", tensor_file(random, _seed(kind)))

    return write


def _read_checkpoint(path: Path, output: Path) -> None:
    load_checkpoint(path, IDENTITY)


TARGETS = {
    "nifti": Target(_write_nifti, _read_nifti, 50),
    "dataset.json": Target(write_description, read_description, 30),
    "split": Target(write_split, read_split, 20),
    "config.json": Target(write_config, read_config, 20),
    "run": Target(write_run, read_run, 20),
    "plots": Target(write_run, draw_run, 1),
    "metrics.jsonl": Target(write_run, read_log, 10),
    "cache": Target(write_cache, read_cache, 10),
    "patients.csv": Target(write_lines, read_lines, 10),
    "checkpoint": Target(
        _write_tensors("checkpoint"), lambda p, _: load_checkpoint(p, IDENTITY), 20
    ),
    "pretraining state": Target(write_pretraining, read_pretraining, 4),
    "fine-tuning state": Target(write_finetuning, read_finetuning, 4),
    "encoder": Target(_write_tensors("encoder"), lambda p, _: load_encoder(p), 10),
    "weights": Target(_write_tensors("encoder"), lambda p, _: read_weights(p), 10),
    "segmenter": Target(_write_tensors("segmenter"), lambda p, _: load_segmenter(p), 10),
}
