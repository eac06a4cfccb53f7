"""The file of a segmenter: what goes in comes out, and nothing that is broken gets in."""

import dataclasses
import json

import pytest
import torch

import medmoco
from medmoco.data.slices import PixelGrid
from medmoco.data.store import CacheSettings
from medmoco.errors import UserError
from medmoco.models.decoders import DECODERS
from medmoco.models.encoder import Encoder
from medmoco.models.segmenter import Segmenter, find_segmenters, load_segmenter, save_segmenter
from medmoco.models.whitening import MapWhitening, ZCAWhitening, replace_last_norm


def small(decoder="unet", **changes):
    torch.manual_seed(0)
    model = DECODERS[decoder](Encoder("resnet18", 0.125, output_stride=8), 3).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    segmenter = Segmenter(
        model,
        decoder,
        ("background", "liver", "spleen"),
        (0, 7, 300),
        PixelGrid(48, 1.5),
        CacheSettings("ct", 1, (-100.0, 300.0), 2),
    )
    return dataclasses.replace(segmenter, **changes)


@pytest.mark.parametrize("decoder", DECODERS)
def test_saved_segmenter_comes_back_with_the_same_outputs(tmp_path, decoder):
    segmenter, path = small(decoder), tmp_path / "model.pt"
    save_segmenter(path, segmenter)
    before = torch.get_rng_state()
    loaded = load_segmenter(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in loaded.model.modules())
    for field in dataclasses.fields(Segmenter):
        if field.name != "model":
            assert getattr(loaded, field.name) == getattr(segmenter, field.name)
    assert loaded.encoder.output_stride == 8
    images = torch.rand(2, 1, 48, 40)
    with torch.no_grad():
        assert torch.equal(loaded.model(images), segmenter.model(images))


def test_file_says_which_medmoco_wrote_it_and_needs_no_code_to_be_read(tmp_path):
    save_segmenter(tmp_path / "model.pt", small())
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    assert (content["format"], content["version"]) == ("medmoco.segmenter", 1)
    assert content["medmoco"] == medmoco.__version__
    settings = {k: v for k, v in content.items() if k != "state_dict"}
    assert json.loads(json.dumps(settings)) == settings


def test_whitening_inside_the_encoder_is_folded(tmp_path):
    segmenter = small()
    replace_last_norm(segmenter.encoder, ZCAWhitening(segmenter.encoder.channels[-1], 16))
    segmenter.model.train()(torch.randn(8, 1, 48, 48))  # its statistics
    segmenter.model.eval()
    save_segmenter(tmp_path / "model.pt", segmenter)
    loaded = load_segmenter(tmp_path / "model.pt")
    images = torch.rand(2, 1, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(images), segmenter.model(images))


def fold_files(folder, *names):
    """Files that stand for models of folds; "" leaves a fold without one."""
    for number, name in enumerate(names):
        (folder / f"fold_{number}/segmenters").mkdir(parents=True)
        if name:
            (folder / f"fold_{number}/segmenters/{name}.pt").write_bytes(b"")
    return folder


def test_folds_give_one_kind_of_model(tmp_path):
    names = ["finetune-pretrained"] * 3
    found = find_segmenters(fold_files(tmp_path, *names))
    assert [file.parent.parent.name for file in found] == ["fold_0", "fold_1", "fold_2"]


def test_folds_at_different_stages_are_refused(tmp_path):
    fold_files(tmp_path, "finetune-pretrained", "linear-pretrained")
    with pytest.raises(UserError, match="expected one kind of model in all folds, got fold_0/"):
        find_segmenters(tmp_path)


def test_fold_without_a_model_is_named(tmp_path):
    fold_files(tmp_path, "linear-pretrained", "linear-pretrained", "")
    with pytest.raises(UserError, match="fold_2 is not finished"):
        find_segmenters(tmp_path)


