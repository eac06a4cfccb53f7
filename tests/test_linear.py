import pytest
import torch
from torch.nn import functional

from medmoco.errors import UserError
from medmoco.linear import (
    UNTESTED_WEIGHT_DECAY,
    PixelSample,
    choose_weight_decay,
    content_mask,
    features_at,
    fit,
    linear_evaluation,
    objective,
    patient_folds,
    standardise,
)
from medmoco.models.encoder import Encoder

CPU = torch.device("cpu")


def generator():
    return torch.Generator().manual_seed(0)


def pixels(count=400, channels=4, classes=3, noise=0.5):
    """Features of which the first ones tell the class."""
    labels = torch.randint(0, classes, (count,), generator=generator())
    features = noise * torch.randn(channels, count, generator=generator())
    features[:classes] += functional.one_hot(labels, classes).T
    items = torch.arange(count) % 6
    return PixelSample(features.half(), labels, torch.ones(count), items)


class Squares(torch.utils.data.Dataset):
    """A bright square is class 1."""

    def __len__(self):
        return 6

    def __getitem__(self, item):
        label = torch.zeros(32, 32, dtype=torch.int64)
        label[4 + item : 16 + item, 8:24] = 1
        noise = torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(item))
        image = 0.6 * label[None] + 0.2 * noise
        return {"image": image, "label": label, "extent": torch.tensor([32.0, 32.0])}


def test_features_at_pixels_are_those_of_the_upsampled_map():
    feature_map = torch.randn(5, 8, 8, generator=generator())
    mask = torch.rand(30, 30, generator=generator()) < 0.3
    upsampled = functional.interpolate(feature_map[None], (30, 30), mode="bilinear")[0]
    torch.testing.assert_close(features_at(feature_map, mask), upsampled[:, mask])


def test_content_mask_covers_what_the_slice_covers():
    batch = {"image": torch.zeros(2, 1, 6, 6), "extent": torch.tensor([[6.0, 6.0], [2.0, 4.0]])}
    mask = content_mask(batch)
    assert mask[0].all()
    expected = torch.zeros(6, 6, dtype=torch.bool)
    expected[2:4, 1:5] = True
    assert torch.equal(mask[1], expected)


def test_standardised_features_have_mean_zero_and_variance_one():
    sample = pixels()
    normal, mean, variance = standardise(sample, eps=0.0)
    features = sample.features.float()
    torch.testing.assert_close(mean, features.mean(1))
    torch.testing.assert_close(variance, features.var(1, unbiased=False))
    torch.testing.assert_close(normal.features.float().mean(1), torch.zeros(4), atol=1e-3, rtol=0)


def test_fit_ends_where_the_objective_is_flat():
    sample = pixels()
    coefficients = fit(sample, torch.zeros(3, 5), weight_decay=1e-2).requires_grad_()
    objective(sample, coefficients, 1e-2)[0].backward()
    assert coefficients.grad.abs().max() < 5e-3


def test_weight_decay_shrinks_the_slopes_and_spares_the_intercepts():
    sample = pixels()
    free, held = (fit(sample, torch.zeros(3, 5), decay) for decay in (0.0, 1.0))
    assert held[:, :-1].norm() < 0.2 * free[:, :-1].norm()
    intercepts = torch.tensor([[0.0, 5.0]])
    assert torch.equal(
        objective(pixels(channels=1, classes=1), intercepts, 0.0)[0],
        objective(pixels(channels=1, classes=1), intercepts, 1.0)[0],
    )


def test_folds_hold_each_patient_out_once_and_never_split_one():
    patients = ["a", "a", "b", "c", "c", "d"]
    folds = torch.stack(list(patient_folds(patients, 3, generator())))
    assert (folds.sum(0) == 1).all()
    for fold in folds:
        assert fold[0] == fold[1] and fold[3] == fold[4]


def test_cross_validation_prefers_strong_decay_where_features_are_noise():
    sample = pixels(count=60, channels=40, noise=1.0)
    noise = torch.randn(40, 60, generator=generator()).half()
    sample = PixelSample(noise, sample.labels, sample.weights, sample.items)
    assert choose_weight_decay(sample, "abcdef", 3, generator()) == 1e-2


def test_single_patient_gets_a_fixed_weight_decay():
    assert choose_weight_decay(pixels(), "aaaaaa", 3, generator()) == UNTESTED_WEIGHT_DECAY


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    encoder = Encoder("resnet18", width=0.125, output_stride=4)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    log = []
    model, _ = linear_evaluation(
        encoder,
        Squares(),
        "aabbcc",
        2,
        batch_size=3,
        seed=0,
        device=CPU,
        log=lambda *record: log.append(record),
    )
    return model, before, log


def test_linear_decoder_finds_squares(trained):
    model, _, _ = trained
    sample = Squares()[2]
    predicted = model(sample["image"][None]).argmax(1)[0]
    assert (predicted == sample["label"]).float().mean() > 0.85


def test_linear_evaluation_leaves_the_encoder_as_it_was(trained):
    model, before, _ = trained
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_linear_evaluation_logs_a_falling_loss(trained):
    _, _, log = trained
    losses = [loss for _, _, loss, _ in log]
    assert losses == sorted(losses, reverse=True)


def test_features_that_are_not_finite_are_an_error():
    encoder = Encoder("resnet18", width=0.125, output_stride=4)
    encoder.bn1.running_var.fill_(float("nan"))
    with pytest.raises(UserError, match="features of the labelled slices are not finite"):
        linear_evaluation(
            encoder, Squares(), "aabbcc", 2, batch_size=3, seed=0, device=CPU, log=print
        )
