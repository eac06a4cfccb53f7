"""PEP 517 backend: setuptools, building against the torch that the environment already has.

pip builds in an isolated environment. With torch among the build requirements it would fetch the
newest torch there, gigabytes whose CUDA version may not fit this machine, and the extension would
be compiled against a torch that is not the one it will run with.
"""

import importlib.util
import site
import sys
from typing import Any

from setuptools import build_meta

TORCH_REQUIREMENT = "torch>=2.11"


def _expose_environment() -> None:
    """Puts the environment's packages behind the isolated ones on the path."""
    sys.path += [folder for folder in site.getsitepackages() if folder not in sys.path]


def _torch_if_missing() -> list[str]:
    return [] if importlib.util.find_spec("torch") else [TORCH_REQUIREMENT]


# setup.py needs torch, so these must not run it, as setuptools' own would.
def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    _expose_environment()
    return _torch_if_missing()


get_requires_for_build_editable = get_requires_for_build_wheel
get_requires_for_build_sdist = get_requires_for_build_wheel


def prepare_metadata_for_build_wheel(directory: str, config_settings: Any = None) -> str:
    _expose_environment()
    return build_meta.prepare_metadata_for_build_wheel(directory, config_settings)


def prepare_metadata_for_build_editable(directory: str, config_settings: Any = None) -> str:
    _expose_environment()
    return build_meta.prepare_metadata_for_build_editable(directory, config_settings)


def build_wheel(directory: str, config_settings: Any = None, metadata: str | None = None) -> str:
    _expose_environment()
    return build_meta.build_wheel(directory, config_settings, metadata)


def build_editable(directory: str, config_settings: Any = None, metadata: str | None = None) -> str:
    _expose_environment()
    return build_meta.build_editable(directory, config_settings, metadata)


def build_sdist(directory: str, config_settings: Any = None) -> str:
    _expose_environment()
    return build_meta.build_sdist(directory, config_settings)
