"""metrics.jsonl of a run that goes on: every record once, whatever the last attempt wrote."""

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


def test_without_a_file_there_is_nothing_to_forget(tmp_path):
    MetricsLog(tmp_path / "metrics.jsonl").forget_training("linear", "random")
    assert not list(tmp_path.iterdir())
