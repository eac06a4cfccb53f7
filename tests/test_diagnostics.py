import dataclasses
import json
import math

import pytest
import torch

from medmoco.diagnostics import (
    Diagnostics,
    alpha_req,
    collapse_warnings,
    diagnose,
    mean_abs_correlation,
    mean_share,
    rankme,
    spectrum,
    std_sqrt_d,
)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def with_singular_values(singular, samples=256, seed=0):
    """Rows with mean zero and the given singular values."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(samples // 2, len(singular), generator=generator, dtype=torch.float64)
    left = torch.linalg.qr(torch.cat([half, -half])).Q
    square = torch.randn(len(singular), len(singular), generator=generator, dtype=torch.float64)
    return left * singular @ torch.linalg.qr(square).Q


def test_equal_singular_values_have_full_rank():
    assert rankme(torch.eye(16)) == pytest.approx(16, abs=1e-3)


def test_rank_one_has_rank_one():
    rows = torch.arange(1.0, 9)[:, None] * torch.tensor([[1.0, -2.0, 0.5]])
    assert rankme(rows) == pytest.approx(1, abs=1e-4)


def test_rankme_of_two_unequal_directions_by_hand():
    rows = torch.diag(torch.tensor([3.0, 1.0]))
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert rankme(rows) == pytest.approx(expected, abs=1e-5)


def test_rankme_holds_the_published_1e_7():
    share = [1 + 1e-7] + [1e-7] * 99
    expected = math.exp(-sum(p * math.log(p) for p in share))
    rows = torch.zeros(100, 100)
    rows[0, 0] = 5.0
    assert rankme(rows) == pytest.approx(expected, rel=1e-9)


def test_centring_takes_one_rank_of_a_simplex():
    # The rows of the identity span D dimensions, their differences from the mean D - 1.
    assert rankme(torch.eye(8), centred=True) == pytest.approx(7, abs=1e-3)


def test_a_shared_mean_lowers_rankme_but_not_its_centred_value():
    rows = with_singular_values(torch.ones(16))
    shifted = rows + 100
    assert rankme(shifted) < 1.2
    assert rankme(shifted, centred=True) == pytest.approx(16, abs=1e-3)


@pytest.mark.parametrize("rows", [torch.zeros(5, 3), torch.full((5, 3), 0.1)])
def test_the_centred_rank_of_equal_vectors_is_undefined(rows):
    assert rankme(rows, centred=True) is None


def test_spectrum_of_an_even_spread_is_flat():
    rows = torch.cat([torch.eye(4), -torch.eye(4)]) * torch.rand(8, 1).add(0.1)
    torch.testing.assert_close(spectrum(rows), torch.full((4,), 0.25, dtype=torch.float64))


def test_spectrum_is_the_covariance_of_the_unit_vectors():
    rows = torch.randn(40, 6) + 1
    unit = (rows / rows.norm(dim=1, keepdim=True)).double()
    expected = torch.linalg.eigvalsh(torch.cov(unit.T, correction=0)).flip(0)
    torch.testing.assert_close(spectrum(rows), expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_req_finds_the_exponent_of_a_power_law(alpha):
    eigenvalues = torch.arange(1, 121, dtype=torch.float64) ** -alpha
    assert alpha_req(with_singular_values(eigenvalues.sqrt())) == pytest.approx(alpha, abs=1e-6)


def test_alpha_req_looks_at_ranks_11_to_100_only():
    eigenvalues = torch.arange(1, 121, dtype=torch.float64) ** -1
    eigenvalues[:10] *= 50
    eigenvalues[100:] *= 1e-3
    assert alpha_req(with_singular_values(eigenvalues.sqrt())) == pytest.approx(1, abs=1e-6)


def test_alpha_req_needs_twenty_eigenvalues():
    assert alpha_req(torch.randn(100, 19)) is None
    assert alpha_req(torch.randn(20, 64)) is None  # centred, 19 remain
    assert alpha_req(torch.randn(100, 20)) is not None


def test_mean_abs_correlation_by_hand():
    x = torch.tensor([1.0, -1.0, 1.0, -1.0])
    y = torch.tensor([1.0, 1.0, -1.0, -1.0])
    rows = torch.stack([x, -2 * x + 5, y], dim=1)  # |correlations| 1, 0 and 0
    assert mean_abs_correlation(rows) == pytest.approx(1 / 3)


def test_constant_dimensions_are_left_out_of_the_correlation():
    x = torch.randn(10)
    rows = torch.stack([x, 3 * x, torch.full((10,), 0.1)], dim=1)
    assert mean_abs_correlation(rows) == pytest.approx(1)
    assert mean_abs_correlation(rows[:, 1:]) is None


def test_std_sqrt_d_is_one_for_an_even_spread_and_zero_for_equal_vectors():
    assert std_sqrt_d(torch.cat([torch.eye(9), -torch.eye(9)])) == pytest.approx(1)
    assert std_sqrt_d(torch.ones(5, 9)) == pytest.approx(0, abs=1e-12)


def test_mean_share_by_hand():
    assert mean_share(torch.tensor([[1.0, 0.0], [1.0, 2.0]])) == pytest.approx(2 / 3)
    assert mean_share(torch.ones(3, 2)) == pytest.approx(1)
    assert mean_share(torch.zeros(3, 2)) is None


def test_diagnose_gathers_all_of_it():
    rows = torch.randn(50, 30) + 1
    found = diagnose(rows)
    assert (found.samples, found.dimensions) == (50, 30)
    assert found.rankme == rankme(rows)
    assert found.rank_share == pytest.approx(rankme(rows, centred=True) / 30)
    assert diagnose(rows[:20]).rank_share == pytest.approx(rankme(rows[:20], centred=True) / 19)
    assert found.spectrum == spectrum(rows).tolist()


def random_rows(*shape: int, **kind) -> torch.Tensor:
    """The same in every process, for the tests' names are made of them."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), **kind)


