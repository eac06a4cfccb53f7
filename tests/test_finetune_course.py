"""A fine-tuning that was stopped goes on as if it had not been, bit for bit."""

import errno
import json
import math
import os
import shutil
import signal

import pytest
import torch
from labelled_slices import Slices

from medmoco import downstream
from medmoco import finetune as finetuning
from medmoco.command import run_command
from medmoco.data.delivery import LoaderDied
from medmoco.divergence import all_finite
from medmoco.errors import UserError
from medmoco.finetune import finetune
from medmoco.finetune_course import Course
from medmoco.models.segmenter import load_segmenter
from medmoco.output import save_torch
from medmoco.segment import main
from medmoco.signals import Stopped

EPOCHS, BATCHES = 4, 3


def network():
    """With dropout, so that the global random numbers are part of the course."""
    torch.manual_seed(0)
    layers = (
        torch.nn.Conv2d(1, 8, 3, padding=1),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.3),
        torch.nn.Conv2d(8, 3, 1),
    )
    return torch.nn.Sequential(*layers)


class Run:
    """Attempts at one training: they share a log, and the file that its state is saved to."""

    def __init__(self, path, **settings):
        self.path, self.settings = path, settings
        self.rows = []

    def train(self, begun=None):
        """To the end, or until it is stopped; the model and what `finetune` returns."""
        slices, model = Slices(10), network()
        slices.shown[1:, 2] = False  # one shows class 2: it is drawn again
        settings = {
            "epochs": EPOCHS,
            "batch_size": 4,
            "lr": 1e-2,
            "seed": 0,
            "device": torch.device("cpu"),
            "amp_dtype": None,
            "workers": 0,
            "validation": Slices(4),
        }
        return finetune(
            model,
            slices,
            slices.shown,
            log=lambda *row: self.rows.append(row),
            begun=begun,
            save=lambda state: save_torch(self.path, state),
            **settings | self.settings,
        ), model

    def resume(self):
        torch.rand(7)  # a new process has other random numbers
        begun = torch.load(self.path, weights_only=True)
        self.rows = self.rows[: begun["epoch"] - (not begun["finished"])]
        return self.train(begun)


def assert_same(one, other):
    (about, model), (about_other, model_other) = one, other
    assert about == about_other
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, model_other.state_dict()[name], rtol=0, atol=0)


def signal_at_step(patch, step, number=signal.SIGTERM):
    """The signal comes while that step of the process is taken."""
    add, taken = Course.add, []

    def with_signal(self, *results):
        add(self, *results)
        taken.append(results)
        if len(taken) == step:
            os.kill(os.getpid(), number)

    patch.setattr(Course, "add", with_signal)


class LostSlices(Slices):
    """Cannot be read from the second epoch's validation on."""

    left = 4

    def __getitem__(self, item):
        if self.left == 0:
            raise OSError(errno.EIO, "Input/output error", "/cache/images.u16")
        self.left -= 1
        return super().__getitem__(item)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("unbroken") / "state.pt")
    result = run.train()
    assert [row[:2] for row in run.rows] == [(e, BATCHES * e) for e in range(1, EPOCHS + 1)]
    return result, run.rows


@pytest.mark.parametrize(
    ("step", "number", "workers"),
    [
        (1, signal.SIGTERM, 0),
        (BATCHES, signal.SIGTERM, 0),
        (BATCHES + 2, signal.SIGUSR1, 0),
        (BATCHES + 2, signal.SIGTERM, 2),
        (EPOCHS * BATCHES, signal.SIGUSR1, 0),
    ],
)
def test_a_stop_at_a_step_changes_nothing(tmp_path, monkeypatch, unbroken, step, number, workers):
    run = Run(tmp_path / "state.pt", workers=workers)
    with monkeypatch.context() as patch:
        signal_at_step(patch, step, number)
        with pytest.raises(Stopped, match=f"saved step {step} of 12"):
            run.train()
    assert_same(unbroken[0], run.resume())
    assert run.rows == unbroken[1]


@pytest.mark.parametrize("epoch", [1, EPOCHS])
def test_a_stop_in_a_validation_changes_nothing(tmp_path, monkeypatch, unbroken, epoch):
    validate, calls = finetuning.validate, []

    def with_signal(*arguments):
        calls.append(arguments)
        if len(calls) == epoch:
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(*arguments)

    run = Run(tmp_path / "state.pt")
    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "validate", with_signal)
        with pytest.raises(Stopped, match="in a validation"):
            run.train()
    assert len(run.rows) == epoch - 1
    assert_same(unbroken[0], run.resume())
    assert run.rows == unbroken[1]


def test_slices_that_a_validation_cannot_read_cost_no_step(tmp_path, unbroken):
    run = Run(tmp_path / "state.pt")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(LoaderDied, match="Input/output"):
        patch.setitem(run.settings, "validation", LostSlices(4))
        run.train()
    begun = torch.load(run.path, weights_only=True)
    assert (begun["epoch"], begun["batch"]) == (2, BATCHES)
    assert_same(unbroken[0], run.resume())
    assert run.rows == unbroken[1]


