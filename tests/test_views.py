import dataclasses
import math

import pytest
import scipy.ndimage
import torch
from torch.nn import functional as F

from medmoco.data.views import (
    ViewConfig,
    change_intensities,
    corresponding_coordinates,
    overlap_regions,
    overlap_share,
    sample_views,
)
from medmoco.errors import UserError

PLAIN = {
    "gamma": (1.0, 1.0),
    "contrast": (1.0, 1.0),
    "brightness": 0.0,
    "noise": 0.0,
    "blur_probability": 0.0,
}


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def geometry(size=32, **changes):
    return ViewConfig(size=size, **{**PLAIN, **changes})


def intensities(**changes):
    return ViewConfig(size=32, **{**PLAIN, **changes})


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def full_extent(batch, size):
    return torch.full((batch, 2), float(size))


def coordinate_views(batch=16, canvas_size=64, config=None, seed=0):
    """Two views of a canvas whose value is its own x, then of one whose value is its own y."""
    config = config or geometry(size=48)
    steps = (torch.arange(canvas_size) + 0.5) / canvas_size
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    pairs = []
    for values in (x, y):
        canvas = values.expand(batch, 1, -1, -1).contiguous()
        extent = full_extent(batch, canvas_size)
        pairs.append(sample_views(canvas, extent, config, seeded(seed)))
    (ax, bx), (ay, by) = pairs
    assert torch.equal(ax.affine, ay.affine)
    image_a = torch.cat([ax.image, ay.image], dim=1) * 2 - 1
    image_b = torch.cat([bx.image, by.image], dim=1) * 2 - 1
    return (image_a, ax.affine), (image_b, bx.affine)


def inside(coordinates, margin):
    return (coordinates.abs() < 1 - margin).all(-1)


def to_canvas(affine, points):
    """Affine (2, 3) applied to points (n, 2), the plain way."""
    return points.double() @ affine[:, :2].double().T + affine[:, 2].double()


def shown_places(affine, size):
    """Where on the canvas the pixels of each view lie, (B, size, size, 2), the plain way."""
    centres = (2 * torch.arange(size) + 1) / size - 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    points = torch.stack([x, y], -1).reshape(-1, 2)
    return torch.stack([to_canvas(a, points).reshape(size, size, 2).float() for a in affine])


def test_a_view_with_identity_settings_is_the_canvas():
    canvas = torch.rand(3, 1, 32, 32)
    config = geometry(crop_scale=(1.0, 1.0), rotation=0.0)
    for view in sample_views(canvas, full_extent(3, 32), config, seeded()):
        torch.testing.assert_close(view.image, canvas, atol=1e-5, rtol=0)
        expected = torch.eye(2, 3).expand(3, -1, -1)
        torch.testing.assert_close(view.affine, expected)


def test_affines_of_both_views_map_a_landmark_to_the_same_place():
    size, spread = 64, 1.5
    place = torch.tensor([37.3, 28.8])  # x, y in pixels of the canvas
    axis = torch.arange(size) + 0.5
    blob = torch.exp(-((axis - place[0]) ** 2) / (2 * spread**2))[None, :]
    blob = blob * torch.exp(-((axis - place[1]) ** 2) / (2 * spread**2))[:, None]
    config = geometry(size=64, crop_scale=(0.5, 1.0))
    views = sample_views(blob.expand(32, 1, -1, -1), full_extent(32, size), config, seeded())
    expected = 2 * place / size - 1
    centres = (2 * torch.arange(64) + 1) / 64 - 1
    seen = 0
    for view in views:
        mass = view.image[:, 0] / view.image.sum(dim=(2, 3))[:, :, None]
        centroid = torch.stack([(mass.sum(1) * centres).sum(1), (mass.sum(2) * centres).sum(1)], 1)
        for affine, point in zip(view.affine, centroid, strict=True):
            if point.abs().max() < 0.7:  # the whole blob is in the view
                seen += 1
                found = to_canvas(affine, point[None])[0].float()
                torch.testing.assert_close(found, expected, atol=0.005, rtol=0)
    assert seen > 40


def test_the_affine_says_what_each_pixel_of_the_view_shows():
    (image, affine), _ = coordinate_views()
    places = shown_places(affine, 48)
    kept = inside(places, 2 / 64)  # the border of the canvas is blended with zeros
    torch.testing.assert_close(image.movedim(1, -1)[kept], places[kept], atol=1e-4, rtol=0)


