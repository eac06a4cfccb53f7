import pytest
import torch

from medmoco.ops import zca_whiten
from medmoco.ops.zca_whiten import zca_whiten_reference


def correlated(samples, features, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(samples + features)
    mixing = torch.randn(features, features, generator=generator)
    drawn = torch.randn(samples, features, generator=generator) @ mixing + 2
    return drawn.to(device, dtype)


def gradient(function, features, *arguments):
    """Of a sum that weighs each output differently."""
    features = features.detach().requires_grad_()
    whitened = function(features, *arguments)[0]
    weights = torch.linspace(-1, 2, whitened.numel(), device=features.device, dtype=torch.float64)
    total = (whitened * weights.reshape(whitened.shape).to(whitened.dtype)).sum()
    return torch.autograd.grad(total, features)[0]


def worst(found, expected):
    return float((found.double() - expected).abs().max() / expected.abs().max())


def test_two_correlated_features_worked_out_by_hand(device):
    # Covariance [[5, 4], [4, 5]], eigenvalues 9 and 1: W has 1/3 along (1, 1) and 1 along (1, -1).
    centred = torch.tensor([[3.0, 3.0], [-3.0, -3.0], [1.0, -1.0], [-1.0, 1.0]], device=device)
    whitened, mean, matrix = zca_whiten(centred + 7, group_size=2, eps=1e-12)
    torch.testing.assert_close(matrix.cpu(), torch.tensor([[[2 / 3, -1 / 3], [-1 / 3, 2 / 3]]]))
    torch.testing.assert_close(mean.cpu(), torch.tensor([7.0, 7.0]))
    expected = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]])
    torch.testing.assert_close(whitened.cpu(), expected)


def test_each_group_comes_out_white_and_untouched_by_the_others(device):
    features = correlated(200, 12, torch.float64, device)
    whitened, _, matrix = zca_whiten(features, group_size=4, eps=1e-9)
    assert matrix.shape == (3, 4, 4)
    for group in range(3):
        part = slice(4 * group, 4 * group + 4)
        covariance = whitened[:, part].T @ whitened[:, part] / 200
        torch.testing.assert_close(covariance.cpu(), torch.eye(4).double(), rtol=0, atol=1e-6)
        alone, _, _ = zca_whiten(features[:, part], group_size=4, eps=1e-9)
        torch.testing.assert_close(whitened[:, part], alone)


@pytest.mark.parametrize("shape", [(1, 4, 4), (7, 6, 3), (40, 24, 8), (33, 12, 1)], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_matches_the_reference_in_float64(dtype, shape, device):
    samples, features, group_size = shape
    drawn = correlated(samples, features, dtype, device)
    found = zca_whiten(drawn, group_size, 0.1)
    truth = zca_whiten_reference(drawn.double(), group_size, 0.1)
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    assert [t.dtype for t in found] == [dtype, accumulated, accumulated]
    for ours, exact in zip(found, truth, strict=True):
        tolerance = 200 * torch.finfo(accumulated).eps + 2 * torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)


def test_gradient_matches_autograd_through_eigh(device):
    features = correlated(30, 12, torch.float64, device)
    expected = gradient(zca_whiten_reference, features, 4, 1e-2)
    torch.testing.assert_close(gradient(zca_whiten, features, 4, 1e-2), expected)
    assert worst(gradient(zca_whiten, features.float(), 4, 1e-2), expected) < 1e-4


def test_gradcheck():
    features = correlated(9, 6, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: zca_whiten(z, 3, 1e-2)[0], features)


def test_equal_and_zero_eigenvalues_have_a_finite_exact_gradient():
    # Covariance diag(1, 1, 0, 0): autograd through eigh divides by differences of zero.
    features = torch.zeros(4, 4, dtype=torch.float64)
    features[:, 0] = torch.tensor([1.0, 1.0, -1.0, -1.0])
    features[:, 1] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert gradient(zca_whiten_reference, features, 4, 1e-2).isnan().any()
    assert torch.autograd.gradcheck(lambda z: zca_whiten(z, 4, 1e-2)[0], features.requires_grad_())
    assert gradient(zca_whiten, torch.ones(5, 4), 4, 1e-3).isfinite().all()  # collapsed


def test_fewer_samples_than_features_is_finite(device):
    features = correlated(3, 16, device=device)
    assert zca_whiten(features, 16, 1e-3)[0].isfinite().all()
    assert gradient(zca_whiten, features, 16, 1e-3).isfinite().all()


def test_mean_and_matrix_are_constants_to_autograd():
    whitened, mean, matrix = zca_whiten(correlated(9, 4).requires_grad_(), 4, 1e-3)
    assert whitened.requires_grad and not mean.requires_grad and not matrix.requires_grad


def test_second_derivative_is_an_error():
    features = correlated(9, 4).requires_grad_()
    whitened, _, _ = zca_whiten(features, 4, 1e-3)
    (grad,) = torch.autograd.grad(whitened.square().sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_autocast_computes_in_float32(device):
    features = correlated(20, 8, device=device)
    expected = zca_whiten(features, 4, 1e-3)
    with torch.autocast(device, dtype=torch.bfloat16):
        found = zca_whiten(features, 4, 1e-3)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_compiles_without_a_graph_break(device):
    features = correlated(20, 8, device=device)
    compiled = torch.compile(zca_whiten, fullgraph=True, backend="aot_eager")
    expected = gradient(zca_whiten, features, 4, 1e-3)
    torch.testing.assert_close(gradient(compiled, features, 4, 1e-3), expected)


def test_strides_do_not_matter(device):
    features = correlated(20, 8, device=device)
    found = zca_whiten(features.T.contiguous().T, 4, 1e-3)
    torch.testing.assert_close(found, zca_whiten(features, 4, 1e-3), rtol=1e-4, atol=1e-4)
