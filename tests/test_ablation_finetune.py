"""Fine-tuning at other rates and lengths, on the encoders of finished runs."""

import csv
import json

import pytest

import ablation_finetune
from medmoco.data.splits import split_task, write_split
from medmoco.data.task import read_task
from medmoco.errors import UserError
from medmoco.models.encoder import Encoder, save_encoder
from variants import RANDOM


@pytest.fixture
def flags(tiny_task, tmp_path):
    """Of one fine-tuning on a finished run of a variant and on none."""
    folder = tmp_path / "runs" / "zca-3"
    folder.mkdir(parents=True)
    save_encoder(folder / "encoder.pt", Encoder("resnet18", 0.125))
    write_split(tmp_path / "split.json", split_task(read_task(tiny_task)))
    flags = ["--task", tiny_task, "--split", tmp_path / "split.json", "--output", tmp_path]
    flags += ["--scale", "quick", "--seeds", 3, "--labels", 2, "--draws", 1, "--device", "cpu"]
    return [str(flag) for flag in [*flags, "--variants", RANDOM, "zca", "--steps", 2]]


def test_every_rate_has_its_row_once_and_no_test_volume_is_looked_at(flags, tmp_path):
    ablation_finetune.main([*flags, "--rates", "0.002"])
    ablation_finetune.main([*flags, "--rates", "0.002", "0.01"])
    with (tmp_path / "finetune.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["variant"], row["rate"]) for row in rows] == [
        *((RANDOM, "0.002"), ("zca", "0.002")),
        *((RANDOM, "0.01"), ("zca", "0.01")),
    ]
    assert all(0 <= float(row["dice"]) <= 1 for row in rows)
    logs = (tmp_path / "runs").glob("*/finetune-2-0-2-*/metrics.jsonl")
    losses = [json.loads(log.read_text().splitlines()[-1])["loss"] for log in logs]
    assert len(losses) == len(set(losses)) == 4, "each row is a training of its own"
    train = set(json.loads((tmp_path / "split.json").read_text())["train"])
    (folder, *_) = (tmp_path / "runs" / "zca-3").glob("finetune-2-0-2-*")
    predicted = {path.name.removesuffix(".nii.gz") for path in folder.rglob("*.nii.gz")}
    assert predicted < train and len(predicted) == len(train) - 2


def test_a_run_that_is_not_finished_is_named(flags):
    with pytest.raises(UserError, match="mocov2-3: expected a finished run, found no encoder"):
        ablation_finetune.main([*flags, "--variants", "mocov2"])