def test_corresponding_coordinates_find_the_same_tissue():
    (image_a, affine_a), (image_b, affine_b) = coordinate_views()
    coordinates, valid = corresponding_coordinates(affine_a, affine_b, 48)
    found = F.grid_sample(image_b, coordinates, align_corners=False).movedim(1, -1)
    shown = image_a.movedim(1, -1)
    kept = inside(coordinates, 2 / 48) & inside(shown_places(affine_a, 48), 8 / 64)
    assert kept.float().mean() > 0.4
    torch.testing.assert_close(found[kept], shown[kept], atol=2e-4, rtol=0)
    assert torch.equal(valid, (coordinates.abs() <= 1).all(-1))


def test_a_view_corresponds_to_itself_cell_by_cell():
    (_, affine), _ = coordinate_views(batch=4)
    coordinates, valid = corresponding_coordinates(affine, affine, 4)
    centres = torch.tensor([-0.75, -0.25, 0.25, 0.75])
    torch.testing.assert_close(coordinates[..., 0], centres.expand(4, 4, 4))
    torch.testing.assert_close(coordinates[..., 1], centres[:, None].expand(4, 4, 4))
    assert valid.all()


def test_overlap_regions_show_the_same_tissue_inside_both_crops():
    (image_a, affine_a), (image_b, affine_b) = coordinate_views()
    coords_a, coords_b, valid = overlap_regions(affine_a, affine_b, 5)
    assert valid.shape == (16, 5, 5) and valid.all()
    assert coords_a.abs().max() < 1 and coords_b.abs().max() < 1
    found_a = F.grid_sample(image_a, coords_a, align_corners=False).movedim(1, -1)
    found_b = F.grid_sample(image_b, coords_b, align_corners=False).movedim(1, -1)
    places = [to_canvas(a, c.reshape(-1, 2)) for a, c in zip(affine_a, coords_a, strict=True)]
    kept = inside(coords_a, 2 / 48) & inside(coords_b, 2 / 48)
    kept &= inside(torch.stack(places).reshape(coords_a.shape), 8 / 64)
    assert kept.float().mean() > 0.5
    torch.testing.assert_close(found_a[kept], found_b[kept], atol=2e-4, rtol=0)


def test_overlap_regions_are_an_even_grid_on_the_canvas():
    _, (_, affine_b) = coordinate_views(batch=3)
    (_, affine_a), _ = coordinate_views(batch=3, seed=1)
    coords_a, coords_b, _ = overlap_regions(affine_a, affine_b, 4)
    for i in range(3):
        points = to_canvas(affine_a[i], coords_a[i].reshape(-1, 2)).reshape(4, 4, 2)
        same = to_canvas(affine_b[i], coords_b[i].reshape(-1, 2)).reshape(4, 4, 2)
        torch.testing.assert_close(points, same, atol=1e-5, rtol=0)
        steps = points.diff(dim=1)[..., 0]
        torch.testing.assert_close(steps, steps[:1, :1].expand_as(steps), atol=1e-5, rtol=0)


def test_crops_that_share_nothing_have_no_valid_region():
    left = torch.tensor([[[0.4, 0.0, -0.6], [0.0, 0.4, 0.0]]])
    right = torch.tensor([[[0.4, 0.0, 0.6], [0.0, 0.4, 0.0]]])
    coords_a, coords_b, valid = overlap_regions(left, right, 3)
    assert not valid.any()
    assert coords_a.isfinite().all() and coords_b.isfinite().all()
    assert overlap_share(left, right).item() == 0


def test_overlap_share_of_crops_side_by_side():
    whole = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    quarter = torch.tensor([[0.5, 0.0, 0.75], [0.0, 0.5, 0.5]])  # x from 0.25 to 1.25
    assert overlap_share(whole, quarter).item() == pytest.approx(0.75)
    assert overlap_share(quarter, whole).item() == pytest.approx(0.75)


