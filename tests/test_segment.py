import dataclasses
import json
import os
import signal

import nibabel
import numpy as np
import pytest
import torch

from medmoco.command import run_command
from medmoco.data.slices import PixelGrid
from medmoco.downstream import Segmentation
from medmoco.models.encoder import Encoder, save_encoder
from medmoco.models.segmenter import load_segmenter
from medmoco.report.cases import choose_cases, read_cases, read_prediction
from medmoco.report.run_folder import MODEL_FOLDERS
from medmoco.segment import SegmentConfig, main, prepare, with_encoder

SMALL = ["--width", "0.125", "--device", "cpu", "--seed", "1"]


def segment(task, output, *flags):
    arguments = ["--task", task, "--output", output, "--cache", output.parent / "cache", *flags]
    return run_command(main, [str(argument) for argument in [*arguments, *SMALL]])


def summary_of(output):
    return json.loads((output / "summary.json").read_text())


def fails(capsys, *arguments):
    """Runs the command, expects exit status 2, returns the message."""
    assert segment(*arguments) == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module", autouse=True)
def few_pixels():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medmoco.linear.MAX_PIXELS", 2**11)
        yield


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoder") / "encoder.pt"
    encoder = Encoder("resnet18", width=0.125, output_stride=8)
    whitening = {"weight": torch.randn(64, 8, 1, 1), "mean": torch.ones(64)}
    save_encoder(path, encoder, method="medmoco", image_size=48, modality="ct", whitening=whitening)
    return path


@pytest.fixture(scope="module")
def finished(tiny_task, encoder_file, tmp_path_factory):
    """A run of every model."""
    output = tmp_path_factory.mktemp("segment") / "run"
    assert segment(tiny_task, output, "--encoder", encoder_file, "--epochs", "3") == 0
    return output


def test_summary_holds_every_model_and_its_control(finished):
    summary = summary_of(finished)
    results = [
        summary["linear"],
        summary["finetune"],
        summary["controls"]["linear_random"],
        summary["controls"]["finetune_scratch"],
    ]
    for result in results:
        assert 0 <= result["dice_mean"] <= 1
        assert list(result["dice_per_class"]) == summary["classes"][1:]
        assert len(result["dice_per_volume"]) == 2  # a fifth of ten patients
        assert result["seconds"] > 0
    assert summary["linear"]["weight_decay"] in (1e-2, 1e-3, 1e-4, 0.0)
    assert summary["method"] == "medmoco"


def test_label_maps_lie_on_the_grid_of_their_images_and_hold_the_values_of_the_labels(
    finished, tiny_task
):
    split = json.loads((finished / "split.json").read_text())
    for case in split["test"]:
        predicted = nibabel.load(finished / f"predictions/linear-pretrained/{case}.nii.gz")
        image = nibabel.load(tiny_task / f"imagesTr/{case}.nii.gz")
        labels = json.loads((tiny_task / "dataset.json").read_text())["labels"]
        assert predicted.shape == image.shape
        np.testing.assert_allclose(predicted.affine, image.affine, atol=1e-5)
        assert set(np.unique(np.asarray(predicted.dataobj))) <= set(range(len(labels)))


def test_test_cases_are_kept_for_the_report(finished, tiny_task):
    shown = read_cases(finished)
    scores = json.loads((finished / "summary.json").read_text())["finetune"]["dice_per_volume"]
    assert [case.case for case in shown] == choose_cases(scores) and len(shown) == 2
    for case in shown:
        label = nibabel.load(tiny_task / f"labelsTr/{case.case}.nii.gz")
        voxels = nibabel.as_closest_canonical(label).dataobj
        expected = np.moveaxis(np.asarray(voxels)[::-1, ::-1], case.axis, 0).swapaxes(1, 2)
        assert case.axis == 2 and (case.truth == expected).all() and case.truth.any()
        for folder in MODEL_FOLDERS.values():
            path = finished / "predictions" / folder / f"{case.case}.nii.gz"
            assert read_prediction(path, case).shape == case.truth.shape


