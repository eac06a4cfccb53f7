import importlib
import resource

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from medmoco.ops import dense_match
from medmoco.ops.dense_match import dense_match_reference

module = importlib.import_module("medmoco.ops.dense_match")
raw = torch.ops.medmoco.dense_match

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [  # batch, channels, query positions, key positions
    (0, 3, 4, 5),
    (2, 3, 0, 5),
    (1, 1, 1, 1),
    (2, 1, 40, 9),
    (3, 33, 20, 21),
    (2, 127, 65, 97),
    (1, 600, 33, 301),
]


def maps(batch, channels, queries, keys, dtype=torch.float32, device="cpu"):
    """Query and key map, drawn alike for every dtype and device."""
    generator = torch.Generator().manual_seed(batch + channels)
    query_map = torch.randn(batch, channels, *queries, generator=generator)
    key_map = torch.randn(batch, channels, *keys, generator=generator)
    return query_map.to(device, dtype), key_map.to(device, dtype)


def eager(query_map: Tensor, key_map: Tensor) -> Tensor:
    """Similarities as one would write them without this package."""
    query, key = (normalize(t.flatten(2), dim=1) for t in (query_map, key_map))
    return query.mT @ key


def assert_same(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_matches_worked_out_by_hand(device):
    query_map = torch.tensor([[[2.0, 0.0], [0.0, 3.0]]], device=device)  # directions x and y
    key_map = torch.tensor([[[0.0, 4.0, 1.0], [5.0, 4.0, 0.0]]], device=device)  # y, diagonal, x
    index, similarity = dense_match(query_map, key_map)
    assert index.tolist() == [[2, 0]]
    torch.testing.assert_close(similarity.cpu(), torch.ones(1, 2))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_twice_that_of_eager(dtype, shape, device):
    batch, channels, queries, keys = shape
    query_map, key_map = maps(batch, channels, (queries,), (keys,), dtype, device)
    index, similarity = dense_match(query_map, key_map)
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    assert index.dtype == torch.int64 and similarity.dtype == accumulated
    assert index.shape == similarity.shape == (batch, queries)
    if not index.numel():
        return
    truth = eager(query_map.double(), key_map.double())
    largest = truth.amax(2)
    chosen = truth.gather(2, index[:, :, None])[:, :, 0]
    by_eager = (eager(query_map, key_map).amax(2).double() - largest).abs().max()
    allowed = min(2 * by_eager, 1e-6) + 2 * torch.finfo(accumulated).eps
    assert (similarity.double() - largest).abs().max() <= allowed
    assert (chosen - largest).abs().max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides_give_the_same_bits(dtype, device):
    operands = maps(2, 20, (5, 8), (6, 9), dtype, device)
    expected = dense_match(*operands)
    channels_last = [t.contiguous(memory_format=torch.channels_last) for t in operands]
    positions_first = [
        t.flatten(2).permute(2, 0, 1).contiguous().permute(1, 2, 0) for t in operands
    ]
    every_other = [t.flatten(2).repeat_interleave(2, 2)[:, :, 1::2] for t in operands]
    narrowed = [torch.cat([t, t], 3)[:, :, :, : t.shape[3]] for t in operands]  # rows apart
    for strided in (channels_last, positions_first, every_other, narrowed):
        assert not any(t.is_contiguous() for t in strided)
        assert_same(dense_match(*strided), expected)
    expanded = operands[0][:1].expand(2, -1, -1, -1)
    assert_same(dense_match(expanded, operands[1]), dense_match(expanded.clone(), operands[1]))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_maps_are_read_as_they_lie(memory_format):
    operands = [t.contiguous(memory_format=memory_format) for t in maps(2, 20, (5, 8), (6, 9))]
    read = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            if function is raw.default:
                read.extend(tensor.data_ptr() for tensor in arguments[:2])
            else:
                assert function.is_view, f"{function} may copy"
            return function(*arguments, **(keywords or {}))

    with Spy():
        dense_match(*operands)
    assert read == [tensor.data_ptr() for tensor in operands]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_a_key_stands_does_not_change_its_similarity(dtype, device):
    query_map, key_map = maps(1, 40, (70,), (149,), dtype, device)
    index, similarity = dense_match(query_map, key_map)
    for shift in (1, 7, 16, 45, 47, 100):
        rolled = dense_match(query_map, key_map.roll(shift, 2))
        assert_same(rolled, ((index + shift) % 149, similarity))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_go_to_the_lowest_position(dtype, device):
    ones = torch.ones(2, 4, 1000, dtype=dtype, device=device)
    index, similarity = dense_match(ones[:, :, :50], ones)
    assert not index.any() and (similarity == similarity[0, 0]).all()
    query_map, key_map = maps(1, 40, (70,), (149,), dtype, device)
    key_map[:, :, [23, 24, 47, 48, 100, 148]] = query_map[:, :, :1]  # in blocks and tiles apart
    index, _ = dense_match(query_map[:, :, :1].expand(-1, -1, 70), key_map)
    assert index.unique().tolist() == [23]
    index, _ = dense_match(query_map, torch.cat([key_map] * 3, 2))
    assert_same([index], dense_match(query_map, key_map)[:1])


def test_nan_wins_and_the_lowest_of_several(device):
    query_map, key_map = maps(1, 4, (70,), (149,), device=device)
    query_map[0, 0, 1] = torch.nan
    index, similarity = dense_match(query_map, key_map)
    assert index[0, 1] == 0 and similarity.isnan().sum() == 1
    clean = maps(1, 4, (70,), (149,), device=device)
    assert_same([t[:, 2:] for t in (index, similarity)], [t[:, 2:] for t in dense_match(*clean)])
    key_map[0, 2, [61, 62, 130]] = torch.nan
    index, similarity = dense_match(query_map, key_map)
    assert index[0, 1] == 0 and similarity.isnan().all()
    assert (index[0, 2:] == 61).all()


def test_an_infinite_entry_is_as_nan(device):
    query_map, key_map = maps(1, 4, (5,), (149,), device=device)
    key_map[0, 2, 61] = torch.inf
    index, similarity = dense_match(query_map, key_map)
    assert (index == 61).all() and similarity.isnan().all()


def test_a_zero_vector_has_cosine_zero(device):
    query_map = torch.zeros(1, 4, 2, device=device)
    query_map[0, 0, 1] = 1
    key_map = torch.zeros(1, 4, 3, device=device)
    key_map[0, 0] = torch.tensor([-1.0, -0.0, -2.0])
    index, similarity = dense_match(query_map, key_map)
    assert index.tolist() == [[0, 1]] and similarity.tolist() == [[0, 0]]


@pytest.mark.parametrize("compiled", [True, False], ids=["kernel", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lengths_near_the_limits_of_float32_do_not_matter(dtype, compiled, monkeypatch, device):
    if not compiled:
        monkeypatch.setattr(module, "has_kernel", lambda *_: False)
    query_map, key_map = maps(1, 12, (70,), (90,), device=device)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    sizes = torch.tensor([20 * smallest, 1e-38, 1e-30, 1e-19, 1, 1e19, 1e30, 5e37], device=device)
    query_map *= sizes[torch.arange(70) % 8]
    key_map *= sizes[torch.arange(90) % 7 + 1]
    query_map, key_map = query_map.to(dtype), key_map.to(dtype)
    assert query_map.isfinite().all() and query_map.any(1).all()
    index, similarity = dense_match(query_map, key_map)
    truth = eager(query_map.double() * 1e45, key_map.double() * 1e45)  # beyond normalize's eps
    torch.testing.assert_close(similarity.double(), truth.amax(2), rtol=0, atol=1e-6)
    chosen = truth.gather(2, index[:, :, None])[:, :, 0]
    torch.testing.assert_close(chosen, truth.amax(2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("compiled", [True, False], ids=["kernel", "reference"])
def test_similarity_never_leaves_its_range(compiled, monkeypatch, device):
    if not compiled:
        monkeypatch.setattr(module, "has_kernel", lambda *_: False)
    query_map, _ = maps(1, 50, (500,), (1,), device=device)
    _, similarity = dense_match(query_map, query_map)
    assert similarity.max() == 1 and similarity.min() > 0.999999
    _, similarity = dense_match(query_map[:, :, :1], -query_map[:, :, :1])
    assert -1 <= similarity < -0.999999


def test_same_input_gives_same_bits_at_any_number_of_threads():
    operands = maps(3, 64, (200,), (400,))
    expected = dense_match(*operands)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for _ in range(20):
                assert_same(dense_match(*operands), expected)
    finally:
        torch.set_num_threads(threads)


def test_similarities_are_never_in_memory():
    query_map, key_map = maps(1, 4, (160, 160), (160, 160))  # similarities of 2.4 GiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    dense_match(query_map, key_map)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 16 * 1024  # KiB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_a_kernel_the_reference_runs_in_chunks(dtype, monkeypatch):
    query_map, key_map = maps(2, 8, (4, 5), (6, 3), dtype)
    expected = dense_match(query_map, key_map)
    positions_at_once = []

    def spy(query, key):
        positions_at_once.append(query.shape[2])
        return dense_match_reference(query, key)

    monkeypatch.setattr(module, "has_kernel", lambda *_: False)
    monkeypatch.setattr(module, "CHUNK_BYTES", 6 * 2 * 18 * 4)  # six query positions
    monkeypatch.setattr(module, "dense_match_reference", spy)
    found = dense_match(query_map, key_map)
    assert positions_at_once == [6, 6, 6, 2]
    torch.testing.assert_close(found, expected)
    index, _ = dense_match(query_map.float(), query_map.float()[:, :, :, :1])
    assert index.shape == (2, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = dense_match(query_map.float(), key_map.float())
    torch.testing.assert_close(
        found, dense_match_reference(query_map.bfloat16(), key_map.bfloat16())
    )


@pytest.mark.parametrize("function", [dense_match, raw], ids=["function", "operator"])
def test_result_is_a_constant_to_autograd(function):
    query_map, key_map = (t.requires_grad_() for t in maps(1, 4, (3,), (9,)))
    assert not any(t.requires_grad for t in function(query_map, key_map))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of opcheck's own copies
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_accepts_the_operator(dtype):
    query_map, key_map = maps(2, 6, (7,), (9,), dtype)
    torch.library.opcheck(raw, (query_map, key_map))
    torch.library.opcheck(raw, (query_map.clone().requires_grad_(), key_map, True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("function", [dense_match, raw], ids=["function", "operator"])
def test_autocast_takes_the_maps_in_its_dtype(function, dtype, device):
    query_map, key_map = maps(2, 8, (20,), (18,), device=device)
    expected = dense_match(query_map.to(dtype), key_map.to(dtype))
    with torch.autocast(device, dtype=dtype):
        assert_same(function(query_map, key_map), expected)
        assert_same(function(query_map.to(dtype), key_map), expected)


def test_autocast_leaves_float64_alone():
    operands = maps(2, 8, (20,), (18,), torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = dense_match(*operands)
    assert_same(found, dense_match(*operands))


def test_compiles_with_changing_batch_without_a_graph_break(device):
    compiled = torch.compile(dense_match, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3, 5):
        operands = maps(batch, 8, (4, 5), (6, 3), device=device)
        assert_same(compiled(*operands), dense_match(*operands))
        channels_last = [t.to(memory_format=torch.channels_last) for t in operands]
        assert_same(compiled(*channels_last), dense_match(*operands))


def test_autocast_compiles():
    operands = maps(2, 8, (4, 5), (6, 3))
    compiled = torch.compile(dense_match, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(compiled(*operands), dense_match(*operands))


ROUNDING = 2e-6  # of a cosine, whose sums are float32 whatever the maps are


def tied_maps(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of the keys of each image a third stands there twice, and a few queries are keys."""
    query_map, key_map = maps(3, 130, (150,), (99,), dtype)
    key_map = torch.cat([key_map, key_map[:, :, 40:73]], 2)
    query_map[:, :, ::10] = key_map[:, :, 20:35]
    return query_map, key_map


def assert_same_choice(found: Tensor, expected: Tensor, query_map: Tensor, key_map: Tensor):
    """Two devices choose alike where the best key is clear, and the lowest of equal keys always."""
    positions = torch.arange(key_map.shape[2])
    alike = (key_map[:, :, :, None] == key_map[:, :, None]).all(1)
    lowest = torch.where(alike, positions, len(positions)).amin(2)  # of the keys that equal each
    for index in (found, expected):
        assert torch.equal(lowest.gather(1, index), index), "not the lowest of equal keys"
    cosine = eager(query_map.double(), key_map.double())
    best, second = (
        cosine.masked_fill((lowest != positions)[:, None], -2).topk(2, 2).values.unbind(2)
    )
    clear = best - second > 2 * ROUNDING
    assert clear.float().mean() > 0.9
    assert torch.equal(found[clear], expected[clear]), "another key than the best"
    chosen = cosine.gather(2, found[:, :, None])[:, :, 0]
    assert (best - chosen <= 2 * ROUNDING).all(), "no key that is about as good as the best"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_cuda_and_cpu_choose_the_same_keys(device, layout, dtype):
    operands = tied_maps(dtype)
    expected, _ = dense_match(*operands)
    if layout == "channels last":
        operands = tuple(t.mT.contiguous().mT for t in operands)
    found, _ = dense_match(*(t.to(device) for t in operands))
    assert_same_choice(found.cpu(), expected, *operands)


def test_a_choice_on_cuda_that_is_off_would_be_found():
    query_map, key_map = tied_maps(torch.float32)
    expected, _ = dense_match(query_map, key_map)
    in_double, _ = dense_match(query_map.double(), key_map.double())
    assert_same_choice(in_double, expected, query_map, key_map)
    highest = torch.where((expected >= 40) & (expected < 73), expected + 59, expected)
    another = expected.clone()
    another[1, 7] = 0 if expected[1, 7] else 1
    for wrong, message in ((highest, "not the lowest of equal"), (another, "another key than")):
        with pytest.raises(AssertionError, match=message):
            assert_same_choice(wrong, expected, query_map, key_map)


def test_a_near_tie_may_be_chosen_either_way_on_cuda():
    query_map, key_map = tied_maps(torch.float32)
    key_map[:, :, 0] = query_map[:, :, 1]
    key_map[:, :, 1] = query_map[:, :, 1] * 3  # the same direction, and another vector
    expected, _ = dense_match(query_map, key_map)
    assert set(expected[:, 1].tolist()) <= {0, 1}
    for choice in (0, 1):
        found = expected.clone()
        found[:, 1] = choice
        assert_same_choice(found, expected, query_map, key_map)
    found[:, 1] = 2
    with pytest.raises(AssertionError, match="no key that is about as good"):
        assert_same_choice(found, expected, query_map, key_map)
