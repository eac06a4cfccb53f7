"""Pretraining: it learns, it resumes bit for bit, and it refuses what cannot work."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from pretraining_runs import TINY, assert_same_end, records, state

from medmoco import pretrain
from medmoco.command import run_command
from medmoco.config import read_config
from medmoco.data.stream import EpochSampler, hold_out_patients
from medmoco.methods import apply_preset, build_model
from medmoco.models.encoder import Encoder, load_encoder
from medmoco.pretrain import PretrainConfig


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def flags(tiny_task, cache_folder):
    """Flags of a run of 2 epochs of 6 steps, which a test completes by its output folder."""
    data = ["--data", str(tiny_task / "imagesTr"), "--cache", str(cache_folder), "--device", "cpu"]
    return [*data, *TINY, "--epochs", "2"]


@pytest.fixture(scope="module")
def unbroken(tiny_task, cache_folder, tmp_path_factory) -> Path:
    """A run that was never stopped."""
    output = tmp_path_factory.mktemp("runs") / "unbroken"
    data = ["--data", str(tiny_task / "imagesTr"), "--cache", str(cache_folder), "--device", "cpu"]
    pretrain.main([*data, *TINY, "--epochs", "2", "--output", str(output)])
    return output


def test_a_run_leaves_what_the_next_commands_need(unbroken):
    encoder, metadata = load_encoder(unbroken / "encoder.pt")
    assert (encoder.arch, metadata["method"], metadata["modality"]) == ("resnet18", "medmoco", "ct")
    mean = state(unbroken)["model"]["query.whitening.running_mean"]
    assert torch.equal(metadata["whitening"]["mean"], mean)
    summary = json.loads((unbroken / "summary.json").read_text())
    assert summary["dimensions"] == encoder.channels[-1]
    assert 1 <= summary["effective_rank"]["features"] <= summary["dimensions"]
    assert 0 < summary["seconds"]["checkpoints"] < summary["seconds"]["pretrain"]
    assert (unbroken / "report.html").is_file() and (unbroken / "spectrum.png").is_file()


def test_every_step_and_every_epoch_is_recorded_once(unbroken):
    steps = [record["step"] for record in records(unbroken)]
    assert steps == list(range(1, len(steps) + 1))
    assert [record["epoch"] for record in records(unbroken, "diagnostics")] == [0, 1, 2]
    last = records(unbroken)[-1]
    parts = last["loss_global"] + 0.5 * last["loss_local"]
    assert last["loss"] == pytest.approx(parts, rel=1e-5)


def test_training_moves_the_query_branch_and_the_key_branch_after_it(unbroken):
    config = PretrainConfig(**read_config(PretrainConfig, unbroken / "config.json"))
    begin, end = build_model(config).state_dict(), state(unbroken)["model"]
    key, query = (f"{branch}.encoder.conv1.weight" for branch in ("key", "query"))
    assert 0 < (end[key] - begin[key]).norm() < (end[query] - begin[query]).norm()


def test_queue_ends_with_the_keys_of_the_slices_seen_last(unbroken):
    config = PretrainConfig(**read_config(PretrainConfig, unbroken / "config.json"))
    cache = pretrain.open_slices(config)
    learned, _ = hold_out_patients(cache, config.seed)
    sampler = EpochSampler(len(learned), config.batch_size, config.seed)
    sampler.start(config.epochs - 1)
    seen = [int(learned[position]) for batch in sampler for position in batch]
    ids = state(unbroken)["model"]["queue.ids"].tolist()
    assert sorted(ids) == sorted(seen[-config.queue_size :])


def test_learning_rate_falls_along_a_cosine(unbroken):
    rates = [record["lr"] for record in records(unbroken)]
    falling = [(1 + math.cos(math.pi * step / len(rates))) / 2 for step in range(len(rates))]
    expected = [0.3 * 8 / 256 * share for share in falling]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(("same", "expected"), [("volume", range(10)), ("none", [-1])])
def test_ids_of_the_queue_say_whose_keys_are_no_negatives(flags, tmp_path, same, expected):
    choice = ["--method", "mocov2", "--same", same, "--epochs", "1", "--queue-size", "40"]
    pretrain.main([*flags, *choice, "--output", str(tmp_path / "run")])
    ids = state(tmp_path / "run")["model"]["queue.ids"].unique().tolist()
    assert set(ids) <= set(expected)


def test_same_seed_gives_the_same_weights(flags, unbroken, tmp_path):
    pretrain.main([*flags, "--output", str(tmp_path / "again")])
    assert_same_end(unbroken, tmp_path / "again")


def test_the_limit_of_the_gradient_reaches_the_training(flags, tmp_path):
    choice = [*flags, "--epochs", "1", "--weight-decay", "0"]
    for name, limit in (("free", "0"), ("held", "1e-9")):
        pretrain.main([*choice, "--clip-norm", limit, "--output", str(tmp_path / name)])
    last = {name: state(tmp_path / name)["model"] for name in ("free", "held")}
    kept = [n for n in last["held"] if n.startswith("query.") and n.endswith("weight")]
    moved = {
        name: max(
            float((weights[n] - weights[n.replace("query.", "key.", 1)]).abs().max()) for n in kept
        )
        for name, weights in last.items()
    }  # the key branch started where the query branch did, and follows it slowly
    assert moved["held"] < 1e-6 < 1e-4 < moved["free"]


@pytest.mark.parametrize(
    "choice",
    [
        ["--method", "mocov2"],
        ["--method", "mocov2", "--key-norm", "shuffle", "--same", "volume"],
        ["--method", "mocov2", "--decorrelation", "covariance", "--same", "none"],
        ["--method", "mocov2", "--local", "regions", "--decorrelation", "iternorm"],
        ["--method", "medmoco", "--local", "dense", "--key-norm", "shuffle"],
        ["--method", "medmoco", "--whiten-at", "last-norm"],
        ["--method", "paper", "--arch", "resnet18", "--queue-size", "20"],
    ],
    ids=lambda choice: " ".join(choice),
)
def test_every_combination_trains(flags, tmp_path, choice):
    output = tmp_path / "run"
    pretrain.main([*flags, *choice, "--epochs", "1", "--output", str(output)])
    encoder, _ = load_encoder(output / "encoder.pt")
    assert all(torch.isfinite(weight).all() for weight in encoder.state_dict().values())


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            ["--local", "regions", "--regions", "5"],
            "--regions 5: the feature map is smaller than the region grid: "
            "expected at least 5 x 5 cells, got 4 x 4",
        ),
        (
            ["--whiten-group", "4"],
            "--whiten-group 4: the batch is too small for whitening: expected at least 16 slices",
        ),
        (
            ["--whiten-group", "64", "--whiten-at", "last-norm", "--image-size", "16"],
            "--whiten-group 64: the batch is too small for whitening: expected at least 256 cells "
            "of a feature map (4 a channel), got 32; raise --batch-size",
        ),
        (["--whiten-group", "3"], "--whiten-group 3: expected a divisor of 64 channels"),
        (["--batch-size", "4"], "--batch-size 4: whitening needs at least 8 slices, got 4"),
        (["--batch-size", "999"], "--batch-size 999: expected at most the 48 slices"),
        (["--batch-size", "0"], "--batch-size: expected a value of at least 2, got 0"),
        (["--epochs", "-1"], "--epochs: expected a value of at least 1, got -1"),
        (["--image-size", "0"], "--image-size: expected a value of at least 4, got 0"),
        (["--queue-size", "0"], "--queue-size: expected a value of at least 1, got 0"),
        (["--temperature", "0"], "--temperature: expected a value above 0, got 0"),
        (["--crop-min", "2"], "--crop-min: expected a value of at most 1, got 2"),
        (["--width", "0"], "width must be above 0 and at most 16, got 0.0"),
        (["--seed", "-1"], "--seed: expected a value of at least 0, got -1"),
        (["--workers", "-1"], "--workers: expected a value of at least 0, got -1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    flags, tmp_path, capsys, choice, message
):
    output = tmp_path / "refused"
    assert run_command(pretrain.main, [*flags, *choice, "--output", str(output)]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_skipped_files_are_listed_in_the_summary(tiny_task, flags, tmp_path):
    folder = tmp_path / "volumes"
    shutil.copytree(tiny_task / "imagesTr", folder)
    (folder / "broken.nii.gz").write_bytes(b"not a volume")
    choice = ["--method", "mocov2", "--epochs", "1", "--skip-bad", "--data", str(folder)]
    pretrain.main([*flags, *choice, "--output", str(tmp_path / "run")])
    (bad,) = json.loads((tmp_path / "run" / "summary.json").read_text())["bad_files"]
    assert bad["path"] == str(folder / "broken.nii.gz")
    assert bad["reason"].startswith("expected a gzip stream")


@pytest.fixture
def others(tmp_path) -> Path:
    """Weights as a trainer of another kind leaves them, for images of three channels."""
    torch.manual_seed(9)
    state = Encoder("resnet34", width=0.125, in_channels=3).state_dict()
    path = tmp_path / "others.pth"
    torch.save({"state_dict": {f"module.encoder_q.{n}": v for n, v in state.items()}}, path)
    return path


def without_width(flags: list[str]) -> list[str]:
    at = flags.index("--width")
    return flags[:at] + flags[at + 2 :]


def test_init_starts_from_weights_of_others_and_goes_on_without_their_file(
    flags, others, tmp_path, capsys
):
    output = tmp_path / "run"
    choice = ["--method", "mocov2", "--epochs", "1", "--lr", "1e-12", "--init", str(others)]
    pretrain.main([*without_width(flags), *choice, "--output", str(output)])
    assert "init: " in capsys.readouterr().out
    encoder, _ = load_encoder(output / "encoder.pt")
    assert (encoder.arch, encoder.width) == ("resnet34", 0.125)
    stem = torch.load(others, weights_only=True)["state_dict"]["module.encoder_q.conv1.weight"]
    torch.testing.assert_close(encoder.conv1.weight, stem.sum(1, keepdim=True))
    others.unlink()
    (output / "encoder.pt").unlink()
    pretrain.main(["--output", str(output), "--resume"])
    assert (output / "encoder.pt").is_file()
    # Before the first checkpoint the file is still needed, and asked for.
    shutil.rmtree(output / "checkpoints")
    assert run_command(pretrain.main, ["--output", str(output), "--resume"]) == 2
    assert f"{others}: no such file" in capsys.readouterr().err


def test_architecture_of_init_wins_over_that_of_the_method(others):
    config = apply_preset(pretrain.with_init(PretrainConfig(method="paper", init=others)))
    assert (config.arch, config.width) == ("resnet34", 0.125)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (["--arch", "resnet50"], "others.pth: --arch resnet50 was given, the file has resnet34"),
        (["--width", "0.5"], "others.pth: --width 0.5 was given, the file has 0.125"),
    ],
)
def test_init_of_another_architecture_is_refused(flags, others, tmp_path, capsys, choice, message):
    output = tmp_path / "refused"
    choice = [*choice, "--init", str(others), "--output", str(output)]
    assert run_command(pretrain.main, [*without_width(flags), *choice]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_occupied_output_is_refused_and_left_alone(flags, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("draft")
    assert run_command(pretrain.main, [*flags, "--output", str(tmp_path)]) == 2
    assert "the folder is not empty" in capsys.readouterr().err
    assert run_command(pretrain.main, [*flags, "--output", str(tmp_path), "--overwrite"]) == 2
    assert "so it is not a run" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]
