"""Checkpoints that anyone could have sealed: a state that does not fit is refused by its file."""

import copy
import hashlib
import math
import os
import signal
import struct
from pathlib import Path

import pytest
import torch
from labelled_slices import Slices
from pretraining_runs import TINY, assert_identical
from torch import nn

from medmoco import pretrain
from medmoco.checkpoint import Checkpoints, Misfit
from medmoco.checkpoint_state import load_optimizer
from medmoco.command import run_command
from medmoco.config import parse
from medmoco.errors import UserError
from medmoco.finetune import finetune
from medmoco.finetune_course import Course, load_begun
from medmoco.launch import choose_output
from medmoco.methods import resolve
from medmoco.output import save_torch
from medmoco.pretrain import PretrainConfig
from medmoco.pretraining import Pretraining
from medmoco.segment import main as segment

GONE = object()


def changed(state: dict, place: str, value) -> dict:
    """A copy with another entry at a place such as "random/numpy/key", or without it.

    Args:
        value: the new one, or a function that gets the old one.
    """
    state = holder = copy.copy(state)
    *path, last = [int(name) if name.isdigit() else name for name in place.split("/")]
    for name in path:
        holder[name] = copy.copy(holder[name])
        holder = holder[name]
    if value is GONE:
        del holder[last]
    else:
        holder[last] = value(holder[last]) if callable(value) else value
    return state


