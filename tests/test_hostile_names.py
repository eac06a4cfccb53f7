"""Files whose names hold markup, quotes, line breaks and bytes that are no text."""

import csv
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from pretraining_runs import TINY
from threshold_segmenter import threshold_segmenter
from volume_files import save_volume

from medmoco import evaluate, predict, pretrain
from medmoco.command import run_command
from medmoco.metrics_log import MetricsLog
from medmoco.models.segmenter import save_segmenter
from medmoco.report import write_report

# Bytes, as Linux has them: 0xff and 0x80 are no UTF-8, \x1b[2J clears a terminal.
NASTY = os.fsdecode(b'<img src=x onerror="alert(1)">&\'\n\x1b[2J\xff\x80=1+1')


def harmless(text):
    """What a terminal shows holds no control character besides ends of lines and progress bars."""
    return not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\udc80-\udcff]", text)


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    """Four volumes with such names, in a folder with such a name."""
    folder = tmp_path_factory.mktemp("hostile") / NASTY
    random = np.random.default_rng(0)
    for number in range(4):
        voxels = random.integers(-900, 200, (24, 24, 8)).astype(np.int16)
        save_volume(folder / f"{number or '='}{NASTY}.nii.gz", voxels)
    return folder


def test_pretraining_and_its_report(scans, tmp_path, capsys):
    flags = ["--data", str(scans), "--cache", str(tmp_path / "cache"), "--device", "cpu", *TINY]
    output = tmp_path / NASTY
    assert run_command(pretrain.main, [*flags, "--epochs", "1", "--output", str(output)]) == 0
    shown = capsys.readouterr()
    assert harmless(shown.out) and harmless(shown.err)
    page = write_report([output], tmp_path / "page.html").read_text("utf-8")
    assert "<img src=x" not in page and "&lt;img src=x onerror=" in page
    assert json.loads((output / "config.json").read_text("utf-8"))["data"] == str(scans)
    (output / "metrics.csv").read_text("utf-8")


def test_prediction_and_its_scores(scans, tmp_path, capsys):
    model = tmp_path / "model.pt"
    save_segmenter(model, threshold_segmenter(-300.5))
    masks = tmp_path / NASTY
    flags = ["--model", str(model), "--input", str(scans), "--output", str(masks)]
    assert run_command(predict.main, [*flags, "--device", "cpu"]) == 0
    names = sorted(path.name for path in scans.iterdir())
    assert sorted(path.name for path in masks.glob("*.nii.gz")) == names

    truth = tmp_path / "truth"
    truth.mkdir()
    for name in names:
        shutil.copy(masks / name, truth / name)
    flags = ["--pred", str(masks), "--truth", str(truth), "--output", str(tmp_path / "scores")]
    assert run_command(evaluate.main, [*flags, "--workers", "1"]) == 0
    shown = capsys.readouterr()
    assert harmless(shown.out) and harmless(shown.err)
    with open(tmp_path / "scores" / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {len(row) for row in rows} == {len(rows[0])} and len(rows) % len(names) == 0
    assert "'=<img src" in {row["case"][:10] for row in rows}, (
        "no spreadsheet takes it for a formula"
    )
    json.loads((tmp_path / "scores" / "summary.json").read_text("utf-8"))


def test_records_with_hostile_names_make_a_table(tmp_path):
    record = {"stage": "finetune", "encoder": "scratch", "epoch": 1, "step": 2, NASTY: 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.forget_after(5, 5)
    table = (tmp_path / "metrics.csv").read_text("utf-8")
    assert "\\udcff" in table and harmless(table)


def test_bad_files_are_named_without_harm(scans, tmp_path, capsys):
    folder = tmp_path / "scans"
    folder.mkdir()
    (folder / f"{NASTY}.nii.gz").write_bytes(b"no volume")
    flags = ["--data", str(folder), "--output", str(tmp_path / "run"), "--device", "cpu", *TINY]
    assert run_command(pretrain.main, flags) == 2
    shown = capsys.readouterr().err
    assert harmless(shown) and "1 bad file among 1 volumes" in shown and "\\x1b[2J" in shown
