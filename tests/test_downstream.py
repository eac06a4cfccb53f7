"""What each model of the segmentation starts from, and how it is tested."""

import dataclasses

import pytest
import torch

from medmoco import downstream
from medmoco.models.decoders import DECODERS
from medmoco.models.encoder import Encoder
from medmoco.segment import SegmentConfig, prepare


class Started(Exception):
    """The training was about to begin with this encoder."""

    def __init__(self, encoder: Encoder):
        self.weights = {name: value.clone() for name, value in encoder.state_dict().items()}


@pytest.fixture
def segmentation(tiny_task, tmp_path):
    config = SegmentConfig(
        task=tiny_task,
        cache=tmp_path / "cache",
        arch="resnet18",
        width=0.125,
        epochs=1,
        device="cpu",
    )
    return prepare(config)


@pytest.fixture
def weights_at_the_start(segmentation, tmp_path, monkeypatch):
    """The encoder's weights when the training of a stage begins, by stage and initialisation."""

    def linear_evaluation(encoder, *args, **kwargs):
        raise Started(encoder)

    def finetune(model, *args, **kwargs):
        raise Started(model.encoder)

    monkeypatch.setattr(downstream, "linear_evaluation", linear_evaluation)
    monkeypatch.setattr(downstream, "finetune", finetune)

    def start(stage: str, initialisation: str, encoder: Encoder | None) -> dict:
        with pytest.raises(Started) as started:
            segmentation.run(stage, initialisation, encoder, tmp_path / "run")
        return started.value.weights

    return start


@pytest.mark.parametrize("stage", ["linear", "finetune"])
def test_pretrained_model_starts_from_the_weights_it_was_given(weights_at_the_start, stage):
    torch.manual_seed(5)
    encoder = Encoder("resnet18", width=0.125, output_stride=8)
    torch.nn.init.normal_(encoder.bn1.running_mean)
    weights = weights_at_the_start(stage, "pretrained", encoder)
    for name, value in encoder.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(("stage", "control"), [("linear", "random"), ("finetune", "scratch")])
def test_control_starts_from_weights_that_only_the_seed_decides(
    weights_at_the_start, stage, control
):
    torch.manual_seed(5)
    one = weights_at_the_start(stage, control, None)
    torch.manual_seed(6)
    other = weights_at_the_start(stage, control, None)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=0)


def test_statistics_of_the_frozen_random_encoder_are_those_of_slices(weights_at_the_start):
    weights = weights_at_the_start("linear", "random", None)
    assert weights["bn1.running_mean"].abs().max() > 0
    assert weights_at_the_start("finetune", "scratch", None)["bn1.running_mean"].abs().max() == 0


@pytest.mark.parametrize(("stage", "control"), [("linear", "random"), ("finetune", "scratch")])
def test_models_are_tested_in_eval_mode(segmentation, tmp_path, monkeypatch, stage, control):
    class Tested(Exception):
        """The model was about to be tested."""

    def evaluate(model, *args, **kwargs):
        assert not any(module.training for module in model.modules())
        raise Tested

    monkeypatch.setattr(downstream, "evaluate", evaluate)
    monkeypatch.setattr("medmoco.linear.MAX_PIXELS", 2**9)
    with pytest.raises(Tested):
        segmentation.run(stage, control, None, tmp_path)


@pytest.mark.parametrize("decoder", sorted(DECODERS.keys() - {"linear"}))
def test_fine_tuning_starts_from_the_frequencies_of_the_classes(
    segmentation, tmp_path, monkeypatch, decoder
):
    def finetune(model, dataset, shown, **settings):
        raise Started(model)

    monkeypatch.setattr(downstream, "finetune", finetune)
    segmentation.config = dataclasses.replace(segmentation.config, decoder=decoder)
    with pytest.raises(Started) as started:
        segmentation.run("finetune", "scratch", None, tmp_path)
    labels = torch.stack([item["label"] for item in segmentation.dataset])
    share = labels.flatten().bincount() / labels.numel()
    start = started.value.weights["classifier.bias"].softmax(dim=0)
    torch.testing.assert_close(start, share, rtol=0.1, atol=1e-4)


@pytest.mark.parametrize(
    ("decoder", "asked", "stride"),
    [("unet", None, 16), ("deeplab", None, 8), ("deeplab", 4, 4), ("unet", 4, 4)],
)
def test_fine_tuning_trains_the_decoder_and_output_stride_asked_for(
    segmentation, tmp_path, monkeypatch, decoder, asked, stride
):
    def finetune(model, *args, **kwargs):
        assert type(model) is DECODERS[decoder]
        assert model.encoder.output_stride == stride
        raise Started(model.encoder)

    monkeypatch.setattr(downstream, "finetune", finetune)
    flags = {"decoder": decoder, "output_stride": asked}
    segmentation.config = dataclasses.replace(segmentation.config, **flags)
    with pytest.raises(Started):
        segmentation.run("finetune", "scratch", None, tmp_path / "run")
