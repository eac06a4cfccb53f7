"""Which slices an epoch of fine-tuning shows."""

import pytest
import torch

from medmoco.sampling import ForegroundSampler


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def shown(slices: int, **classes: range) -> torch.Tensor:
    """(slices, 1 + len(classes)): the background everywhere, each class in its range of slices."""
    table = torch.zeros(slices, 1 + len(classes), dtype=torch.bool)
    table[:, 0] = True
    for column, where in enumerate(classes.values(), start=1):
        table[list(where), column] = True
    return table


def test_every_slice_with_foreground_comes_once_and_a_third_as_many_without():
    sampler = ForegroundSampler(shown(40, liver=range(12)), generator())
    first, second = list(sampler), list(sampler)
    assert len(first) == len(sampler) == 12 + 4
    assert set(range(12)) < set(first)
    assert len(set(first)) == len(first)
    assert first != second


def test_slices_without_foreground_are_drawn_anew_each_epoch():
    sampler = ForegroundSampler(shown(300, liver=range(30)), generator())
    first, second = ({item for item in sampler if item >= 30} for _ in range(2))
    assert first != second


def test_classes_that_are_seen_often_enough_do_not_change_the_order():
    one = ForegroundSampler(shown(40, liver=range(12)), generator())
    two = ForegroundSampler(shown(40, liver=range(12), spleen=range(3)), generator())
    assert list(one) == list(two)


@pytest.mark.parametrize("rare", [1, 5])
def test_rare_class_comes_as_often_as_in_a_fifth_of_the_slices_with_foreground(rare):
    sampler = ForegroundSampler(shown(120, liver=range(100), gland=range(rare)), generator())
    first, second = list(sampler), list(sampler)
    assert len(first) == len(sampler) == 100 + 34 - (34 - 20) + 20 - rare
    assert sum(item < rare for item in first) == 20
    assert set(range(100)) < set(first)
    assert rare == 1 or sorted(first) != sorted(second), "the repeats are drawn anew"


def test_class_that_no_slice_shows_is_no_reason_to_repeat_any():
    table = shown(12, liver=range(9), absent=range(0))
    assert len(ForegroundSampler(table, generator())) == 9 + 3


def test_slices_without_any_foreground_are_all_drawn():
    assert sorted(ForegroundSampler(shown(5), generator())) == list(range(5))
