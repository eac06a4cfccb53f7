"""What is fuzzed: for each format a valid seed, its mutation, and the readers that meet it."""

import json
import os
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import torch

from fuzz_runner import Target
from fuzz_tensors import tensor_file
from fuzz_values import NASTY_NAMES, damaged, json_bytes
from fuzz_volumes import nifti_file
from medmoco.checkpoint import load_checkpoint, save_checkpoint
from medmoco.config import parse, to_json
from medmoco.data.convert import guess_modality, to_classes, to_pixels
from medmoco.data.folds import split_folds
from medmoco.data.slices import PixelGrid
from medmoco.data.sources import read_case_list
from medmoco.data.splits import split_task
from medmoco.data.store import CacheSettings
from medmoco.data.task import Case, Task, patient_of, read_classes, read_task
from medmoco.data.volumes import read_grid, read_volume, write_label_map
from medmoco.errors import UserError
from medmoco.evaluate import EvaluateConfig
from medmoco.export import ExportConfig
from medmoco.metrics_log import MetricsLog
from medmoco.models.decoders import DECODERS
from medmoco.models.encoder import Encoder, load_encoder, save_encoder
from medmoco.models.segmenter import Segmenter, load_segmenter, save_segmenter
from medmoco.models.weights import read_weights
from medmoco.output import check_output
from medmoco.predict import PredictConfig
from medmoco.pretrain import PretrainConfig
from medmoco.progress import ProgressPlot
from medmoco.report.page import report_page
from medmoco.report.run_folder import read_run
from medmoco.segment import SegmentConfig
from medmoco.train import TrainConfig

IDENTITY = {"method": "medmoco", "arch": "resnet18", "width": 0.125}
CASES = ("case_00", "case_01", "case_02", "case_03")
CONFIGS = (TrainConfig, PretrainConfig, SegmentConfig, PredictConfig, EvaluateConfig, ExportConfig)


def _write_nifti(random: Random, folder: Path) -> Path:
    name, content = nifti_file(random)
    return _put(folder / name, content)


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


def _write_description(random: Random, folder: Path) -> Path:
    valid = {
        "name": "task",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "liver", "2": "spleen"},
        "numTraining": len(CASES),
        "file_ending": ".nii.gz",
        "training": [
            {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
            for name in CASES
        ],
    }
    if random.random() < 0.3:
        valid |= {"labels": {"background": 0, "liver": 1}, "channel_names": {"0": "CT"}}
        del valid["training"]
    for name in CASES[:2]:
        _put(folder / "imagesTr" / f"{name}.nii.gz", b"")
        _put(folder / "labelsTr" / f"{name}.nii.gz", b"")
    return _put(folder / "dataset.json", json_bytes(random, valid))


def _read_description(path: Path, output: Path) -> None:
    read_classes(path)
    task = read_task(path.parent)
    for case in task.cases:
        for file in (case.image, case.label):
            if not Path(os.path.abspath(file)).is_relative_to(path.parent):
                raise AssertionError(f"a path of dataset.json leaves its folder: {file}")
    split_task(task)


@lru_cache(maxsize=1)
def _task() -> Task:
    cases = tuple(Case(name, name, Path(f"{name}.nii"), Path(f"{name}.nii")) for name in CASES)
    return Task(Path("task"), cases, ("background", "liver"), (0, 1), "mr")


def _write_split(random: Random, folder: Path) -> Path:
    valid: Any = {"pretrain": CASES[:3], "train": CASES[:2], "test": CASES[3:]}
    valid = {part: list(names) for part, names in valid.items()}
    if random.random() < 0.5:
        valid = [
            {"train": list(CASES[:2]), "val": list(CASES[2:])},
            {"train": ["case_00"], "val": [CASES[1]]},
        ]
    return _put(folder / "splits_final.json", json_bytes(random, valid))


def _read_split(path: Path, output: Path) -> None:
    tried: list[UserError] = []
    try:
        split_folds(_task(), path)
    except UserError as error:
        tried.append(error)
    split_task(_task(), path)
    if tried and "--fold:" not in str(tried[0]):
        raise tried[0]


def _write_config(random: Random, folder: Path) -> Path:
    config = random.choice(CONFIGS)
    valid = {"medmoco": "0.1.0", "command": config.__name__.removesuffix("Config").lower()}
    valid |= {"argv": ["--data", "scans"]} | to_json(config())
    return _put(folder / "config.json", json_bytes(random, valid))


def _read_config(path: Path, output: Path) -> None:
    tried: list[UserError] = []
    for config in CONFIGS:
        try:
            parse(config, ["--config", str(path)], prog="fuzz", description="")
        except UserError as error:
            if str(error).startswith("--") or path.name in str(error):
                tried.append(error)  # a flag's range is named by the flag
                continue
            raise
    check_output(path.parent, resume=False, overwrite=True)