def refused(path, message):
    with pytest.raises(UserError, match=message) as caught:
        load_segmenter(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_is_named(tmp_path):
    refused(tmp_path / "none.pt", "no such file")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_file_is_refused(tmp_path, share):
    path = tmp_path / "model.pt"
    save_segmenter(path, small())
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    refused(path, "expected a file of tensors written by torch.save")


def without(content, name):
    return {key: value for key, value in content.items() if key != name}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: {"state_dict": {}}, "expected a segmenter of format 'medmoco.segmenter', got"),
        (lambda c: {**c, "format": "medmoco.encoder"}, "got 'medmoco.encoder'"),
        (lambda c: {**c, "version": 2}, "expected version 1 of a segmenter, got 2"),
        (lambda c: without(c, "version"), "got None"),
        (lambda c: {**c, "decoder": "vgg"}, "settings are damaged: no or unknown 'vgg'"),
        (lambda c: {**c, "decoder": []}, "settings are damaged"),
        (lambda c: without(c, "arch"), "settings are damaged: no or unknown 'arch'"),
        (lambda c: {**c, "arch": "vgg"}, "arch must be one of"),
        (lambda c: {**c, "in_channels": -1}, "settings are damaged"),
        (lambda c: {**c, "classes": ["background"]}, "classes must be 2 to 256 different names"),
        (lambda c: {**c, "classes": ["a", "a", "b"]}, "classes must be 2 to 256 different names"),
        (lambda c: {**c, "classes": "abc"}, "classes must be 2 to 256 different names"),
        (lambda c: {**c, "values": [0, 1]}, "values must be 3 different whole numbers"),
        (lambda c: {**c, "values": [0, 1, 1]}, "values must be 3 different whole numbers"),
        (lambda c: {**c, "values": [0, 1, True]}, "values must be 3 different whole numbers"),
        (lambda c: {**c, "values": [-1, 0, 1]}, "values must lie between 0 and 65535"),
        (lambda c: {**c, "image_size": 0}, "image_size must be a whole number of pixels"),
        (
            lambda c: {**c, "image_size": 48.0},
            "image_size must be a whole number of pixels",
        ),
        (
            lambda c: {**c, "spacing": float("nan")},
            "spacing must be a number of mm above 0",
        ),
        (lambda c: {**c, "modality": "auto"}, "modality must be ct or mr"),
        (lambda c: {**c, "slice_axis": None}, "slice_axis must be 0, 1 or 2"),
        (lambda c: {**c, "slice_axis": 3}, "slice_axis must be 0, 1 or 2, got 3"),
        (
            lambda c: {**c, "window": [0.0]},
            "window must be two rising numbers of HU",
        ),
        (lambda c: {**c, "window": [0.0, float("inf")]}, "window must be two rising numbers"),
        (lambda c: {**c, "window": [5.0, 1.0]}, "two rising numbers of HU"),
        (lambda c: {**c, "channel": -1}, "channel must be a whole number"),
        (lambda c: without(c, "state_dict"), "do not fit unet: expected a state_dict"),
        (lambda c: {**c, "width": 0.25}, "weights do not fit unet: encoder.conv1.weight must be"),
        (
            lambda c: {**c, "classes": ["background", "liver"], "values": [0, 1]},
            "classifier.weight must be",
        ),
    ],
)
def test_damaged_content_is_named(tmp_path, damage, message):
    path = tmp_path / "model.pt"
    save_segmenter(path, small())
    torch.save(damage(torch.load(path, weights_only=True)), path)
    refused(path, message)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    path, segmenter = tmp_path / "model.pt", small()
    with torch.no_grad():
        segmenter.encoder.conv1.weight[0, 0, 1, 2] = value
    save_segmenter(path, segmenter)
    refused(path, r"encoder\.conv1\.weight holds values that are not finite")


@torch.no_grad()
@pytest.mark.parametrize("decoder", DECODERS)
def test_a_kept_whitening_comes_back(tmp_path, decoder):
    segmenter = small(decoder)
    layer = MapWhitening(segmenter.encoder.channels[-1], 16)
    layer.mean.normal_()
    segmenter.encoder.whitening = layer
    save_segmenter(tmp_path / "model.pt", segmenter)
    images = torch.rand(2, 1, 48, 40)
    loaded = load_segmenter(tmp_path / "model.pt").model
    assert torch.equal(loaded(images), segmenter.model(images))
    segmenter.encoder.whitening = None
    assert not torch.equal(loaded(images), segmenter.model(images))


@pytest.mark.parametrize("group", [0, 3, "wide"])
def test_a_whitening_of_another_kind_is_refused(tmp_path, group):
    save_segmenter(tmp_path / "model.pt", small())
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    torch.save({**content, "whitening_group": group}, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"model.pt: the segmenter's settings are damaged"):
        load_segmenter(tmp_path / "model.pt")
