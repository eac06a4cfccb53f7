"""Whether keys tell by the statistics of their batch which query is theirs."""

import csv

import pytest
import torch

import ablation_leak
import ablation_tables
from ablation_run import Experiment, finished, run
from medmoco.data.splits import split_task, write_split
from medmoco.data.task import read_task
from medmoco.errors import UserError
from variants import SCALES


@pytest.fixture(scope="module")
def experiment(tiny_task, tmp_path_factory):
    """One with a finished pretraining, at the smallest scale."""
    folder = tmp_path_factory.mktemp("leak")
    write_split(folder / "split.json", split_task(read_task(tiny_task)))
    experiment = Experiment(tiny_task, folder / "split.json", folder, SCALES["quick"], "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medmoco.linear.MAX_PIXELS", 2**11)
        patch.setattr("ablation_run._finetuned", lambda *_: [])
        run(experiment, "zca", 3)
    return experiment


@pytest.fixture
def flags(experiment):
    flags = ["--task", experiment.task, "--split", experiment.split, "--output", experiment.output]
    flags += ["--scale", "quick", "--seeds", 3, "--device", "cpu", "--variants", "zca"]
    return [str(flag) for flag in flags]


def test_losses_by_the_images_among_which_keys_are_normalised(flags, experiment):
    for batches in ("2", "2", "1"):  # what was measured is not measured again
        ablation_leak.main([*flags, "--batches", batches])
    with (experiment.output / "leak.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    kinds = [*ablation_leak.SPREADS, ablation_leak.AVERAGES]
    assert [(row["keys"], row["batches"]) for row in rows] == [(k, b) for b in "21" for k in kinds]
    losses = [float(row["loss"]) for row in rows[: len(kinds)]]
    assert all(loss > 0 for loss in losses) and len(set(losses)) == len(kinds)
    table = ablation_tables.leak_table(rows[: len(kinds)])
    assert table.splitlines()[-1].startswith(f"| zca | 1 | {losses[0]:.2f} | ")
    assert f"| {losses[1] - losses[0]:+.3f} (" in table


@pytest.mark.parametrize("spread", [1, 2, 4])
def test_keys_are_normalised_among_as_many_other_images(experiment, monkeypatch, spread):
    model = finished(experiment, "zca", 3)[0].model
    model.key_norm = "ema"  # so few images cannot be whitened
    images, others = torch.rand(2, 8, 1, 32, 32)
    batches = []

    def encode_keys(batch, generator):
        batches.append(batch)
        return encode(batch, generator)

    encode = model.encode_keys
    monkeypatch.setattr(model, "encode_keys", encode_keys)
    ablation_leak.spread_keys(model, images, others, spread, torch.Generator())
    own = [sum(any(torch.equal(i, image) for image in images) for i in batch) for batch in batches]
    assert [len(batch) for batch in batches] == [8] * spread and own == [8 // spread] * spread


@pytest.mark.parametrize("spread", [1, 2, 4])
def test_keys_are_those_of_their_own_images_in_their_order(experiment, spread):
    model = finished(experiment, "zca", 3)[0].model
    model.key_norm = "ema"  # then no image has a part in another one's key
    images, others = torch.rand(2, 7, 1, 32, 32)
    expected = model.encode_keys(images, torch.Generator()).projection
    keys = ablation_leak.spread_keys(model, images, others, spread, torch.Generator())
    torch.testing.assert_close(keys, expected)


def test_the_averages_are_those_of_the_training(experiment, monkeypatch):
    """Keys that are normalised by their batch move the averages of the branch that makes them."""

    def by_averages():
        pretraining, _ = finished(experiment, "zca", 3)
        pretraining.restore()
        return ablation_leak.measure(pretraining, 1)[ablation_leak.AVERAGES]

    monkeypatch.setattr(ablation_leak, "spread_keys", lambda _, images, *__: torch.eye(64, 128))
    alone = by_averages()
    monkeypatch.undo()
    assert by_averages() == alone


def test_what_cannot_be_measured_is_named(flags, capsys):
    with pytest.raises(UserError, match="mocov2-3: expected a finished run, found no encoder"):
        ablation_leak.main([*flags, "--variants", "mocov2"])
    with pytest.raises(SystemExit):
        ablation_leak.main([*flags, "--batches", "0"])
    assert "--batches: expected at least 1, got 0" in capsys.readouterr().err
