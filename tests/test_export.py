"""Exported weights load elsewhere, and do there what they do here."""

import builtins
import json

import numpy as np
import pytest
import torch

from medmoco import export
from medmoco.command import run_command
from medmoco.data.slices import PixelGrid
from medmoco.data.store import CacheSettings
from medmoco.errors import UserError
from medmoco.models.decoders import DECODERS
from medmoco.models.encoder import Encoder, save_encoder
from medmoco.models.segmenter import Segmenter, save_segmenter
from medmoco.models.whitening import MapWhitening, ZCAWhitening, replace_last_norm


def command(*arguments):
    return run_command(export.main, [str(argument) for argument in arguments])


def trained(arch="resnet18", width=1.0, whiten=False):
    """An encoder whose statistics are those of images; its last norm can be a whitening."""
    torch.manual_seed(0)
    encoder = Encoder(arch, width)
    if whiten:
        replace_last_norm(encoder, ZCAWhitening(encoder.channels[-1], 8))
    encoder.train()(torch.rand(8, 1, 64, 64))
    return encoder.eval()


def segmenter_of(decoder, width=0.125, whiten=False):
    torch.manual_seed(0)
    model = DECODERS[decoder](Encoder("resnet18", width, output_stride=8), 3)
    if whiten:
        model.encoder.whitening = MapWhitening(model.encoder.channels[-1], 16)
        model.encoder.whitening.mean.normal_()
    model.encoder.train()(torch.rand(4, 1, 48, 48))
    return Segmenter(
        model.eval(),
        decoder,
        ("background", "liver", "spleen"),
        (0, 7, 300),
        PixelGrid(48, 1.5),
        CacheSettings("ct", 1, (-100.0, 300.0), 2),
    )


@pytest.fixture(scope="module", params=["resnet18", "resnet50"])
def encoder_file(request, tmp_path_factory):
    """The file of an encoder, the encoder before it was folded, its name."""
    path = tmp_path_factory.mktemp("export") / "encoder.pt"
    encoder = trained(request.param, whiten=True)
    save_encoder(path, encoder, method="zca")
    return path, encoder, request.param


def last_map(library, network, images):
    if library == "timm":
        return network.forward_features(images)
    if library == "segmentation_models_pytorch":
        return network.encoder.eval()(images)[-1]
    for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
        images = getattr(network, name)(images)
    return images


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("library", ["torchvision", "timm", "segmentation_models_pytorch"])
def test_exported_weights_load_strictly_by_the_printed_code_and_give_the_same_features(
    encoder_file, tmp_path, capsys, library, channels
):
    pytest.importorskip(library)
    path, encoder, _ = encoder_file
    output = tmp_path / "exported.pt"
    flags = ["--to", "torchvision", "--channels", channels, "--output", output]
    assert command("--encoder", path, *flags) == 0
    load, *paragraphs = capsys.readouterr().out.split("\n\n")[1:]
    (code,) = (text for text in paragraphs if f"import {library}" in text)
    names: dict = {}
    exec(load + "\n" + code, names)
    network = names["network"].eval()
    images = torch.rand(2, 1, 64, 96)
    expected = encoder(images)
    found = last_map(library, network, images.expand(-1, channels, -1, -1))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_a_run_exports_its_encoder_and_a_segmenter_its_own(tmp_path, capsys):
    encoder = trained()
    save_encoder(tmp_path / "encoder.pt", encoder)
    assert command("--run", tmp_path, "--to", "torchvision") == 0
    assert "import timm" in capsys.readouterr().out
    exported = torch.load(tmp_path / "encoder-torchvision.pt", weights_only=True)
    assert torch.equal(exported["layer1.0.conv1.weight"], encoder.layer1[0].conv1.weight)

    segmenter = segmenter_of("linear", width=1.0)
    save_segmenter(tmp_path / "model.pt", segmenter)
    assert command("--model", tmp_path / "model.pt", "--to", "torchvision") == 0
    exported = torch.load(tmp_path / "model-torchvision.pt", weights_only=True)
    assert torch.equal(exported["conv1.weight"], segmenter.encoder.conv1.weight)


