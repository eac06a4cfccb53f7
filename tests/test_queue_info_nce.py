import importlib
import resource

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy, normalize
from torch.utils._python_dispatch import TorchDispatchMode

from medmoco.ops import dispatch, queue_info_nce
from medmoco.ops.queue_info_nce import queue_info_nce_reference

module = importlib.import_module("medmoco.ops.queue_info_nce")
raw = torch.ops.medmoco.queue_info_nce
raw_backward = torch.ops.medmoco.queue_info_nce_backward

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [
    (0, 5, 3),
    (1, 0, 3),
    (1, 1, 1),
    (3, 5, 127),
    (33, 257, 1),
    (70, 1000, 127),
    (5, 300, 520),
    (3, 9001, 17),  # the queue in segments
    (300, 2500, 8),  # and the rows in groups
]
# By temperature: three times the largest error of the loss, and of the gradient over its largest
# entry, that float32 operands were measured to have against float64 at 65536 keys of 128
# dimensions. On the CPU 16-bit operands are widened, so it holds for all.
ALLOWED_AT_FULL_QUEUE = {0.2: (3 * 1.7e-6, 3 * 1e-7), 0.07: (3 * 2.2e-6, 3 * 2.7e-6)}
# The same on tensor cores, by how they take the operands: dtype, allow_tf32, allowed errors.
ALLOWED_ON_TENSOR_CORES = {
    "3xTF32": (torch.float32, False, ALLOWED_AT_FULL_QUEUE),
    "TF32": (torch.float32, True, {0.2: (3 * 1.7e-5, 3 * 1.2e-5), 0.07: (3 * 5.6e-4, 3 * 9.1e-4)}),
    "float16": (
        torch.float16,
        False,
        {0.2: (3 * 1.7e-5, 3 * 1.2e-5), 0.07: (3 * 5.6e-4, 3 * 9.1e-4)},
    ),
    "bfloat16": (
        torch.bfloat16,
        False,
        {0.2: (3 * 1.4e-4, 3 * 8.3e-5), 0.07: (3 * 3.7e-3, 3 * 6.9e-3)},
    ),
}


def unit_rows(batch: int, queue_size: int, embed_dim: int, dtype=torch.float32, device="cpu"):
    """Query, key near it, and queue, drawn alike for every dtype and device."""
    generator = torch.Generator().manual_seed(batch + queue_size + embed_dim)
    query = torch.randn(batch, embed_dim, generator=generator)
    key = query + torch.randn(batch, embed_dim, generator=generator)
    queue = torch.randn(queue_size, embed_dim, generator=generator)
    return [normalize(t, dim=1).to(device, dtype) for t in (query, key, queue)]


def eager(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, None]:
    """What one would write without this package."""
    positive = (query * key).sum(1, keepdim=True) / temperature
    logits = torch.cat([positive, query @ queue.T / temperature], 1)
    target = torch.zeros(len(query), dtype=torch.long, device=query.device)
    return cross_entropy(logits, target, reduction="none"), None


def losses_and_gradients(function, query: Tensor, key: Tensor, *others):
    """Loss, and the gradient of its sum by query and key."""
    query, key = query.detach().requires_grad_(), key.detach().requires_grad_()
    loss, _ = function(query, key, *others)
    return loss.detach(), *torch.autograd.grad(loss.sum(), (query, key))


def worst(found: Tensor, expected: Tensor) -> float:
    """Largest error over the largest value."""
    if not expected.numel():
        return 0.0
    scale = expected.abs().max().clamp(min=1e-30)
    return float((found.double() - expected).abs().max() / scale)


def test_uniform_similarity_gives_log_of_candidates(device):
    one = torch.ones(4, 1, device=device)
    loss, rank = queue_info_nce(one, one, torch.ones(7, 1, device=device))
    torch.testing.assert_close(loss, torch.full((4,), 8.0, device=device).log())
    assert rank.tolist() == [7] * 4  # an equal negative is no hit


