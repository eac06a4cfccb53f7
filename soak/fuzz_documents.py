"""What is fuzzed of documents: dataset.json, splits, configurations, runs, lists of patients."""

import json
import os
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

from fuzz_files import link_or_pipe, put
from fuzz_values import NASTY_NAMES, damaged, json_bytes
from medmoco.config import parse, to_json
from medmoco.data.folds import split_folds
from medmoco.data.sources import read_case_list
from medmoco.data.splits import split_task
from medmoco.data.task import Case, Task, patient_of, read_classes, read_task
from medmoco.errors import UserError
from medmoco.evaluate import EvaluateConfig
from medmoco.export import ExportConfig
from medmoco.metrics_log import MetricsLog
from medmoco.output import check_output
from medmoco.predict import PredictConfig
from medmoco.pretrain import PretrainConfig
from medmoco.progress import ProgressPlot
from medmoco.report import run_folder
from medmoco.report.page import report_page
from medmoco.segment import SegmentConfig
from medmoco.train import TrainConfig

CASES = ("case_00", "case_01", "case_02", "case_03")
LARGE = 1 << 20  # bytes
CONFIGS = (TrainConfig, PretrainConfig, SegmentConfig, PredictConfig, EvaluateConfig, ExportConfig)


def write_description(random: Random, folder: Path) -> Path:
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
    ending = random.choice((".nii.gz", "_0000.nii.gz"))
    for name in CASES[:2]:
        put(folder / "imagesTr" / f"{name}{ending}", b"")
        put(folder / "labelsTr" / f"{name}.nii.gz", b"")
    link_or_pipe(random, folder / "imagesTr" / f"{CASES[0]}{ending}")
    return link_or_pipe(random, put(folder / "dataset.json", json_bytes(random, valid)))


def read_description(path: Path, output: Path) -> None:
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


def write_split(random: Random, folder: Path) -> Path:
    valid: Any = {"pretrain": CASES[:3], "train": CASES[:2], "test": CASES[3:]}
    valid = {part: list(names) for part, names in valid.items()}
    if random.random() < 0.5:
        valid = [
            {"train": list(CASES[:2]), "val": list(CASES[2:])},
            {"train": ["case_00"], "val": [CASES[1]]},
        ]
    return put(folder / "splits_final.json", json_bytes(random, valid))


def read_split(path: Path, output: Path) -> None:
    tried: list[UserError] = []
    try:
        split_folds(_task(), path)
    except UserError as error:
        tried.append(error)
    split_task(_task(), path)
    if tried and "--fold:" not in str(tried[0]):
        raise tried[0]


def write_config(random: Random, folder: Path) -> Path:
    config = random.choice(CONFIGS)
    valid = {"medmoco": "0.1.0", "command": config.__name__.removesuffix("Config").lower()}
    valid |= {"argv": ["--data", "scans"]} | to_json(config())
    return put(folder / "config.json", json_bytes(random, valid))


def read_config(path: Path, output: Path) -> None:
    tried: list[UserError] = []
    large = path.stat().st_size > LARGE  # one reading takes seconds
    for config in CONFIGS[:1] if large else CONFIGS:
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


def write_run(random: Random, folder: Path) -> Path:
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
        put(folder / name, content)
    return folder / chosen


def read_run(path: Path, output: Path) -> None:
    """The whole page but for its plots, which take a second to draw."""
    with patch("medmoco.report.figures.render_svg", lambda plot, theme: b"<svg/>"):
        draw_run(path, output)


def draw_run(path: Path, output: Path) -> None:
    page = report_page([run_folder.read_run(path.parent)])
    if "<script>alert" in page:
        raise AssertionError("a name became markup")
    page.encode("utf-8")


def read_log(path: Path, output: Path) -> None:
    """What a resumed run does with its own records."""
    content = path.read_bytes()
    copied = output / "metrics.jsonl"
    put(copied, content)
    with MetricsLog(copied) as log:
        log.forget_training("linear", "random")
        log.forget_after(2, 5)
    ProgressPlot(output)


def write_lines(random: Random, folder: Path) -> Path:
    lines = [f"{name},{name[-1]}" for name in CASES]
    lines[random.randrange(4)] = random.choice(NASTY_NAMES) + random.choice((",", "", ',"', ",,"))
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    return put(
        folder / "patients.csv", damaged(random, content) if random.random() < 0.5 else content
    )


def read_lines(path: Path, output: Path) -> None:
    read_case_list(path)
    for name in CASES:
        patient_of(name, str(path))