@pytest.mark.parametrize(
    "rows",
    [
        torch.zeros(8, 4),
        torch.ones(8, 4),
        torch.full((8, 4), 0.1),
        torch.full((8, 4), torch.nan),
        torch.tensor([[1.0, torch.inf], [0.0, 1.0]]),
        random_rows(1, 4),
        torch.zeros(0, 4),
        random_rows(8, 1),
        random_rows(8, 4) * 1e-30,
        random_rows(8, 4) * 1e30,
        random_rows(8, 4, dtype=torch.bfloat16),
        random_rows(8, 40, requires_grad=True),
    ],
    ids=str,
)
def test_whatever_comes_in_the_result_is_json(rows):
    text = json.dumps(dataclasses.asdict(diagnose(rows)), allow_nan=False)
    assert json.loads(text)["samples"] == len(rows)


HEALTHY = Diagnostics(100, 16, std_sqrt_d=0.9, mean_share=0.2, mean_abs_correlation=0.3)


def test_a_healthy_run_has_no_warning():
    assert collapse_warnings(2.0, math.log(101), HEALTHY) == []
    assert collapse_warnings(None, math.log(101), Diagnostics(0, 16)) == []


@pytest.mark.parametrize(("loss", "warns"), [(4.40, True), (4.80, True), (4.37, False), (5, False)])
def test_a_loss_within_5_percent_of_chance_is_told(loss, warns):
    found = collapse_warnings(loss, math.log(101), HEALTHY)  # log 101 = 4.615
    assert len(found) == warns
    if warns:
        assert "within 5 % of chance, log(K + 1) = 4.615" in found[0] and "--lr" in found[0]


def test_embeddings_that_hardly_vary_are_told():
    flat = dataclasses.replace(HEALTHY, std_sqrt_d=0.29)
    (found,) = collapse_warnings(2.0, 4.6, flat)
    assert found.startswith("The embeddings hardly vary") and "0.29, below 0.3" in found
    assert "--momentum" in found


def test_dimensions_that_repeat_each_other_are_told():
    alike = dataclasses.replace(HEALTHY, mean_abs_correlation=0.78)
    (found,) = collapse_warnings(2.0, 4.6, alike)
    assert found.startswith("The embeddings' dimensions repeat each other") and "0.78" in found
    assert "--decorrelation zca" in found


def test_a_low_rank_alone_is_no_warning():
    low = dataclasses.replace(HEALTHY, rankme=1.5, rankme_centred=1.2, rank_share=0.01)
    assert collapse_warnings(2.0, 4.6, low) == []
