import pytest
import torch

from medmoco.ops import covariance_loss
from medmoco.ops.covariance_loss import covariance_loss_reference

SHAPES = [(2, 1), (2, 40), (9, 12), (20, 20), (8, 64), (64, 8), (33, 127), (5, 300)]


def with_gradient(function, features):
    features = features.detach().requires_grad_()
    loss = function(features)
    return loss.detach(), torch.autograd.grad(loss, features)[0]


def worst(found, expected):
    scale = expected.abs().max().clamp(min=1e-30)
    return float((found.double() - expected).abs().max() / scale)


def test_value_worked_out_by_hand(device):
    # Covariance [[2, 2], [2, 2]]: two off-diagonal entries of 4, over 2 dimensions.
    features = torch.tensor([[0.0, 0.0], [2.0, 2.0]], device=device)
    assert covariance_loss(features).item() == pytest.approx(4.0)


def test_one_dimension_has_no_covariance(device):
    assert covariance_loss(torch.randn(5, 1, device=device)) == 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_matches_the_covariance_in_float64(dtype, shape, device):
    generator = torch.Generator().manual_seed(sum(shape))
    features = (torch.randn(shape, generator=generator) + 3).to(device, dtype)
    loss, gradient = with_gradient(covariance_loss, features)
    truth = with_gradient(covariance_loss_reference, features.double())
    assert loss.shape == () and gradient.dtype == dtype
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == accumulated
    assert worst(loss, truth[0]) <= 100 * torch.finfo(accumulated).eps
    assert worst(gradient, truth[1]) <= 100 * torch.finfo(accumulated).eps + torch.finfo(dtype).eps


def test_a_few_dominant_dimensions_cost_no_digits(device):
    features = torch.randn(64, 500, generator=torch.Generator().manual_seed(0)).to(device)
    features[:, [3, 77]] *= 300
    loss, gradient = with_gradient(covariance_loss, features)
    truth = with_gradient(covariance_loss_reference, features.double())
    assert worst(loss, truth[0]) <= 2e-6
    assert worst(gradient, truth[1]) <= 5e-6


@pytest.mark.parametrize("shape", [(6, 4), (3, 24)], ids=["covariance", "gram"])
def test_gradcheck(shape):
    features = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(covariance_loss, features)


@pytest.mark.parametrize("shape", [(40, 8), (4, 60)], ids=["covariance", "gram"])
def test_strides_do_not_matter(shape, device):
    features = torch.randn(shape, device=device)
    strided = torch.stack([features, features], 2)[:, :, 1]
    torch.testing.assert_close(covariance_loss(strided), covariance_loss(features))


@pytest.mark.parametrize("shape", [(6, 4), (3, 40)], ids=["covariance", "gram"])
def test_nan_gives_nan(shape, device):
    features = torch.randn(shape, device=device)
    features[1, 2] = torch.nan
    assert covariance_loss(features).isnan()


@pytest.mark.parametrize("shape", [(40, 8), (4, 60)], ids=["covariance", "gram"])
def test_compiles_without_a_graph_break(shape, device):
    features = torch.randn(shape, device=device)
    compiled = torch.compile(covariance_loss, fullgraph=True, backend="aot_eager")
    for found, expected in zip(
        with_gradient(compiled, features), with_gradient(covariance_loss, features), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(40, 8), (4, 60)], ids=["covariance", "gram"])
def test_autocast_computes_in_float32(shape, device):
    features = torch.randn(shape, device=device)
    expected = covariance_loss(features)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(covariance_loss(features), expected)
        torch.testing.assert_close(
            covariance_loss(features.bfloat16()), covariance_loss(features.bfloat16().float())
        )


def test_same_input_gives_same_bits(device):
    features = torch.randn(40, 300, device=device)
    first, second = (with_gradient(covariance_loss, features) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
