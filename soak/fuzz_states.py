"""Checkpoints that are whole, sealed and of the right run, but for what their state holds."""

import io
import json
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import lru_cache
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from fuzz_files import put
from fuzz_tensors import state_file
from fuzz_volumes import valid_nifti
from medmoco.checkpoint import Checkpoints
from medmoco.data.cache import CacheSettings, Source, build_cache
from medmoco.errors import UserError
from medmoco.finetune import finetune
from medmoco.finetune_course import load_begun
from medmoco.methods import resolve
from medmoco.output import save_torch
from medmoco.pretrain import PretrainConfig
from medmoco.pretraining import Pretraining

NAME = "last.pt"
INPUTS = {"inputs": "fuzz"}  # the identity of the fine-tuning
CLASSES = 3


# --- pretraining ----------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _pretraining() -> tuple[Pretraining, dict[str, Tensor], list[dict[str, Any]]]:
    """A run as small as they go, one of its batches, and its checkpoints of steps 0 and 1."""
    with tempfile.TemporaryDirectory() as scratch, redirect_stdout(io.StringIO()):
        folder = Path(scratch)
        image = put(folder / "image.nii", valid_nifti())
        cache = build_cache(
            [Source(name, name, image) for name in "abcd"],
            CacheSettings("mr", 2),
            folder / "caches",
            workers=1,
        )
        config = PretrainConfig(
            arch="resnet18",
            width=0.125,
            image_size=16,
            output_stride=4,
            batch_size=8,
            queue_size=8,
            embed_dim=8,
            epochs=2,
            device="cpu",
            workers=0,
            output=folder,
        )
        run = Pretraining(resolve(config, cache), cache)
        run._start(SimpleNamespace(asked=False))  # type: ignore[arg-type]
        saved = [torch.load(run.checkpoints.path, weights_only=True)]
        run.sampler.start(0, 0)
        batch = next(iter(run.loader))
        run.held_out = list(run.held_out)  # type: ignore[assignment]
        run._train_step(batch)
        run.save()
        saved.append(torch.load(run.checkpoints.path, weights_only=True))
    return run, batch, saved


def write_pretraining(random: Random, folder: Path) -> Path:
    return put(folder / NAME, state_file(random, random.choice(_pretraining()[2])))


def read_pretraining(path: Path, output: Path) -> None:
    """Goes on, and takes a step, looks at the features and saves with what was loaded."""
    run, batch, _ = _pretraining()
    run.checkpoints = Checkpoints(path, run.checkpoints.identity)
    run.metrics.path = output / "metrics.jsonl"
    run.restore()
    json.dumps(run.summary(), allow_nan=False)
    if run.step < run.total_steps:
        run.model.train()
        run._train_step(batch)
    with redirect_stderr(io.StringIO()):
        run._diagnose()
    run.checkpoints = Checkpoints(output / NAME, run.checkpoints.identity)
    run.save()


# --- fine-tuning ----------------------------------------------------------------------------------


class _Slices(torch.utils.data.Dataset):
    """Labelled slices in which every class has its square."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        label = torch.zeros(16, 16, dtype=torch.int64)
        label[2:8, 2:8], label[10:14, 10:14] = 1, 2
        return {"image": label[None] / CLASSES, "label": label}


def _log(*row: Any) -> None:
    json.dumps(row, allow_nan=False)


def _finetune(begun: dict[str, Any] | None, save: Callable[[dict[str, Any]], None]) -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, CLASSES, 1)
    finetune(
        nn.Sequential(*layers),
        _Slices(),
        torch.ones(4, CLASSES, dtype=torch.bool),
        epochs=2,
        batch_size=2,
        lr=1e-3,
        seed=0,
        device=torch.device("cpu"),
        amp_dtype=None,
        workers=0,
        log=_log,
        validation=_Slices(),
        begun=begun,
        save=save,
    )


@lru_cache(maxsize=1)
def _finetuning() -> list[dict[str, Any]]:
    """The checkpoints of every step of a training, and of its end."""
    with tempfile.TemporaryDirectory() as scratch, redirect_stdout(io.StringIO()):
        checkpoints = Checkpoints(Path(scratch, NAME), INPUTS)
        saved: list[dict[str, Any]] = []

        def save(state: dict[str, Any]) -> None:
            checkpoints.save({"seconds": 1.5, "course": state})
            saved.append(torch.load(checkpoints.path, weights_only=True))

        with patch("medmoco.finetune.CHECKPOINT_SECONDS", 0):
            _finetune(None, save)
    return saved


def write_finetuning(random: Random, folder: Path) -> Path:
    return put(folder / NAME, state_file(random, random.choice(_finetuning())))


def read_finetuning(path: Path, output: Path) -> None:
    """Goes on to the end with what was loaded."""
    checkpoints = Checkpoints(path, INPUTS)
    with redirect_stdout(io.StringIO()), checkpoints.naming_misfits():
        begun = load_begun(checkpoints)
        assert begun is not None
        try:
            _finetune(begun["course"], lambda state: save_torch(output / NAME, state))
        except UserError as error:
            if "not finite" not in str(error) and "the loss is" not in str(error):
                raise  # weights of any size may be finite and diverge
