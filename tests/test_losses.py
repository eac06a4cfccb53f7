import pytest
import torch

from medmoco.losses import dice_cross_entropy, inverse_frequency_weights


def certain(labels, classes=3):
    return 50.0 * torch.nn.functional.one_hot(labels, classes).movedim(-1, 1).float()


def test_certain_and_right_costs_nothing():
    labels = torch.tensor([[0, 1], [2, 0]])
    loss, dice = dice_cross_entropy(certain(labels), labels)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert dice.item() == pytest.approx(1)


def test_value_of_a_hand_made_case():
    labels = torch.tensor([[0, 1]])  # uniform over 2 classes: Dice = 2 * 0.5 / (2 * 0.5 + 1)
    loss, dice = dice_cross_entropy(torch.zeros(1, 2, 2), labels)
    assert dice.item() == pytest.approx(0.5)
    assert loss.item() == pytest.approx(0.5 + torch.tensor(2.0).log().item())


def test_dice_is_pooled_over_the_batch():
    labels = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    logits = certain(torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]), classes=2)
    _, dice = dice_cross_entropy(logits, labels)
    assert dice.item() == pytest.approx(2 * 4 / (4 + 5))


def test_class_that_the_batch_lacks_is_left_out_of_dice():
    labels = torch.tensor([[0, 1]])
    logits = certain(torch.tensor([[2, 1]]))  # class 2 is wrong, but nowhere true
    assert dice_cross_entropy(logits, labels)[1].item() == pytest.approx(1)


def test_batch_of_background_alone_has_cross_entropy_alone():
    labels = torch.zeros(1, 4, dtype=torch.int64)
    logits = torch.zeros(1, 2, 4, requires_grad=True)
    loss, _ = dice_cross_entropy(logits, labels)
    loss.backward()
    assert loss.item() == pytest.approx(torch.tensor(2.0).log().item())
    assert logits.grad.isfinite().all()


def test_weight_counts_a_pixel_as_often():
    torch.manual_seed(0)
    logits, labels = torch.randn(1, 3, 4), torch.tensor([[0, 1, 2, 1]])
    repeated = torch.cat([logits, logits[:, :, :1], logits[:, :, :1]], dim=2)
    expected = dice_cross_entropy(repeated, torch.tensor([[0, 1, 2, 1, 0, 0]]))
    weighted = dice_cross_entropy(logits, labels, torch.tensor([[3.0, 1.0, 1.0, 1.0]]))
    torch.testing.assert_close(weighted, expected)


def test_class_weights_are_those_of_the_cross_entropy_and_leave_dice_alone():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 5, 4), torch.randint(0, 3, (2, 5, 4))
    weights = torch.tensor([0.2, 1.0, 7.0])
    plain, dice = dice_cross_entropy(logits, labels)
    weighted, same_dice = dice_cross_entropy(logits, labels, class_weights=weights)
    entropy = torch.nn.functional.cross_entropy
    expected = entropy(logits, labels, weights) - entropy(logits, labels)
    torch.testing.assert_close(weighted - plain, expected)
    torch.testing.assert_close(same_dice, dice)


def test_weights_go_with_the_root_of_the_inverse_frequency_and_average_1_over_the_pixels():
    pixels = torch.tensor([90.0, 0.0, 10.0])
    weights = inverse_frequency_weights(pixels)
    assert weights[2] / weights[0] == pytest.approx(3.0)
    assert weights[1] == 0
    assert (weights * pixels).sum() / pixels.sum() == pytest.approx(1.0)
