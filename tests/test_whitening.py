import pytest
import torch

from medmoco.errors import UserError
from medmoco.models.branch import Branch
from medmoco.models.encoder import Encoder, fold_whitening, load_encoder, save_encoder
from medmoco.models.whitening import (
    IterNorm,
    ZCAWhitening,
    keep_whitening,
    map_whitening_state,
    replace_last_norm,
)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def correlated(samples, features, seed=0):
    """Vectors with a mean, unequal variances and strong correlation."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator) / features**0.5
    scale = torch.logspace(-0.5, 0.5, features)
    return torch.randn(samples, features, generator=generator) @ mixing * scale + 3 * scale


def covariance(rows):
    centred = rows.double() - rows.double().mean(0)
    return centred.T @ centred / len(rows)


def both(features=32, group=16):
    return [ZCAWhitening(features, group), IterNorm(features, group)]


@torch.no_grad()
@pytest.mark.parametrize("group", [8, 32])
def test_zca_leaves_each_group_with_unit_covariance(group):
    out = ZCAWhitening(32, group, eps=1e-6)(correlated(512, 32))
    for start in range(0, 32, group):
        block = covariance(out[:, start : start + group])
        torch.testing.assert_close(block, torch.eye(group).double(), atol=2e-3, rtol=0)
    torch.testing.assert_close(out.mean(0), torch.zeros(32), atol=1e-4, rtol=0)


@torch.no_grad()
def test_zca_eps_is_relative_to_standardised_channels():
    rows = correlated(512, 16)
    torch.testing.assert_close(
        ZCAWhitening(16, 16)(rows), ZCAWhitening(16, 16)(100 * rows), atol=1e-2, rtol=0
    )


@torch.no_grad()
def test_iternorm_with_many_iterations_whitens_and_with_five_does_not():
    rows = torch.randn(512, 16) * torch.linspace(1, 2, 16) + 1
    full = covariance(IterNorm(16, iterations=12)(rows))
    torch.testing.assert_close(full, torch.eye(16).double(), atol=0.01, rtol=0)
    few = covariance(IterNorm(16, iterations=5)(rows)).diagonal()
    assert few.min() < 0.9


@torch.no_grad()
def test_iternorm_leaves_the_published_variance_on_a_flat_spectrum():
    # 2048 channels of equal variance: five steps reach an output variance of 0.028. The result
    # depends on the number of channels alone, and 2048 would take seconds: here P_5^2/D by hand.
    features, root = 64, 1.0
    for _ in range(5):
        root = 1.5 * root - 0.5 * root**3 / features
    rows = torch.linalg.qr(torch.randn(256, features).double()).Q * 16
    rows = torch.cat([rows, -rows])  # mean 0, covariance exactly the identity
    out = IterNorm(features, eps=1e-12)(rows)
    torch.testing.assert_close(
        covariance(out).diagonal(), torch.full((features,), root**2 / features).double()
    )


@torch.no_grad()
@pytest.mark.parametrize("layer", both())
def test_eval_mode_with_the_statistics_of_one_batch_repeats_training(layer):
    rows = correlated(256, 32)
    layer.momentum = 1.0
    trained = layer.train()(rows)
    torch.testing.assert_close(layer.eval()(rows), trained, atol=2e-3, rtol=0)
    assert layer.num_batches_tracked.item() == 1


@torch.no_grad()
@pytest.mark.parametrize("layer", both())
def test_eval_mode_treats_each_sample_by_itself(layer):
    layer.train()(correlated(256, 32))
    layer.eval()
    rows = correlated(8, 32, seed=1)
    torch.testing.assert_close(layer(rows[:1]), layer(rows)[:1])


@torch.no_grad()
def test_zca_averages_mean_variance_and_covariance():
    layer = ZCAWhitening(16, 16, momentum=0.1)
    first, second = correlated(128, 16), correlated(128, 16, seed=1)
    layer(first)
    layer(second)
    mean = 0.9 * 0.1 * first.mean(0) + 0.1 * second.mean(0)
    torch.testing.assert_close(layer.running_mean, mean)
    blocks = [torch.corrcoef(rows.T) for rows in (first, second)]
    expected = 0.81 * torch.eye(16) + 0.09 * blocks[0] + 0.1 * blocks[1]
    torch.testing.assert_close(layer.running_covariance[0], expected, atol=1e-3, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("layer", both())
def test_without_momentum_every_batch_counts_the_same(layer):
    layer.reset_running_stats()
    layer.momentum = None
    batches = [correlated(128, 32, seed) for seed in range(3)]
    for batch in batches:
        layer.train()(batch)
    torch.testing.assert_close(
        layer.running_mean, torch.stack([b.mean(0) for b in batches]).mean(0)
    )


@torch.no_grad()
@pytest.mark.parametrize("layer", both())
def test_reset_brings_back_the_first_state(layer):
    fresh = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.train()(correlated(128, 32))
    layer.reset_running_stats()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, fresh[name]), name


@torch.no_grad()
@pytest.mark.parametrize("layer", both())
def test_the_whitening_matrix_is_what_eval_mode_applies(layer):
    layer.train()(correlated(256, 32))
    layer.eval()
    mean, matrix = layer.whitening_matrix()
    rows = correlated(8, 32, seed=1)
    torch.testing.assert_close(layer(rows), (rows - mean) @ matrix.T, atol=1e-4, rtol=1e-4)
    assert matrix[:16, 16:].eq(0).all() and matrix[16:, :16].eq(0).all()


@torch.no_grad()
@pytest.mark.parametrize("layer", both())
def test_output_variance_is_what_eval_mode_leaves(layer):
    rows = correlated(2048, 32)
    layer.momentum = 1.0
    layer.train()(rows)
    found = covariance(layer.eval()(rows)).diagonal().float()
    torch.testing.assert_close(layer.output_variance(), found, atol=2e-3, rtol=2e-3)


@torch.no_grad()
@pytest.mark.parametrize("layer", both())
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_map_is_whitened_over_its_cells(layer, layout):
    feature_map = correlated(4 * 6 * 5, 32).reshape(4, 6, 5, 32).movedim(-1, 1)
    out = layer.train()(feature_map.contiguous(memory_format=layout))
    assert out.shape == feature_map.shape
    layer.reset_running_stats()
    rows = layer(feature_map.movedim(1, -1).reshape(-1, 32))
    torch.testing.assert_close(out.movedim(1, -1).reshape(-1, 32), rows, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", both())
def test_gradients_flow_and_are_finite_for_channels_without_variance(layer):
    rows = correlated(128, 32)
    rows[:, 3] = rows[:, 4] = 0
    rows.requires_grad_()
    target = correlated(128, 32, seed=1)
    (layer.train()(rows) * target).sum().backward()
    assert rows.grad.isfinite().all() and rows.grad.abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("layer", both())
def test_half_precision_is_whitened_in_float32_also_under_autocast(layer):
    rows = correlated(256, 32).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer.train()(rows)
    assert out.dtype == torch.bfloat16
    expected = type(layer)(32, 16)(rows.float())
    torch.testing.assert_close(out.float(), expected, atol=0.02, rtol=0.01)


@pytest.mark.parametrize("layer", both())
def test_too_few_pooled_samples_are_refused_with_two_ways_out(layer):
    with pytest.raises(UserError, match="expected at least 64 pooled features") as caught:
        layer.train()(correlated(63, 32))
    assert "got 63; raise --batch-size, or lower --whiten-group" in str(caught.value)
    layer.eval()(correlated(1, 32))  # needs no batch


@pytest.mark.parametrize("kind", [ZCAWhitening, IterNorm])
def test_a_group_that_does_not_divide_the_channels_is_named(kind):
    with pytest.raises(UserError, match="must divide the 32 channels, got 5"):
        kind(32, 5)


@torch.no_grad()
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("kind", ["zca", "iternorm"])
def test_folding_keeps_the_outputs_and_gives_torchvision_keys(arch, kind):
    torch.manual_seed(0)
    encoder = Encoder(arch, width=0.125, output_stride=8)
    keys = list(encoder.state_dict())
    channels = encoder.channels[-1]
    layer = ZCAWhitening(channels, 32) if kind == "zca" else IterNorm(channels, affine=True)
    if kind == "iternorm":
        layer.weight.uniform_(0.5, 2)
        layer.bias.uniform_(-1, 1)
    replace_last_norm(encoder, layer)
    encoder.train()(torch.randn(8, 1, 48, 48))
    images = torch.randn(2, 1, 48, 48)
    expected = encoder.eval()(images)
    folded = fold_whitening(encoder)
    assert list(folded.state_dict()) == keys
    torch.testing.assert_close(folded(images), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoder(images), expected)  # the original is left as it was


@torch.no_grad()
def test_a_folded_norm_keeps_its_outputs_when_training_goes_on():
    torch.manual_seed(0)
    encoder = Encoder("resnet18", width=0.125, output_stride=8)
    layer = IterNorm(encoder.channels[-1], momentum=1.0, affine=True)
    replace_last_norm(encoder, layer)
    images = torch.randn(16, 1, 48, 48)
    encoder.train()(images)
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # only the folded norm is to see batch statistics
    block = encoder.layer4[-1]
    layer.train()
    encoder(images)
    expected = layer.eval() and encoder(images)
    folded = fold_whitening(encoder)
    folded.layer4[-1].bn2.train()
    torch.testing.assert_close(folded(images), expected, atol=1e-3, rtol=1e-3)
    assert block.bn2 is layer


@torch.no_grad()
def test_saving_folds_the_whitening(tmp_path):
    torch.manual_seed(0)
    encoder = Encoder("resnet18", width=0.125, output_stride=8)
    replace_last_norm(encoder, ZCAWhitening(encoder.channels[-1], 32))
    encoder.train()(torch.randn(8, 1, 48, 48))
    save_encoder(tmp_path / "encoder.pt", encoder)
    loaded, _ = load_encoder(tmp_path / "encoder.pt")
    images = torch.randn(2, 1, 48, 48)
    torch.testing.assert_close(loaded(images), encoder.eval()(images), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("stride", [8, 4])
@pytest.mark.parametrize("group", [16, 64])
@pytest.mark.parametrize("kind", [ZCAWhitening, IterNorm])
def test_a_kept_whitening_gives_maps_whose_average_is_the_whitened_feature(
    tmp_path, kind, group, stride
):
    encoder = Encoder("resnet18", width=0.125, output_stride=stride)
    branch = Branch(encoder, 8, kind(encoder.channels[-1], group), local=False)
    for _ in range(3):
        branch.train()(torch.randn(256, 1, 17, 24))
    branch.eval()
    state = map_whitening_state(branch.whitening)
    save_encoder(tmp_path / "encoder.pt", encoder, whitening=state)
    images = torch.randn(2, 1, 33, 40)
    pooled = branch(images).pooled
    expected = branch.whitening(pooled)
    assert (expected - pooled).abs().max() > 0.1

    loaded, metadata = load_encoder(tmp_path / "encoder.pt")
    loaded.set_output_stride(stride)
    keep_whitening(loaded, metadata["whitening"])
    found = loaded(images).mean((2, 3))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for kept, plain in zip(loaded.pyramid(images)[:-1], encoder.pyramid(images)[:-1], strict=True):
        torch.testing.assert_close(kept, plain)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "it holds no whitening after pooling"),
        ({"weight": torch.ones(32, 8, 1, 1), "mean": torch.ones(32)}, "does not fit 64 channels"),
        ({"weight": torch.ones(64, 3, 1, 1), "mean": torch.ones(64)}, "does not fit 64 channels"),
        ({"weight": torch.ones(64, 8, 1, 1)}, "does not fit 64 channels"),
        ({"weight": "W", "mean": torch.ones(64)}, "does not fit 64 channels"),
        (3, "does not fit 64 channels"),
    ],
)
def test_a_whitening_that_does_not_fit_is_not_kept(state, message):
    encoder = Encoder("resnet18", width=0.125)
    with pytest.raises(UserError, match=message):
        keep_whitening(encoder, state)
    assert encoder.whitening is None