def test_value_and_gradient_worked_out_by_hand(device):
    query = torch.tensor([[1.0, 0.0]], device=device, requires_grad=True)
    key = torch.tensor([[0.5, 0.0]], device=device, requires_grad=True)
    queue = torch.tensor([[0.0, 1.0]], device=device)
    loss, rank = queue_info_nce(query, key, queue, temperature=0.5)  # logits 1 and 0
    negative = 1 / (1 + torch.e)  # its softmax
    torch.testing.assert_close(loss.cpu(), torch.tensor([-1 + (1 + torch.tensor(1.0).exp()).log()]))
    assert rank.tolist() == [0]
    loss.sum().backward()
    expected = torch.tensor([[-negative * 0.5 / 0.5, negative * 1 / 0.5]])
    torch.testing.assert_close(query.grad.cpu(), expected)
    torch.testing.assert_close(key.grad.cpu(), torch.tensor([[-negative / 0.5, 0.0]]))


@pytest.mark.filterwarnings("ignore:queue_info_nce. on CUDA the kernel takes at most")
@pytest.mark.parametrize("temperature", [0.2, 0.01])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_twice_that_of_eager(dtype, shape, temperature, device):
    operands = unit_rows(*shape, dtype, device)
    found = losses_and_gradients(queue_info_nce, *operands, temperature)
    wide = [t.double() for t in operands]
    expected = losses_and_gradients(queue_info_nce_reference, *wide, temperature)
    by_eager = losses_and_gradients(eager, *operands, temperature)
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    assert found[0].dtype == accumulated
    assert found[1].dtype == found[2].dtype == dtype
    rounding = [accumulated, dtype, dtype]
    last_digits = 100 if dtype == torch.float64 else 4  # in float64 the truth has errors of its own
    for ours, truth, theirs, kind in zip(found, expected, by_eager, rounding, strict=True):
        allowed = 2 * worst(theirs, truth) + last_digits * torch.finfo(kind).eps
        assert worst(ours, truth) <= allowed


