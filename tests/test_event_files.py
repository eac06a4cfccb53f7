"""TensorBoard's event files: the numbers of metrics.jsonl, each point once, resumed or not."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from medmoco import pretrain, segment
from medmoco.command import run_command
from medmoco.metrics_log import MetricsLog


def points(folder: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """{run: {tag: [(step, value), ...]}} as TensorBoard reads it."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = {}
    for run in sorted(folder.iterdir()):
        events = accumulator.EventAccumulator(str(run), {"scalars": 0}).Reload()
        tags = events.Tags()["scalars"]
        found[run.name] = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}
    return found


def recorded(output: Path, stage: str, key: str) -> list[tuple[int, float]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    records = [r for line in lines if (r := json.loads(line))["stage"] == stage]
    return [(r["step"], pytest.approx(r[key])) for r in records if r[key] is not None]


def step(number: int, **others) -> dict:
    return {"stage": "pretrain", "epoch": 1, "step": number, "loss": 1 / number} | others


def test_a_resumed_log_draws_no_point_twice(tmp_path):
    pytest.importorskip("tensorboard")
    path = tmp_path / "metrics.jsonl"
    trained = step(4, stage="finetune", encoder="scratch")
    with MetricsLog(path, tensorboard=True) as log:
        for record in (step(1), step(2), trained, step(3)):
            log.write(record)
    with MetricsLog(path, tensorboard=True) as log:
        log.forget_after(2, 0)
        for number in (3, 4):
            log.write(step(number))
    found = points(tmp_path / "tensorboard")
    values = [(n, pytest.approx(1 / n)) for n in (1, 2, 3, 4)]
    assert found["pretrain"]["pretrain/loss"] == values
    assert found["finetune-scratch"] == {"finetune/loss": [(4, 0.25)]}
    with MetricsLog(path, tensorboard=True) as log:
        log.forget_training("finetune", "scratch")
        log.write(trained | {"loss": 0.125})
    assert points(tmp_path / "tensorboard") == {
        "pretrain": {"pretrain/loss": values},
        "finetune-scratch": {"finetune/loss": [(4, 0.125)]},
    }


def test_asked_for_later_it_begins_at_the_first_step(tmp_path):
    pytest.importorskip("tensorboard")
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.write(step(1))
    assert not (tmp_path / "tensorboard").exists()
    with MetricsLog(tmp_path / "metrics.jsonl", tensorboard=True) as log:
        log.forget_after(1, 0)
        log.write(step(2))
    assert points(tmp_path / "tensorboard")["pretrain"]["pretrain/loss"] == [(1, 1), (2, 0.5)]


def test_commands_write_the_numbers_of_metrics_jsonl(tiny_task, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    for name in ("write_plots", "write_report"):  # most of the time, and not what this is about
        monkeypatch.setattr(pretrain, name, lambda *_: None)
    common = ["--cache", str(tmp_path / "cache"), "--device", "cpu", "--tensorboard"]
    small = ["--width", "0.125", "--image-size", "32", "--batch-size", "8", "--epochs", "1"]
    output = tmp_path / "pretrained"
    images = ["--data", str(tiny_task / "imagesTr"), "--output-stride", "8"]
    pretrain.main([*images, *small, *common, "--output", str(output)])
    found = points(output / "tensorboard")
    assert list(found) == ["pretrain"]
    for tag, stage, key in (
        ("pretrain/loss_global", "pretrain", "loss_global"),
        ("pretrain/acc1", "pretrain", "acc1"),
        ("diagnostics/effective_rank", "diagnostics", "effective_rank"),
    ):
        assert found["pretrain"][tag] == recorded(output, stage, key)
    pretrain.main(["--output", str(output), "--resume"])
    assert points(output / "tensorboard") == found

    output = tmp_path / "segmented"
    task = ["--task", str(tiny_task), "--mode", "finetune", *small, *common]
    segment.main([*task, "--output", str(output)])
    found = points(output / "tensorboard")
    assert found["finetune-scratch"]["finetune/loss"] == recorded(output, "finetune", "loss")
    assert (output / "metrics.csv").is_file()


def test_missing_package_is_named_before_anything_is_written(
    tiny_task, tmp_path, monkeypatch, capsys
):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else found(name)
    )
    monkeypatch.delitem(sys.modules, "tensorboard", raising=False)
    flags = ["--data", str(tiny_task), "--output", str(tmp_path / "run"), "--tensorboard"]
    assert run_command(pretrain.main, flags) == 2
    assert "pip install 'medmoco[tensorboard]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
