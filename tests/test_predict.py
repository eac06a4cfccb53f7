"""The command `medmoco predict`: names, types, what is refused, and what a stop leaves behind."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from threshold_segmenter import threshold_segmenter
from volume_files import save_volume

from medmoco.command import run_command
from medmoco.data.slices import PixelGrid
from medmoco.data.volumes import write_label_map
from medmoco.models.decoders import UNet
from medmoco.models.encoder import Encoder
from medmoco.models.segmenter import save_segmenter
from medmoco.predict import load_models, main
from medmoco.prediction import Member
from medmoco.volume_prediction import VolumePredictor, slices_at_once

AFFINE = np.diag([1.0, 1, 2, 1])


def hu(shape=(9, 8, 4), seed=0):
    """Air on one side, tissue of 0 to 200 HU on the other."""
    voxels = np.random.default_rng(seed).integers(0, 200, shape).astype(np.int16)
    voxels[: shape[0] // 2] = -900
    return voxels


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.pt"
    save_segmenter(path, threshold_segmenter(100.5))
    return path


@pytest.fixture
def scans(tmp_path):
    for number in range(3):
        save_volume(tmp_path / f"scans/scan{number}.nii.gz", hu(seed=number), AFFINE)
    return tmp_path / "scans"


@pytest.fixture
def predict(tmp_path):
    def run(*arguments, status=0):
        flags = [str(argument) for argument in arguments]
        if "--output" not in flags:
            flags += ["--output", str(tmp_path / "masks")]
        assert run_command(main, [*flags, "--device", "cpu"]) == status
        return tmp_path / "masks"

    return run


@pytest.fixture
def refused(predict, model, tmp_path, capsys):
    """Runs the command, expects an error and no more than `written`; gives the message."""

    def run(*arguments, models=(), written=(), status=2):
        if "--resume" not in arguments:
            arguments = ("--model", *(models or (model,)), *arguments)
        output = predict(*arguments, status=status)
        assert sorted(path.name for path in output.rglob("*.gz")) == sorted(written)
        return capsys.readouterr().err

    return run


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.nii.gz"))


def mask_of(path):
    return np.asarray(nib.load(path).dataobj)


# What comes out


def test_folder_of_mixed_shapes_gives_a_label_map_of_each(tmp_path, model, predict, capsys):
    shapes = {"a": (9, 8, 4), "b/c": (5, 40, 1), "b/d/e": (50, 3, 2)}
    for seed, (name, shape) in enumerate(shapes.items()):
        save_volume(tmp_path / f"scans/{name}.nii.gz", hu(shape, seed), AFFINE)
    output = predict("--model", model, "--input", tmp_path / "scans")
    assert names(output) == ["a.nii.gz", "b/c.nii.gz", "b/d/e.nii.gz"]
    for seed, (name, shape) in enumerate(shapes.items()):
        np.testing.assert_array_equal(mask_of(output / f"{name}.nii.gz"), hu(shape, seed) > 100)
    printed = capsys.readouterr().out
    assert "3 volumes, 7 slices" in printed and "slices/s" in printed
    assert "% of the time inside the model" in printed
    assert f"next:        python -m medmoco.evaluate --pred {output} --truth" in printed


def test_single_file_and_its_folder_give_the_same(tmp_path, model, predict, scans):
    every = predict("--model", model, "--input", scans, "--output", tmp_path / "every")
    every = tmp_path / "every"
    one = predict("--model", model, "--input", scans / "scan1.nii.gz")
    assert names(one) == ["scan1.nii.gz"]
    assert (one / "scan1.nii.gz").read_bytes() == (every / "scan1.nii.gz").read_bytes()


@pytest.mark.parametrize(("value", "kind"), [(1, np.uint8), (255, np.uint8), (300, np.uint16)])
def test_type_of_the_label_map_holds_the_largest_value(tmp_path, predict, scans, value, kind):
    save_segmenter(tmp_path / "model.pt", threshold_segmenter(100.5, value=value))
    output = predict("--model", tmp_path / "model.pt", "--input", scans)
    mask = nib.load(output / "scan0.nii.gz")
    assert mask.get_data_dtype() == kind
    np.testing.assert_array_equal(mask.dataobj, value * (hu(seed=0) > 100))


def test_folder_of_a_task_means_its_test_images_and_channels_are_no_part_of_names(
    tmp_path, model, predict
):
    save_volume(tmp_path / "task/imagesTr/train_0000.nii.gz", hu(), AFFINE)
    for channel in range(2):
        path = tmp_path / f"task/imagesTs/case_000{channel}.nii.gz"
        save_volume(path, hu(seed=channel), AFFINE)
    output = predict("--model", model, "--input", tmp_path / "task", "--channel", "1")
    assert names(output) == ["case.nii.gz"]
    np.testing.assert_array_equal(mask_of(output / "case.nii.gz"), hu(seed=1) > 100)


def test_channel_of_the_training_is_the_default(tmp_path, predict, capsys):
    save_segmenter(tmp_path / "model.pt", threshold_segmenter(100.5, channel=1))
    both = np.stack([hu(seed=0), hu(seed=1)], -1)
    save_volume(tmp_path / "scans/scan.nii.gz", both, AFFINE)
    flags = ("--model", tmp_path / "model.pt", "--input", tmp_path / "scans")
    output = predict(*flags)
    assert "channel: 1, as in training" in capsys.readouterr().out
    np.testing.assert_array_equal(mask_of(output / "scan.nii.gz"), hu(seed=1) > 100)
    assert run_command(main, ["--output", str(output), "--resume"]) == 0
    output = predict(*flags, "--overwrite", "--channel", "0")
    told = capsys.readouterr().out
    assert "warning: --channel 0: the model was trained on channel 1" in told
    np.testing.assert_array_equal(mask_of(output / "scan.nii.gz"), hu(seed=0) > 100)


def test_numbered_cases_without_a_channel_0000_keep_their_numbers(tmp_path, model, predict):
    for number in (1, 4):
        path = save_volume(tmp_path / f"imagesTs/amos_000{number}.nii.gz", hu(), AFFINE)
    output = predict("--model", model, "--input", tmp_path / "imagesTs")
    assert names(output) == ["amos_0001.nii.gz", "amos_0004.nii.gz"]
    one = tmp_path / "one"
    predict("--model", model, "--input", path, "--output", one)
    assert names(one) == ["amos_0004.nii.gz"]


def test_chosen_channel_makes_channels_of_numbered_files_in_any_folder(tmp_path, model, predict):
    for channel in range(2):
        save_volume(tmp_path / f"scans/case_000{channel}.nii.gz", hu(seed=channel), AFFINE)
    output = predict("--model", model, "--input", tmp_path / "scans", "--channel", "1")
    assert names(output) == ["case.nii.gz"]
    np.testing.assert_array_equal(mask_of(output / "case.nii.gz"), hu(seed=1) > 100)


def test_single_file_is_a_channel_where_its_siblings_tell_so(tmp_path, model, predict):
    for channel in range(2):
        path = save_volume(tmp_path / f"imagesTs/case_000{channel}.nii.gz", hu(), AFFINE)
    assert names(predict("--model", model, "--input", path)) == ["case.nii.gz"]


def test_probabilities_lie_voxel_by_voxel_on_the_label_map(tmp_path, predict, scans):
    segmenter = threshold_segmenter(100.5, value=9)
    with torch.no_grad():  # logits of 0 and 8 (image - level), which is soft
        segmenter.model.classifier.weight *= 8e-3
        segmenter.model.classifier.bias *= 8e-3
    save_segmenter(tmp_path / "model.pt", segmenter)
    save_volume(scans / "turned.nii.gz", hu(), np.diag([-1.0, 1, -1, 1])[[2, 0, 1, 3]])
    output = predict("--model", tmp_path / "model.pt", "--input", scans, "--save-probabilities")
    image = (np.clip(hu(), -175, 250) + 175) / 425
    level = (100.5 + 175) / 425
    for name in ("scan0", "turned"):
        with np.load(output / f"{name}.npz", allow_pickle=False) as file:
            probabilities, values = file["probabilities"], file["values"]
            assert list(file["classes"]) == ["background", "bright"]
        assert probabilities.dtype == np.float16 and list(values) == [0, 9]
        expected = 1 / (1 + np.exp(-8 * (image - level)))
        np.testing.assert_allclose(probabilities[1], expected, atol=1e-3)
        np.testing.assert_allclose(probabilities[0], 1 - expected, atol=1e-3)
        np.testing.assert_array_equal(mask_of(output / f"{name}.nii.gz"), 9 * (hu() > 100))
    assert not [path for path in output.iterdir() if path.name.startswith(".")]


def test_several_models_vote_with_the_mean_of_their_probabilities(tmp_path, predict, scans):
    """Two thresholds, as sure of themselves: the middle one decides."""
    paths = []
    for threshold in (60.5, 140.5):
        segmenter = threshold_segmenter(threshold, size=32 if threshold < 100 else 16)
        with torch.no_grad():  # soft, or what is sure of itself at both ends would be a draw
            segmenter.model.classifier.weight /= 1000
            segmenter.model.classifier.bias /= 1000
        paths.append(tmp_path / f"model{threshold}.pt")
        save_segmenter(paths[-1], segmenter)
    output = predict("--model", *paths, "--input", scans)
    np.testing.assert_array_equal(mask_of(output / "scan0.nii.gz"), hu() > 100)


def test_batches_and_windows_do_not_change_what_a_pointwise_model_says(tmp_path, predict, scans):
    for size, batch in ((4, 1), (7, 3), (32, 100)):
        save_segmenter(tmp_path / "model.pt", threshold_segmenter(100.5, size=size))
        flags = ("--model", tmp_path / "model.pt", "--input", scans, "--batch-size", batch)
        output = tmp_path / f"size{size}"
        predict(*flags, "--output", output)
        np.testing.assert_array_equal(mask_of(output / "scan2.nii.gz"), hu(seed=2) > 100)


def test_best_model_of_a_run_is_found_and_that_of_every_fold(tmp_path, predict, scans):
    run = tmp_path / "run"
    for name, threshold in (("linear-pretrained", 20.5), ("finetune-scratch", 100.5)):
        (run / "segmenters").mkdir(parents=True, exist_ok=True)
        save_segmenter(run / f"segmenters/{name}.pt", threshold_segmenter(threshold))
    output = predict("--model", run, "--input", scans)
    np.testing.assert_array_equal(mask_of(output / "scan0.nii.gz"), hu() > 100)
    for fold in range(2):
        (tmp_path / f"folds/fold_{fold}").mkdir(parents=True)
        (run / "segmenters").rename(tmp_path / f"folds/fold_{fold}/segmenters")
        if fold == 0:
            (run / "segmenters").mkdir()
            save_segmenter(run / "segmenters/finetune-scratch.pt", threshold_segmenter(100.5))
    assert len(load_models([tmp_path / "folds"])) == 2


# What is refused


def broken_volume(kind):
    voxels = hu().astype(np.float32)
    if kind == "NaN":
        voxels[0, 0, 0] = np.nan
    if kind == "infinite":
        voxels[0, 0, 0] = np.inf
    return {"4-D": np.stack([voxels, voxels], -1), "2-D": voxels[..., 0]}.get(kind, voxels)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("4-D", "expected 3 axes, got a 4-D file of 2 channels; --channel chooses one"),
        ("2-D", "expected a volume of 3 axes, got an image of 2"),
        ("zero-size", "expected 2 to 7 axes of at least 1 voxel"),
        ("DICOM", "got DICOM"),
    ],
)
def test_volume_that_cannot_be_predicted_is_named_before_anything_is_written(
    scans, refused, kind, message
):
    path = scans / "bad.nii.gz"
    save_volume(path, broken_volume(kind), AFFINE)
    if kind == "zero-size":
        path = path.rename(scans / "bad.nii")
        content = bytearray(nib.Nifti1Image(hu(), AFFINE).to_bytes())
        content[44:46] = bytes(2)  # dim[2]
        path.write_bytes(content)
    if kind == "DICOM":
        path.write_bytes(bytes(128) + b"DICM")
    error = refused("--input", scans)
    assert f"{path}: " in error and message in error
    assert not (scans.parent / "masks").exists()


@pytest.mark.parametrize("kind", ["NaN", "infinite", "truncated"])
def test_damaged_volume_stops_or_is_left_out_and_the_others_are_kept(
    scans, refused, predict, kind, capsys
):
    path = save_volume(scans / "scan1.nii.gz", broken_volume(kind), AFFINE)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    error = refused("--input", scans, written=["scan0.nii.gz"])
    assert f"{path}: " in error and "finished label maps are kept" in error
    output = predict("--resume", "--skip-bad")
    assert names(output) == ["scan0.nii.gz", "scan2.nii.gz"]
    assert f"left out: {path}: " in capsys.readouterr().out


def test_spacing_of_another_unit_is_named(scans, refused):
    path = save_volume(scans / "scan1.nii.gz", hu(), np.diag([4000.0, 3000, 2000, 1]))
    error = refused("--input", scans, written=["scan0.nii.gz"])
    assert f"{path}: expected slices of at most 16384 pixels at the model's 1 mm" in error
    assert "from a spacing of 3000 x 4000 mm; are its units mm?" in error


def test_nothing_but_bad_volumes_is_an_error(scans, refused):
    for path in scans.iterdir():
        path.write_bytes(path.read_bytes()[:-20])
    error = refused("--input", scans, "--skip-bad")
    assert f"no volume could be predicted: {scans / 'scan0.nii.gz'}: " in error


@pytest.mark.parametrize("place", ["write", "begin"])
def test_label_map_that_cannot_be_written_is_named(
    tmp_path, scans, refused, predict, monkeypatch, place
):
    if place == "begin":  # with .nii.gz it is longer than a name may be
        path = save_volume(scans / f"scan1{'x' * 245}.nii", hu(), AFFINE)
        reason = "File name too long"
    else:

        def full(path, *_):
            if path.name.startswith("scan1"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write_label_map(path, *_)

        monkeypatch.setattr("medmoco.volume_prediction.write_label_map", full)
        path, reason = scans / "scan1.nii", "No space left on device"
    written = ["scan0.nii.gz"] + ["scan1.nii.gz"] * (place == "begin")
    error = refused("--input", scans, written=written, status=1)
    label_map = tmp_path / "masks" / f"{path.name}.gz"
    assert f"{label_map}: cannot be written: {reason}; finished label maps are kept" in error
    if place == "write":
        monkeypatch.undo()
        assert len(names(predict("--resume"))) == 3


def test_channel_that_is_not_there_is_refused(scans, refused):
    error = refused("--input", scans, "--channel", "1")
    assert "scan0.nii.gz: expected a channel below 1, got --channel 1" in error


def test_case_of_several_channels_asks_for_one(tmp_path, refused):
    for channel in range(2):
        save_volume(tmp_path / f"imagesTs/case_000{channel}.nii.gz", hu(), AFFINE)
    error = refused("--input", tmp_path / "imagesTs")
    assert "case_0000.nii.gz: expected one channel, got 2 files of this case" in error
    error = refused("--input", tmp_path / "imagesTs", "--channel", "2")
    assert "expected channel 2 of this case, got 0, 1" in error


def test_two_files_of_one_name_are_refused(scans, refused):
    save_volume(scans / "scan0.nii", hu(), AFFINE)
    error = refused("--input", scans)
    assert f"{scans / 'scan0.nii.gz'}: expected one file of this name, got also" in error


def test_input_that_is_no_volume_is_refused(tmp_path, refused):
    assert "expected a folder or a .nii" in refused("--input", tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("")
    assert "notes.txt: expected a .nii" in refused("--input", tmp_path / "notes.txt")
    (tmp_path / "empty").mkdir()
    assert "expected .nii or .nii.gz volumes, got none" in refused("--input", tmp_path / "empty")


def test_what_is_missing_is_asked_for(model, scans, refused, capsys):
    assert run_command(main, ["--model", str(model), "--input", str(scans)]) == 2
    assert "--output: expected a folder, got none" in capsys.readouterr().err
    assert "--input: expected a folder, got none" in refused()
    assert run_command(main, ["--input", str(scans), "--output", str(scans / "masks")]) == 2
    assert "--model: expected a run or a model's file, got none" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["scans", "scans/masks", "."])
def test_output_that_meets_the_input_is_refused(tmp_path, scans, refused, place):
    error = refused("--input", scans, "--output", tmp_path / place, "--overwrite")
    assert f"--output {tmp_path / place}: expected a" in error
    assert names(scans) == ["scan0.nii.gz", "scan1.nii.gz", "scan2.nii.gz"]


def test_output_that_holds_the_model_is_refused(tmp_path, scans, refused):
    run = tmp_path / "run"
    (run / "segmenters").mkdir(parents=True)
    (run / "config.json").write_text('{"medmoco": "0.1.0", "command": "segment"}')
    save_segmenter(run / "segmenters/finetune-scratch.pt", threshold_segmenter(100))
    error = refused("--input", scans, "--output", run, "--overwrite", models=[run])
    assert f"--output {run}: expected a folder that does not hold" in error
    assert (run / "segmenters/finetune-scratch.pt").is_file()


def test_run_of_another_command_is_not_overwritten(tmp_path, scans, refused):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"medmoco": "0.1.0", "command": "train"}')
    error = refused("--input", scans, "--output", run, "--overwrite")
    assert f"--overwrite: {run} is a run of `medmoco train`" in error
    assert (run / "config.json").is_file()


def test_existing_predictions_are_kept_without_overwrite(model, scans, predict, refused):
    output = predict("--model", model, "--input", scans)
    (output / "scan0.nii.gz").write_bytes(b"precious")
    written = ["scan0.nii.gz", "scan1.nii.gz", "scan2.nii.gz"]
    assert "the folder is not empty" in refused("--input", scans, written=written)
    assert (output / "scan0.nii.gz").read_bytes() == b"precious"
    predict("--model", model, "--input", scans, "--overwrite")
    np.testing.assert_array_equal(mask_of(output / "scan0.nii.gz"), hu() > 100)


def test_run_without_a_model_is_refused(tmp_path, scans, refused):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/encoder.pt").write_bytes(b"")
    error = refused("--input", scans, models=[tmp_path / "run"])
    assert "run: expected a run with a trained model in segmenters/, got none" in error
    error = refused("--input", scans, models=[tmp_path / "nowhere"])
    assert "nowhere: expected a run or a segmenter's file, got neither" in error


def test_model_file_of_another_version_or_kind_is_refused(tmp_path, model, scans, refused):
    content = torch.load(model, weights_only=True)
    torch.save(content | {"version": 7}, tmp_path / "newer.pt")
    error = refused("--input", scans, models=[tmp_path / "newer.pt"])
    assert "newer.pt: expected version 1 of a segmenter, got 7" in error
    (tmp_path / "cut.pt").write_bytes(model.read_bytes()[:1000])
    assert "cut.pt: " in refused("--input", scans, models=[tmp_path / "cut.pt"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ("background", "dark")}, "expected the classes of"),
        ({"values": (0, 2)}, "expected the values of"),
        ({"settings": threshold_segmenter(0, axis=1).settings}, "expected the slice axis of"),
    ],
)
def test_models_that_cannot_vote_together_are_refused(
    tmp_path, model, scans, refused, changes, message
):
    other = dataclasses.replace(threshold_segmenter(100), **changes)
    save_segmenter(tmp_path / "other.pt", other)
    error = refused("--input", scans, models=[model, tmp_path / "other.pt"])
    assert f"other.pt: {message} {model}" in error


def test_model_of_three_channels_is_refused(tmp_path, scans, refused):
    network = UNet(Encoder("resnet18", 0.125, in_channels=3), 2)
    save_segmenter(tmp_path / "rgb.pt", dataclasses.replace(threshold_segmenter(0), model=network))
    error = refused("--input", scans, models=[tmp_path / "rgb.pt"])
    assert "rgb.pt: expected a model of 1 channel, got one of 3" in error


@pytest.mark.parametrize(
    ("modality", "low", "message"),
    [
        ("ct", 0, "the model was trained on CT in Hounsfield units, but hardly a voxel"),
        ("mr", -900, "the model was trained on MR, but this looks like CT"),
        ("ct", -900, None),
        ("mr", 0, None),
    ],
)
def test_other_modality_is_warned_of(tmp_path, predict, capsys, modality, low, message):
    path = save_volume(tmp_path / "scan.nii.gz", np.maximum(hu(), low).astype(np.int16), AFFINE)
    save_segmenter(tmp_path / "model.pt", threshold_segmenter(0.5, modality=modality))
    predict("--model", tmp_path / "model.pt", "--input", path)
    printed = capsys.readouterr().out
    assert ("warning: " in printed) == (message is not None)
    assert message is None or f"warning: {path}: {message}" in printed


# Stopping and going on


def test_stopped_prediction_leaves_whole_files_and_goes_on(
    model, scans, predict, monkeypatch, capsys
):
    whole = VolumePredictor.run

    def stop_in_the_second(self, item):
        if item.name == "scan1":
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, item)

    monkeypatch.setattr(VolumePredictor, "run", stop_in_the_second)
    output = predict("--model", model, "--input", scans)
    assert names(output) == ["scan0.nii.gz"]
    assert "finished label maps are kept; --resume goes on from there" in capsys.readouterr().err
    monkeypatch.undo()
    first = (output / "scan0.nii.gz").stat().st_mtime_ns
    (output / ".scan1.nii.gz.abcd_123").write_bytes(b"half")
    predict("--resume")
    assert names(output) == ["scan0.nii.gz", "scan1.nii.gz", "scan2.nii.gz"]
    assert (output / "scan0.nii.gz").stat().st_mtime_ns == first
    assert "finished before: 1 of 3 volumes" in capsys.readouterr().out
    np.testing.assert_array_equal(mask_of(output / "scan1.nii.gz"), hu(seed=1) > 100)


KILLED = """
import os, signal, sys
from medmoco.predict import main
replace = os.replace
def kill_at_the_second(source, target):
    if str(target).endswith("scan1.nii.gz"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = kill_at_the_second
main(sys.argv[1:])
"""


def test_killed_process_leaves_whole_files_alone(model, scans, tmp_path):
    """Killed when a file is written and about to get its name: the last moment of a partial one."""
    output = tmp_path / "masks"
    flags = ["--model", model, "--input", scans, "--output", output, "--save-probabilities"]
    command = [sys.executable, "-c", KILLED, *map(str, flags), "--device", "cpu"]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    seen = {path.name for path in output.iterdir() if not path.name.startswith(".")}
    assert seen == {"config.json", "scan0.nii.gz", "scan0.npz", "scan1.npz"}
    np.testing.assert_array_equal(mask_of(output / "scan0.nii.gz"), hu() > 100)
    assert [path for path in output.iterdir() if path.name.startswith(".")]
    assert run_command(main, ["--output", str(output), "--resume"]) == 0
    assert len(list(output.iterdir())) == 7, "what the killed process left is gone"
    np.testing.assert_array_equal(mask_of(output / "scan1.nii.gz"), hu(seed=1) > 100)


def test_resume_with_other_weights_is_refused(model, scans, predict, refused):
    predict("--model", model, "--input", scans)
    save_segmenter(model, threshold_segmenter(50))
    written = ["scan0.nii.gz", "scan1.nii.gz", "scan2.nii.gz"]
    assert "are of other models" in refused("--resume", written=written)


def test_config_tells_how_the_predictions_were_made(model, scans, predict):
    content = json.loads((predict("--model", model, "--input", scans) / "config.json").read_text())
    assert content["command"] == "predict" and content["model"] == [str(model)]
    assert list(content["models"]) == [str(model)]


@pytest.mark.parametrize(
    ("size", "shape", "batch"),
    [
        (512, (8, 9), 1),
        (1024, (8, 9), 1),
        (64, (8, 9), 64),
        (64, (128, 64), 32),  # rows x columns of the slices, which are more
        (64, (900, 700), 1),
    ],
)
def test_batch_is_chosen_by_the_larger_of_image_and_slice(size, shape, batch):
    pixels = np.zeros((3, *shape), np.uint16)
    members = [
        Member(torch.nn.Identity(), PixelGrid(each, 1.0), pixels) for each in (min(size, 32), size)
    ]
    assert slices_at_once(members, torch.device("cpu")) == batch
