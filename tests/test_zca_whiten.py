import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from medmoco.ops import zca_whiten
from medmoco.ops.zca_whiten import zca_whiten_reference

module = importlib.import_module("medmoco.ops.zca_whiten")
raw = torch.ops.medmoco.zca_whiten
raw_backward = torch.ops.medmoco.zca_whiten_backward

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [  # samples, features, group_size
    (1, 4, 4),
    (5, 18, 9),
    (7, 6, 3),
    (40, 24, 8),
    (33, 12, 1),
    (150, 128, 64),
    (600, 67, 67),  # by LAPACK from 65 on
    (300, 256, 128),
    (70, 0, 4),
]


def correlated(samples, features, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(samples + features)
    mixing = torch.randn(features, features, generator=generator)
    drawn = torch.randn(samples, features, generator=generator) @ mixing / max(features, 1) ** 0.5
    return (drawn + 2).to(device, dtype)


def whitened_and_gradient(function, features, *arguments):
    """Of a sum that weighs each output differently."""
    features = features.detach().requires_grad_()
    whitened = function(features, *arguments)[0]
    weights = torch.linspace(-1, 2, whitened.numel(), device=features.device, dtype=torch.float64)
    weights = weights.sin().reshape(whitened.shape).to(whitened.dtype)
    return whitened.detach(), torch.autograd.grad(whitened, features, weights)[0]


def gradient(function, features, *arguments):
    return whitened_and_gradient(function, features, *arguments)[1]


def without_kernel(monkeypatch):
    monkeypatch.setattr(module, "has_kernel", lambda *_: False)


def worst(found, expected):
    """Largest error over the largest value."""
    if not expected.numel():
        return 0.0
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def rounding(dtype):
    """What a chain of a few products and a decomposition may lose, of the largest value."""
    return 64 * torch.finfo(dtype).eps


def duplicated(samples, features, dtype=torch.float64):
    """Every column twice: half of the eigenvalues are zero."""
    half = correlated(samples, features // 2, dtype)
    return torch.cat([half, half], 1)


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


@pytest.mark.parametrize("eps", [1e-5, 1e-2, 1.0])
def test_eps_leaves_each_eigenvalue_as_a_share_of_one(eps, device):
    features = correlated(400, 32, device=device)
    whitened, _, _ = zca_whiten(features, 32, eps)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(features.double().T, correction=0))
    found = torch.linalg.eigvalsh(torch.cov(whitened.double().T, correction=0))
    expected = eigenvalues / (eigenvalues + eps)
    torch.testing.assert_close(found, expected.sort().values, rtol=0, atol=1e-4)


@pytest.mark.parametrize("compiled", [True, False], ids=["kernel", "fallback"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_twice_that_of_eager(dtype, shape, compiled, device, monkeypatch):
    samples, features, group_size = shape
    if not compiled:
        without_kernel(monkeypatch)
    drawn = correlated(samples, features, dtype, device)
    found = zca_whiten(drawn, group_size, 0.1)
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    assert [t.dtype for t in found] == [dtype, accumulated, accumulated]
    truth = zca_whiten_reference(drawn.double(), group_size, 0.1)
    by_eager = zca_whiten_reference(drawn, group_size, 0.1)
    for ours, exact, theirs in zip(found, truth, by_eager, strict=True):
        assert ours.shape == exact.shape
        allowed = 2 * worst(theirs, exact) + rounding(accumulated) + 4 * torch.finfo(ours.dtype).eps
        assert worst(ours, exact) <= allowed


@pytest.mark.parametrize("compiled", [True, False], ids=["kernel", "fallback"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_error_is_at_most_twice_that_of_eager(dtype, shape, compiled, device, monkeypatch):
    samples, features, group_size = shape
    drawn = correlated(samples, features, dtype, device)
    by_eager = gradient(zca_whiten_reference, drawn, group_size, 0.1)
    with monkeypatch.context() as patch:
        without_kernel(patch)
        truth = gradient(zca_whiten, drawn.double(), group_size, 0.1)
    if not compiled:
        without_kernel(monkeypatch)
    found = gradient(zca_whiten, drawn, group_size, 0.1)
    assert found.dtype == dtype and found.isfinite().all()
    # Eager's gradient is NaN for equal eigenvalues.
    theirs = worst(by_eager, truth) if by_eager.isfinite().all() else 0.0
    assert worst(found, truth) <= 2 * theirs + rounding(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides_give_the_same_bits(dtype, device):
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("float64 on CUDA runs in PyTorch, whose products may depend on strides")
    features = correlated(20, 8, dtype, device)
    expected = whitened_and_gradient(zca_whiten, features, 4, 1e-3)
    transposed = features.T.contiguous().T
    stepped = torch.cat([features, features], 1).repeat_interleave(2, 0)[::2, :8]
    apart = torch.stack([features, features], 2)[:, :, 1]
    for strided in (transposed, stepped, apart):
        assert not strided.is_contiguous()
        found = whitened_and_gradient(zca_whiten, strided, 4, 1e-3)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_gradient_of_stride_zero_is_taken(device):
    features = correlated(20, 8, device=device).requires_grad_()
    weights = torch.linspace(0, 1, 8, device=device)
    whitened = zca_whiten(features, 4, 1e-3)[0]
    expanded = torch.autograd.grad(whitened, features, weights.expand(20, 8), retain_graph=True)
    full = torch.autograd.grad(whitened, features, weights.repeat(20, 1))
    assert torch.equal(expanded[0], full[0])


@pytest.mark.parametrize("factor", [100, 1e-4])
def test_features_of_any_scale_come_out_finite_and_right(factor, device):
    features = factor * correlated(300, 64, device=device)
    eps = 1e-3 * factor**2
    truth = whitened_and_gradient(zca_whiten, features.double(), 64, eps)
    by_eager = whitened_and_gradient(zca_whiten_reference, features, 64, eps)
    found = whitened_and_gradient(zca_whiten, features, 64, eps)
    for ours, exact, theirs in zip(found, truth, by_eager, strict=True):
        assert worst(ours, exact) <= 2 * worst(theirs, exact) + 1e-6
    fixed = whitened_and_gradient(zca_whiten, features, 64, 1e-3)
    assert all(t.isfinite().all() for t in fixed)


@pytest.mark.parametrize("mean", [1e3, 1e4])
def test_a_mean_far_above_the_spread_costs_no_more_digits_than_eager_loses(mean, device):
    features = correlated(300, 64, device=device) + mean
    truth = zca_whiten(features.double(), 64, 1e-3)[0]
    by_eager = zca_whiten_reference(features, 64, 1e-3)[0]
    assert worst(zca_whiten(features, 64, 1e-3)[0], truth) <= 1.2 * worst(by_eager, truth)


@pytest.mark.parametrize(
    "features",
    [
        correlated(9, 6, torch.float64),
        correlated(3, 6, torch.float64),
        correlated(1, 6, torch.float64),
        duplicated(9, 6),
        torch.ones(5, 6, dtype=torch.float64),
        torch.eye(7, 6, dtype=torch.float64),
    ],
    ids=["full rank", "fewer samples", "one sample", "duplicate columns", "constant", "equal"],
)
def test_gradcheck(features):
    for group_size in (1, 3, 6):
        assert torch.autograd.gradcheck(
            lambda z, g=group_size: zca_whiten(z, g, 1e-2)[0], features.clone().requires_grad_()
        )


def test_equal_and_zero_eigenvalues_have_a_finite_exact_gradient(device):
    # Covariance diag(1, 1, 0, 0): autograd through eigh divides by differences of zero.
    features = torch.zeros(4, 4, dtype=torch.float64, device=device)
    features[:, 0] = torch.tensor([1.0, 1.0, -1.0, -1.0])
    features[:, 1] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert gradient(zca_whiten_reference, features, 4, 1e-2).isnan().any()
    exact = gradient(zca_whiten, features, 4, 1e-2)
    assert worst(gradient(zca_whiten, features.float(), 4, 1e-2), exact) < 1e-5
    assert torch.autograd.gradcheck(lambda z: zca_whiten(z, 4, 1e-2)[0], features.requires_grad_())


@pytest.mark.parametrize("eps", [1e-3, 1e-12])
@pytest.mark.parametrize(
    "features",
    [torch.ones(5, 16), correlated(3, 16), correlated(1, 16), duplicated(30, 16, torch.float32)],
    ids=["constant", "fewer samples", "one sample", "duplicate columns"],
)
def test_directions_without_variance_are_finite(features, eps, device):
    found = whitened_and_gradient(zca_whiten, features.to(device), 16, eps)
    assert all(t.isfinite().all() for t in found)


@pytest.mark.parametrize("group_size", [33, 64])
@pytest.mark.parametrize("samples", [2, 5, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_most_directions_may_lack_variance(dtype, samples, group_size, device):
    generator = torch.Generator().manual_seed(samples)
    features = torch.randn(samples, 16 * group_size, dtype=dtype, generator=generator).to(device)
    whitened, _, matrix = zca_whiten(features, group_size, 1e-2)
    exact, _, exact_matrix = zca_whiten_reference(features.double(), group_size, 1e-2)
    _, _, eager_matrix = zca_whiten_reference(features, group_size, 1e-2)
    bound = 1e-4 if dtype == torch.float32 else 1e-12
    assert worst(whitened, exact) < bound
    assert worst(matrix, exact_matrix) < max(bound, worst(eager_matrix, exact_matrix))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
@pytest.mark.parametrize("compiled", [True, False], ids=["kernel", "fallback"])
def test_what_is_not_finite_reaches_its_group_alone(value, compiled, device, monkeypatch):
    if not compiled:
        without_kernel(monkeypatch)
    features = correlated(30, 12, device=device)
    clean = zca_whiten(features, 4, 1e-3)
    clean_gradient = gradient(zca_whiten, features, 4, 1e-3)
    features[3, 5] = value
    whitened, _, matrix = zca_whiten(features, 4, 1e-3)
    assert whitened[:, 4:8].isnan().all() and matrix[1].isnan().all()
    found = gradient(zca_whiten, features, 4, 1e-3)
    assert found[:, 4:8].isnan().all()
    for part in (slice(0, 4), slice(8, 12)):
        torch.testing.assert_close(whitened[:, part], clean[0][:, part])
        torch.testing.assert_close(found[:, part], clean_gradient[:, part])


def test_same_input_gives_same_bits_at_any_number_of_threads():
    threads = torch.get_num_threads()
    for shape in ((256, 512, 64), (3000, 40, 40)):
        features = correlated(*shape[:2])
        expected = whitened_and_gradient(zca_whiten, features, shape[2], 1e-3)
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                for _ in range(20):
                    found = whitened_and_gradient(zca_whiten, features, shape[2], 1e-3)
                    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_tf32_keeps_three_digits_where_it_is_allowed(device):
    features = correlated(500, 128, device=device)
    exact = whitened_and_gradient(zca_whiten_reference, features.double(), 64, 0.1)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        found = whitened_and_gradient(zca_whiten, features, 64, 0.1)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert all(worst(ours, truth) < 5e-3 for ours, truth in zip(found, exact, strict=True))


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_a_cuda_graph_replays_the_same_bits(device):
    features = correlated(256, 192, device=device)
    expected = raw(features, 64, 1e-3)
    expected_grad = raw_backward(expected[0], features, *expected[1:])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = raw(features, 64, 1e-3)
        grad = raw_backward(replayed[0], features, *replayed[1:])
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(replayed, expected, strict=True))
    assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_memory_on_the_gpu_is_that_of_the_results_and_little_more(device):
    features = correlated(256, 2048, device=device)
    whitened_and_gradient(zca_whiten, features, 64, 1e-3)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    whitened_and_gradient(zca_whiten, features, 64, 1e-3)
    assert torch.cuda.max_memory_allocated() - before < 32 * 2**20


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_the_kernels_refuse_float64_and_groups_beyond_128_on_cuda(device):
    with pytest.raises(RuntimeError, match=r"^zca_whiten: features must be float32, bfloat16 or"):
        raw(correlated(9, 6, torch.float64, device), 3, 1e-2)
    with pytest.raises(RuntimeError, match=r"group_size must be at most 128 on CUDA, got 129$"):
        raw(correlated(9, 129, device=device), 129, 1e-2)


def test_float64_and_groups_beyond_128_run_in_pytorch_on_cuda(monkeypatch):
    monkeypatch.setattr(module, "has_kernel", lambda *_: True)
    called = []
    in_pytorch = module._ZcaWhiten.apply
    monkeypatch.setattr(
        module._ZcaWhiten, "apply", lambda *a: called.append(a[1]) or in_pytorch(*a)
    )
    with FakeTensorMode():
        for dtype, group_size in ((torch.float32, 128), (torch.float64, 2), (torch.float32, 129)):
            features = torch.empty(4, 128 * 129, dtype=dtype, device="cuda")
            whitened, _, matrix = zca_whiten(features, group_size, 1e-3)
            assert whitened.dtype == dtype and matrix.shape[1] == group_size
    assert called == [2, 129]


@pytest.mark.parametrize("group_size", [4, 96])
def test_runs_in_inference_mode(group_size, device):
    features = correlated(300, 192, device=device)
    expected = zca_whiten(features, group_size, 1e-3)
    with torch.inference_mode():
        found = zca_whiten(features.clone(), group_size, 1e-3)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of opcheck's own copies
def test_opcheck_accepts_the_operators():
    features = correlated(9, 6)
    torch.library.opcheck(raw, (features, 3, 1e-2))
    torch.library.opcheck(raw, (features.clone().requires_grad_(), 3, 1e-2))
    whitened, *others = raw(features, 3, 1e-2)
    torch.library.opcheck(raw_backward, (whitened, features, *others))


def test_all_but_the_whitened_features_are_constants_to_autograd():
    whitened, *others = raw(correlated(9, 4).requires_grad_(), 4, 1e-3)
    assert whitened.requires_grad and not any(t.requires_grad for t in others)


@pytest.mark.parametrize("compiled", [True, False], ids=["kernel", "fallback"])
def test_second_derivative_is_an_error(compiled, monkeypatch):
    if not compiled:
        without_kernel(monkeypatch)
    features = correlated(9, 4).requires_grad_()
    whitened, _, _ = zca_whiten(features, 4, 1e-3)
    (grad,) = torch.autograd.grad(whitened.square().sum(), features, create_graph=True)
    message = "^zca_whiten: second derivatives are not implemented"
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(grad.sum(), features)
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.functional.hessian(
            lambda z: zca_whiten(z, 4, 1e-3)[0].square().sum(), features.detach()
        )


@pytest.mark.parametrize("compiled", [True, False], ids=["kernel", "fallback"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_takes_and_returns_float32(dtype, compiled, device, monkeypatch):
    if not compiled:
        without_kernel(monkeypatch)
    features = correlated(20, 8, dtype, device)
    expected = zca_whiten(features.float(), 4, 1e-3)
    with torch.autocast(device, dtype=torch.bfloat16):
        found = zca_whiten(features, 4, 1e-3)
        assert gradient(zca_whiten, features, 4, 1e-3).dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_autocast_leaves_float64_alone():
    features = correlated(20, 8, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = zca_whiten(features, 4, 1e-3)
    assert torch.equal(found[0], zca_whiten(features, 4, 1e-3)[0])


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "fallback"])
def test_compiles_without_a_graph_break(kernel, device, monkeypatch):
    if not kernel:
        without_kernel(monkeypatch)
    torch.compiler.reset()
    features = correlated(20, 8, device=device)
    compiled = torch.compile(zca_whiten, fullgraph=True, backend="aot_eager")
    expected = gradient(zca_whiten, features, 4, 1e-3)
    torch.testing.assert_close(gradient(compiled, features, 4, 1e-3), expected)


def test_compiles_with_changing_batch():
    torch.compiler.reset()
    compiled = torch.compile(zca_whiten, fullgraph=True, backend="aot_eager", dynamic=True)
    for samples in (9, 20, 31):
        features = correlated(samples, 8)
        torch.testing.assert_close(compiled(features, 4, 1e-3), zca_whiten(features, 4, 1e-3))
        torch.testing.assert_close(
            gradient(compiled, features, 4, 1e-3), gradient(zca_whiten, features, 4, 1e-3)
        )
