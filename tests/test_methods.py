"""What a method or a flag makes of the model."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from medmoco.data.table import VolumeEntry, VolumeTable
from medmoco.errors import UserError
from medmoco.methods import (
    apply_data_defaults,
    apply_preset,
    build_model,
    resolve,
    whitening_group,
)
from medmoco.models.encoder import Encoder
from medmoco.models.moco import MoCo
from medmoco.models.weights import read_weights
from medmoco.models.whitening import IterNorm, ZCAWhitening
from medmoco.pretrain import PretrainConfig


def model_of(**flags) -> MoCo:
    small = {"arch": "resnet18", "width": 0.125, "queue_size": 16, "device": "cpu"}
    config = apply_preset(PretrainConfig(**{**small, **flags}))
    return build_model(apply_data_defaults(config, 1000))


@pytest.mark.parametrize(
    ("method", "local", "key_norm", "layer"),
    [
        ("mocov2", "none", "shuffle", None),
        ("densecl", "dense", "shuffle", None),
        ("medmoco", "coordinates", "shuffle", ZCAWhitening),
        ("directclr", "none", "shuffle", None),
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


def test_the_gradient_is_limited_where_features_are_whitened_exactly():
    def limit(**flags):
        return apply_preset(PretrainConfig(**flags)).clip_norm

    assert limit(method="medmoco") == limit(method="mocov2", decorrelation="zca") == 1
    assert limit(method="mocov2") == limit(method="paper") == limit(method="densecl") == 0
    assert limit(method="medmoco", clip_norm=0.0) == 0


def cache_of(volumes: int, sides: tuple[int, int] = (32, 32)) -> SimpleNamespace:
    """As much of a cache as the flags depend on: volumes of 80 slices, each of another patient."""
    entries = [
        VolumeEntry(str(v), str(v), "", (80, *sides), (4.0, 2.0, 2.0)) for v in range(volumes)
    ]
    table = VolumeTable.of(entries, 0, 0)
    return SimpleNamespace(volumes=table, locate=table.locate)


@pytest.mark.parametrize("volumes", [1, 2])  # of two, one is held out for the diagnostics
def test_other_volumes_cannot_be_the_negatives_where_there_are_none(volumes):
    flags = PretrainConfig(method="mocov2", same="volume", device="cpu")
    assert resolve(flags, cache_of(20)).same == "volume"
    with pytest.raises(UserError, match="--same volume: expected two volumes or more"):
        resolve(flags, cache_of(volumes))


@pytest.mark.parametrize(
    ("sides", "flags", "size"),
    [
        ((32, 20), {}, 32),
        ((33, 20), {}, 64),
        ((20, 50), {"spacing": 1.0}, 128),
        ((512, 512), {}, 224),
        ((32, 32), {"image_size": 100}, 100),
        ((32, 32), {"method": "paper"}, 336),
    ],
)
def test_images_are_no_larger_than_the_slices_need(sides, flags, size):
    config = resolve(PretrainConfig(device="cpu", **flags), cache_of(20, sides))
    assert config.image_size == size


def test_flags_win_over_the_method():
    assert model_of(method="paper", local="none", key_norm="ema").local == "none"


@pytest.mark.parametrize(
    ("flags", "weights"),
    [
        ({"method": "medmoco"}, (1, 0.5)),
        ({"method": "medmoco", "local": "dense", "local_weight": 2.0}, (1, 2)),
        ({"method": "densecl"}, (0.5, 0.5)),
        ({"method": "densecl", "local_weight": 0.25}, (0.75, 0.25)),
        ({"method": "densecl", "local_weight": 0.25, "global_weight": 1.0}, (1, 0.25)),
        ({"method": "densecl", "local_weight": 1.5, "global_weight": 1.0}, (1, 1.5)),
    ],
)
def test_densecl_shares_a_weight_of_1_between_its_losses(flags, weights):
    model = model_of(**flags)
    assert (model.global_weight, model.local_weight) == weights


def test_densecl_without_its_local_loss_is_mocov2():
    assert model_of(method="densecl", local="none").global_weight == 1


def test_densecl_cannot_share_more_than_it_has():
    with pytest.raises(UserError, match=r"--local-weight 1\.5: .* expected at most 1"):
        model_of(method="densecl", local_weight=1.5)


def test_covariance_penalty_weighs_what_its_flag_says_where_it_is_asked_for():
    assert model_of(method="mocov2", covariance_weight=0.3).covariance_weight == 0
    asked = model_of(method="mocov2", decorrelation="covariance", covariance_weight=0.3)
    assert asked.covariance_weight == 0.3


def test_directclr_compares_the_first_features_themselves():
    model = model_of(method="directclr")
    assert model.temperature == 0.1
    embedding = model.query.eval()(torch.rand(4, 1, 32, 32))
    assert embedding.pooled.shape == (4, 64) and embedding.projection.shape == (4, 11)
    first = functional.normalize(embedding.pooled[:, :11], dim=1)
    torch.testing.assert_close(embedding.projection, first)
    assert model_of(method="directclr", embed_dim=20).queue.keys.shape == (16, 20)


def test_an_embedding_without_projector_is_no_longer_than_the_features():
    with pytest.raises(UserError, match=r"--embed-dim 65: .* expected at most 64"):
        model_of(method="mocov2", projector="none", embed_dim=65)
    assert model_of(method="mocov2", embed_dim=65).queue.keys.shape == (16, 65)


@pytest.mark.parametrize("flags", [{}, {"decorrelation": "iternorm", "whiten_at": "last-norm"}])
def test_query_and_key_encoder_start_from_initial_weights(tmp_path, flags):
    torch.manual_seed(7)
    state = Encoder("resnet18", 0.125, in_channels=3).state_dict()
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "init.pth")
    config = PretrainConfig(arch="resnet18", width=0.125, queue_size=16, device="cpu", **flags)
    config = apply_data_defaults(apply_preset(config), 1000)
    model = build_model(config, read_weights(tmp_path / "init.pth"))
    for branch in (model.query, model.key):
        found = branch.encoder
        assert torch.equal(found.conv1.weight, state["conv1.weight"].sum(1, keepdim=True))
        assert torch.equal(found.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])


@pytest.mark.parametrize(("ranks", "batch"), [(1, 64), (3, 63), (6, 60), (100, 100)])
def test_default_batch_is_a_multiple_of_the_ranks(ranks, batch):
    config = apply_preset(PretrainConfig(method="mocov2", device="cpu"))
    assert apply_data_defaults(config, 1100, ranks=ranks).batch_size == batch


def test_whitening_group_stays_when_a_run_goes_on_with_more_ranks():
    flags = {"method": "medmoco", "device": "cpu", "batch_size": 128, "statistics": "rank"}
    config = apply_preset(PretrainConfig(**flags, width=0.125))
    groups = [apply_data_defaults(config, 1000, ranks=n).whiten_group for n in (1, 2)]
    assert groups == [32, 16]
    begun = apply_data_defaults(config, 1000, ranks=2)
    assert apply_data_defaults(begun, 1000, ranks=1) == begun
    with pytest.raises(UserError, match="--whiten-group 16: the batch is too small"):
        whitening_group(begun, 64, ranks=4)