@lru_cache(maxsize=1)
def _run() -> dict[str, list[dict[str, Any]]]:
    measured = {"rankme": 3.5, "samples": 9, "dimensions": 8, "spectrum": [1.0, 0.5, 0.25]}
    scores = {"case_00": {"liver": 0.5}, "case_01": {"liver": None}}
    result = {"dice_mean": 0.5, "dice_per_class": {"liver": 0.5}, "dice_per_volume": scores}
    result |= {"dice_pooled": {"liver": 0.4}, "absent": {"liver": 1}, "seconds": 2.0}
    summary = {"method": "medmoco", "seed": 0, "classes": ["background", "liver"]}
    summary |= {"effective_rank": {"features": 3.5, "embeddings": 2.5}, "linear": result}
    summary |= {"finetune": result, "controls": {"linear_random": result}, "warnings": ["low"]}
    summary |= {"bad_files": [{"path": "a.nii", "reason": "NaN"}], "seconds": {"pretrain": 3.0}}
    config = {"medmoco": "0.1.0", "command": "train", "argv": ["--seed", "1"], "epochs": 2}
    records: list[dict[str, Any]] = [
        {
            "stage": "diagnostics",
            "epoch": e,
            "step": 5 * e,
            "loss": 2.0,
            "features": measured,
            "embeddings": measured,
            "effective_rank": 3.5,
            "warnings": [],
        }
        for e in range(3)
    ]
    records += [
        {
            "stage": "pretrain",
            "epoch": 1,
            "step": s,
            "loss": 2.5,
            "loss_global": 2.0,
            "acc1": 0.5,
            "chance": 3.0,
            "lr": 0.1,
            "images_per_second": 9.0,
            "data_wait": 0.1,
        }
        for s in range(1, 4)
    ]
    records += [
        {
            "stage": "finetune",
            "encoder": "pretrained",
            "epoch": e,
            "step": e,
            "loss": 1.0,
            "lr": 0.1,
            "dice": {"liver": 0.5},
        }
        for e in range(1, 3)
    ]
    return {"config.json": [config], "summary.json": [summary], "metrics.jsonl": records}


def _write_run(random: Random, folder: Path) -> Path:
    """A whole run; one of its files is not as it should be."""
    chosen = random.choice(("metrics.jsonl", "metrics.jsonl", "summary.json", "config.json"))
    for name, records in _run().items():
        lines = [json.dumps(record).encode() for record in records]
        if name == chosen:
            at = random.randrange(len(lines))
            lines[at] = json_bytes(random, records[at])
        content = b"\n".join(lines) + b"\n"
        if name == chosen and random.random() < 0.2:
            content = damaged(random, content)
        _put(folder / name, content)
    return folder / chosen


def _read_run(path: Path, output: Path) -> None:
    """The whole page but for its plots, which take a second to draw."""
    with patch("medmoco.report.figures.render_svg", lambda plot, theme: b"<svg/>"):
        _draw_run(path, output)


def _draw_run(path: Path, output: Path) -> None:
    page = report_page([read_run(path.parent)])
    if "<script>alert" in page:
        raise AssertionError("a name became markup")
    page.encode("utf-8")


def _read_log(path: Path, output: Path) -> None:
    """What a resumed run does with its own records."""
    content = path.read_bytes()
    copied = output / "metrics.jsonl"
    _put(copied, content)
    with MetricsLog(copied) as log:
        log.forget_training("linear", "random")
        log.forget_after(2, 5)
    ProgressPlot(output)


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
        return _put(folder / f"{kind}.pt", tensor_file(random, _seed(kind)))

    return write


def _read_checkpoint(path: Path, output: Path) -> None:
    load_checkpoint(path, IDENTITY)


def _write_lines(random: Random, folder: Path) -> Path:
    lines = [f"{name},{name[-1]}" for name in CASES]
    lines[random.randrange(4)] = random.choice(NASTY_NAMES) + random.choice((",", "", ',"', ",,"))
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    return _put(
        folder / "patients.csv", damaged(random, content) if random.random() < 0.5 else content
    )


def _read_lines(path: Path, output: Path) -> None:
    read_case_list(path)
    for name in CASES:
        patient_of(name, str(path))


def _put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


TARGETS = {
    "nifti": Target(_write_nifti, _read_nifti, 50),
    "dataset.json": Target(_write_description, _read_description, 30),
    "split": Target(_write_split, _read_split, 20),
    "config.json": Target(_write_config, _read_config, 20),
    "run": Target(_write_run, _read_run, 20),
    "plots": Target(_write_run, _draw_run, 1),
    "metrics.jsonl": Target(_write_run, _read_log, 10),
    "patients.csv": Target(_write_lines, _read_lines, 10),
    "checkpoint": Target(
        _write_tensors("checkpoint"), lambda p, _: load_checkpoint(p, IDENTITY), 20
    ),
    "encoder": Target(_write_tensors("encoder"), lambda p, _: load_encoder(p), 10),
    "weights": Target(_write_tensors("encoder"), lambda p, _: read_weights(p), 10),
    "segmenter": Target(_write_tensors("segmenter"), lambda p, _: load_segmenter(p), 10),
}