@pytest.mark.parametrize("temperature", [0.2, 0.07])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_at_a_full_queue_is_that_of_float32(dtype, temperature):
    operands = unit_rows(24, 65536, 128, dtype)
    wide = [t.double() for t in operands]
    truth = losses_and_gradients(queue_info_nce_reference, *wide, temperature)
    loss, _, direction = raw(*operands, temperature)
    allowed_loss, allowed_gradient = ALLOWED_AT_FULL_QUEUE[temperature]
    assert float((loss - truth[0]).abs().max()) <= allowed_loss
    assert worst(direction, truth[1]) <= allowed_gradient


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("temperature", [0.2, 0.07])
@pytest.mark.parametrize("operands", ALLOWED_ON_TENSOR_CORES)
def test_error_at_a_full_queue_on_tensor_cores(operands, temperature, device):
    dtype, allow_tf32, allowed = ALLOWED_ON_TENSOR_CORES[operands]
    tensors = unit_rows(512, 65536, 128, dtype, device)
    wide = [t.double() for t in tensors]
    truth = losses_and_gradients(queue_info_nce_reference, *wide, temperature)
    loss, _, direction = raw(*tensors, temperature, allow_tf32=allow_tf32)
    allowed_loss, allowed_gradient = allowed[temperature]
    assert float((loss - truth[0]).abs().max()) <= allowed_loss
    assert worst(direction, truth[1]) <= allowed_gradient


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_logits_are_never_in_the_memory_of_the_gpu(device):
    operands = unit_rows(12544, 65536, 128, torch.bfloat16, device)  # logits of 1.5 GiB
    losses_and_gradients(queue_info_nce, *operands)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    losses_and_gradients(queue_info_nce, *operands)
    assert torch.cuda.max_memory_allocated() - before < 64 * 2**20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides_give_the_same_bits(dtype, device):
    operands = unit_rows(9, 40, 12, dtype, device)
    expected = losses_and_gradients(queue_info_nce, *operands)
    transposed = [t.T.contiguous().T for t in operands]
    stepped = [torch.cat([t, t], 1).repeat_interleave(2, 0)[::2, :12] for t in operands]
    reversed_order = [torch.stack([t, t], 2)[:, :, 1] for t in operands]
    for strided in (transposed, stepped, reversed_order):
        assert not strided[0].is_contiguous()
        found = losses_and_gradients(queue_info_nce, *strided)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_rows_of_a_channels_last_map_need_no_copy(device):
    feature_map = torch.randn(2, 12, 3, 3, device=device).to(memory_format=torch.channels_last)
    rows = feature_map.permute(0, 2, 3, 1).flatten(0, 2)
    assert rows.data_ptr() == feature_map.data_ptr()
    key, queue = torch.randn(18, 12, device=device), torch.randn(5, 12, device=device)
    loss, _ = queue_info_nce(rows, key, queue)
    torch.testing.assert_close(loss, queue_info_nce_reference(rows, key, queue)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entries_with_the_id_of_the_query_are_left_out(dtype, device):
    operands = unit_rows(11, 300, 16, dtype, device)
    query_ids = torch.arange(11, device=device) % 5 - 1
    queue_ids = torch.arange(300, device=device) % 7 - 1
    found = losses_and_gradients(queue_info_nce, *operands, 0.1, query_ids, queue_ids)
    _, rank = queue_info_nce(*operands, 0.1, query_ids, queue_ids)
    query, key, queue = (t.double() for t in operands)
    allowed = 1e-13 if dtype == torch.float64 else 1e-5 + torch.finfo(dtype).eps
    for i in range(11):
        kept = queue[(queue_ids != query_ids[i]) | (queue_ids < 0)]  # as if they were not there
        row = slice(i, i + 1)
        truth = losses_and_gradients(queue_info_nce_reference, query[row], key[row], kept, 0.1)
        assert all(worst(a[row], b) <= allowed for a, b in zip(found, truth, strict=True))
        assert rank[i] == queue_info_nce_reference(query[row], key[row], kept, 0.1)[1]


def test_a_query_whose_negatives_are_all_left_out_has_no_loss(device):
    query, key, queue = unit_rows(3, 20, 8, device=device)
    ids = torch.tensor([4, 5, 4], device=device)
    queue_ids = torch.full((20,), 4, device=device)
    loss, gradient, _ = losses_and_gradients(queue_info_nce, query, key, queue, 0.2, ids, queue_ids)
    _, rank = queue_info_nce(query, key, queue, 0.2, ids, queue_ids)
    assert loss[0] == loss[2] == 0 and loss[1] > 0
    assert not gradient[0].any() and gradient[1].any()
    assert rank[0] == rank[2] == 0


def test_an_empty_queue_gives_no_loss(device):
    query, key, queue = unit_rows(3, 0, 8, device=device)
    loss, grad_query, grad_key = losses_and_gradients(queue_info_nce, query, key, queue)
    assert not loss.any() and not grad_query.any() and not grad_key.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_logits_of_ten_thousand_neither_overflow_nor_vanish(dtype, device):
    query = torch.tensor([[100.0, 0], [100, 0], [-100, 0], [0, 100]], device=device, dtype=dtype)
    key = torch.tensor([[1.0, 0], [-1, 0], [-1, 0], [0, 1]], device=device, dtype=dtype)
    queue = torch.tensor([[1.0, 0], [-1, 0], [0, 0.5]], device=device, dtype=dtype)
    found = losses_and_gradients(queue_info_nce, query, key, queue, 0.01)
    wide = [t.double() for t in (query, key, queue)]
    expected = losses_and_gradients(queue_info_nce_reference, *wide, 0.01)
    # Tensor cores round the weights: what cancels in a gradient leaves that much of its largest.
    rounding = 1e-4 if dtype == torch.bfloat16 and device == "cuda" else 0
    for ours, truth in zip(found, expected, strict=True):
        atol = 1e-6 + rounding * float(truth.abs().max())
        torch.testing.assert_close(ours.double(), truth, rtol=4e-3, atol=atol)


def test_a_loss_far_below_one_keeps_its_digits(device):
    query = torch.tensor([[1.0]], device=device)
    loss, _ = queue_info_nce(query, query, -query, temperature=0.1)  # log(1 + e^-20)
    torch.testing.assert_close(loss.cpu(), torch.tensor([-20.0]).exp(), rtol=1e-5, atol=0)


def test_nan_in_a_query_or_key_stays_in_its_row(device):
    query, key, queue = unit_rows(40, 30, 8, device=device)
    clean = losses_and_gradients(queue_info_nce, query, key, queue)
    query[3, 2] = torch.nan
    key[35, 0] = torch.nan
    found = losses_and_gradients(queue_info_nce, query, key, queue)
    _, rank = queue_info_nce(query, key, queue)
    touched = torch.zeros(40, dtype=torch.bool)
    touched[[3, 35]] = True
    assert found[0].isnan().cpu().equal(touched)
    assert found[1].isnan().all(1).cpu().equal(touched)
    assert torch.equal(found[0][~touched], clean[0][~touched])
    assert torch.equal(found[1][~touched], clean[1][~touched])
    assert rank[3] == rank[35] == 30


def test_nan_in_the_queue_reaches_the_loss_of_all_rows_that_keep_it(device):
    query, key, queue = unit_rows(3, 30, 8, device=device)
    queue[7] = torch.nan
    loss, rank = queue_info_nce(query, key, queue)
    assert loss.isnan().all() and (rank >= 1).all()
    ids = torch.tensor([1, 2, 2], device=device)
    queue_ids = torch.full((30,), -1, device=device)
    queue_ids[7] = 1
    loss, _ = queue_info_nce(query, key, queue, 0.2, ids, queue_ids)
    assert loss.isnan().tolist() == [False, True, True]


def test_a_collapsed_encoder_never_scores_a_hit(device):
    query, _, queue = unit_rows(5, 30, 8, device=device)
    _, rank = queue_info_nce(torch.zeros_like(query), query, queue)
    assert rank.tolist() == [30] * 5
    collapsed = query[:1].expand(5, -1)
    _, rank = queue_info_nce(collapsed, collapsed, query[:1].expand(9, -1))
    assert rank.tolist() == [9] * 5


@pytest.mark.parametrize("shape", [(3, 9001, 17), (300, 2500, 8)], ids=str)
def test_same_input_gives_same_bits_at_any_number_of_threads(shape):
    operands = unit_rows(*shape)
    expected = losses_and_gradients(queue_info_nce, *operands)
    threads = torch.get_num_threads()
    try:
        for count in [1, 2] * 20:
            torch.set_num_threads(count)
            found = losses_and_gradients(queue_info_nce, *operands)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_segments_of_the_queue_make_one_sum(device):
    query, key, queue = unit_rows(3, 8192, 8, device=device)
    queue[[100, 5000]] = query[0]  # the largest logits lie in segments of their own
    queue[7000, 3] = torch.nan
    query_ids = torch.tensor([4, -1, 5], device=device)
    queue_ids = torch.arange(8192, device=device) % 9
    queue_ids[7000] = 5
    operands = (query, key, queue, 0.01, query_ids, queue_ids)
    loss, rank = queue_info_nce(*operands)
    kept = torch.ones(8192, dtype=torch.bool, device=device)
    kept[7000] = False
    truth, positions = queue_info_nce_reference(
        query.double(), key.double(), queue[kept].double(), 0.01, query_ids, queue_ids[kept]
    )
    assert loss.isnan().tolist() == [True, True, False]  # only the last query leaves it out
    assert rank.tolist() == [positions[0] + 1, positions[1] + 1, positions[2]]
    torch.testing.assert_close(loss[2].double(), truth[2], rtol=1e-5, atol=1e-5)
    queue[7000] = 0
    queue_ids[7000] = -1
    loss, rank = queue_info_nce(*operands)
    wide = (query.double(), key.double(), queue.double(), *operands[3:])
    truth, positions = queue_info_nce_reference(*wide)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-5)
    assert rank.tolist() == positions.tolist()