def spoilt(value):
    """Sets the first number of a tensor."""

    def spoil(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return spoil


def beyond_its_numbers(state):
    """A generator's state with all numbers left, of which it has used all."""
    state = state.clone()
    state[8:24] = torch.tensor(list(struct.pack("<iiQ", 624, 1, 624)), dtype=torch.uint8)
    return state


def digests(folder: Path) -> dict[str, str]:
    """Of all files below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def cases(misfits: dict[str, tuple]) -> list:
    """Parameters of a test: each place with each of its values."""
    return [
        pytest.param(place, value, id=f"{place}-{number}")
        for place, values in misfits.items()
        for number, value in enumerate(values)
    ]


# By place, entries that are no state.
OF_RANDOM = {
    "random": (GONE, None, [1, 2]),
    "random/torch": (
        *(torch.zeros(5056), torch.zeros(5056, dtype=torch.uint8)),
        *(lambda state: state[:-1], beyond_its_numbers),
    ),
    "random/cuda": (None, [torch.zeros(3)]),
    "random/numpy/key": (GONE, spoilt(-1), lambda key: key[:-1]),
    "random/numpy/position": (10**6, -1),
    "random/numpy/has_gauss": ("yes",),
    "random/numpy/gauss": (math.nan,),
    "random/python": (
        *(None, (3, (1, 2), None), (3, "x" * 625, None)),
        *(lambda s: (3, s[1], "x"), lambda s: (3, (*s[1][:-1], 10**6), None)),
    ),
}
OF_GENERATOR = (
    *(GONE, None, torch.zeros(5056), torch.zeros(7, dtype=torch.uint8), beyond_its_numbers),
    *(lambda state: state[None], lambda state: torch.full_like(state, 255)),
)
OF_WEIGHT = (GONE, 1.0, torch.zeros(3), spoilt(math.nan), lambda weight: weight.double())


# --- pretraining ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tiny_task, tmp_path_factory) -> Path:
    """A pretraining of an epoch of 6 steps."""
    folder = tmp_path_factory.mktemp("pretraining")
    flags = ["--data", str(tiny_task / "imagesTr"), "--device", "cpu", "--workers", "0", *TINY]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "write_summary", lambda run: None)
        pretrain.main([*flags, "--epochs", "1", "--output", str(folder / "run")])
    return folder / "run"


@pytest.fixture(scope="module")
def run(finished) -> Pretraining:
    """What goes on with it."""
    config = parse(PretrainConfig, ["--output", str(finished), "--resume"], prog="", description="")
    config = choose_output(config, "medmoco")
    cache = pretrain.open_slices(config)
    return Pretraining(resolve(config, cache), cache)


@pytest.fixture(scope="module")
def content(finished) -> dict:
    return torch.load(finished / "checkpoints" / "last.pt", weights_only=True)


def restore(run, content, state, path: Path) -> None:
    save_torch(path, content | {"state": state})
    run.checkpoints = Checkpoints(path, content["identity"])
    run.restore()


OF_PRETRAINING = {
    "step": (GONE, -1, 7, True, 6.0, 10**400),
    "losses": (GONE, [1.0], [math.nan, 3], [1.0, -3], [torch.zeros(2), 3]),
    "diagnostics": (GONE, None, {}),
    "diagnostics/step": (GONE, -1, 7),
    "diagnostics/epoch": (2,),
    "diagnostics/stage": ("pretrain",),
    "diagnostics/loss": (math.inf,),
    "diagnostics/effective_rank": ("high",),
    "diagnostics/warnings": (GONE, [1]),
    "diagnostics/features": (GONE,),
    "diagnostics/features/rankme": (math.nan,),
    "diagnostics/features/samples": (10**400,),
    "diagnostics/embeddings/rankme": (GONE,),
    "diagnostics/embeddings/spectrum": ([None],),
    "model": (GONE, [1], {}),
    "model/queue.keys": (lambda keys: keys[:-1], lambda keys: keys.double()),
    "model/queue.cursor": (torch.tensor(-1),),
    "model/queue.ids": (torch.tensor(0),),
    "model/extra": (torch.zeros(1),),
    "model/query.encoder.conv1.weight": OF_WEIGHT,
    "model/key.encoder.bn1.running_var": (spoilt(-1),),
    "optimizer": (GONE, {"param_groups": []}),
    "optimizer/state": ({}, []),
    "optimizer/state/0": (GONE, None),
    "optimizer/state/0/momentum_buffer": (*OF_WEIGHT, None),
    "generator": OF_GENERATOR,
    **OF_RANDOM,
}


@pytest.mark.parametrize(("place", "value"), cases(OF_PRETRAINING))
def test_a_state_that_is_none_of_the_pretraining_is_refused(run, content, tmp_path, place, value):
    path = tmp_path / "last.pt"
    with pytest.raises(UserError) as refused:
        restore(run, content, changed(content["state"], place, value), path)
    message = str(refused.value)
    assert message.startswith(f"{path}: whole, but no state of this run: ")
    assert type(refused.value) is UserError and len(message) < 500


def test_entries_that_are_no_ones_are_left_out(run, content, tmp_path):
    """They might be read by a later version, and would be in its way when it saves."""
    state = changed(content["state"], "diagnostics/more", {"a": 1})
    restore(run, content, state | {"more": 1}, tmp_path / "last.pt")
    assert run.diagnostics == content["state"]["diagnostics"]


def test_what_a_checkpoint_says_of_the_optimizer_s_settings_is_not_taken(run, content, tmp_path):
    state = changed(content["state"], "optimizer/param_groups", [{"lr": "x", "params": 1}])
    restore(run, content, state, tmp_path / "last.pt")
    run.save()
    assert_identical(
        torch.load(tmp_path / "last.pt", weights_only=True)["state"]["optimizer"],
        content["state"]["optimizer"],
    )


def test_momentum_that_shares_memory_does_not_after_it_is_loaded():
    weights = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))]
    optimizer = torch.optim.SGD(weights, lr=1.0, momentum=0.5)
    shared = torch.ones(1).expand(4)
    state = {n: {"momentum_buffer": shared} for n in range(2)}
    load_optimizer(optimizer, state, 1, lr=1.0)
    for weight, gradient in zip(weights, (1.0, 2.0), strict=True):
        weight.grad = torch.full((4,), gradient)
    optimizer.step()
    assert [weight.tolist() for weight in weights] == [[-0.5] * 4, [-1.5] * 4]


def test_the_command_names_the_file_and_changes_nothing(finished, content, tmp_path, capsys):
    """Nor does it go on from the one before: that is for damage."""
    last = finished / "checkpoints" / "last.pt"
    kept = last.read_bytes()
    save_torch(last, content | {"state": changed(content["state"], "step", 7)})
    before = digests(finished)
    try:
        assert run_command(pretrain.main, ["--output", str(finished), "--resume"]) == 2
        assert digests(finished) == before
    finally:
        last.write_bytes(kept)
    error = capsys.readouterr().err
    assert f"error: {last}: whole, but no state of this run: step must be a whole number" in error
    assert "from 0 to 6, got 7" in error


# --- fine-tuning ----------------------------------------------------------------------------------

EPOCHS, BATCHES, CLASSES = 3, 2, 3


def train(begun=None, save=None) -> dict:
    """A small network with early stopping; `save` is called after every step."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, CLASSES, 1)
    slices = Slices(4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medmoco.finetune.CHECKPOINT_SECONDS", 0)
        return finetune(
            nn.Sequential(*layers),
            slices,
            slices.shown,
            epochs=EPOCHS,
            batch_size=2,
            lr=1e-2,
            seed=0,
            device=torch.device("cpu"),
            amp_dtype=None,
            workers=0,
            log=lambda *_: None,
            validation=Slices(2),
            begun=begun,
            save=save,
        )


@pytest.fixture(scope="module")
def course(tmp_path_factory) -> dict:
    """The state after the first step of the second epoch."""
    path = tmp_path_factory.mktemp("finetuning") / "state.pt"
    saved = []

    def save(state):
        save_torch(path, state)
        saved.append(torch.load(path, weights_only=True))

    train(save=save)
    assert len(saved) == EPOCHS * BATCHES + 1
    return saved[BATCHES]


OF_FINE_TUNING = {
    "epoch": (GONE, None, 0, -1, 4, 2.0),
    "batch": (GONE, "1", -1, 0, 2, 3),
    "losses": (
        GONE,
        None,
        [1],
        torch.zeros(2),
        torch.zeros(1, dtype=torch.int64),
        spoilt(math.nan),
    ),
    "counts": (GONE, None, spoilt(-1), lambda counts: counts[:, :2], lambda counts: counts * 1.0),
    "dice": (GONE, None, [], [0.5] * 3, [math.nan, 0.5], [2.0, 0.5], ["a", "b"]),
    "finished": (GONE, None, 1, True),
    "order": (*OF_GENERATOR, torch.zeros(16, dtype=torch.uint8)),
    "generator": OF_GENERATOR,
    "model": (GONE, None, {}),
    "model/0.weight": OF_WEIGHT,
    "model/1.running_var": (spoilt(-1),),
    "model/1.num_batches_tracked": (torch.tensor(-1),),
    "optimizer": (GONE, None, {}),
    "optimizer/state": ({}, [], {0: {}}),
    "optimizer/state/0/step": (GONE, 3, torch.tensor(-5.0), torch.tensor(4.0)),
    "optimizer/state/0/exp_avg": OF_WEIGHT,
    "optimizer/state/0/exp_avg_sq": (*OF_WEIGHT, spoilt(-1)),
    "best": (GONE, None, {}),
    "best/epoch": (GONE, "1", -1, 4),
    "best/dice": (GONE, "high", math.nan, 2.0),
    "best/weights": (GONE, None, [1], {}),
    "best/weights/0.weight": OF_WEIGHT,
    **OF_RANDOM,
}


@pytest.mark.parametrize(("place", "value"), cases(OF_FINE_TUNING))
def test_a_state_that_is_none_of_the_fine_tuning_is_refused(course, tmp_path, place, value):
    checkpoints = Checkpoints(tmp_path / "finetune-scratch.pt", {"inputs": "x"})
    checkpoints.save({"seconds": 1.5, "course": changed(course, place, value)})
    with pytest.raises(UserError) as refused, checkpoints.naming_misfits():
        train(load_begun(checkpoints)["course"])
    message = str(refused.value)
    assert message.startswith(f"{checkpoints.path}: whole, but no state of this run: ")
    assert type(refused.value) is UserError and len(message) < 500


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"seconds": 1.0},
        {"course": {}},
        {"seconds": 1.0, "course": {}},
        {"seconds": 1.0, "course": {"epoch": 1}},
        {"seconds": math.nan, "course": {"epoch": 1, "finished": False}},
        {"seconds": 1e300, "course": {"epoch": 1, "finished": False}},
        {"seconds": -1.0, "course": {"epoch": 1, "finished": False}},
        {"seconds": 1.0, "course": [1]},
        {"seconds": 1.0, "course": {"epoch": "one", "finished": False}},
    ],
)
def test_a_fine_tuning_that_does_not_say_where_it_stands_is_refused(tmp_path, state):
    checkpoints = Checkpoints(tmp_path / "finetune-scratch.pt", {"inputs": "x"})
    checkpoints.save(state)
    with pytest.raises(UserError, match=r"finetune-scratch\.pt: whole, but no state of this run"):
        load_begun(checkpoints)


