"""A branch of the model: from images to what the losses compare."""

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from medmoco.models.encoder import Encoder
from medmoco.models.heads import LocalHead, ProjectionHead, Subvector


class Embedding(NamedTuple):
    """What a branch makes of a batch of images."""

    map: Tensor  # (batch, channels, h, w), the encoder's last map
    pooled: Tensor  # (batch, channels), its average over space, before whitening
    projection: Tensor  # (batch, embed_dim), unit length
    local: Tensor | None  # (batch, embed_dim, h, w), the local head's map


class Branch(nn.Module):
    """Encoder, optional whitening of the pooled features, projector, optional local head.

    The projector is "mlp", or "none": then the first `embed_dim` features are what is compared.
    """

    def __init__(
        self,
        encoder: Encoder,
        embed_dim: int,
        whitening: nn.Module | None,
        local: bool,
        projector: str = "mlp",
    ) -> None:
        super().__init__()
        channels = encoder.channels[-1]
        self.embed_dim = embed_dim
        self.encoder = encoder
        self.whitening = whitening
        self.projector = (
            Subvector(embed_dim)
            if projector == "none"
            else ProjectionHead(channels, channels, embed_dim)
        )
        self.local_head = LocalHead(channels, channels, embed_dim) if local else None

    def forward(self, images: Tensor) -> Embedding:
        """images (batch, 1, height, width) in [0, 1]."""
        return self.embed(self.encoder(images))

    def embed(self, feature_map: Tensor) -> Embedding:
        pooled = feature_map.mean((2, 3))
        features = pooled if self.whitening is None else self.whitening(pooled)
        projection = functional.normalize(self.projector(features).float(), dim=1)
        local = None if self.local_head is None else self.local_head(feature_map)
        return Embedding(feature_map, pooled, projection, local)
