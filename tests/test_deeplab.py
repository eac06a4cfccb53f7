"""DeepLabv3+ against torchvision's atrous pyramid and plain convolutions with the same weights."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torchvision.models.segmentation.deeplabv3 import ASPP

from medmoco.models.decoders import DECODERS, DeepLabV3Plus
from medmoco.models.encoder import OUTPUT_STRIDES, Encoder

OFFSET = 1e6  # above all that the ReLU between the two parts of a separable convolution sees


def small_model(arch="resnet18", output_stride=8, width=0.125, in_channels=1):
    torch.manual_seed(0)
    encoder = Encoder(arch, width, output_stride, in_channels)
    return DeepLabV3Plus(encoder, classes=3).eval()


def with_random_norms(model):
    """Statistics and weights of normalisations as a trained network could have them."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.uniform_(-0.1, 0.1)
            norm.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(norm.weight, 0.5, 2.0)
            nn.init.uniform_(norm.bias, -0.1, 0.5)
    return model


def plain_twin(separable, rate=1):
    """The 3x3 conv-BN-ReLU that equals a separable one without a ReLU between its parts.

    In place, that ReLU is put out of effect: what it reads is raised by OFFSET, and the mean of
    the normalisation at the end by what becomes of it.
    """
    depthwise, first, _ = separable[0]
    pointwise, last, _ = separable[1]
    first.running_mean.zero_()
    first.bias.fill_(OFFSET)
    matrix = pointwise.weight[:, :, 0, 0]
    scale = first.weight / (first.running_var + first.eps).sqrt()
    plain = nn.Conv2d(matrix.shape[1], matrix.shape[0], 3, padding=rate, dilation=rate, bias=False)
    plain.weight.copy_((matrix * scale)[:, :, None, None] * depthwise.weight[:, 0][None])
    norm = nn.BatchNorm2d(len(matrix))
    norm.load_state_dict(last.state_dict())
    last.running_mean += OFFSET * matrix.sum(1)
    return nn.Sequential(plain, norm, nn.ReLU()).eval()


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@torch.no_grad()
@pytest.mark.parametrize(
    ("arch", "stride", "rates"),
    [("resnet18", 8, (12, 24, 36)), ("resnet50", 8, (12, 24, 36)), ("resnet50", 16, (6, 12, 18))],
)
def test_logits_are_those_of_torchvision_s_pyramid_and_plain_convolutions(
    float64, arch, stride, rates
):
    model = with_random_norms(small_model(arch, output_stride=stride))
    encoder = model.encoder
    pyramid = ASPP(encoder.channels[-1], rates, model.classifier.in_channels).eval()
    pyramid.convs[0].load_state_dict(model.scales[0].state_dict())
    for number, rate in enumerate(rates, start=1):
        twin = plain_twin(model.scales[number], rate)
        pyramid.convs[number].load_state_dict(twin.state_dict())
    pyramid.convs[4][1].load_state_dict(model.image_pooling.conv.state_dict())
    pyramid.convs[4][2].load_state_dict(model.image_pooling.norm.state_dict())
    pyramid.project[0].load_state_dict(model.project[0][0].state_dict())
    pyramid.project[1].load_state_dict(model.project[0][1].state_dict())
    first, second = (plain_twin(part) for part in model.refine)

    image = torch.rand(1, 1, 301, 60)  # 38 cells of 8 pixels: the widest kernel fits, if one way
    _, finest, _, _, deepest = encoder.pyramid(image)
    size = finest.shape[-2:]
    context = functional.interpolate(pyramid(deepest), size, mode="bilinear")
    skip_conv, skip_norm, _ = model.skip
    skip = functional.relu(skip_norm(skip_conv(finest)))
    logits = model.classifier(second(first(torch.cat([context, skip], dim=1))))
    expected = functional.interpolate(logits, image.shape[-2:], mode="bilinear")
    torch.testing.assert_close(model(image), expected, rtol=1e-7, atol=1e-8)


@torch.no_grad()
@pytest.mark.parametrize("output_stride", OUTPUT_STRIDES)
@pytest.mark.parametrize("size", [(32, 32), (33, 47)])
def test_logits_have_the_size_of_the_image(output_stride, size):
    model = small_model(output_stride=output_stride)
    assert model(torch.rand(2, 1, *size)).shape == (2, 3, *size)


def test_widths_are_the_paper_s_on_an_encoder_of_width_1():
    with torch.device("meta"):
        model = small_model("resnet50", width=1.0, in_channels=3)
    assert model.classifier.weight.shape == (3, 256, 1, 1)
    assert model.skip[0].weight.shape == (48, 256, 1, 1)
    assert model.project[0][0].weight.shape == (256, 5 * 256, 1, 1)
    assert [branch[0][0].dilation for branch in model.scales[1:]] == [(12, 12), (24, 24), (36, 36)]


def test_gradient_reaches_every_parameter():
    model = small_model().train()
    model(torch.rand(2, 1, 48, 48)).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_a_batch_of_one_image_trains():
    model = small_model().train()
    before = model.image_pooling.norm.running_var.clone()
    model(torch.rand(1, 1, 40, 40)).sum().backward()
    assert model.image_pooling.conv.weight.grad.isfinite().all()
    assert torch.equal(model.image_pooling.norm.running_var, before)
    model(torch.rand(2, 1, 40, 40))
    assert not torch.equal(model.image_pooling.norm.running_var, before)


@torch.no_grad()
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50"])
def test_every_decoder_stands_on_every_encoder(name, arch):
    model = DECODERS[name](Encoder(arch, 0.125, 8), 4).eval()
    assert model(torch.rand(1, 1, 40, 56)).shape == (1, 4, 40, 56)
