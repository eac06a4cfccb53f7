"""Weights of encoders from files of ours and of others."""

import pytest
import torch
import torchvision

from medmoco.errors import UserError
from medmoco.models.encoder import Encoder, save_encoder
from medmoco.models.weights import read_weights


@pytest.fixture(scope="module")
def resnet18():
    """torchvision's own network, with statistics that are not those of the start."""
    torch.manual_seed(3)
    network = torchvision.models.resnet18(weights=None)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    return network.eval()


def small_state(width=0.125, in_channels=3, arch="resnet18"):
    """The state_dict of a narrow ResNet, for files that need not be those of torchvision."""
    torch.manual_seed(4)
    return dict(Encoder(arch, width, in_channels=in_channels).state_dict())


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


def written(tmp_path, content, **options):
    path = tmp_path / "weights.pth"
    torch.save(content, path, **options)
    return path


def encoder_from(weights):
    encoder = Encoder(weights.arch, weights.width)
    weights.load_into(encoder)
    return encoder.eval()


def features(network, image):
    for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
        image = getattr(network, name)(image)
    return image


@torch.no_grad()
@pytest.mark.parametrize("zip_file", [True, False])
def test_torchvision_weights_give_the_features_of_a_grey_image(resnet18, tmp_path, zip_file):
    path = written(tmp_path, resnet18.state_dict(), _use_new_zipfile_serialization=zip_file)
    weights = read_weights(path)
    image = torch.rand(2, 1, 64, 48)
    expected = features(resnet18, image.expand(-1, 3, -1, -1))
    torch.testing.assert_close(encoder_from(weights)(image), expected, rtol=1e-4, atol=1e-4)
    assert (weights.arch, weights.width) == ("resnet18", 1.0)
    assert weights.about == (
        f"{path}: resnet18, 120 of 120 entries matched; stem: 3 channels summed into 1; "
        "left out 2: fc.weight, fc.bias"
    )


def moco_checkpoint(state, projector):
    """As facebookresearch/moco writes it: v1 has one fc, v2 two; encoder_k follows encoder_q."""
    head = {name: torch.zeros(2, 2) for name in projector}
    follower = {name: torch.zeros_like(value) for name, value in state.items()}
    return {
        "epoch": 200,
        "arch": "resnet18",
        "state_dict": {
            **prefixed({**state, **head}, "module.encoder_q."),
            **prefixed({**follower, **head}, "module.encoder_k."),
            "module.queue": torch.zeros(2, 8),
            "module.queue_ptr": torch.zeros(1).long(),
        },
        "optimizer": {
            "state": {0: {"momentum_buffer": torch.zeros(3)}},
            "param_groups": [{"lr": 0.03, "params": [0]}],
        },
    }


V1, V2 = ["fc.weight", "fc.bias"], ["fc.0.weight", "fc.0.bias", "fc.2.weight", "fc.2.bias"]


