import importlib
import resource

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from medmoco.ops import covariance_loss
from medmoco.ops.covariance_loss import covariance_loss_reference

module = importlib.import_module("medmoco.ops.covariance_loss")
raw = torch.ops.medmoco.covariance_loss
raw_backward = torch.ops.medmoco.covariance_loss_backward

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Below, at and above a tile of 96, panels of 4 to 32 lanes and a stretch of 256, in both forms.
SHAPES = [
    (2, 1),
    (2, 40),
    (9, 12),
    (20, 20),
    (64, 8),
    (5, 300),
    (95, 96),
    (97, 96),
    (96, 97),
    (300, 193),
    (193, 300),
    (33, 1030),
    (2000, 7),
]
BOTH_FORMS = pytest.mark.parametrize("shape", [(40, 8), (4, 60)], ids=["covariance", "gram"])


def drawn(*shape: int, dtype=torch.float32, device="cpu") -> Tensor:
    """Standard normal, alike for every dtype and device."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def skip_without_kernel(features: Tensor) -> None:
    if not module._kernel_takes(features):
        pytest.skip(f"on {features.device} PyTorch computes {features.dtype}, for want of a kernel")


def with_gradient(function, features: Tensor) -> tuple[Tensor, Tensor]:
    features = features.detach().requires_grad_()
    loss = function(features)
    return loss.detach(), torch.autograd.grad(loss, features)[0]


def worst(found: Tensor, expected: Tensor) -> float:
    """Largest error over the largest value."""
    scale = expected.abs().max().clamp(min=1e-30)
    return float((found.double() - expected).abs().max() / scale)


def assert_at_most_twice_the_error_of_the_masked_covariance(features: Tensor) -> None:
    truth = with_gradient(covariance_loss_reference, features.double())
    found = with_gradient(covariance_loss, features)
    eager = with_gradient(covariance_loss_reference, features)
    for ours, theirs, true in zip(found, eager, truth, strict=True):
        allowed = 2 * worst(theirs, true) + 4 * torch.finfo(features.dtype).eps
        assert worst(ours, true) <= allowed


def test_value_and_gradient_worked_out_by_hand(device):
    # Covariance [[2, 2], [2, 2]]: two off-diagonal entries of 4, over 2 dimensions. The gradient
    # is 4 / (2 * 1) Z C without its diagonal, with rows (-1, -1) and (1, 1) of Z.
    features = torch.tensor([[0.0, 0.0], [2.0, 2.0]], device=device)
    loss, gradient = with_gradient(covariance_loss, features)
    assert loss.item() == pytest.approx(4.0)
    expected = torch.tensor([[-4.0, -4.0], [4.0, 4.0]], device=device)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("samples", [2, 5, 5000])
def test_one_dimension_has_no_covariance(samples, device):
    loss, gradient = with_gradient(covariance_loss, drawn(samples, 1, device=device))
    assert loss == 0 and not gradient.any()


def test_no_dimensions_have_no_mean_over_them(device):
    loss, gradient = with_gradient(covariance_loss, torch.ones(5, 0, device=device))
    assert loss.isnan() and gradient.shape == (5, 0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_covariance_in_float64(dtype, shape, device):
    features = (drawn(*shape, device=device) + 3).to(dtype)
    loss, gradient = with_gradient(covariance_loss, features)
    truth = with_gradient(covariance_loss_reference, features.double())
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.shape == () and loss.dtype == accumulated
    assert gradient.shape == shape and gradient.dtype == dtype
    assert worst(loss, truth[0]) <= 30 * torch.finfo(accumulated).eps
    assert worst(gradient, truth[1]) <= 30 * torch.finfo(accumulated).eps + torch.finfo(dtype).eps


@pytest.mark.parametrize("shape", [(500, 100), (3000, 300)], ids=str)
@pytest.mark.parametrize("spread", [0, 2])
def test_decorrelated_features_cost_no_digits(shape, spread, device):
    features = drawn(*shape, dtype=torch.float64)
    decorrelated = torch.linalg.qr(features - features.mean(0)).Q * shape[0] ** 0.5
    scale = torch.logspace(-spread, spread, shape[1], dtype=torch.float64)
    features = (decorrelated * scale).to(device, torch.float32)
    assert covariance_loss(features) < 1e-12 * features.square().mean().square()
    assert_at_most_twice_the_error_of_the_masked_covariance(features)


@pytest.mark.parametrize("shape", [(64, 500), (256, 2048), (300, 310), (3, 2000)], ids=str)
@pytest.mark.parametrize("dominant", [1, 2, 8])
@pytest.mark.parametrize("scale", [300.0, 1e4])
def test_a_few_dominant_dimensions_cost_no_digits(scale, dominant, shape, device):
    features = drawn(*shape, device=device)
    features[:, 5 :: shape[1] // dominant] *= scale
    assert_at_most_twice_the_error_of_the_masked_covariance(features)


@pytest.mark.parametrize("shape", [(500, 60), (60, 500), (200_000, 4)], ids=str)
def test_a_mean_far_from_zero_costs_no_digits(shape, device):
    assert_at_most_twice_the_error_of_the_masked_covariance(drawn(*shape, device=device) + 1e3)


def test_the_rounding_of_the_mean_does_not_shift_the_gradient(device):
    # Samples on a grid that float32 holds exactly, 2^20 from zero, with a mean that it cannot hold.
    features = drawn(301, 6, device=device).mul(8).round() / 8
    truth = with_gradient(covariance_loss_reference, features.double())
    found = with_gradient(covariance_loss, features + 2**20)
    assert worst(found[0], truth[0]) <= 1e-6
    assert worst(found[1], truth[1]) <= 1e-6


def test_constant_dimensions_get_no_gradient(device):
    for shape in ((40, 8), (4, 60)):
        features = drawn(*shape, device=device)
        features[:, ::2] = 0.1
        loss, gradient = with_gradient(covariance_loss, features)
        truth = with_gradient(covariance_loss_reference, features[:, 1::2].double())
        assert worst(2 * loss, truth[0]) <= 1e-6
        assert worst(2 * gradient[:, 1::2], truth[1]) <= 1e-6
        assert not gradient[:, ::2].any()
    assert covariance_loss(torch.ones(5, 70, device=device)) == 0


def test_equal_variances_are_no_ambiguity(device):
    features = drawn(6, 1, device=device).expand(6, 50)
    loss, gradient = with_gradient(covariance_loss, features)
    truth = with_gradient(covariance_loss_reference, features.double())
    assert worst(loss, truth[0]) <= 1e-6 and worst(gradient, truth[1]) <= 1e-6


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("shape", [(6, 4), (3, 40), (3, 10)], ids=str)
def test_nan_and_infinity_give_nan(shape, value, device):
    features = drawn(*shape, device=device)
    features[1, 2] = value
    loss, gradient = with_gradient(covariance_loss, features)
    assert loss.isnan() and gradient.isnan().all()


@BOTH_FORMS
def test_gradcheck(shape):
    features = drawn(*shape, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(covariance_loss, features)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(300, 100), (100, 300)], ids=["covariance", "gram"])
def test_any_strides_give_the_same_bits(shape, dtype, device):
    features = drawn(*shape, dtype=dtype, device=device)
    skip_without_kernel(features)
    expected = with_gradient(covariance_loss, features)
    transposed = features.T.contiguous().T
    stepped = torch.cat([features, features], 1).repeat_interleave(2, 0)[::2, : shape[1]]
    reversed_order = torch.stack([features, features], 2)[:, :, 1]
    for strided in (transposed, stepped, reversed_order):
        assert not strided.is_contiguous()
        found = with_gradient(covariance_loss, strided)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_repeated_samples_take_no_memory_of_their_own(device):
    features = drawn(1, 8, device=device).expand(5, 8)
    loss, gradient = with_gradient(covariance_loss, features)
    assert loss == 0 and not gradient.any()


@pytest.mark.parametrize(
    "shape", [(700, 130), (130, 700), (20_000, 5)], ids=["covariance", "gram", "tall"]
)
def test_same_input_gives_same_bits_at_any_number_of_threads(shape):
    features = drawn(*shape)
    expected = with_gradient(covariance_loss, features)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for _ in range(20):
                found = with_gradient(covariance_loss, features)
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(400_000, 32), (32, 400_000)], ids=["covariance", "gram"])
def test_memory_grows_by_no_copy_of_the_features(shape):
    features = drawn(*shape)  # 51 MB, and so are its temporaries
    gradient = torch.zeros_like(features)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, gradient = with_gradient(covariance_loss, features)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 16 * 1024  # KiB: the peak was before
    assert gradient.isfinite().all()


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize(
    "shape, dtype, mebibytes",
    [
        ((256, 2048), torch.float32, 8),
        ((256, 8192), torch.float32, 32),
        ((12544, 2048), torch.bfloat16, 64),
    ],
    ids=str,
)
def test_memory_of_the_gpu_holds_little_besides_the_smaller_matrix(shape, dtype, mebibytes, device):
    features = drawn(*shape, dtype=dtype, device=device)
    skip_without_kernel(features)
    with_gradient(covariance_loss, features)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _, gradient = with_gradient(covariance_loss, features)
    grown = torch.cuda.max_memory_allocated() - before - gradient.nbytes
    assert grown <= mebibytes * 2**20


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@BOTH_FORMS
def test_a_cuda_graph_gives_the_same_bits(shape, device):
    features = drawn(*shape, device=device)
    skip_without_kernel(features)
    other = features * 2 - 1

    def run(features: Tensor) -> tuple[Tensor, Tensor]:
        loss, mean, matrix = raw(features)
        return loss, raw_backward(loss, features, mean, matrix)

    expected = run(other)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(features)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):  # an operator that waits for the GPU cannot be
        found = run(features)
    features.copy_(other)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("shape", [(1000, 60), (60, 1000)], ids=["covariance", "gram"])
def test_tf32_costs_digits_only_where_it_is_allowed(shape, device):
    features = drawn(*shape, device=device)
    skip_without_kernel(features)
    truth = covariance_loss_reference(features.double())
    assert worst(raw(features, False)[0], truth) <= 3e-6
    assert 1e-7 < worst(raw(features, True)[2], raw(features, False)[2].double()) <= 2e-3


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_the_kernel_on_cuda_refuses_float64(device):
    features = drawn(4, 3, device=device)
    skip_without_kernel(features)
    loss, mean, matrix = raw(features)
    expected = "features must be float32, bfloat16 or float16 on CUDA, got float64"
    with pytest.raises(RuntimeError, match=f"covariance_loss: {expected}"):
        raw(features.double())
    with pytest.raises(RuntimeError, match=f"covariance_loss_backward: {expected}"):
        raw_backward(loss.double(), features.double(), mean, matrix.double())


def test_float64_on_cuda_runs_in_pytorch(monkeypatch):
    monkeypatch.setattr(module, "has_kernel", lambda *_: True)
    called = []
    monkeypatch.setattr(module, "covariance_loss_reference", lambda x: called.append(x.dtype))
    with FakeTensorMode():
        for dtype in (torch.float32, torch.float64):
            covariance_loss(torch.empty(4, 3, dtype=dtype, device="cuda"))
    assert called == [torch.float64]


@pytest.mark.parametrize("shape", [(3, 1), (5, 2), (2, 5), (9, 40)], ids=str)
def test_matrix_is_of_the_smaller_side(shape):
    features = drawn(*shape, dtype=torch.float64)
    _, mean, matrix = raw(features)
    torch.testing.assert_close(mean, features.mean(0))
    assert matrix.shape == (min(shape), min(shape))
    if shape[0] >= shape[1]:
        torch.testing.assert_close(matrix, features.T.cov().reshape(matrix.shape))


def test_mean_and_matrix_are_constants_to_autograd():
    loss, mean, matrix = raw(drawn(4, 3).requires_grad_())
    assert loss.requires_grad and not mean.requires_grad and not matrix.requires_grad


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of opcheck's own copies
@BOTH_FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_accepts_the_operators(dtype, shape):
    features = drawn(*shape, dtype=dtype)
    torch.library.opcheck(raw, (features,))
    torch.library.opcheck(raw, (features.clone().requires_grad_(),))
    loss, mean, matrix = raw(features)
    torch.library.opcheck(raw_backward, (loss, features, mean, matrix))


@BOTH_FORMS
def test_second_derivative_is_an_error(shape):
    features = drawn(*shape).requires_grad_()
    loss = covariance_loss(features)
    (gradient,) = torch.autograd.grad(loss, features, create_graph=True)
    message = "covariance_loss: second derivatives are not implemented"
    with pytest.raises(RuntimeError, match=message):
        gradient.square().sum().backward()
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.functional.hessian(covariance_loss, features.detach())


@BOTH_FORMS
def test_compiles_without_a_graph_break(shape, device):
    features = drawn(*shape, device=device)
    compiled = torch.compile(covariance_loss, fullgraph=True, backend="aot_eager")
    for found, expected in zip(
        with_gradient(compiled, features), with_gradient(covariance_loss, features), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_compiles_once_for_a_batch_that_crosses_between_the_forms():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(covariance_loss, fullgraph=True, backend=counter, dynamic=True)
    for batch in (30, 7, 12, 50):
        features = drawn(batch, 12)
        for found, expected in zip(
            with_gradient(compiled, features), with_gradient(covariance_loss, features), strict=True
        ):
            torch.testing.assert_close(found, expected)
    assert counter.frame_count == 1


@BOTH_FORMS
def test_autocast_computes_in_float32(shape, device):
    features = drawn(*shape, device=device)
    expected = with_gradient(covariance_loss, features)
    with torch.autocast(device, dtype=torch.bfloat16):
        found = with_gradient(covariance_loss, features)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        loss, gradient = with_gradient(covariance_loss, features.bfloat16())
    widened = with_gradient(covariance_loss, features.bfloat16().float())
    assert gradient.dtype == torch.bfloat16
    assert torch.equal(loss, widened[0]) and torch.equal(gradient, widened[1].bfloat16())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_a_kernel_pytorch_computes_the_same(shape, monkeypatch):
    features = drawn(*shape)
    expected = with_gradient(covariance_loss, features)
    monkeypatch.setattr(module, "has_kernel", lambda *_: False)
    for found in (features, features.double()):
        loss, gradient = with_gradient(covariance_loss, found)
        torch.testing.assert_close(loss.float(), expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient.float(), expected[1], rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(covariance_loss(features), expected[0], rtol=1e-5, atol=1e-6)


def test_without_a_kernel_a_few_dominant_dimensions_cost_no_digits(monkeypatch):
    monkeypatch.setattr(module, "has_kernel", lambda *_: False)
    features = drawn(64, 500)
    features[:, [3, 77]] *= 300
    assert_at_most_twice_the_error_of_the_masked_covariance(features)
