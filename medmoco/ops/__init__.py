"""Losses and whitening as operators. `torch.ops.medmoco.*` are the raw ones."""

from medmoco.ops.covariance_loss import covariance_loss
from medmoco.ops.dense_match import dense_match
from medmoco.ops.iternorm_whiten import iternorm_whiten
from medmoco.ops.queue_info_nce import queue_info_nce
from medmoco.ops.zca_whiten import zca_whiten

__all__ = ["covariance_loss", "dense_match", "iternorm_whiten", "queue_info_nce", "zca_whiten"]