@pytest.mark.parametrize("step", [BATCHES + 2, EPOCHS * BATCHES])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch, step):
    """They become so in a step whose loss was finite."""
    add, saved = Course.add, []

    def spoil(self, *results):
        add(self, *results)
        if self.steps(BATCHES) == step:
            next(self.model.parameters()).data.view(-1)[0] = math.nan

    monkeypatch.setattr(Course, "add", spoil)
    monkeypatch.setattr(finetuning, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setitem(globals(), "save_torch", lambda _, state: saved.append(all_finite(state)))
    message = f"the weights are not finite at step {step} of fine-tuning; .*--lr"
    with pytest.raises(UserError, match=message):
        Run(tmp_path / "state.pt").train()
    assert saved == [True] * (step - 1)


def test_a_stop_when_all_is_saved_is_not_lost(tmp_path, monkeypatch, unbroken):
    run = Run(tmp_path / "state.pt")
    with monkeypatch.context() as patch:
        end = Course.end_epoch

        def with_signal(self, dice, finished):
            end(self, dice, finished)
            if finished:
                os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(Course, "end_epoch", with_signal)
        with pytest.raises(Stopped, match="saved step 12 of 12"):
            run.train()
    assert_same(unbroken[0], run.resume())
    assert run.rows == unbroken[1]


def test_what_was_saved_on_the_way_is_enough(tmp_path, monkeypatch, unbroken):
    """The process is killed three steps after the last time that its state was saved."""

    class Killed(Exception):
        pass

    def kill(self, *results):
        add(self, *results)
        if (self.epoch, self.batch) == (3, 1):
            raise Killed

    run, add, saves = Run(tmp_path / "state.pt"), Course.add, []
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Course, "add", kill)
        patch.setattr(finetuning, "CHECKPOINT_SECONDS", 0)
        save = save_torch
        patch.setitem(
            globals(), "save_torch", lambda *v: saves.append(v) or (len(saves) < 5 and save(*v))
        )
        run.train()
    assert_same(unbroken[0], run.resume())
    assert run.rows == unbroken[1]


def test_early_stopping_remembers_the_best_epoch(tmp_path, monkeypatch):
    """Validation Dice is made up; the stop comes between the best epoch and the end of patience."""
    runs = {}
    for name in ("unbroken", "stopped"):
        made_up = iter([[0.2], [0.9], [0.5], [0.4], [0.95]])
        monkeypatch.setattr(finetuning, "validate", lambda *_, made_up=made_up: next(made_up))
        run = Run(tmp_path / f"{name}.pt", epochs=6, patience=2)
        if name == "stopped":
            with monkeypatch.context() as patch, pytest.raises(Stopped):
                signal_at_step(patch, 3 * BATCHES + 1)
                run.train()
            runs[name] = run.resume()
        else:
            runs[name] = run.train()
    assert runs["unbroken"][0]["best_epoch"] == 2 and runs["unbroken"][0]["epochs"] == 4
    assert_same(runs["unbroken"], runs["stopped"])
    assert_same(runs["unbroken"], run.resume())  # the end, once more


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def segment(tiny_task, tmp_path_factory):
    """Runs `medmoco segment` with a U-Net of its own and early stopping, or goes on with it."""
    cache = tmp_path_factory.mktemp("cache")
    flags = ["--task", tiny_task, "--cache", cache, "--width", "0.125", "--device", "cpu"]
    flags += ["--mode", "finetune", "--epochs", "3", "--workers", "2", "--batch-size", "4"]
    flags += ["--validation-fraction", "0.3", "--patience", "2"]

    def run(output, *further) -> int:
        own = [] if "--resume" in further else flags
        return run_command(main, [str(f) for f in [*own, "--output", output, *further]])

    return run


@pytest.fixture(scope="module")
def finished(segment, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "unbroken"
    assert segment(output) == 0
    return output


def result(output):
    """The model, the metrics and the summary without its seconds."""
    weights = load_segmenter(output / "segmenters/finetune-scratch.pt").model.state_dict()
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((output / "summary.json").read_text())
    del summary["seconds"], summary["controls"]["finetune_scratch"]["seconds"]
    return {name: value.tolist() for name, value in weights.items()}, rows, summary


def test_the_command_goes_on_with_a_model_half_trained(
    segment, finished, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "stopped"
    last = output / "checkpoints/finetune-scratch.pt"
    with monkeypatch.context() as patch:
        signal_at_step(patch, 8, signal.SIGUSR1)
        assert segment(output) == 0
    assert "; --resume goes on from there" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        signal_at_step(patch, 3)
        assert segment(output, "--resume") == 0
    assert last.is_file()
    assert not (output / "segmenters").exists()
    # The last one is damaged: the training goes back to the one before.
    last.write_bytes(last.read_bytes()[:1000])
    capsys.readouterr()
    assert segment(output, "--resume") == 0
    assert f"warning: {last}: " in capsys.readouterr().err
    assert result(output) == result(finished)
    assert not list(last.parent.iterdir()), "a model that is finished needs no checkpoint"


def test_a_kill_while_the_model_is_tested_does_not_train_it_again(
    segment, finished, tmp_path, monkeypatch
):
    class Killed(BaseException):
        pass

    def kill(*_, **__):
        raise Killed

    output = tmp_path / "killed"
    shutil.copytree(finished, output)
    shutil.rmtree(output / "segmenters")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(downstream, "evaluate", kill)
        segment(output, "--resume")
    monkeypatch.setattr(Course, "add", kill)
    assert segment(output, "--resume") == 0
    assert result(output) == result(finished)


def test_the_checkpoint_of_other_inputs_is_not_gone_on_from(segment, finished, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    shutil.rmtree(output / "segmenters")
    (output / "checkpoints").mkdir(exist_ok=True)
    content = {"format": "medmoco.checkpoint", "version": 2, "identity": {"inputs": "other"}}
    save_torch(output / "checkpoints/finetune-scratch.pt", content | {"state": {"course": {}}})
    assert segment(output, "--resume") == 0
    assert result(output) == result(finished)
