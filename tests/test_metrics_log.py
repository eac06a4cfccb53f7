"""metrics.jsonl and metrics.csv of a run that goes on: every record once, whatever was written."""

import csv
import json

from medmoco.metrics_log import MetricsLog


def log_of(folder, *records, cut=""):
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + cut)
    return MetricsLog(path)


def read(log):
    return [json.loads(line) for line in log.path.read_text().splitlines()]


def step(number, stage="pretrain", **others):
    return {"stage": stage, "step": number} | others


def test_steps_after_the_checkpoint_are_forgotten_and_a_line_that_was_cut_off(tmp_path):
    segmented = step(90, "linear", encoder="random")
    log = log_of(tmp_path, step(1), step(2), segmented, step(3), cut='{"stage": "pre')
    log.forget_after(2, 0)
    assert read(log) == [step(1), step(2), segmented]


def test_diagnosis_that_the_checkpoint_does_not_know_is_forgotten(tmp_path):
    """A run stopped at an epoch's end is diagnosed when it goes on, and may be killed then."""
    log = log_of(tmp_path, step(0, "diagnostics"), step(6), step(6, "diagnostics"))
    log.forget_after(6, 0)
    assert read(log) == [step(0, "diagnostics"), step(6)]


def test_model_that_is_trained_anew_leaves_the_others_records(tmp_path):
    others = [step(1), step(1, "linear", encoder="random"), step(1, "finetune", encoder="scratch")]
    log = log_of(tmp_path, *others, step(1, "linear", encoder="pretrained"))
    log.forget_training("linear", "pretrained")
    assert read(log) == others


def test_model_that_goes_on_keeps_the_epochs_that_it_has_behind_it(tmp_path):
    rows = [step(3 * n, "finetune", encoder="scratch", epoch=n) for n in (1, 2, 3)]
    log = log_of(tmp_path, step(1), *rows)
    log.forget_training("finetune", "scratch", after=2)
    assert read(log) == [step(1), *rows[:2]]


def test_without_a_file_there_is_nothing_to_forget(tmp_path):
    MetricsLog(tmp_path / "metrics.jsonl").forget_training("linear", "random")
    assert not list(tmp_path.iterdir())


def table(log):
    with open(log.path.with_suffix(".csv"), newline="") as file:
        return list(csv.DictReader(file))


def test_csv_has_a_row_an_epoch_with_the_means_of_its_steps(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        for number, loss in enumerate((4.0, 2.0, 1.0), start=1):
            log.hold(step(number, epoch=(number + 1) // 2, loss=loss))
        log.flush(images_per_second=8.0)
        features = {"rankme": 3.5, "spectrum": [1.0, 0.5]}
        log.write(step(3, "diagnostics", epoch=2, loss=None, features=features, warnings=[]))
        log.write(step(7, "finetune", epoch=1, encoder='a,\n"b"', loss=0.25))
    rows = table(log)
    assert [(r["stage"], r["encoder"], r["epoch"], r["step"], r["loss"]) for r in rows] == [
        ("pretrain", "", "1", "2", "3"),
        ("pretrain", "", "2", "3", "1"),
        ("diagnostics", "", "2", "3", ""),
        ("finetune", 'a,\n"b"', "1", "7", "0.25"),
    ]
    assert rows[0]["images_per_second"] == "8" and rows[2]["features/rankme"] == "3.5"
    assert "features/spectrum" not in rows[0]


def test_csv_of_a_resumed_run_is_that_of_an_unbroken_one(tmp_path):
    steps = [step(n, epoch=(n + 2) // 3, loss=1 / n) for n in range(1, 8)]
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with log_of(tmp_path / "one") as unbroken:
        for record in steps:
            unbroken.write(record)
    with log_of(tmp_path / "two", *steps[:5]) as resumed:
        resumed.forget_after(2, 0)
        for record in steps[2:]:
            resumed.write(record)
    assert table(resumed) == table(unbroken) and len(table(unbroken)) == 3
