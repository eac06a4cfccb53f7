import pytest
import torch

from medmoco.models.heads import LocalHead, ProjectionHead


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def test_projection_head_maps_vectors():
    head = ProjectionHead(6, 10, 4)
    assert head(torch.randn(3, 6)).shape == (3, 4)
    assert [name for name, _ in head.named_parameters()] == [
        "0.weight",
        "0.bias",
        "2.weight",
        "2.bias",
    ]


def test_local_head_treats_every_cell_alike():
    head = LocalHead(6, 10, 4)
    cells = torch.randn(2, 6, 3, 5)
    out = head(cells)
    assert out.shape == (2, 4, 3, 5)
    torch.testing.assert_close(head(cells[:, :, 1:2, 3:4]), out[:, :, 1:2, 3:4])


def test_heads_do_not_normalise():
    head = ProjectionHead(6, 10, 4)
    assert (head(torch.randn(8, 6)).norm(dim=1) - 1).abs().max() > 0.05
