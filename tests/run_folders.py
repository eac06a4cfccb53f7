"""Run folders for tests of the report: everything that a run leaves, made by hand."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np

from medmoco.data.table import VolumeEntry, VolumeTable
from medmoco.data.volumes import from_stack
from medmoco.report.cases import choose_cases, write_cases
from medmoco.report.run_folder import MODEL_FOLDERS

CLASSES = ["background", "liver", "spleen <left>", "kidney & ureter"]
VALUES = (0, 1, 2, 7)  # of the classes in label maps
NASTY = 'a<script>alert("1")</script>&\n\u202e\udc80.nii.gz'
NASTY_CASE = 'case <b>"x"\n<script>alert(1)&\u202e'
QUEUE_SIZE = 511
BATCHES = 6


def dice_result(mean: float, seed: int, volumes: int = 13) -> dict:
    generator = np.random.default_rng(seed)
    names = CLASSES[1:]
    scores = np.clip(generator.normal(mean, 0.08, (volumes - 1, len(names))), 0, 1).round(4)
    per_volume = {
        f"case_{v:02d}": dict(zip(names, row, strict=True)) for v, row in enumerate(scores.tolist())
    }
    per_volume["case_03"]["spleen <left>"] = None
    per_volume[NASTY_CASE] = dict.fromkeys(names, 0.0625)  # the worst of all
    columns = {name: [row[name] for row in per_volume.values()] for name in names}
    per_class = {n: float(np.mean([s for s in c if s is not None])) for n, c in columns.items()}
    return {
        "dice_mean": float(np.mean(list(per_class.values()))),
        "dice_per_class": per_class,
        "dice_per_volume": per_volume,
        "dice_pooled": per_class,
        "absent": {"liver": 0, "spleen <left>": 1, "kidney & ureter": 0},
        "seconds": 12.5,
    }


def diagnosis(epoch: int, warnings: list[str]) -> dict:
    measured = {}
    for kind, dimensions, decay in (("features", 64, 0.05), ("embeddings", 32, 0.15)):
        decay *= 1 + epoch / 3
        measured[kind] = {
            "rankme": dimensions / (1 + 4 * decay),
            "rankme_centred": dimensions / (1 + 3 * decay),
            "rank_share": 1 / (1 + 3 * decay),
            "samples": 200,
            "dimensions": dimensions,
            "alpha_req": 1.2,
            "mean_abs_correlation": 0.21,
            "std_sqrt_d": 0.83,
            "mean_share": 0.31,
            "spectrum": [math.exp(-decay * i) / dimensions for i in range(dimensions)],
        }
    place = {"stage": "diagnostics", "epoch": epoch, "step": epoch * BATCHES, "loss": 5.0}
    return {**place, **measured, "warnings": warnings}


def metrics(epochs: int, warnings: list[str]) -> list[dict]:
    records = [diagnosis(0, [])]
    for step in range(1, epochs * BATCHES + 1):
        records.append(
            {
                "stage": "pretrain",
                "epoch": math.ceil(step / BATCHES),
                "step": step,
                "loss": 2 + 4.2 * math.exp(-step / 12) + 0.1 * math.sin(step),
                "loss_global": 2.0,
                "acc1": 1 - math.exp(-step / 20),
                "chance": math.log(QUEUE_SIZE + 1),
                "lr": 0.03,
                "images_per_second": 120.0 + step,
                "data_wait": 0.04,
            }
        )
        if step % BATCHES == 0:
            epoch = step // BATCHES
            records.append(diagnosis(epoch, warnings if epoch == epochs else []))
    for step in range(5):
        place = {"stage": "finetune", "encoder": "pretrained", "epoch": 1, "step": step}
        records.append({**place, "loss": 1.0, "lr": 1e-3})
    return records


def write_shown_cases(
    folder: Path, results: dict, shape: tuple[int, int, int] = (9, 24, 20)
) -> None:
    """The worst and best cases of the results, with label maps that err in known ways."""
    cases = choose_cases(results["finetune"]["dice_per_volume"])
    slices, rows, columns = np.indices(shape, dtype=np.float32)
    images, labels = [], []
    for number in range(len(cases)):
        truth = np.zeros(shape, np.uint8)
        for label, centre in enumerate(((4, 8 + number, 6), (4, 14, 14), (5, 6, 15)), start=1):
            scale = min(shape[1] / 24, shape[2] / 20)
            away = np.hypot(rows - centre[1] * scale, columns - centre[2] * scale)
            truth[np.hypot(away, 2 * (slices - centre[0])) < 4 * scale] = label
        wave = np.sin(rows / 3) + np.cos(columns / 4 + slices)
        images.append((9000 + 12000.0 * truth + 4000 * (2 + wave)).astype(np.uint16))
        labels.append(truth)
    cache = SimpleNamespace(
        volumes=VolumeTable.of(
            [VolumeEntry(c, c, "", shape, (4.0, 1.0, 2.0)) for c in cases], 0, 0
        ),
        images=images.__getitem__,
        labels=labels.__getitem__,
        axis=2,
        values=VALUES,
    )
    (folder / "predictions").mkdir(exist_ok=True)
    write_cases(folder, cache, results)
    for shift, stage in enumerate(MODEL_FOLDERS.values()):
        (folder / "predictions" / stage).mkdir(exist_ok=True)
        for case, truth in zip(cases, labels, strict=True):
            predicted = np.array(VALUES, np.uint8)[np.roll(truth, shift, axis=1)]
            image = nibabel.Nifti1Image(from_stack(predicted, 2), np.diag([2.0, 1.0, 4.0, 1.0]))
            nibabel.save(image, folder / "predictions" / stage / f"{case}.nii.gz")


def make_run(folder: Path, *, seed: int = 0, warnings: tuple[str, ...] = (), **flags) -> Path:
    """A run folder with everything in it."""
    folder.mkdir(parents=True)
    config = {
        "medmoco": "0.1.0",
        "command": "train",
        "argv": ["--data", "data <1>", "--seed", str(seed)],
        "data": "data <1>",
        "task": "task & labels",
        "output": str(folder),
        "method": "medmoco",
        "arch": "resnet18",
        "width": 0.25,
        "epochs": 3,
        "skip_bad": True,
        "lr": None,
        "seed": seed,
    }
    config |= flags
    (folder / "config.json").write_text(json.dumps(config))
    lines = [json.dumps(record) for record in metrics(3, list(warnings))]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    summary = {
        "medmoco": "0.1.0",
        "method": config["method"],
        "seed": seed,
        "classes": CLASSES,
        "effective_rank": {"features": 41.25, "embeddings": 17.5},
        "samples": 200,
        "dimensions": 64,
        "linear": dice_result(0.7, seed),
        "finetune": dice_result(0.8, seed + 1),
        "controls": {
            "linear_random": dice_result(0.62, seed + 2),
            "finetune_scratch": dice_result(0.81, seed + 3),
        },
        "bad_files": [{"path": NASTY, "reason": "NaN voxels"}],
        "warnings": list(warnings),
        "seconds": {"pretrain": 200.4, "linear": 31.0, "finetune": 7509.0},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    write_shown_cases(folder, summary)
    return folder
