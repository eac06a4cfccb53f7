"""Heads between encoder and loss. Their outputs are not normalised."""

from torch import Tensor, nn


class ProjectionHead(nn.Sequential):
    """fc, ReLU, fc on pooled features (B, in_dim) -> (B, out_dim), as in MoCo v2 [1].

    [1] Chen et al., 2020, arXiv:2003.04297.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__(
            nn.Linear(in_dim, hidden_dim), nn.ReLU(inplace=True), nn.Linear(hidden_dim, out_dim)
        )


class Subvector(nn.Module):
    """The first features of each vector, (B, in_dim) -> (B, out_dim): DirectCLR's projector [1].

    [1] Jing et al., 2022, arXiv:2110.09348.
    """

    def __init__(self, out_dim: int) -> None:
        super().__init__()
        self.out_dim = out_dim

    def forward(self, features: Tensor) -> Tensor:
        return features[:, : self.out_dim]


class LocalHead(nn.Sequential):
    """1x1, ReLU, 1x1 on a feature map (B, in_dim, h, w) -> (B, out_dim, h, w), as in DenseCL [1].

    [1] Wang et al., 2021, arXiv:2011.09157.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__(
            nn.Conv2d(in_dim, hidden_dim, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden_dim, out_dim, 1),
        )
