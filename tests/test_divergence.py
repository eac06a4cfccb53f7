"""A training that diverges stops, says where, and leaves a good checkpoint."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from medmoco import pretrain
from medmoco.command import run_command
from medmoco.config import read_config
from medmoco.data.stream import EpochSampler, hold_out_patients
from medmoco.data.table import VolumeEntry, VolumeTable
from medmoco.divergence import all_finite, name_slices
from medmoco.models.weights import read_weights
from medmoco.pretrain import PretrainConfig

STEPS_AN_EPOCH = 6


def spoil(monkeypatch, step: int, when: str) -> None:
    """Makes a weight NaN before or after a step."""
    train_step = pretrain.Pretraining._train_step

    def spoiled(self, batch):
        if self.step + 1 == step and when == "before":
            next(self.model.query.parameters()).data.view(-1)[0] = math.nan
        record = train_step(self, batch)
        if self.step == step and when == "after":
            next(self.model.query.parameters()).data.view(-1)[0] = math.nan
        return record

    monkeypatch.setattr(pretrain.Pretraining, "_train_step", spoiled)


@pytest.mark.parametrize(("step", "when", "good"), [(8, "before", 6), (6, "after", 0)])
def test_step_files_of_its_batch_and_the_last_good_checkpoint_are_named(
    tiny_task, tmp_path, monkeypatch, capsys, step, when, good
):
    output = tmp_path / "run"
    flags = ["--data", str(tiny_task / "imagesTr"), "--method", "mocov2", "--device", "cpu"]
    flags += ["--width", "0.125", "--image-size", "32", "--batch-size", "8", "--epochs", "2"]
    spoil(monkeypatch, step, when)
    assert run_command(pretrain.main, [*flags, "--output", str(output)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    what = "the loss is nan" if when == "before" else "the weights are not finite"
    assert error.startswith(f"error: {what} at step {step}, on the batch of ")
    assert "--lr" in error

    config = PretrainConfig(**read_config(PretrainConfig, output / "config.json"))
    cache = pretrain.open_slices(config)
    learned, _ = hold_out_patients(cache, config.seed)
    sampler = EpochSampler(len(learned), config.batch_size, config.seed)
    sampler.start(*divmod(step - 1, STEPS_AN_EPOCH))
    assert name_slices(learned[next(iter(sampler))], cache) in error

    checkpoint = output / "checkpoints" / "last.pt"
    assert f"the last good checkpoint is {checkpoint}" in error
    saved = torch.load(checkpoint, weights_only=True)["state"]
    assert saved["step"] == good and all_finite(saved)
    assert read_weights(checkpoint).arch == "resnet18"
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    steps = [record["step"] for record in lines if record["stage"] == "pretrain"]
    assert steps == list(range(1, step + (when == "after")))


def test_of_a_large_batch_eight_files_are_named_each_with_its_slices():
    entries = [
        VolumeEntry(name, name, f"/data/{name}.nii.gz", (2, 8, 8), (1.0, 1.0, 1.0))
        for name in "abcdefghij"
    ]
    table = VolumeTable.of(entries, 0, 0)
    cache = SimpleNamespace(volumes=table, locate=table.locate)
    assert name_slices([1, 2, 0], cache) == "/data/a.nii.gz (slices 0, 1), /data/b.nii.gz (slice 0)"
    named = name_slices(range(20), cache)
    assert named.count(".nii.gz") == 8 and named.endswith(" and 2 more files")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_found_wherever_it_is(value):
    state = {"step": 3, "momenta": [torch.ones(2), {"weight": torch.ones(2, 2)}], "none": None}
    assert all_finite(state | {"ids": torch.arange(3)})
    state["momenta"][1]["weight"][1, 0] = value
    assert not all_finite(state)
