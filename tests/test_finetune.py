import pytest
import torch

from medmoco.errors import UserError
from medmoco.finetune import ForegroundSampler, augment, default_epochs, finetune, warmup_cosine


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_every_slice_with_foreground_comes_once_and_a_third_as_many_without():
    has_foreground = torch.arange(40) < 12
    sampler = ForegroundSampler(has_foreground, generator())
    first, second = list(sampler), list(sampler)
    assert len(first) == len(sampler) == 12 + 4
    assert set(range(12)) < set(first)
    assert len(set(first)) == len(first)
    assert first != second


def test_slices_without_foreground_are_drawn_anew_each_epoch():
    sampler = ForegroundSampler(torch.arange(300) < 30, generator())
    first, second = ({item for item in sampler if item >= 30} for _ in range(2))
    assert first != second


def test_schedule_rises_to_the_peak_and_falls_to_zero():
    rates = [warmup_cosine(step, 200) for step in range(201)]
    assert 0 < rates[0] < rates[5] < rates[9] == max(rates) == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert abs(rates[200]) < 1e-9


def test_label_moves_with_the_image():
    label = torch.zeros(8, 64, 64, dtype=torch.int64)
    label[:, 20:44, 16:36] = 1
    image, moved = augment(label[:, None].float(), label, generator())
    bright = image[:, 0] > (image.amin((1, 2, 3)) + image.amax((1, 2, 3)))[:, None, None] / 2
    overlap = 2 * (bright & (moved == 1)).sum() / (bright.sum() + (moved == 1).sum())
    assert overlap > 0.95
    assert not torch.equal(moved, label)


def test_augmented_labels_are_classes_that_were_there():
    label = torch.tensor([0, 3, 200])[torch.randint(0, 3, (4, 32, 32), generator=generator())]
    image, moved = augment(torch.rand(4, 1, 32, 32), label, generator())
    assert set(moved.unique().tolist()) <= {0, 3, 200}
    assert moved.dtype == torch.int64
    assert image.min() >= 0 and image.max() <= 1


def test_same_generator_state_gives_the_same_augmentation():
    image, label = torch.rand(2, 1, 16, 16), torch.ones(2, 16, 16, dtype=torch.int64)
    first, second = (augment(image, label, generator(3)) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_loss_that_is_not_finite_stops_the_training():
    model = torch.nn.Conv2d(1, 2, 1)
    torch.nn.init.constant_(model.weight, float("nan"))
    item = {"image": torch.rand(1, 8, 8), "label": torch.ones(8, 8, dtype=torch.int64)}
    with pytest.raises(UserError, match=r"--lr 0.1: the loss of fine-tuning is nan"):
        finetune(
            model,
            [item] * 4,
            torch.ones(4, dtype=torch.bool),
            epochs=1,
            batch_size=2,
            lr=0.1,
            seed=0,
            device=torch.device("cpu"),
            amp_dtype=None,
            workers=0,
            log=print,
        )


@pytest.mark.parametrize(("batches", "epochs"), [(12, 30), (100, 30), (300, 10), (2000, 5)])
def test_large_sets_get_fewer_epochs(batches, epochs):
    assert default_epochs(batches) == epochs