@pytest.mark.parametrize(
    ("wrap", "prefix", "left_out"),
    [
        (lambda s: moco_checkpoint(s, V1), "state_dict.module.encoder_q.", "2: fc.weight, fc.bias"),
        (
            lambda s: moco_checkpoint(s, V2),
            "state_dict.module.encoder_q.",
            "4: fc.0.weight, fc.0.bias, fc.2.weight, ...",
        ),
        (  # SwAV
            lambda s: prefixed({**s, "prototypes.weight": torch.ones(2)}, "module."),
            "module.",
            "1: prototypes.weight",
        ),
        (  # DINO: the student comes first
            lambda s: {
                "student": prefixed(s, "module.backbone."),
                "teacher": prefixed({n: 0 * v for n, v in s.items()}, "backbone."),
                "epoch": 3,
            },
            "student.module.backbone.",
            None,
        ),
        (lambda s: {"format": "medmoco.other", "state": s}, "state.", None),
    ],
    ids=["moco-v1", "moco-v2", "swav", "dino", "nested"],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_weights_are_found_in_checkpoints(tmp_path, wrap, prefix, left_out, channels):
    state = small_state(in_channels=channels)
    weights = read_weights(written(tmp_path, wrap(state)))
    assert (weights.arch, weights.width) == ("resnet18", 0.125)
    loaded = encoder_from(weights).state_dict()
    for name, value in state.items():
        expected = value.sum(1, keepdim=True) if name == "conv1.weight" else value
        torch.testing.assert_close(loaded[name], expected, rtol=0, atol=0)
    assert f"120 of 120 entries matched (prefix {prefix!r})" in weights.about
    assert ("3 channels summed into 1" in weights.about) == (channels == 3)
    assert weights.about.endswith(f"left out {left_out}") or left_out is None
    assert weights.metadata == {"calibrated": False}


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50"])
def test_architecture_is_told_by_the_names(tmp_path, arch):
    weights = read_weights(written(tmp_path, small_state(0.25, arch=arch)))
    assert (weights.arch, weights.width) == (arch, 0.25)


@pytest.mark.parametrize("channels", [1, 2])
def test_an_encoder_of_ours_brings_its_metadata(tmp_path, channels):
    torch.manual_seed(0)
    encoder = Encoder("resnet18", 0.125, in_channels=channels)
    save_encoder(tmp_path / "encoder.pt", encoder, method="zca", spacing=1.5)
    weights = read_weights(tmp_path / "encoder.pt")
    assert weights.metadata == {"method": "zca", "spacing": 1.5}
    found = weights.state["conv1.weight"]
    assert torch.equal(found, encoder.conv1.weight.sum(1, keepdim=True))
    assert weights.about.startswith(f"{weights.path}: resnet18 of width 0.125, all 120 entries")


def test_half_precision_becomes_float32(tmp_path):
    state = {n: v.half() if v.is_floating_point() else v for n, v in small_state().items()}
    weights = read_weights(written(tmp_path, state))
    assert weights.state["bn1.weight"].dtype == weights.state["conv1.weight"].dtype == torch.float32


def test_what_is_missing_is_told_and_stays_as_it_was(tmp_path):
    state = small_state()
    counters = [name for name in state if name.endswith("num_batches_tracked")]
    for name in [*counters, "layer4.1.conv2.weight", "layer4.1.bn2.bias"]:
        del state[name]
    weights = read_weights(written(tmp_path, state))
    assert "; missing 2: layer4.1.conv2.weight, layer4.1.bn2.bias" in weights.about
    encoder = Encoder("resnet18", 0.125)
    before = encoder.layer4[1].conv2.weight.clone()
    weights.load_into(encoder)
    assert torch.equal(encoder.layer4[1].conv2.weight, before)
    assert torch.equal(encoder.layer4[1].conv1.weight, state["layer4.1.conv1.weight"])


def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}


def with_blocks(state, layer, count):
    """More blocks in a layer, as resnet101 has."""
    last = {n: v for n, v in state.items() if n.startswith(f"{layer}.1.")}
    more = {
        name.replace(f"{layer}.1.", f"{layer}.{number}."): value
        for number in range(2, count)
        for name, value in last.items()
    }
    return {**state, **more}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            lambda s: {"patch_embed.proj.weight": torch.ones(2), "head.bias": torch.ones(1)},
            "expected an encoder.pt of medmoco or a ResNet in torchvision's keys such as "
            "layer1.0.conv1.weight, got 2: patch_embed.proj.weight, head.bias; nothing matches",
        ),
        (lambda s: {"epoch": 3}, "got no tensor; nothing matches"),
        (lambda s: without(s, "conv1.weight"), "nothing matches"),
        (
            lambda s: with_blocks(small_state(arch="resnet50"), "layer3", 23),
            r"nearest is resnet50 of width 0.125, which \d+ entries contradict: layer3.6.conv1",
        ),
        (
            lambda s: {**s, "layer2.0.conv1.weight": torch.ones(16, 8, 5, 5)},
            r"nearest is resnet18 of width 0.125, which 1 entries contradict: "
            r"layer2.0.conv1.weight is \(16, 8, 5, 5\), expected \(16, 8, 3, 3\)",
        ),
        (
            lambda s: {**s, "bn1.weight": torch.ones(8).int()},
            "1 entries contradict: bn1.weight",
        ),
        (lambda s: {**s, "conv1.weight": torch.ones(8)}, r"conv1.weight must be .*got \(8,\)"),
        (lambda s: {**s, "conv1.weight": torch.ones(0, 3, 7, 7)}, r"got \(0, 3, 7, 7\)"),
        (
            lambda s: {**s, "bn1.weight": torch.full((8,), float("nan"))},
            "bn1.weight holds values that are not finite",
        ),
        (lambda s: [s], "expected a dictionary of tensors, got list"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, content, message):
    path = written(tmp_path, content(small_state()))
    with pytest.raises(UserError, match=message) as caught:
        read_weights(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_weights(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(UserError, match=r"text.pth: expected a file of tensors written by torch"):
        read_weights(tmp_path / "text.pth")


class Payload:
    def __init__(self, victim):
        self.victim = str(victim)

    def __reduce__(self):
        return open, (self.victim, "w")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    victim = tmp_path / "victim"
    path = written(tmp_path, {**small_state(), "args": Payload(victim)})
    with pytest.raises(UserError, match="expected a file of tensors"):
        read_weights(path)
    assert not victim.exists()


def test_reading_draws_no_random_number(tmp_path):
    path = written(tmp_path, small_state())
    before = torch.get_rng_state()
    read_weights(path)
    assert torch.equal(torch.get_rng_state(), before)