@pytest.mark.parametrize("rotation", [0.0, 15.0, 180.0])
def test_least_overlap_holds_on_thousands_of_draws(rotation):
    batch = 3000
    config = geometry(size=8, rotation=rotation, min_overlap=0.45)
    extent = 8 * (0.2 + 0.8 * torch.rand(batch, 2, generator=seeded(3)))
    first, second = sample_views(torch.zeros(batch, 1, 8, 8), extent, config, seeded())
    assert overlap_share(first.affine, second.affine).min() >= 0.45 - 1e-5


def test_overlap_share_never_exceeds_the_area_in_common():
    config = geometry(size=8, rotation=40.0, min_overlap=0.0)
    canvas = torch.zeros(32, 1, 8, 8)
    first, second = sample_views(canvas, full_extent(32, 8), config, seeded())
    areas = torch.stack([torch.linalg.det(v.affine[:, :, :2]) for v in (first, second)])
    points = 2 * torch.rand(4000, 2, generator=seeded(1)) - 1
    for i, share in enumerate(overlap_share(first.affine, second.affine).tolist()):
        small, large = (first, second) if areas[0, i] < areas[1, i] else (second, first)
        placed = to_canvas(small.affine[i], points)
        linear, shift = large.affine[i, :, :2].double(), large.affine[i, :, 2].double()
        seen = torch.linalg.solve(linear, (placed - shift).T).abs().amax(0) <= 1
        assert share <= seen.double().mean() + 0.03


def test_a_small_crop_stays_within_the_content_and_a_large_one_contains_it():
    batch = 500
    extent = torch.tensor([[5.0, 8.0]]).expand(batch, -1)
    config = geometry(size=8, rotation=0.0)
    view, _ = sample_views(torch.zeros(batch, 1, 8, 8), extent, config, seeded())
    side = view.affine[:, 0, 0]
    assert side.square().min() >= 0.4 - 1e-5 and side.max() <= 1
    for axis, content in ((0, 1.0), (1, 5 / 8)):
        offset = view.affine[:, axis, 2].abs()
        assert (offset <= (content - side).abs() + 1e-6).all()
        assert offset.max() > 0.8 * (content - side).abs().max()  # and uses the room it has


def test_rotation_stays_within_its_limit_either_way():
    config = geometry(size=8, rotation=15.0)
    view, _ = sample_views(torch.zeros(500, 1, 8, 8), full_extent(500, 8), config, seeded())
    angle = torch.atan2(view.affine[:, 1, 0], view.affine[:, 0, 0]).rad2deg()
    assert angle.abs().max() <= 15.001
    assert angle.min() < -12 and angle.max() > 12
    determinant = torch.linalg.det(view.affine[:, :, :2])
    assert (determinant > 0).all()  # never mirrored: left and right differ


def test_a_canvas_finer_than_the_view_does_not_alias():
    checkerboard = (torch.arange(64)[:, None] + torch.arange(64)) % 2
    canvas = checkerboard.float().expand(1, 1, -1, -1)
    config = geometry(crop_scale=(1.0, 1.0), rotation=0.0)
    view, _ = sample_views(canvas, full_extent(1, 64), config, seeded())
    torch.testing.assert_close(view.image, torch.full((1, 1, 32, 32), 0.5), atol=1e-4, rtol=0)


def test_the_same_generator_state_gives_the_same_views():
    canvas, extent = torch.rand(4, 1, 40, 40), full_extent(4, 40)
    config = ViewConfig(size=24)
    first = sample_views(canvas, extent, config, seeded(7))
    again = sample_views(canvas, extent, config, seeded(7))
    other = sample_views(canvas, extent, config, seeded(8))
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a.image, b.image) and torch.equal(a.affine, b.affine)
        assert not torch.equal(a.affine, c.affine)
    assert not torch.equal(first[0].affine, first[1].affine)


def test_views_have_the_configured_size_and_stay_in_range():
    for view in sample_views(
        torch.rand(6, 1, 40, 40), full_extent(6, 40), ViewConfig(size=24), seeded()
    ):
        assert view.image.shape == (6, 1, 24, 24) and view.image.dtype == torch.float32
        assert view.image.min() >= 0 and view.image.max() <= 1


def test_drawing_views_never_waits_for_the_device():
    # Meta tensors hold no values: whatever asked for one would raise here.
    canvas = torch.empty(4, 1, 32, 32, device="meta")
    extent = torch.empty(4, 2, device="meta")
    a, b = sample_views(canvas, extent, ViewConfig(size=16))
    corresponding_coordinates(a.affine, b.affine, 4)
    overlap_regions(a.affine, b.affine, 3)
    assert a.image.shape == (4, 1, 16, 16)


