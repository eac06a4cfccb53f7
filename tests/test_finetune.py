import pytest
import torch
from labelled_slices import Slices

from medmoco.errors import UserError
from medmoco.finetune import (
    augment,
    default_epochs,
    finetune,
    start_from_frequencies,
    warmup_cosine,
    warmup_poly,
)
from medmoco.losses import inverse_frequency_weights
from medmoco.models.decoders import UNet
from medmoco.models.encoder import Encoder


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_schedule_rises_to_the_peak_and_falls_to_zero():
    rates = [warmup_cosine(step, 200) for step in range(201)]
    assert 0 < rates[0] < rates[5] < rates[9] == max(rates) == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert abs(rates[200]) < 1e-9


def test_poly_falls_as_nnunet_after_the_warm_up():
    rates = [warmup_poly(step, 200) for step in range(201)]
    assert rates[:10] == [warmup_cosine(step, 200) for step in range(10)]
    assert rates[105] == pytest.approx((1 - 95 / 190) ** 0.9)
    assert rates[200] == 0


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


def network(classes=3):
    torch.manual_seed(0)
    layers = (
        torch.nn.Conv2d(1, 8, 3, padding=1),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, classes, 1),
    )
    return torch.nn.Sequential(*layers)


def train(model, slices, log=lambda *_: None, **changes):
    settings = {
        "epochs": 2,
        "batch_size": 4,
        "lr": 1e-2,
        "seed": 0,
        "device": torch.device("cpu"),
        "amp_dtype": None,
        "workers": 0,
        "log": log,
    }
    return finetune(model, slices, slices.shown, **(settings | changes))


def test_loss_that_is_not_finite_stops_the_training():
    model = network()
    torch.nn.init.constant_(model[0].weight, float("nan"))
    with pytest.raises(UserError, match=r"the loss is nan at step 1 of fine-tuning; .*--lr"):
        train(model, Slices(), lr=0.1)


def test_untrained_network_predicts_each_class_as_often_as_it_occurs():
    classifier = torch.nn.Conv2d(4, 3, 1)
    start_from_frequencies(classifier, torch.tensor([900.0, 99.0, 1.0]))
    probability = classifier(torch.zeros(1, 4, 2, 2)).softmax(dim=1)
    expected = torch.tensor([0.9, 0.099, 0.001])
    torch.testing.assert_close(probability[0, :, 0, 0], expected, rtol=1e-5, atol=0)


def test_class_without_pixels_starts_with_a_finite_bias():
    classifier = torch.nn.Conv2d(4, 3, 1)
    start_from_frequencies(classifier, torch.tensor([90.0, 10.0, 0.0]))
    assert classifier.bias.isfinite().all()
    assert classifier.bias.argmin() == 2


class FewPixels(Slices):
    """Four squares, and a dot of four bright pixels where they meet: 0.4 % of the slice."""

    def __init__(self):
        super().__init__(16)
        self.image.mul_(0.15)
        self.label.zero_()
        for organ, (row, column) in enumerate(((4, 4), (4, 16), (16, 4), (16, 16)), start=1):
            rows, columns = slice(row, row + 9), slice(column, column + 9)
            self.label[:, rows, columns] = organ
            self.image[:, 0, rows, columns] += 0.12 * organ
        self.label[:, 14:16, 14:16] = 5
        self.image[:, 0, 14:16, 14:16] = 1
        self.shown = torch.ones(16, 6, dtype=torch.bool)


def test_organ_of_few_pixels_is_found_within_few_steps():
    slices, told = FewPixels(), []
    torch.manual_seed(0)
    model = UNet(Encoder("resnet18", width=0.125, output_stride=8), classes=6)
    start_from_frequencies(model.classifier, slices.pixels())
    weights = inverse_frequency_weights(slices.pixels())
    train(model, slices, lambda *v: told.append(v), epochs=16, lr=2e-3, class_weights=weights)
    *_, dice, _ = told[-1]
    assert dice[-1] > 0.5


def test_class_that_is_never_found_is_reported():
    slices = Slices()
    model = network()
    torch.nn.init.constant_(model[3].bias, 0.0)
    with torch.no_grad():
        model[3].bias[2] = -1e4
    assert train(model, slices, lr=1e-6)["missed"] == [2]


def test_log_gets_the_dice_of_each_class_on_the_batches_and_on_the_validation():
    told = []
    result = train(network(), Slices(), lambda *values: told.append(values))
    assert result == {"missed": []}
    assert [(epoch, step) for epoch, step, *_ in told] == [(1, 2), (2, 4)]
    for *_, dice, validated in told:
        assert len(dice) == 2 and all(0 <= value <= 1 for value in dice)
        assert validated is None
    told.clear()
    train(network(), Slices(), lambda *values: told.append(values), validation=Slices(4))
    assert all(len(validated) == 2 for *_, validated in told)


def test_weights_of_the_best_epoch_are_kept(monkeypatch):
    """Validation Dice is made up: 0.2, 0.9, 0.5, so the second epoch is the best."""
    made_up, weights = iter([[0.2], [0.9], [0.5]]), []

    def validate(model, *_):
        weights.append(model[0].weight.detach().clone())
        return next(made_up)

    monkeypatch.setattr("medmoco.finetune.validate", validate)
    model = network()
    result = train(model, Slices(), epochs=3, validation=Slices(4))
    assert (result["best_epoch"], result["epochs"], result["validation_dice"]) == (2, 3, 0.9)
    assert not torch.equal(weights[1], weights[2])
    torch.testing.assert_close(model[0].weight, weights[1], rtol=0, atol=0)
    assert not model.training


def test_training_stops_when_patience_is_over(monkeypatch, capsys):
    made_up = iter([[0.5], [0.7], [0.7], [None], [0.9]])
    monkeypatch.setattr("medmoco.finetune.validate", lambda *_: next(made_up))
    result = train(network(), Slices(), epochs=5, validation=Slices(4), patience=2)
    assert (result["best_epoch"], result["epochs"], result["validation_dice"]) == (2, 4, 0.7)
    assert "no better validation since epoch 2: stopped" in capsys.readouterr().out


def test_validation_leaves_the_course_of_the_training_as_it_is():
    losses = []
    for validation in (None, Slices(4)):
        told = []
        train(
            network(), Slices(), lambda *values, to=told: to.append(values), validation=validation
        )
        losses.append([loss for _, _, loss, *_ in told])
    assert losses[0] == losses[1]


def test_schedules_differ_in_what_the_network_learns():
    cosine, poly = network(), network()
    train(cosine, Slices())
    train(poly, Slices(), schedule="poly")
    assert not torch.equal(cosine[0].weight, poly[0].weight)


@pytest.mark.parametrize(("batches", "epochs"), [(12, 30), (100, 30), (300, 10), (2000, 5)])
def test_large_sets_get_fewer_epochs(batches, epochs):
    assert default_epochs(batches) == epochs
