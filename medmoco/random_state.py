"""The random numbers of a process: where each library's global generator stands."""

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """The states of torch (CPU and CUDA), numpy and Python, as tensors and plain values.

    Generators that were made for a purpose are not among them; who draws from one keeps it.
    """
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    twister = numpy_state["state"]
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": {
            "key": torch.from_numpy(twister["key"].astype(np.int64)),
            "position": int(twister["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Goes on where `random_state` was; CUDA's only where there are as many devices as then."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    twister = state["numpy"]
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": twister["key"].numpy().astype(np.uint32), "pos": twister["position"]},
            "has_gauss": twister["has_gauss"],
            "gauss": twister["gauss"],
        }
    )
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def resume_generator(generator: torch.Generator, state: torch.Tensor, seed: int) -> None:
    """Sets the state of a generator; one of another kind of device gives it `seed` instead."""
    if len(state) == len(generator.get_state()):
        generator.set_state(state)
    else:
        generator.manual_seed(seed)