def test_geometry_is_not_rounded_under_autocast():
    (_, affine_a), (_, affine_b) = coordinate_views(batch=4)
    exact = corresponding_coordinates(affine_a, affine_b, 8)[0]
    exact_regions = overlap_regions(affine_a, affine_b, 3)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(corresponding_coordinates(affine_a, affine_b, 8)[0], exact)
        assert torch.equal(overlap_regions(affine_a, affine_b, 3)[0], exact_regions)


def test_intensities_are_left_alone_by_neutral_settings():
    image = torch.rand(3, 1, 32, 32)
    torch.testing.assert_close(change_intensities(image, intensities(), seeded()), image)


def test_gamma_is_drawn_for_each_image_within_its_range():
    image = torch.full((200, 1, 4, 4), 0.5)
    out = change_intensities(image, intensities(gamma=(0.7, 1.5)), seeded())[:, 0, 0, 0]
    gamma = out.log() / math.log(0.5)
    assert 0.699 < gamma.min() < 0.75 and 1.4 < gamma.max() < 1.501
    assert gamma.log().mean().item() == pytest.approx(math.log(0.7 * 1.5) / 2, abs=0.05)


def test_contrast_scales_about_the_mean_and_brightness_shifts():
    image = 0.4 + 0.2 * torch.rand(100, 1, 16, 16)
    out = change_intensities(image, intensities(contrast=(0.75, 1.25)), seeded())
    factor = out.std(dim=(1, 2, 3)) / image.std(dim=(1, 2, 3))
    assert 0.749 < factor.min() < 0.78 and 1.22 < factor.max() < 1.251
    torch.testing.assert_close(out.mean(dim=(1, 2, 3)), image.mean(dim=(1, 2, 3)))
    shift = (change_intensities(image, intensities(brightness=0.1), seeded()) - image).mean(
        dim=(1, 2, 3)
    )
    assert -0.1001 < shift.min() < -0.08 and 0.08 < shift.max() < 0.1001


def test_noise_is_gaussian_of_at_most_its_strength():
    image = torch.full((100, 1, 64, 64), 0.5)
    out = change_intensities(image, intensities(noise=0.05), seeded())
    deviation = out.std(dim=(1, 2, 3))
    assert deviation.min() < 0.005 and 0.045 < deviation.max() < 0.052
    assert abs(out.mean().item() - 0.5) < 1e-3


@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.5])
def test_blur_matches_scipy(sigma):
    image = torch.rand(2, 1, 20, 24)
    config = intensities(blur=(sigma, sigma), blur_probability=1.0)
    out = change_intensities(image, config, seeded())
    radius = math.ceil(3 * sigma)
    for blurred, original in zip(out[:, 0], image[:, 0], strict=True):
        expected = scipy.ndimage.gaussian_filter(
            original.numpy(), sigma, mode="nearest", radius=radius
        )
        torch.testing.assert_close(blurred, torch.from_numpy(expected), atol=1e-5, rtol=0)


def test_each_image_has_a_blur_of_its_own_or_none():
    image = torch.rand(1, 1, 32, 32, generator=seeded()).expand(60, -1, -1, -1)
    out = change_intensities(image, intensities(blur_probability=0.5), seeded())
    untouched = (out - image).abs().amax(dim=(1, 2, 3)) < 1e-5
    assert 15 <= untouched.sum() <= 45
    assert out[~untouched].std(dim=(1, 2, 3)).unique().numel() > 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_scale": (0.0, 1.0)}, r"crop_scale must rise within \(0, 1\], got \(0.0, 1.0\)"),
        ({"crop_scale": (0.8, 0.4)}, "crop_scale must rise"),
        ({"crop_scale": (0.5, 1.5)}, "crop_scale must rise"),
        ({"min_overlap": 0.7}, r"min_overlap must be within \[0, 0.67\] for rotations of up to 15"),
        ({"min_overlap": -0.1}, "min_overlap must be within"),
    ],
)
def test_settings_that_cannot_be_met_are_named(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(ViewConfig(size=8), **change)
