import pytest
import torch

from medmoco.ops import iternorm_whiten, zca_whiten


def correlated(samples, features, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(samples + features)
    mixing = torch.eye(features) + 0.2 * torch.randn(features, features, generator=generator)
    drawn = torch.randn(samples, features, generator=generator) @ mixing + 2
    return drawn.to(device, dtype)


def test_one_iteration_worked_out_by_hand(device):
    # Variance 4 alone in its group: S / tr S = 1, P_1 = 1, so the output is z_c / 2.
    features = torch.tensor([[5.0], [1.0]], device=device)
    whitened, mean, matrix = iternorm_whiten(features, group_size=1, eps=1e-12, iterations=1)
    torch.testing.assert_close(whitened.cpu(), torch.tensor([[1.0], [-1.0]]))
    assert mean.item() == 3 and matrix.item() == 0.5


def test_many_iterations_approach_zca(device):
    features = correlated(300, 12, device=device)
    found = iternorm_whiten(features, group_size=4, eps=1e-3, iterations=12)
    expected = zca_whiten(features, group_size=4, eps=1e-3)
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-6)


def test_each_iteration_comes_closer_to_white():
    features = correlated(300, 8)
    errors = []
    for iterations in (1, 3, 5):
        whitened, _, _ = iternorm_whiten(features, 8, 1e-5, iterations)
        covariance = whitened.T @ whitened / 300
        errors.append(float((covariance - torch.eye(8)).norm()))
    assert errors[0] > errors[1] > errors[2]


def test_gradcheck():
    features = correlated(9, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: iternorm_whiten(z, 3, 1e-3, 4)[0], features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_computes_in_float32_also_under_autocast(dtype, device):
    features = correlated(30, 8, dtype, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        found = iternorm_whiten(features, 4, 1e-3, 5)
    exact = iternorm_whiten(features.double(), 4, 1e-3, 5)
    assert [t.dtype for t in found] == [dtype, torch.float32, torch.float32]
    for ours, truth in zip(found, exact, strict=True):
        tolerance = 1e-5 + 2 * torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours.double(), truth, rtol=tolerance, atol=tolerance)


def test_collapsed_features_have_a_finite_gradient():
    features = torch.ones(5, 4, requires_grad=True)
    iternorm_whiten(features, 4, 1e-5, 5)[0].sum().backward()
    assert features.grad.isfinite().all()
