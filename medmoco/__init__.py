"""Contrastive pretraining for medical image segmentation.

Importing the package loads the compiled operators, `torch.ops.medmoco.*`.
"""

from importlib import metadata as _metadata

import torch as _torch  # noqa: F401  loads libtorch, which the extension needs

try:
    from medmoco import _C as _C
except ImportError as error:
    raise ImportError(
        f"medmoco's compiled operators cannot be loaded ({error}). Build them with: "
        "pip install -e ."
    ) from error

try:
    __version__ = _metadata.version("medmoco")
except _metadata.PackageNotFoundError:  # run from a source folder that is not installed
    __version__ = str(_C.build_info()["version"])

__all__ = ["__version__"]
