import pickle
from math import inf

import pytest
import torch
import torchvision

from medmoco.errors import UserError
from medmoco.models.encoder import (
    Encoder,
    default_output_stride,
    fold_whitening,
    load_encoder,
    save_encoder,
)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def torchvision_twin(arch, **options):
    """torchvision's own network with statistics that a trained one could have."""
    torch.manual_seed(0)
    network = getattr(torchvision.models, arch)(weights=None, **options).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    network.fc = torch.nn.Identity()
    return network


def last_map(network, images):
    for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
        images = getattr(network, name)(images)
    return images


@torch.no_grad()
@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50"])
def test_torchvision_weights_load_strictly_and_give_the_same_features(arch):
    twin = torchvision_twin(arch)
    encoder = Encoder(arch, in_channels=3).eval()
    encoder.load_state_dict(twin.state_dict(), strict=True)
    assert list(encoder.state_dict()) == list(twin.state_dict())
    images = torch.randn(2, 3, 64, 48)
    assert torch.equal(encoder(images), last_map(twin, images))


@torch.no_grad()
@pytest.mark.parametrize(
    ("stride", "dilate"),
    [(16, [False, False, True]), (8, [False, True, True]), (4, [True, True, True])],
)
def test_dilated_bottlenecks_are_those_of_torchvision(stride, dilate):
    twin = torchvision_twin("resnet50", replace_stride_with_dilation=dilate)
    encoder = Encoder("resnet50", in_channels=3, output_stride=stride).eval()
    encoder.load_state_dict(twin.state_dict())
    images = torch.randn(1, 3, 64, 64)
    found = encoder(images)
    assert found.shape[-2:] == (64 // stride, 64 // stride)
    torch.testing.assert_close(found, last_map(twin, images))


@torch.no_grad()
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("height", [64, 57])
def test_a_finer_output_stride_keeps_the_cells_of_the_coarser_one(arch, height):
    encoder = Encoder(arch, width=0.25).double().eval()
    images = torch.randn(2, 1, height, 64, dtype=torch.float64)
    coarse = encoder(images)
    for stride in (16, 8, 4):
        encoder.set_output_stride(stride)
        step = 32 // stride
        torch.testing.assert_close(encoder(images)[:, :, ::step, ::step], coarse)
    encoder.set_output_stride(32)
    torch.testing.assert_close(encoder(images), coarse)


@torch.no_grad()
def test_the_pyramid_holds_five_maps_from_the_stem_on():
    encoder = Encoder("resnet18", width=0.25, output_stride=8).eval()
    maps = encoder.pyramid(torch.randn(1, 1, 64, 64))
    assert [m.shape[1] for m in maps] == list(encoder.channels) == [16, 16, 32, 64, 128]
    assert [m.shape[-1] for m in maps] == [32, 16, 8, 8, 8]


@pytest.mark.parametrize("width", [0.1, 0.25, 0.3, 1.5])
def test_every_width_gives_channels_that_are_multiples_of_8(width):
    with torch.device("meta"):
        encoder = Encoder("resnet50", width=width)
    channels = [m.out_channels for m in encoder.modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(count % 8 == 0 for count in channels)
    assert encoder.channels[0] == max(8, round(64 * width / 8) * 8)
    assert encoder.channels[-1] == 32 * encoder.channels[0]


def test_convolutions_start_as_torchvision_starts_them():
    torch.manual_seed(0)
    encoder = Encoder("resnet18")
    weight = encoder.layer4[1].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)
    assert encoder.layer4[1].bn2.weight.eq(1).all()


def test_default_output_stride_follows_the_image_size():
    sizes = (64, 96, 97, 256, 257, 512)
    assert [default_output_stride(size) for size in sizes] == [4, 4, 8, 8, 16, 16]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("vgg",), "arch must be one of resnet18, resnet34, resnet50, got 'vgg'"),
        (("resnet18", 0.0), "width must be above 0 and at most 16, got 0.0"),
        (("resnet18", float("nan")), "width must be above 0"),
        (("resnet18", 1.0, 2), r"output_stride must be one of \(32, 16, 8, 4\), got 2"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        Encoder(*settings)


def small_encoder():
    torch.manual_seed(1)
    encoder = Encoder("resnet18", width=0.125, output_stride=8)
    encoder(torch.randn(4, 1, 32, 32))  # moves the running statistics
    return encoder


@torch.no_grad()
def test_a_saved_encoder_comes_back_with_its_metadata(tmp_path):
    encoder = small_encoder()
    path = tmp_path / "encoder.pt"
    metadata = {"image_size": 64, "spacing": 1.5, "window": (-175.0, 250.0), "method": "medmoco"}
    save_encoder(path, encoder, **metadata)
    before = torch.get_rng_state()
    loaded, found = load_encoder(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert found == metadata
    assert (loaded.arch, loaded.width, loaded.output_stride) == ("resnet18", 0.125, 8)
    assert not loaded.training
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(loaded(images), encoder.eval()(images))
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_saving_leaves_the_encoder_in_training_mode(tmp_path):
    encoder = small_encoder()
    save_encoder(tmp_path / "encoder.pt", encoder)
    assert encoder.training and encoder.layer4.training


def test_folding_a_plain_encoder_gives_an_equal_copy():
    encoder = small_encoder()
    folded = fold_whitening(encoder)
    assert folded is not encoder
    for name, value in encoder.state_dict().items():
        assert torch.equal(folded.state_dict()[name], value), name


def refused(path, message):
    with pytest.raises(UserError, match=message) as caught:
        load_encoder(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    refused(tmp_path / "none.pt", "no such file")


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x02", b"PK\x03\x04" + bytes(100), bytes(range(256))]
)
def test_random_bytes_are_refused(tmp_path, content):
    path = tmp_path / "encoder.pt"
    path.write_bytes(content)
    refused(path, "expected a file of tensors written by torch.save")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, share):
    path = tmp_path / "encoder.pt"
    save_encoder(path, small_encoder())
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    refused(path, "expected a file of tensors written by torch.save")


class Payload:
    def __init__(self, victim):
        self.victim = str(victim)

    def __reduce__(self):
        return open, (self.victim, "w")


def test_names_of_many_patients_come_back_whatever_they_are(tmp_path):
    path = tmp_path / "encoder.pt"
    names = ["", "a\0b\n", "\udcff", *(f"patient-{number:032}" for number in range(200_000))]
    save_encoder(path, Encoder("resnet18", 0.125), patients=names)
    assert load_encoder(path)[1]["patients"] == names


def test_a_list_of_patients_as_older_files_have_it_is_read(tmp_path):
    path = tmp_path / "encoder.pt"
    save_encoder(path, Encoder("resnet18", 0.125), patients=["a"])
    content = torch.load(path, weights_only=True) | {"patients": ["a", "b"]}
    torch.save(content, path)
    assert load_encoder(path)[1]["patients"] == ["a", "b"]


@pytest.mark.parametrize("write", ["pickle", "torch"])
def test_code_in_a_pickle_is_not_run(tmp_path, write):
    path, victim = tmp_path / "encoder.pt", tmp_path / "victim"
    content = {"format": "medmoco.encoder", "version": 1, "payload": Payload(victim)}
    if write == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    refused(path, "expected a file of tensors written by torch.save")
    assert not victim.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected a dictionary of tensors, got list"),
        ({"state_dict": {}}, "expected an encoder.pt of format 'medmoco.encoder', got 'no format"),
        ({"format": "other"}, "expected an encoder.pt of format 'medmoco.encoder', got 'other'"),
        ({"format": torch.ones(2)}, "expected an encoder.pt of format .*, got Tensor"),
        (torch.ones(2), "expected a dictionary of tensors, got Tensor"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path, content, message):
    path = tmp_path / "encoder.pt"
    torch.save(content, path)
    refused(path, message)


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: {**c, "version": 2}, "expected version 1 of an encoder.pt, got 2"),
        (lambda c: {**c, "spacing": float("nan")}, "damaged: spacing must be a number of mm above"),
        (lambda c: {**c, "spacing": 10**400}, "damaged: spacing must be .* got a number of 1329"),
        (lambda c: {**c, "image_size": 10**9}, "damaged: image_size must be a whole number"),
        (lambda c: {**c, "window": (5.0, 1.0)}, "damaged: window must be two rising numbers"),
        (lambda c: {**c, "modality": []}, "damaged: modality must be ct or mr, got list of 0"),
        (lambda c: {**c, "patients": [[]]}, "damaged: patients must be a list of names"),
        (lambda c: {**c, "patients": torch.ones(3)}, "the encoder's settings are damaged: "),
        (lambda c: {**c, "patients": torch.tensor(list(b"[1]")).byte()}, "must be a list of names"),
        (lambda c: {**c, "arch": "vgg"}, "settings are damaged: arch must be one of"),
        (lambda c: {**c, "arch": ["resnet18"]}, "settings are damaged"),
        (lambda c: {**c, "width": "wide"}, "settings are damaged"),
        (lambda c: {**c, "width": 1e30}, "settings are damaged: width must be"),
        (lambda c: {**c, "in_channels": -1}, "settings are damaged"),
        (lambda c: {**c, "in_channels": 10**30}, "settings are damaged"),
        (lambda c: without(c, "output_stride"), "settings are damaged: 'output_stride'"),
        (lambda c: without(c, "state_dict"), "do not fit resnet18: expected a state_dict"),
        (
            lambda c: {**c, "width": 1.0},
            r"conv1.weight must be \(64, 1, 7, 7\).*got \(8, 1, 7, 7\)",
        ),
        (
            lambda c: {**c, "state_dict": without(c["state_dict"], "bn1.bias")},
            "do not fit resnet18: 1 missing: bn1.bias",
        ),
        (
            lambda c: {**c, "state_dict": {**c["state_dict"], "fc.weight": torch.ones(1)}},
            "do not fit resnet18: 1 unexpected: 'fc.weight'",
        ),
        (
            lambda c: {**c, "state_dict": {**c["state_dict"], "bn1.bias": "zero"}},
            "bn1.bias must be a tensor, got str",
        ),
        (
            lambda c: {**c, "state_dict": {**c["state_dict"], "bn1.bias": torch.ones(8).int()}},
            r"bn1.bias must be \(8,\) torch.float32, got \(8,\) torch.int32",
        ),
        (
            lambda c: {**c, "state_dict": {**c["state_dict"], "bn1.bias": torch.full((8,), inf)}},
            "bn1.bias holds values that are not finite",
        ),
    ],
)
def test_damaged_content_is_named(tmp_path, damage, message):
    path = tmp_path / "encoder.pt"
    save_encoder(path, small_encoder())
    torch.save(damage(torch.load(path, weights_only=True)), path)
    refused(path, message)
