"""The model: its losses against loops that read like the formulas, and how keys come to be."""

import contextlib
import math

import pytest
import torch
from torch.nn import functional

from medmoco.data.views import View
from medmoco.models.branch import Branch, Embedding
from medmoco.models.encoder import Encoder
from medmoco.models.moco import MoCo, recalibrate_batchnorm, train_step
from medmoco.models.whitening import ZCAWhitening

SIZE, STRIDE, BATCH, QUEUE = 32, 8, 6, 11
CELLS = SIZE // STRIDE


def make_model(**changes) -> MoCo:
    torch.manual_seed(0)
    settings = {
        "queue_size": QUEUE,
        "momentum": 0.9,
        "temperature": 0.2,
        "key_norm": "ema",
        "local": "none",
        "global_weight": 1.0,
        "local_weight": 0.5,
        "covariance_weight": 0.0,
        "regions": 2,
    } | changes
    encoder = Encoder("resnet18", width=0.125, output_stride=STRIDE)
    branch = Branch(encoder, 16, None, local=settings["local"] != "none")
    return MoCo(branch, **settings)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def views(generator):
    """Two views of six canvases: the second one shifted right by half its width."""
    images = [torch.rand(BATCH, 1, SIZE, SIZE, generator=generator) for _ in range(2)]
    identity = torch.eye(2, 3).expand(BATCH, 2, 3).clone()
    shifted = identity.clone()
    shifted[:, 0, 2] = 1.0
    return View(images[0], identity), View(images[1], shifted)


@pytest.fixture
def ids():
    return torch.arange(BATCH)


def fill(model: MoCo, generator: torch.Generator) -> None:
    for queue in filter(None, (model.queue, model.local_queue)):
        keys = functional.normalize(torch.randn(QUEUE, 16, generator=generator), dim=1)
        queue.enqueue(keys, torch.arange(QUEUE))


def info_nce(query, key, negatives, temperature=0.2) -> float:
    positive = math.exp((query @ key).item() / temperature)
    others = sum(math.exp((query @ negative).item() / temperature) for negative in negatives)
    return -math.log(positive / (positive + others))


def test_global_loss_is_info_nce_without_the_slices_own_keys(views, ids, generator):
    model = make_model()
    fill(model, generator)
    losses, key = model(*views, ids, generator)
    query = model.query(views[0].image).projection
    expected = [
        info_nce(query[i], key.projection[i], [k for j, k in enumerate(model.queue.keys) if j != i])
        for i in range(BATCH)
    ]
    assert losses.global_.item() == pytest.approx(sum(expected) / BATCH, rel=1e-4)
    assert losses.total.item() == losses.global_.item()


