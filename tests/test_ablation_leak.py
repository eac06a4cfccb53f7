"""Whether keys tell by the statistics of their batch which query is theirs."""

import csv

import pytest
import torch

import ablation_leak
import ablation_tables
from ablation_run import Experiment, open_pretraining, run_name
from medmoco.data.splits import split_task, write_split
from medmoco.data.task import read_task
from medmoco.errors import UserError
from variants import SCALES


@pytest.fixture(scope="module")
def folder(tiny_task, tmp_path_factory):
    """A finished pretraining at the smallest scale."""
    folder = tmp_path_factory.mktemp("leak")
    write_split(folder / "split.json", split_task(read_task(tiny_task)))
    experiment = Experiment(tiny_task, folder / "split.json", folder, SCALES["quick"], "cpu")
    run = folder / "runs" / run_name("zca", 3, {})
    run.mkdir(parents=True)
    open_pretraining(experiment, "zca", 3, run).run()
    return folder


@pytest.fixture
def flags(folder, tiny_task):
    flags = ["--task", tiny_task, "--split", folder / "split.json", "--output", folder]
    flags += ["--scale", "quick", "--seeds", 3, "--batches", 2, "--device", "cpu"]
    return [str(flag) for flag in [*flags, "--variants", "zca"]]


def test_losses_by_the_images_among_which_keys_are_normalised(flags, folder):
    ablation_leak.main(flags)
    ablation_leak.main(flags)  # nothing is left to do
    with (folder / "leak.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    kinds = [*ablation_leak.SPREADS, ablation_leak.AVERAGES]
    assert [row["keys"] for row in rows] == kinds
    losses = [float(row["loss"]) for row in rows]
    assert all(loss > 0 for loss in losses) and len(set(losses)) == len(kinds)
    table = ablation_tables.leak_table(rows)
    assert table.splitlines()[-1].startswith(f"| zca | 1 | {losses[0]:.2f} |")


def test_keys_are_those_of_their_own_images_in_their_order(folder, flags, tiny_task):
    split = folder / "split.json"
    experiment = Experiment(tiny_task, split, folder, SCALES["quick"], "cpu")
    run = folder / "runs" / run_name("zca", 3, {})
    model = open_pretraining(experiment, "zca", 3, run).model
    model.key_norm = "ema"  # then no image has a part in another one's key
    images, others = torch.rand(2, 7, 1, 32, 32)
    expected = model.encode_keys(images, torch.Generator()).projection
    for spread in (1, 2, 4):
        keys = ablation_leak._spread_keys(model, images, others, spread, torch.Generator())
        torch.testing.assert_close(keys, expected)


def test_a_run_that_is_not_finished_is_named(flags):
    with pytest.raises(UserError, match="mocov2-3: expected a finished run, found no encoder"):
        ablation_leak.main([*flags, "--variants", "mocov2"])