def test_the_learning_rate_is_that_of_the_step(course):
    """Whatever the optimizer's settings in the file are."""
    odd = changed(course, "optimizer/param_groups", [{"lr": "x"}])
    odd["rates"] = {"optimizer": None, "last_epoch": -5}
    assert train(odd) == train(course) == train()


def test_a_finished_state_before_the_end_of_its_epoch_is_refused(course):
    with pytest.raises(Misfit, match=r"^batch must be 2 in a state that is finished, got 1$"):
        train(course | {"finished": True})


def test_a_state_of_no_epoch_has_no_dice_yet(course):
    with pytest.raises(Misfit, match=r"^dice must be a list of 0, each "):
        train(course | {"epoch": 1})


def test_segment_names_the_file_and_changes_nothing(tiny_task, tmp_path, monkeypatch, capsys):
    """Neither metrics.jsonl, whose records of later epochs a resumed training drops."""
    add, taken = Course.add, []

    def stop_in_the_second_epoch(self, *results):
        add(self, *results)
        taken.append(results)
        if self.epoch == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    output = tmp_path / "run"
    flags = ["--task", tiny_task, "--cache", tmp_path / "cache", "--width", "0.125"]
    flags += ["--device", "cpu", "--mode", "finetune", "--epochs", "2", "--workers", "0"]
    flags += ["--image-size", "32", "--output", output]
    with monkeypatch.context() as patch:
        patch.setattr(Course, "add", stop_in_the_second_epoch)
        assert run_command(segment, [str(flag) for flag in flags]) == 0
    path = output / "checkpoints" / "finetune-scratch.pt"
    content = torch.load(path, weights_only=True)
    course = content["state"]["course"]
    assert course["epoch"] == 2 and (output / "metrics.csv").is_file()
    course |= {"epoch": 1, "dice": []}  # fits, but for the steps of the optimizer
    save_torch(path, content)
    before = digests(output)
    capsys.readouterr()
    assert run_command(segment, ["--output", str(output), "--resume"]) == 2
    error = capsys.readouterr().err
    assert f"error: {path}: whole, but no state of this run: optimizer does not fit" in error
    assert digests(output) == before