@torch.no_grad()
@pytest.mark.parametrize(("decoder", "whiten"), [("unet", True), ("deeplab", False)])
def test_onnxruntime_runs_a_segmenter_to_the_same_logits(tmp_path, capsys, decoder, whiten):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    onnxruntime = pytest.importorskip("onnxruntime")
    segmenter = segmenter_of(decoder, whiten=whiten)
    run = tmp_path / "run"
    (run / "segmenters").mkdir(parents=True)
    save_segmenter(run / "segmenters" / "finetune-pretrained.pt", segmenter)
    assert command("--run", run, "--to", "onnx", "--output", tmp_path / "model.onnx") == 0
    assert "onnxruntime.InferenceSession" in capsys.readouterr().out

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for batch in (1, 3):
        images = torch.rand(batch, 1, 48, 48)
        expected = segmenter.model(images)
        (logits,) = session.run(["logits"], {"image": images.numpy()})
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == ["background", "liver", "spleen"]
    assert json.loads(about["values"]) == [0, 7, 300]
    assert (json.loads(about["image_size"]), json.loads(about["spacing"])) == (48, 1.5)
    assert (json.loads(about["modality"]), json.loads(about["window"])) == ("ct", [-100.0, 300.0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "run"]
    assert b".py" not in (tmp_path / "model.onnx").read_bytes(), "a path of this machine"


def test_onnx_without_its_packages_names_the_extra(tmp_path, monkeypatch, capsys):
    save_segmenter(tmp_path / "model.pt", segmenter_of("linear"))
    real = builtins.__import__

    def without_onnx(name, *arguments, **options):
        if name.startswith("onnx"):
            raise ModuleNotFoundError("no", name="onnx")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_onnx)
    assert command("--model", tmp_path / "model.pt", "--to", "onnx") == 2
    monkeypatch.undo()
    assert "onnx is missing: pip install 'medmoco[onnx]'" in capsys.readouterr().err
    assert not (tmp_path / "model.onnx").exists()


@pytest.fixture
def narrow(tmp_path):
    """A folder that is a run of narrow models."""
    save_encoder(tmp_path / "encoder.pt", Encoder("resnet18", 0.125))
    for run in (".", "folds/fold_0", "folds/fold_1"):
        path = tmp_path / run / "segmenters" / "linear-random.pt"
        path.parent.mkdir(parents=True)
        save_segmenter(path, segmenter_of("linear"))
    for name in ("there.onnx", "text.pt"):
        (tmp_path / name).write_text("mine")
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--run .", "--to: expected torchvision or onnx, got none"),
        ("--to onnx", "--run: expected one of --run, --encoder and --model, got none"),
        (
            "--to onnx --run . --model segmenters/linear-random.pt",
            "--run: expected one of --run, --encoder and --model, got --run and --model",
        ),
        ("--to onnx --encoder encoder.pt", "--to onnx: expected --run or --model"),
        (
            "--to torchvision --run .",
            "--to torchvision: expected an encoder of width 1, got 0.125: torchvision's resnet18",
        ),
        ("--to torchvision --run segmenters", "--run segmenters: expected encoder.pt in it"),
        ("--to torchvision --encoder none.pt", "none.pt: no such file"),
        ("--to torchvision --encoder text.pt", "text.pt: expected a file of tensors"),
        ("--to onnx --model text.pt", "text.pt: expected a file of tensors"),
        ("--to onnx --model encoder.pt", "encoder.pt: expected a segmenter of format"),
        ("--to onnx --run . --channels 3", "--channels 3: only --to torchvision can change them"),
        ("--to onnx --run folds", "--run folds: expected one model, got folds/fold_0/segmenters/l"),
        ("--to onnx --model none.pt", "none.pt: expected a run or a segmenter's file"),
        (
            "--to onnx --run . --output there.onnx",
            "--output there.onnx: the file exists; add --overwrite",
        ),
        (
            "--to onnx --run . --output segmenters",
            "--output segmenters: expected a file, got a folder",
        ),
        ("--to onnx --run . --output none/x.onnx", "expected a file in an existing folder"),
        (
            "--to torchvision --run . --overwrite --output encoder.pt",
            "--output encoder.pt: expected another file than the one to export",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused(narrow, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(narrow)
    before = {path: path.read_bytes() for path in narrow.rglob("*") if path.is_file()}
    assert command(*flags.split()) == 2
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in narrow.rglob("*") if path.is_file()} == before


def test_channels_and_layers_that_torchvision_has_not_are_named():
    with pytest.raises(UserError, match="--channels 1: the encoder takes images of 2 channels"):
        export.torchvision_state(Encoder("resnet18", in_channels=2))
    encoder = Encoder("resnet18")
    encoder.whitening = MapWhitening(512, 64)
    with pytest.raises(UserError, match="expected an encoder without a whitening at its end"):
        export.torchvision_state(encoder)