def test_metrics_show_the_loss_going_down(finished):
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    for stage, encoder in (("linear", "pretrained"), ("finetune", "scratch")):
        losses = [r["loss"] for r in records if (r["stage"], r["encoder"]) == (stage, encoder)]
        assert losses[-1] < losses[0]
    assert [r["epoch"] for r in records if r["encoder"] == "scratch"] == [1, 2, 3]


def test_resume_repeats_only_what_is_missing(finished):
    kept = finished / "predictions/linear-random/result.json"
    lost = finished / "predictions/linear-pretrained/result.json"
    written = kept.stat().st_mtime_ns
    before = summary_of(finished)
    lost.unlink()
    trained = (before["finetune"], before["controls"]["finetune_scratch"])
    assert run_command(main, ["--output", str(finished), "--resume"]) == 0
    assert lost.is_file()
    assert kept.stat().st_mtime_ns == written
    again = summary_of(finished)
    assert again["controls"] == before["controls"]
    assert again["seconds"]["segment"] > sum(result["seconds"] for result in trained)
    assert again["linear"]["dice_per_volume"] == before["linear"]["dice_per_volume"]
    lines = (finished / "metrics.jsonl").read_text().splitlines()
    steps = [(r["stage"], r["encoder"], r["step"]) for r in map(json.loads, lines)]
    assert len(steps) == len(set(steps)), "a repeated training replaces the records of the first"


def test_another_encoder_does_not_get_the_result_of_the_first(finished, tiny_task):
    flags = json.loads((finished / "config.json").read_text())
    config = SegmentConfig(
        task=tiny_task,
        cache=finished.parent / "cache",
        arch="resnet18",
        width=0.125,
        epochs=1,
        device="cpu",
        seed=flags["seed"],
    )
    segmentation = prepare(config)
    first, second = Encoder("resnet18", 0.125), Encoder("resnet18", 0.125)
    assert segmentation.identity(first) == segmentation.identity(first)
    assert segmentation.identity(first) != segmentation.identity(second)


def test_same_seed_gives_the_same_label_maps(tiny_task, tmp_path):
    maps = []
    for name in ("first", "second"):
        output = tmp_path / name
        assert segment(tiny_task, output, "--mode", "finetune", "--epochs", "2") == 0
        (case, *_) = sorted((output / "predictions/finetune-scratch").glob("*.nii.gz"))
        maps.append(np.asarray(nibabel.load(case).dataobj))
    np.testing.assert_array_equal(*maps)


def test_without_an_encoder_only_the_controls_run(tiny_task, tmp_path, capsys):
    assert segment(tiny_task, tmp_path / "run", "--mode", "linear") == 0
    summary = summary_of(tmp_path / "run")
    assert summary["linear"] is None and summary["finetune"] is None
    assert list(summary["controls"]) == ["linear_random"]
    printed = capsys.readouterr().out
    assert "linear, random" in printed
    assert f"next:        python -m medmoco.report {tmp_path / 'run'}" in printed


def test_images_take_size_and_spacing_from_the_encoder_and_grow_where_slices_do_not_fit(
    tiny_task, tmp_path
):
    config = SegmentConfig(task=tiny_task, cache=tmp_path, arch="resnet18", width=0.125)
    fine = prepare(config, {"image_size": 32, "spacing": 4.0, "modality": "ct"}).grid
    assert fine.spacing == 4.0 and fine.size > 32 and fine.size % 32 == 0
    assert prepare(config, {"image_size": 128, "spacing": 10.0}).grid == PixelGrid(128, 10.0)