def test_coordinate_loss_compares_cells_at_the_same_place(views, ids, generator):
    model = make_model(local="coordinates")
    fill(model, generator)
    losses, key = model(*views, ids, generator)
    query = functional.normalize(model.query(views[0].image).local, dim=1)
    key_map = functional.normalize(key.local, dim=1)
    # The second view begins where the first has its middle: columns 2, 3 are its columns 0, 1.
    expected = [
        info_nce(
            query[i, :, row, column],
            key_map[i, :, row, column - CELLS // 2],
            [k for j, k in enumerate(model.local_queue.keys) if j != i],
        )
        for i in range(BATCH)
        for row in range(CELLS)
        for column in range(CELLS // 2, CELLS)
    ]
    assert losses.local.item() == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert losses.total.item() == pytest.approx(
        losses.global_.item() + 0.5 * losses.local.item(), rel=1e-6
    )


def test_dense_loss_compares_each_cell_with_the_one_that_the_encoder_finds_most_alike(
    views, ids, generator
):
    model = make_model(local="dense", global_weight=0.75, local_weight=0.25)
    fill(model, generator)
    losses, key = model(*views, ids, generator)
    query = model.query(views[0].image)
    maps = [functional.normalize(branch.map, dim=1).flatten(2) for branch in (query, key)]
    cells = [functional.normalize(branch.local, dim=1).flatten(2) for branch in (query, key)]
    places, expected = set(), []
    for i in range(BATCH):
        negatives = [k for j, k in enumerate(model.local_queue.keys) if j != i]
        for place in range(CELLS**2):
            alike = [(maps[0][i, :, place] @ other).item() for other in maps[1][i].T]
            match = alike.index(max(alike))
            places.add((place, match))
            expected.append(info_nce(cells[0][i, :, place], cells[1][i, :, match], negatives))
    assert len({match for _, match in places}) > 1 and any(a != b for a, b in places)
    assert losses.local.item() == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert losses.total.item() == pytest.approx(
        0.75 * losses.global_.item() + 0.25 * losses.local.item(), rel=1e-6
    )


def test_region_loss_contrasts_the_regions_of_one_image(ids, generator):
    model = make_model(local="regions")
    fill(model, generator)
    image = torch.rand(BATCH, 1, SIZE, SIZE, generator=generator)
    view = View(image, torch.eye(2, 3).expand(BATCH, 2, 3))
    losses, key = model(view, view, ids, generator)

    def regions(branch, feature_map):
        # The overlap is the whole view. Each region of 2 x 2 cells is read at 4 x 4 points, which
        # is the map upsampled by two, with its border repeated.
        upsampled = functional.interpolate(feature_map, scale_factor=2, mode="bilinear")
        pooled = functional.avg_pool2d(upsampled, 4)
        return functional.normalize(branch.local_head(pooled), dim=1).flatten(2)

    query = regions(model.query, model.query(image).map)
    keys = regions(model.key, key.map)
    expected = [
        info_nce(query[i, :, r], keys[i, :, r], [keys[i, :, s] for s in range(4) if s != r])
        for i in range(BATCH)
        for r in range(4)
    ]
    assert losses.local.item() == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_region_loss_is_taken_in_float32_under_autocast(views, ids, generator):
    model = make_model(local="regions")
    model.query.local_head = model.key.local_head = torch.nn.Identity()
    shape = (BATCH, 16, CELLS, CELLS)
    maps = [torch.randn(shape, generator=generator) for _ in range(2)]
    query, key = (Embedding(m, m.mean((2, 3)), m.mean((2, 3)), None) for m in maps)
    loss = model._local_loss(query, key, views, ids)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model._local_loss(query, key, views, ids), loss)


def test_views_that_share_nothing_give_no_local_loss_and_a_finite_gradient(ids, generator):
    model = make_model(local="coordinates")
    fill(model, generator)
    image = torch.rand(BATCH, 1, SIZE, SIZE, generator=generator)
    here = torch.eye(2, 3).expand(BATCH, 2, 3)
    elsewhere = here.clone()
    elsewhere[:, 0, 2] = 5.0
    losses, _ = model(View(image, here), View(image, elsewhere), ids, generator)
    assert losses.local.item() == 0
    losses.total.backward()
    assert all(p.grad.isfinite().all() for p in model.query.parameters() if p.grad is not None)


def test_covariance_penalty_does_not_reward_small_features(views, ids, generator):
    model = make_model(covariance_weight=1.0)
    fill(model, generator)
    pooled = torch.randn(64, 16, generator=generator)
    pooled[:, 1] += pooled[:, 0]
    small, large = model._covariance(0.01 * pooled), model._covariance(100 * pooled)
    assert large.item() > 0.01
    # The 1e-5 beside the variance of 1e-4 is felt, and only it.
    assert small.item() == pytest.approx(large.item(), rel=0.3)


@pytest.mark.parametrize("local", ["none", "regions", "coordinates", "dense"])
def test_gradient_reaches_the_query_branch_and_never_the_key_branch(views, ids, generator, local):
    model = make_model(local=local)
    fill(model, generator)
    losses, key = model(*views, ids, generator)
    losses.total.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.query.parameters())
    assert all(p.grad is None for p in model.key.parameters())
    assert not key.projection.requires_grad


def test_key_branch_follows_as_a_moving_average_with_its_buffers(generator):
    model = make_model(momentum=0.75)
    before = {name: value.clone() for name, value in model.key.state_dict().items()}
    with torch.no_grad():
        for parameter in model.query.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    model.query(torch.rand(4, 1, SIZE, SIZE, generator=generator))  # moves running statistics
    model.update_key()
    for name, value in model.query.state_dict().items():
        moved = model.key.state_dict()[name]
        if value.is_floating_point():
            torch.testing.assert_close(moved, 0.75 * before[name] + 0.25 * value)
        else:
            assert moved == value


