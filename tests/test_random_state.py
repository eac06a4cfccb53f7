"""The global random numbers of all libraries go on where they were."""

import random

import numpy as np
import torch

from medmoco.output import save_torch
from medmoco.random_state import random_state, set_random_state


def draw():
    return [
        torch.rand(3).tolist(),
        torch.randn(1).item(),
        np.random.rand(3).tolist(),
        np.random.normal(),
        random.random(),
        random.gauss(0, 1),
    ]


def test_all_libraries_draw_again_what_they_drew(tmp_path):
    draw()  # an odd number of normal variates: numpy and Python keep the second of a pair
    save_torch(tmp_path / "state.pt", random_state())
    first = [draw(), draw()]
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    set_random_state(state)
    assert [draw(), draw()] == first
