import random

import pytest
import torch

from medmoco.models.queue import KeyQueue


def batch_of(start, count, dim=3):
    """Keys whose every value is their running number, and ids of 1000 more."""
    numbers = torch.arange(start, start + count)
    return numbers[:, None].expand(-1, dim).float(), numbers + 1000


@pytest.mark.parametrize("seed", range(5))
def test_it_matches_a_plain_ring_buffer_for_batches_of_any_size(seed):
    rng = random.Random(seed)
    size = rng.randint(1, 17)
    queue = KeyQueue(size, 3)
    ring, written = [None] * size, 0
    for _ in range(40):
        count = rng.randint(0, 3 * size)
        keys, ids = batch_of(written, count)
        queue.enqueue(keys, ids)
        for number in range(written, written + count):
            ring[number % size] = number
        written += count
        expected = torch.tensor([-1 if n is None else n + 1000 for n in ring])
        assert torch.equal(queue.ids, expected)
        rows = torch.tensor([0 if n is None else n for n in ring], dtype=torch.float32)
        assert torch.equal(queue.keys, rows[:, None].expand(-1, 3))
        assert queue.cursor.item() == written
        assert queue.filled.item() == min(written, size)


def test_a_batch_larger_than_the_queue_leaves_its_last_keys():
    queue = KeyQueue(4, 3)
    queue.enqueue(*batch_of(0, 11))
    assert sorted(queue.ids.tolist()) == [1007, 1008, 1009, 1010]


def test_keys_without_ids_match_nothing():
    queue = KeyQueue(4, 3)
    queue.enqueue(*batch_of(0, 4))
    queue.enqueue(torch.ones(2, 3))
    assert queue.ids.tolist() == [-1, -1, 1002, 1003]


def test_it_stores_values_and_no_graph():
    queue = KeyQueue(4, 3)
    keys = torch.randn(2, 3, requires_grad=True)
    queue.enqueue(keys * 2)
    assert not queue.keys.requires_grad
    with torch.no_grad():
        keys.zero_()
    assert queue.keys[:2].abs().sum() > 0


def test_half_precision_keys_are_stored_in_float32():
    queue = KeyQueue(4, 3)
    queue.enqueue(torch.ones(2, 3, dtype=torch.bfloat16))
    assert queue.keys.dtype == torch.float32 and queue.keys[:2].eq(1).all()


def test_a_queue_restored_from_its_state_goes_on_alike():
    queue, copy = KeyQueue(5, 3), KeyQueue(5, 3)
    queue.enqueue(*batch_of(0, 7))
    copy.load_state_dict(queue.state_dict())
    for each in (queue, copy):
        each.enqueue(*batch_of(7, 4))
    for name, value in queue.state_dict().items():
        assert torch.equal(value, copy.state_dict()[name]), name
    assert set(queue.state_dict()) == {"keys", "ids", "cursor"}


def test_enqueue_never_waits_for_the_device():
    # Meta tensors hold no values: whatever asked for one would raise here.
    queue = KeyQueue(5, 3).to("meta")
    queue.enqueue(
        torch.empty(7, 3, device="meta"), torch.empty(7, dtype=torch.int64, device="meta")
    )
    assert queue.filled.device.type == "meta"


def test_wrong_key_length_is_named():
    with pytest.raises(ValueError, match=r"keys must be \(batch, 3\), got \(2, 4\)"):
        KeyQueue(5, 3).enqueue(torch.ones(2, 4))


def test_wrong_number_of_ids_is_named():
    with pytest.raises(ValueError, match=r"ids must be \(2,\) to match keys, got \(3,\)"):
        KeyQueue(5, 3).enqueue(torch.ones(2, 3), torch.arange(3))