def test_with_ema_a_key_does_not_depend_on_its_batch(views, generator):
    model = make_model(key_norm="ema")
    image = views[0].image
    together = model.encode_keys(image, generator).projection
    alone = model.encode_keys(image[:1], generator).projection
    torch.testing.assert_close(together[:1], alone)


def test_shuffled_keys_come_back_in_order(generator):
    """With statistics of one split over the whole batch, the order cannot matter."""
    model = make_model(key_norm="shuffle")
    images = torch.rand(8, 1, SIZE, SIZE, generator=generator)
    keys = model.encode_keys(images, generator).projection
    again = model.encode_keys(images, generator).projection  # another permutation
    torch.testing.assert_close(keys, again, rtol=1e-4, atol=1e-5)


def test_shuffling_normalises_in_splits_of_32(generator):
    model = make_model(key_norm="shuffle")
    images = torch.rand(70, 1, SIZE, SIZE, generator=generator)
    norms = []
    model.key.encoder.bn1.register_forward_hook(lambda _, inputs, __: norms.append(len(inputs[0])))
    model.encode_keys(images, generator)
    assert norms == [32, 38]


@pytest.mark.parametrize("local", ["coordinates", "dense"])
def test_enqueue_stores_unit_keys_with_their_ids(views, ids, generator, local):
    model = make_model(local=local)
    _, key = model(*views, ids, generator)
    model.enqueue(key, ids + 100, generator)
    for queue in (model.queue, model.local_queue):
        assert queue.ids[:BATCH].tolist() == (ids + 100).tolist()
        assert queue.ids[BATCH:].tolist() == [-1] * (QUEUE - BATCH)
        torch.testing.assert_close(queue.keys[:BATCH].norm(dim=1), torch.ones(BATCH))
    torch.testing.assert_close(model.queue.keys[:BATCH], key.projection)


def test_local_queue_holds_a_cell_of_each_image_or_with_dense_their_average(views, ids, generator):
    model = make_model(local="dense")
    _, key = model(*views, ids, generator)
    model.enqueue(key, ids, generator)
    average = functional.normalize(key.local.sum((2, 3)), dim=1)
    torch.testing.assert_close(model.local_queue.keys[:BATCH], average)

    model = make_model(local="coordinates")
    model.enqueue(key, ids, generator)
    cells = functional.normalize(key.local, dim=1).flatten(2)
    nearest = torch.einsum("bc,bcj->bj", model.local_queue.keys[:BATCH], cells).amax(1)
    torch.testing.assert_close(nearest, torch.ones(BATCH))


def first_step(clip_norm, views, ids) -> torch.Tensor:
    """How far plain descent at a rate of 1 moves the weights: the gradient, turned around."""
    model = make_model()
    fill(model, torch.Generator().manual_seed(1))
    before = torch.nn.utils.parameters_to_vector(model.query.parameters())
    optimizer = torch.optim.SGD(model.query.parameters(), lr=1.0)
    generator = torch.Generator().manual_seed(2)
    train_step(model, optimizer, views, ids, generator, contextlib.nullcontext(), clip_norm)
    return (torch.nn.utils.parameters_to_vector(model.query.parameters()) - before).detach()


def test_a_step_goes_no_farther_than_the_gradient_may_and_not_another_way(views, ids):
    free = first_step(0.0, views, ids)
    limit = 0.1 * float(free.norm())
    torch.testing.assert_close(first_step(limit, views, ids), 0.1 * free, rtol=1e-3, atol=1e-6)
    assert torch.equal(first_step(2 * float(free.norm()), views, ids), free)


def test_recalibration_gives_every_batch_the_same_weight(generator):
    whitening = ZCAWhitening(4, group_size=2)
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(4, momentum=0.1), whitening).eval()
    batches = [torch.randn(32, 4, generator=generator) * scale + scale for scale in (1, 2, 3)]
    recalibrate_batchnorm(model, batches)
    mean = torch.stack([batch.mean(0) for batch in batches]).mean(0)
    torch.testing.assert_close(model[0].running_mean, mean)
    assert model[0].momentum == 0.1 and whitening.momentum == 0.1
    assert not model.training