def test_duplicates_of_the_key_each_count(device):
    query, key, _ = unit_rows(5, 1, 24, device=device)
    for copies in (1, 100, 5000):
        loss, rank = queue_info_nce(query[:1], key[:1], key[:1].expand(copies, -1))
        expected = torch.full((1,), copies + 1.0, device=device).log()
        torch.testing.assert_close(loss, expected)
        assert rank.tolist() == [copies]  # none scores below the key


def test_logits_are_never_in_memory():
    query, key, queue = unit_rows(2048, 65536, 8)  # logits of 512 MiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    losses_and_gradients(queue_info_nce, query, key, queue)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 64 * 1024  # KiB


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of opcheck's own copies
def test_opcheck_accepts_the_operators():
    query, key, queue = unit_rows(4, 9, 6)
    ids = torch.arange(4), torch.arange(9)
    needs = query.clone().requires_grad_(), key.clone().requires_grad_()
    torch.library.opcheck(raw, (query, key, queue))
    torch.library.opcheck(raw, (*needs, queue, 0.3, *ids))
    torch.library.opcheck(raw, (query, needs[1], queue, 0.3, None, None, False))
    loss, _, direction = raw(query, key, queue)
    for both in (True, False):
        torch.library.opcheck(raw_backward, (loss, query, loss, direction, 0.2, both, True))