def test_sigterm_stops_at_once_with_status_0(tiny_task, tmp_path, monkeypatch, capsys):
    def terminate(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on after SIGTERM")

    monkeypatch.setattr(Segmentation, "run", terminate)
    before = signal.getsignal(signal.SIGTERM)
    assert segment(tiny_task, tmp_path / "run") == 0
    assert "--resume goes on from there" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_flags_of_pretraining_are_not_taken_for_those_of_fine_tuning(tiny_task, tmp_path, capsys):
    output = tmp_path / "run"
    output.mkdir()
    config = {"medmoco": "0.1.0", "command": "train", "task": str(tiny_task), "lr": 0.03}
    path = output / "config.json"
    path.write_text(json.dumps(config))
    for flags in (["--resume"], ["--config", str(path)]):
        assert run_command(main, ["--output", str(output), *flags]) == 2
        message = f"{path}: the flags of `medmoco train` have other meanings here"
        assert message in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == ["config.json"]


@pytest.mark.parametrize("flag", ["--epochs", "--batch-size", "--lr", "--image-size", "--spacing"])
def test_flag_that_must_be_positive_is_named(flag, tiny_task, tmp_path, capsys):
    message = fails(capsys, tiny_task, tmp_path / "run", flag, "0")
    assert f"{flag}: expected a value above 0, got 0" in message


def test_map_of_a_single_cell_is_refused(tiny_task, tmp_path, capsys):
    flags = ("--image-size", "32", "--output-stride", "32")
    message = fails(capsys, tiny_task, tmp_path / "run", *flags)
    assert "--image-size 32: expected more than the 32 pixels of a cell" in message
    assert not (tmp_path / "run").exists()


def test_folder_without_a_task_is_refused(tmp_path, capsys):
    message = fails(capsys, tmp_path / "nothing", tmp_path / "run")
    assert "nothing: expected the folder of a labelled data set, got no folder" in message
    assert not (tmp_path / "run").exists()


def test_encoder_of_another_architecture_is_refused(tiny_task, encoder_file, tmp_path, capsys):
    flags = ("--encoder", encoder_file, "--arch", "resnet50")
    message = fails(capsys, tiny_task, tmp_path / "run", *flags)
    assert "--arch resnet50 was given, the file has resnet18" in message


def test_file_that_is_no_encoder_is_refused_before_anything_is_written(tiny_task, tmp_path, capsys):
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    flags = ("--encoder", tmp_path / "other.pt")
    message = fails(capsys, tiny_task, tmp_path / "run", *flags)
    assert (
        "other.pt: expected an encoder.pt of medmoco or a ResNet in torchvision's keys" in message
    )
    assert not (tmp_path / "run").exists()


def test_task_that_is_missing_is_asked_for(tmp_path, capsys):
    assert run_command(main, ["--output", str(tmp_path / "run")]) == 2
    assert "--task: expected the folder of a labelled data set, got none" in capsys.readouterr().err


def test_an_encoder_that_has_seen_test_patients_is_warned_of(tiny_task, tmp_path, capsys):
    torch.manual_seed(0)
    cases = sorted(path.name.removesuffix(".nii.gz") for path in (tiny_task / "imagesTr").iterdir())
    encoder = Encoder("resnet18", width=0.125, output_stride=8)
    for patients, warned in ((cases, True), (["somebody else"], False)):
        path = tmp_path / f"encoder{warned}.pt"
        save_encoder(path, encoder, image_size=48, modality="ct", patients=patients)
        flags = ["--encoder", path, "--mode", "finetune", "--epochs", "1", "--no-controls"]
        assert segment(tiny_task, tmp_path / f"run{warned}", *flags) == 0
        message = "2 of the 2 test patients have the name of a patient that the encoder"
        assert (message in capsys.readouterr().out) == warned
        assert bool(summary_of(tmp_path / f"run{warned}")["warnings"]) == warned


def test_deeplab_is_fine_tuned_where_it_is_asked_for(tiny_task, tmp_path):
    flags = ["--mode", "finetune", "--decoder", "deeplab", "--epochs", "1"]
    assert segment(tiny_task, tmp_path / "run", *flags) == 0
    assert 0 <= summary_of(tmp_path / "run")["controls"]["finetune_scratch"]["dice_mean"] <= 1


def test_a_kept_whitening_is_part_of_the_encoder(encoder_file):
    keep = SegmentConfig(encoder=encoder_file, keep_whitening=True)
    _, encoder, metadata = with_encoder(keep)
    _, plain, _ = with_encoder(dataclasses.replace(keep, keep_whitening=False))
    image = torch.rand(1, 1, 48, 48)
    cells = plain(image) - metadata["whitening"]["mean"][:, None, None]
    weight = metadata["whitening"]["weight"][:, :, 0, 0].unflatten(0, (8, 8))
    expected = torch.einsum("gij,bgjhw->bgihw", weight, cells.unflatten(1, (8, 8))).flatten(1, 2)
    torch.testing.assert_close(encoder(image), expected, rtol=1e-4, atol=1e-4)


def test_a_whitening_that_is_not_there_cannot_be_kept(tiny_task, tmp_path, capsys):
    path = tmp_path / "encoder.pt"
    save_encoder(path, Encoder("resnet18", width=0.125), whitening=None)
    flags = ("--encoder", path, "--keep-whitening")
    message = fails(capsys, tiny_task, tmp_path / "run", *flags)
    assert f"--keep-whitening: {path}: it holds no whitening after pooling" in message
    message = fails(capsys, tiny_task, tmp_path / "run", "--keep-whitening")
    assert "--keep-whitening: expected --encoder with it" in message


def test_weights_of_others_are_evaluated_with_statistics_of_slices(
    tiny_task, tmp_path, monkeypatch, capsys
):
    """Of the input's scale, which is that of other images, nothing is left."""
    torch.manual_seed(0)
    state = Encoder("resnet18", width=0.125, in_channels=3).state_dict()
    seen = []
    result = {"dice_mean": 0.5, "dice_per_volume": {}, "seconds": 1.0}
    monkeypatch.setattr(Segmentation, "run", lambda *given: seen.append(given[3]) or result)
    monkeypatch.setattr("medmoco.segment.dice_table", lambda results: "")
    for scale in (1.0, 50.0):
        path = tmp_path / f"{scale}.pth"
        torch.save({**state, "conv1.weight": scale * state["conv1.weight"]}, path)
        flags = ["--encoder", path, "--mode", "linear", "--no-controls"]
        assert segment(tiny_task, tmp_path / f"run{scale}", *flags) == 0
    first, second = seen
    assert "3 channels summed into 1" in capsys.readouterr().out
    assert second.bn1.running_var.mean() > 1000 * first.bn1.running_var.mean() > 0
    image = torch.rand(1, 1, 48, 48)
    torch.testing.assert_close(second(image), first(image), rtol=0.05, atol=0.05)


def test_every_model_is_kept_with_what_prediction_needs(finished, tiny_task):
    labels = json.loads((tiny_task / "dataset.json").read_text())["labels"]
    for name in ("linear-pretrained", "linear-random", "finetune-pretrained", "finetune-scratch"):
        segmenter = load_segmenter(finished / f"segmenters/{name}.pt")
        assert dict(zip(map(str, segmenter.values), segmenter.classes, strict=True)) == labels
        assert segmenter.decoder == ("linear" if name.startswith("linear") else "unet")
        assert (segmenter.settings.modality, segmenter.settings.slice_axis) == ("ct", 2)


def test_a_stage_without_its_model_is_not_finished(finished):
    model = finished / "segmenters/linear-random.pt"
    result = finished / "predictions/linear-random/result.json"
    before, weights = json.loads(result.read_text())["result"], load_segmenter(model).model
    model.unlink()
    assert run_command(main, ["--output", str(finished), "--resume"]) == 0
    assert json.loads(result.read_text())["result"]["dice_per_volume"] == before["dice_per_volume"]
    for name, value in load_segmenter(model).model.state_dict().items():
        torch.testing.assert_close(value, weights.state_dict()[name], rtol=0, atol=0)
