"""What a method or a flag makes of the model."""

import pytest

from medmoco.methods import apply_data_defaults, apply_preset, build_model
from medmoco.models.moco import MoCo
from medmoco.models.whitening import IterNorm, ZCAWhitening
from medmoco.pretrain import PretrainConfig


def model_of(**flags) -> MoCo:
    small = {"arch": "resnet18", "width": 0.125, "queue_size": 16, "device": "cpu"}
    config = apply_preset(PretrainConfig(**{**small, **flags}))
    return build_model(apply_data_defaults(config, 1000))


@pytest.mark.parametrize(
    ("method", "local", "key_norm", "layer"),
    [
        ("mocov2", "none", "ema", None),
        ("medmoco", "coordinates", "ema", ZCAWhitening),
        ("paper", "regions", "shuffle", IterNorm),
    ],
)
def test_method_names_local_learning_normalisation_and_whitening(method, local, key_norm, layer):
    model = model_of(method=method)
    assert (model.local, model.key_norm) == (local, key_norm)
    found = {
        type(module)
        for module in model.query.modules()
        if isinstance(module, (ZCAWhitening, IterNorm))
    }
    assert found == ({layer} if layer else set())


def test_flags_win_over_the_method():
    assert model_of(method="paper", local="none", key_norm="ema").local == "none"


def test_covariance_penalty_weighs_what_its_flag_says_where_it_is_asked_for():
    assert model_of(method="mocov2", covariance_weight=0.3).covariance_weight == 0
    asked = model_of(method="mocov2", decorrelation="covariance", covariance_weight=0.3)
    assert asked.covariance_weight == 0.3