def test_gradcheck_with_and_without_ids():
    query, key, queue = unit_rows(4, 7, 5, torch.float64)
    query.requires_grad_()
    key.requires_grad_()
    ids = torch.arange(4), torch.arange(7) % 5
    for others in ((), ids):
        assert torch.autograd.gradcheck(
            lambda q, k, others=others: queue_info_nce(q, k, queue, 0.5, *others)[0], (query, key)
        )


def test_gradients_of_key_alone_and_of_expanded_losses():
    query, key, queue = unit_rows(4, 7, 5)
    expected = losses_and_gradients(queue_info_nce_reference, query, key, queue)
    key.requires_grad_()
    loss, _ = queue_info_nce(query, key, queue)
    loss.mean().backward()  # hands down a gradient of stride 0
    torch.testing.assert_close(key.grad * 4, expected[2])


def test_second_derivative_is_an_error():
    query, key, queue = unit_rows(4, 7, 5)
    query.requires_grad_()
    loss, _ = queue_info_nce(query, key, queue)
    (gradient,) = torch.autograd.grad(loss.square().sum(), query, create_graph=True)
    with pytest.raises(
        RuntimeError, match="queue_info_nce: second derivatives are not implemented"
    ):
        gradient.sum().backward()


@pytest.mark.parametrize("ids", [False, True])
def test_compiles_without_a_graph_break(ids, device):
    operands = unit_rows(6, 20, 8, device=device)
    others = (0.2, torch.arange(6), torch.arange(20)) if ids else ()
    others = tuple(o.to(device) if torch.is_tensor(o) else o for o in others)
    compiled = torch.compile(queue_info_nce, fullgraph=True, backend="aot_eager")
    found = losses_and_gradients(compiled, *operands, *others)
    expected = losses_and_gradients(queue_info_nce, *operands, *others)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_compiles_with_changing_batch():
    compiled = torch.compile(queue_info_nce, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (3, 5, 8):
        operands = unit_rows(batch, 20, 8)
        torch.testing.assert_close(compiled(*operands), queue_info_nce(*operands))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_the_operands_in_its_dtype(dtype, device):
    operands = unit_rows(6, 20, 8, device=device)
    rounded = [t.to(dtype) for t in operands]
    expected = losses_and_gradients(queue_info_nce, *rounded)
    with torch.autocast(device, dtype=dtype):
        found = losses_and_gradients(queue_info_nce, *operands)
    assert [t.dtype for t in found] == [torch.float32] * 3
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
    torch.testing.assert_close(found[1], expected[1].float(), rtol=0, atol=0)


def test_autocast_leaves_float64_alone():
    operands = unit_rows(6, 20, 8, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = queue_info_nce(*operands)
    assert torch.equal(loss, queue_info_nce(*operands)[0])


def test_autocast_compiles():
    operands = unit_rows(6, 20, 8)
    compiled = torch.compile(queue_info_nce, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(*operands), queue_info_nce(*operands))


def test_without_a_kernel_the_reference_runs_in_chunks(monkeypatch):
    operands = unit_rows(11, 50, 8)
    ids = torch.arange(11), torch.arange(50) % 13
    expected = losses_and_gradients(queue_info_nce, *operands, 0.2, *ids)
    rows_at_once = []

    def spy(query, *others):
        rows_at_once.append(len(query))
        return queue_info_nce_reference(query, *others)

    monkeypatch.setattr(module, "has_kernel", lambda *_: False)
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 50 * 4)  # the logits of four rows
    monkeypatch.setattr(module, "queue_info_nce_reference", spy)
    found = losses_and_gradients(queue_info_nce, *operands, 0.2, *ids)
    assert rows_at_once[:3] == [4, 4, 3]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = queue_info_nce(*operands)
    rounded = [t.bfloat16() for t in operands]
    torch.testing.assert_close(loss, queue_info_nce_reference(*rounded)[0])


def test_more_dimensions_than_the_cuda_kernel_takes_run_in_pytorch_with_one_warning(monkeypatch):
    monkeypatch.setattr(module, "has_kernel", lambda *_: True)
    module._warn_of_embed_dim.cache_clear()
    with FakeTensorMode():
        wide = [torch.empty(size, 257, device="cuda") for size in (4, 4, 9)]
        with pytest.warns(
            UserWarning, match="queue_info_nce: on CUDA the kernel takes at most 256"
        ):
            loss, rank = queue_info_nce(*wide)
        assert loss.shape == rank.shape == (4,) and loss.device.type == "cuda"
        queue_info_nce(*wide)  # a second warning would be an error


@pytest.mark.parametrize("capability, expected", [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_gpus_without_the_tensor_cores_that_kernels_need_run_pytorch(
    capability, expected, monkeypatch
):
    monkeypatch.setattr(dispatch, "_is_registered", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert dispatch.has_kernel("queue_info_nce", torch.device("cuda")) is expected


def test_float64_on_cuda_runs_in_pytorch(monkeypatch):
    monkeypatch.setattr(module, "has_kernel", lambda *_: True)
    called = []
    monkeypatch.setattr(module, "_chunked_reference", lambda *_: called.append("PyTorch"))
    with FakeTensorMode():
        for dtype in (torch.float32, torch.float64):
            queue_info_nce(*(torch.empty(4, 8, dtype=dtype, device="cuda") for _ in range(3)))
    assert called == ["PyTorch"]


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "fallback"])
def test_the_queue_is_a_constant(kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr(module, "has_kernel", lambda *_: False)
    query, key, queue = unit_rows(4, 7, 5)
    queue.requires_grad_()
    for function in (queue_info_nce, raw):
        with pytest.raises(RuntimeError, match="queue_info_nce: queue must not require a gradient"):
            function(query, key, queue)
        with torch.no_grad():
            function(query, key, queue)


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "fallback"])
def test_a_learned_temperature_is_refused_where_its_gradient_would_be_lost(kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr(module, "has_kernel", lambda *_: False)
    operands = unit_rows(4, 7, 5)
    temperature = torch.tensor(0.2, requires_grad=True)
    message = "queue_info_nce: temperature must not require a gradient, it is a constant"
    with pytest.raises(RuntimeError, match=message):
        queue_info_nce(*operands, temperature)
    loss, _ = queue_info_nce(*operands, temperature.detach())
    assert torch.equal(loss, queue_info_nce(*operands, 0.2)[0])


def test_direction_is_computed_only_when_asked_for():
    query, key, queue = unit_rows(4, 7, 5)
    assert raw(query, key, queue)[2].shape == (4, 5)
    assert raw(query, key, queue, compute_direction=False)[2].shape == (0, 5)
    with pytest.raises(RuntimeError, match="queue_info_nce: compute_direction must be True"):
        raw(query.requires_grad_(), key, queue, compute_direction=False)


def test_the_function_asks_for_the_direction_where_a_gradient_of_query_may_follow():
    query, key, queue = unit_rows(4, 7, 5)
    needed = query.clone().requires_grad_()
    directions = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            returned = function(*arguments, **(keywords or {}))
            if function is raw.default:
                directions.append(len(returned[2]))
            return returned

    with Spy():
        queue_info_nce(query, key, queue)
        queue_info_nce(needed, key, queue)
        with torch.no_grad():
            queue_info_nce(needed, key, queue)
    assert directions == [0, 4, 0]


def test_rank_and_direction_are_constants_to_autograd():
    query, key, queue = unit_rows(4, 7, 5)
    loss, rank, direction = raw(query.requires_grad_(), key, queue)
    assert loss.requires_grad and not rank.requires_grad and not direction.requires_grad
