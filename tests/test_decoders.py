import pytest
import torch
from torch.nn import functional

from medmoco.models.decoders import LinearDecoder, UNet
from medmoco.models.encoder import OUTPUT_STRIDES, Encoder


def small_encoder(arch="resnet18", output_stride=16):
    torch.manual_seed(0)
    return Encoder(arch, width=0.125, output_stride=output_stride)


@pytest.mark.parametrize("output_stride", OUTPUT_STRIDES)
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (50, 31)])
def test_unet_returns_logits_of_the_size_of_the_image(output_stride, size):
    model = UNet(small_encoder(output_stride=output_stride), classes=3).eval()
    assert model(torch.rand(2, 1, *size)).shape == (2, 3, *size)


def test_unet_stands_on_bottlenecks_too():
    model = UNet(small_encoder("resnet50"), classes=2).eval()
    assert model(torch.rand(1, 1, 32, 32)).shape == (1, 2, 32, 32)


def test_gradient_of_the_unet_reaches_every_parameter():
    model = UNet(small_encoder(), classes=3)
    model(torch.rand(2, 1, 48, 48)).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_decoder_of_the_unet_grows_with_the_width_of_the_encoder():
    def size(width):
        model = UNet(Encoder("resnet18", width), classes=2)
        return sum(p.numel() for p in model.blocks.parameters())

    assert 12 < size(0.5) / size(0.125) < 20  # channels x 4, weights x 16


@pytest.mark.parametrize("size", [(32, 32), (33, 47)])
def test_linear_decoder_returns_logits_of_the_size_of_the_image(size):
    model = LinearDecoder(small_encoder(output_stride=4), classes=5)
    assert model(torch.rand(2, 1, *size)).shape == (2, 5, *size)


def test_linear_decoder_is_a_linear_map_of_normalised_features():
    encoder = small_encoder(output_stride=4)
    model = LinearDecoder(encoder, classes=2)
    model.norm.running_mean.uniform_()
    model.norm.running_var.uniform_(0.5, 2)
    image = torch.rand(1, 1, 32, 32)
    features = (encoder(image) - model.norm.running_mean[:, None, None]) / (
        model.norm.running_var[:, None, None] + model.norm.eps
    ).sqrt()
    weight, bias = model.classifier.weight[:, :, 0, 0], model.classifier.bias
    logits = torch.einsum("kc,bchw->bkhw", weight, features) + bias[:, None, None]
    expected = functional.interpolate(logits, (32, 32), mode="bilinear")
    torch.testing.assert_close(model(image), expected)


def test_encoder_of_the_linear_decoder_stays_frozen_in_training_mode():
    model = LinearDecoder(small_encoder(output_stride=4), classes=2).train()
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    model(torch.rand(2, 1, 32, 32)).sum().backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(value, before[name]), name
