import importlib

import pytest
import torch
from torch.nn.functional import normalize

from medmoco.ops import dense_match
from medmoco.ops.dense_match import dense_match_reference

module = importlib.import_module("medmoco.ops.dense_match")


def maps(batch, channels, queries, keys, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(batch + channels)
    query_map = torch.randn(batch, channels, *queries, generator=generator)
    key_map = torch.randn(batch, channels, *keys, generator=generator)
    return query_map.to(device, dtype), key_map.to(device, dtype)


def test_matches_worked_out_by_hand(device):
    query_map = torch.tensor([[[2.0, 0.0], [0.0, 3.0]]], device=device)  # directions x and y
    key_map = torch.tensor([[[0.0, 4.0, 1.0], [5.0, 4.0, 0.0]]], device=device)  # y, diagonal, x
    index, similarity = dense_match(query_map, key_map)
    assert index.tolist() == [[2, 0]]
    torch.testing.assert_close(similarity.cpu(), torch.ones(1, 2))


@pytest.mark.parametrize("sizes", [((5, 4), (3, 7)), ((1, 1), (1, 1)), ((17,), (9,))], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_similarity_is_the_largest_cosine_in_float64(dtype, sizes, device):
    query_map, key_map = maps(3, 33, *sizes, dtype, device)
    index, similarity = dense_match(query_map, key_map)
    query = normalize(query_map.flatten(2).double(), dim=1)
    key = normalize(key_map.flatten(2).double(), dim=1)
    truth = query.mT @ key
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    assert index.dtype == torch.int64 and similarity.dtype == accumulated
    tolerance = 4 * torch.finfo(accumulated).eps
    torch.testing.assert_close(similarity.double(), truth.amax(2), rtol=tolerance, atol=tolerance)
    chosen = truth.gather(2, index[:, :, None])[:, :, 0]
    torch.testing.assert_close(chosen, truth.amax(2), rtol=tolerance, atol=tolerance)


def test_positions_are_numbered_row_by_row_in_any_layout(device):
    query_map, key_map = maps(2, 8, (4, 5), (6, 3), device=device)
    expected = dense_match(query_map.flatten(2), key_map.flatten(2))
    channels_last = [t.to(memory_format=torch.channels_last) for t in (query_map, key_map)]
    for found in (dense_match(query_map, key_map), dense_match(*channels_last)):
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1])


def test_chunks_give_the_same_matches(monkeypatch, device):
    query_map, key_map = maps(2, 8, (4, 5), (6, 3), device=device)
    expected = dense_match_reference(query_map, key_map)
    monkeypatch.setattr(module, "CHUNK_BYTES", 3 * 2 * 18 * 4)  # three query positions
    found = dense_match(query_map, key_map)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


def test_ties_go_to_the_lowest_position(device):
    query_map = torch.ones(2, 4, 50, device=device)
    index, _ = dense_match(query_map, torch.ones(2, 4, 1000, device=device))
    assert not index.any()
    key_map = torch.zeros(1, 2, 9, device=device)
    key_map[0, 0, [4, 7]] = 1
    index, _ = dense_match(torch.tensor([[[1.0], [0.0]]], device=device), key_map)
    assert index.tolist() == [[4]]


def test_nan_wins_and_the_lowest_of_several(device):
    query_map, key_map = maps(1, 4, (3,), (9,), device=device)
    key_map[0, 2, [5, 6]] = torch.nan
    index, similarity = dense_match(query_map, key_map)
    assert index.tolist() == [[5, 5, 5]] and similarity.isnan().all()
    query_map, key_map = maps(1, 4, (3,), (9,), device=device)
    query_map[0, 0, 1] = torch.nan
    index, similarity = dense_match(query_map, key_map)
    assert index[0, 1] == 0 and similarity.isnan().tolist() == [[False, True, False]]


def test_a_zero_vector_has_cosine_zero(device):
    query_map = torch.zeros(1, 4, 2, device=device)
    query_map[0, 0, 1] = 1
    key_map = torch.zeros(1, 4, 3, device=device)
    key_map[0, 0] = torch.tensor([-1.0, 0.0, -2.0])
    index, similarity = dense_match(query_map, key_map)
    assert index.tolist() == [[0, 1]] and similarity.tolist() == [[0, 0]]


def test_empty_batch_and_empty_query_map(device):
    index, similarity = dense_match(torch.ones(0, 4, 3), torch.ones(0, 4, 5))
    assert index.shape == similarity.shape == (0, 3)
    index, similarity = dense_match(torch.ones(2, 4, 0), torch.ones(2, 4, 5))
    assert index.shape == similarity.shape == (2, 0)


def test_result_is_a_constant_to_autograd():
    query_map, key_map = maps(1, 4, (3,), (9,))
    index, similarity = dense_match(query_map.requires_grad_(), key_map)
    assert not index.requires_grad and not similarity.requires_grad


def test_autocast_takes_the_maps_in_its_dtype(device):
    query_map, key_map = maps(2, 8, (4, 5), (6, 3), device=device)
    expected = dense_match(query_map.bfloat16(), key_map.bfloat16())
    with torch.autocast(device, dtype=torch.bfloat16):
        found = dense_match(query_map, key_map)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_compiles_without_a_graph_break(device):
    query_map, key_map = maps(2, 8, (4, 5), (6, 3), device=device)
    compiled = torch.compile(dense_match, fullgraph=True, backend="aot_eager")
    for found, expected in zip(
        compiled(query_map, key_map), dense_match(query_map, key_map), strict=True
    ):
        torch.testing.assert_close(found, expected)
