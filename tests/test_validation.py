"""Dice during the training, and the patients that are kept from it."""

import pytest
import torch

from medmoco.errors import UserError
from medmoco.metrics import dice_from_counts, overlap_counts
from medmoco.validation import BestWeights, dice_of, hold_out, mean_dice, overlap, validate

PATIENTS = [f"p{number // 3:02d}" for number in range(30)]  # ten, of three slices


@pytest.mark.parametrize(("fraction", "patients"), [(0.01, 1), (0.2, 2), (0.25, 3), (0.99, 9)])
def test_whole_patients_are_held_out(fraction, patients):
    train, validation = hold_out(PATIENTS, fraction, seed=0)
    assert sorted(train + validation) == list(range(30))
    held = {PATIENTS[i] for i in validation}
    assert len(held) == patients and len(validation) == 3 * patients
    assert not held & {PATIENTS[i] for i in train}


def test_nothing_is_held_out_without_a_share():
    assert hold_out(PATIENTS, 0.0, seed=0) == (list(range(30)), [])
    assert hold_out(["one"] * 3, 0.0, seed=0) == ([0, 1, 2], [])


def test_seed_decides_who_is_held_out():
    chosen = [hold_out(PATIENTS, 0.2, seed)[1] for seed in (0, 0, 1, 2, 3)]
    assert chosen[0] == chosen[1]
    assert len({tuple(items) for items in chosen}) > 1


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_share_out_of_range_is_named(fraction):
    with pytest.raises(UserError, match=f"--validation-fraction: expected .*, got {fraction}"):
        hold_out(PATIENTS, fraction, seed=0)


def test_single_patient_cannot_be_shared_out():
    with pytest.raises(UserError, match=r"at least 2 patients to train on, .*, got 1"):
        hold_out(["one"] * 3, 0.2, seed=0)


def test_dice_is_that_of_the_label_maps():
    random = torch.Generator().manual_seed(0)
    logits = torch.rand(3, 5, 9, 7, generator=random)
    labels = torch.randint(0, 3, (3, 9, 7), generator=random)  # class 4 is only predicted
    logits[:, 3] = -1  # class 3 is absent from both
    expected = overlap_counts(logits.argmax(1).numpy(), labels.numpy(), 5)
    assert dice_of(overlap(logits, labels)) == [dice_from_counts(row) for row in expected[1:]]
    assert dice_of(overlap(logits, labels))[2:] == [None, 0.0]


def test_mean_leaves_out_classes_without_dice():
    assert mean_dice([0.5, None, 1.0]) == 0.75
    assert mean_dice([None]) is None


class LastTrained(torch.nn.Module):
    """Logits are the image; tells in which mode it was used."""

    def forward(self, image):
        assert not self.training
        return torch.cat([1 - image, image], dim=1)


def test_validation_takes_the_pixels_of_all_slices_together_in_eval_mode():
    label = torch.zeros(5, 4, 4, dtype=torch.int64)
    label[:, :2] = 1
    image = label[:, None].float()
    image[0] = 0  # a slice that is missed: 4 of 5 slices found
    slices = [{"image": i, "label": g} for i, g in zip(image, label, strict=True)]
    model = LastTrained().train()
    dice = validate(model, slices, 2, torch.device("cpu"), None)
    assert dice == [pytest.approx(2 * 32 / (32 + 40))]
    assert model.training


def test_without_any_dice_the_last_weights_stay():
    best, model = BestWeights(patience=3), torch.nn.Linear(1, 1)
    assert [best.add(epoch, None, model) for epoch in (1, 2, 3)] == [False, False, True]
    torch.nn.init.constant_(model.weight, 5.0)
    best.restore(model)
    assert model.weight == 5.0
    assert (best.epoch, best.dice) == (0, None)


def test_patience_waits_for_the_first_class_to_be_found():
    best, model = BestWeights(patience=2), torch.nn.Linear(1, 1)
    assert [best.add(epoch, 0.0, model) for epoch in range(1, 6)] == [False] * 5
    assert not best.add(6, 0.3, model)
    assert [best.add(epoch, 0.2, model) for epoch in (7, 8)] == [False, True]
    assert (best.epoch, best.dice) == (6, 0.3)
