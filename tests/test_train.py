"""The main job end to end on small phantoms, and the commands around it."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from medmoco import train
from medmoco.command import run_command
from medmoco.config import parse
from medmoco.data.store import SliceCache
from medmoco.labelled import read_split

TINY = ["--width", "0.125", "--image-size", "32", "--output-stride", "8", "--batch-size", "8"]
TINY += ["--epochs", "1", "--finetune-epochs", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(tiny_task, tmp_path_factory):
    """A run of the main job on the tiny task, and what it printed."""
    folder = tmp_path_factory.mktemp("train")
    command = [sys.executable, "-m", "medmoco.train", "--task", str(tiny_task), *TINY]
    # As many threads as this process has, which repeats the run: the number decides the last bits.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [*command, "--output", str(folder / "run")],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return folder / "run", done.stdout


def test_the_run_ends_with_a_table_the_report_and_the_next_command(run):
    output, printed = run
    tail = printed.splitlines()[-25:]
    assert any("method medmoco" in line and "effective rank" in line for line in tail)
    header = next(line for line in tail if "from scratch" in line)
    assert all(name in header for name in ("linear", "random", "finetune"))
    assert f"report: {output / 'report.html'}" in tail
    assert tail[-1].startswith("next:   python -m medmoco.")


def test_summary_has_dice_of_both_stages_and_both_controls(run):
    summary = json.loads((run[0] / "summary.json").read_text())
    results = [summary["linear"], summary["finetune"], *summary["controls"].values()]
    assert len(results) == 4
    for result in results:
        assert set(result["dice_per_class"]) == set(summary["classes"][1:])
        assert 0 <= result["dice_mean"] <= 1
    assert set(summary["effective_rank"]) == {"features", "embeddings"}


def test_test_patients_are_seen_by_nobody_before_the_test(run):
    output, _ = run
    split = json.loads((output / "split.json").read_text())
    assert len(split["test"]) == 2
    assert not set(split["test"]) & {*split["train"], *split["pretrain"]}
    tested = json.loads((output / "summary.json").read_text())["finetune"]["dice_per_volume"]
    assert set(tested) == set(split["test"])
    caches = (output.parent / ".medmoco-cache").glob("*/index.json")
    cached = [{volume.case for volume in SliceCache(path.parent).volumes} for path in caches]
    assert set(split["pretrain"]) in cached  # what pretraining read, and nothing more


def test_everything_of_a_run_is_there(run):
    expected = {"config.json", "metrics.jsonl", "summary.json", "checkpoints", "encoder.pt"}
    expected |= {"spectrum.png", "curves.png", "report.html", "predictions", "split.json"}
    assert expected <= {path.name for path in run[0].iterdir()}


def test_a_second_start_builds_no_cache_and_a_used_folder_is_refused(run, tiny_task, capsys):
    output, printed = run
    assert printed.count("(built)") == 2
    flags = ["--task", str(tiny_task), *TINY]
    assert run_command(train.main, [*flags, "--output", str(output)]) == 2
    assert "the folder is not empty" in capsys.readouterr().err
    assert run_command(train.main, ["--output", str(output), "--resume"]) == 0
    again = capsys.readouterr().out
    assert "(built)" not in again and again.count("(found)") == 2


def test_a_runs_own_config_repeats_it(run, tmp_path):
    output, _ = run
    cache = output.parent / ".medmoco-cache"
    flags = ["--config", str(output / "config.json"), "--cache", str(cache)]
    train.main([*flags, "--output", str(tmp_path / "again")])
    one, two = (json.loads((r / "summary.json").read_text()) for r in (output, tmp_path / "again"))
    for summary in (one, two):
        del summary["seconds"]
        for result in (summary["linear"], summary["finetune"], *summary["controls"].values()):
            del result["seconds"]
    assert one == two


def test_labels_that_cannot_be_used_stop_the_job_before_pretraining(tiny_task, tmp_path, capsys):
    task = tmp_path / "task"
    shutil.copytree(tiny_task, task)
    label = sorted((task / "labelsTr").iterdir())[3]
    label.write_bytes(label.read_bytes()[:200])
    flags = ["--task", str(task), *TINY, "--output", str(tmp_path / "run")]
    assert run_command(train.main, flags) == 2
    assert label.name in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_skipped_files_are_listed_in_summary_and_report(tiny_task, tmp_path, capsys):
    task = tmp_path / "task"
    shutil.copytree(tiny_task, task)
    image = sorted((task / "imagesTr").iterdir())[0]
    image.write_bytes(b"not a volume")
    flags = ["--task", str(task), *TINY, "--output", str(tmp_path / "run"), "--skip-bad"]
    assert run_command(train.main, flags) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [file["path"].endswith(image.name) for file in summary["bad_files"]] == [True]
    assert image.name in (tmp_path / "run" / "report.html").read_text()


def test_without_a_command_the_build_and_the_commands_are_shown():
    done = subprocess.run(
        [sys.executable, "-m", "medmoco"], capture_output=True, text=True, check=True
    )
    for word in ("version", "torch_target", "cuda", "train", "pretrain", "segment", "report"):
        assert word in done.stdout


def test_an_unknown_command_is_named():
    done = subprocess.run([sys.executable, "-m", "medmoco", "fly"], capture_output=True, text=True)
    assert done.returncode == 2 and "got 'fly'" in done.stderr


def test_excluded_cases_do_not_move_test_patients_into_pretraining(tiny_task, tmp_path):
    left_out = sorted(path.name for path in (tiny_task / "imagesTr").iterdir())[:3]
    (tmp_path / "exclude.txt").write_text("\n".join(left_out))
    flags = ["--task", str(tiny_task), "--exclude", str(tmp_path / "exclude.txt")]
    config = parse(train.TrainConfig, flags, prog="", description="")
    task, split = read_split(train.segment_config(config))
    kept = train.kept_from_pretraining(config)
    assert len(task.cases) == 7
    assert set(split.test) <= kept
    assert not kept & {*split.train, *split.pretrain}


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_named(tiny_task, tmp_path, capsys, device):
    flags = ["--task", str(tiny_task), *TINY, "--output", str(tmp_path / "run")]
    assert run_command(train.main, [*flags, "--device", device]) == 2
    assert "--device" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_split_without_a_task_is_not_passed_over(tiny_task, tmp_path, capsys):
    flags = [
        "--data",
        str(tiny_task),
        *TINY,
        "--split",
        "s.json",
        "--output",
        str(tmp_path / "run"),
    ]
    assert run_command(train.main, flags) == 2
    assert "--split s.json: expected --task with it, got none" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_flags_win_over_what_the_phantom_run_would_choose(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "generate_phantom", lambda folder: folder)
    flags = ["--width", "0.5", "--output", str(tmp_path / "run")]
    asked = parse(train.TrainConfig, flags, prog="", description="")
    located = train.locate_data(asked)
    assert located.task == located.data == tmp_path / "phantom"
    assert (located.width, located.image_size) == (0.5, train.PHANTOM_FLAGS["image_size"])


def test_decoder_goes_over_to_segmentation():
    assert train.segment_config(train.TrainConfig(decoder="deeplab")).decoder == "deeplab"
