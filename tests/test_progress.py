"""progress.png while a U-Net is trained."""

import json

import numpy as np
from PIL import Image

from medmoco import progress
from medmoco.progress import ProgressPlot, progress_plots


def record(epoch, encoder="scratch", **further):
    about = {"stage": "finetune", "encoder": encoder, "epoch": epoch, "step": epoch, "lr": 0.1}
    dice = {"liver": min(1.0, 0.1 * epoch), "spleen": None}
    return about | {"loss": 1 / epoch, "dice": dice} | further


def test_picture_is_redrawn_only_after_some_seconds_and_at_the_end(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    plot, path = ProgressPlot(tmp_path), tmp_path / "progress.png"
    plot.add(record(1))
    first = path.read_bytes()
    plot.add(record(2))
    assert path.read_bytes() == first
    now[0] = progress.SECONDS + 1
    plot.add(record(3))
    later = path.read_bytes()
    assert later != first
    plot.add(record(4))
    plot.draw()
    assert path.read_bytes() != later
    with Image.open(path) as picture:
        assert np.asarray(picture).std() > 0
    assert [file.name for file in tmp_path.iterdir()] == ["progress.png"]


def test_model_that_was_trained_before_stays_in_the_picture(tmp_path):
    lines = [record(1, "pretrained"), {"stage": "pretrain", "epoch": 1, "loss": 7.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot = ProgressPlot(tmp_path)
    assert [row["encoder"] for row in plot.records] == ["pretrained"]
    plot.add(record(2))
    titles = [drawn.title for drawn in progress_plots(plot.records)]
    assert titles[0] == "Loss of fine-tuning"
    assert [title.split(" (")[0] for title in titles[1:]] == ["Dice, pretrained", "Dice, scratch"]


def test_validation_is_what_the_lines_show_where_there_is_one(tmp_path):
    rows = [record(epoch, dice_validation={"liver": 0.5, "spleen": 0.2}) for epoch in (1, 2)]
    assert "validation" in progress_plots(rows)[1].title
    assert "training batches" in progress_plots([record(1)])[1].title


def test_nothing_is_drawn_of_nothing(tmp_path):
    ProgressPlot(tmp_path).draw()
    assert not any(tmp_path.iterdir())


def test_names_of_classes_are_no_formulas(tmp_path):
    plot = ProgressPlot(tmp_path)
    plot.add(record(1, dice={r"a $\foo$": 0.5, "$x$ y": 0.4, "_hidden": 0.3}))
    assert (tmp_path / "progress.png").is_file()
