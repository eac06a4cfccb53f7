"""The README's code runs as it stands."""

from pathlib import Path

import torch

from medmoco.ops import covariance_loss, queue_info_nce

README = (Path(__file__).parents[1] / "README.md").read_text()


def code_block(label: str) -> str:
    return README.split(f"```{label}\n")[1].split("```")[0]


def test_the_quick_start_is_two_commands():
    assert code_block("sh quick-start").splitlines() == [
        "pip install -e . && python -m medmoco.train",
        "pip install -e '.[test]' && pytest -n 2 --dist loadfile",
    ]


def test_the_operators_take_a_step_of_another_trainer():
    torch.manual_seed(0)
    step: dict = {}
    exec(code_block("python operators"), step)
    queue, queue_ids, ids = step["queue"], step["queue_ids"], step["ids"]

    assert step["loss"].shape == (32,) and step["dense_loss"].shape == (32 * 64,)
    assert 0 <= step["accuracy"] <= 1
    others = [queue[queue_ids != own] for own in ids]
    assert all(len(other) < len(queue) for other in others), "every query has a false negative"
    for query, key, other, loss in zip(
        step["query"], step["key"], others, step["loss"], strict=True
    ):
        alone, _ = queue_info_nce(query[None], key[None], other)
        torch.testing.assert_close(loss[None], alone)

    gradient = step["encoder"].weight.grad
    assert gradient.isfinite().all() and gradient.any()
    assert covariance_loss(step["query_map"].mean((2, 3))) > 0
