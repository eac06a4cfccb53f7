"""A compiled function names wrong arguments in the words of the one that is not compiled."""

import pytest
import torch

from medmoco.ops import covariance_loss, dense_match, queue_info_nce, zca_whiten

ROWS = torch.ones(4, 5)
QUEUE = torch.ones(7, 5)
IDS = torch.arange(4), torch.arange(7)
MAP = torch.ones(2, 3, 4)
WRONG = [
    (queue_info_nce, (ROWS, ROWS, QUEUE[:, :4])),
    (queue_info_nce, (ROWS, ROWS.half(), QUEUE)),
    (queue_info_nce, (ROWS, ROWS, QUEUE, -0.1)),
    (queue_info_nce, (ROWS, ROWS, QUEUE, 0.2, IDS[0].int(), IDS[1])),
    (queue_info_nce, (ROWS, ROWS, QUEUE, 0.2, None, IDS[1])),
    (queue_info_nce, (ROWS, ROWS, QUEUE.clone().requires_grad_())),
    (dense_match, (MAP, MAP[:, :2])),
    (dense_match, (MAP, MAP.double())),
    (covariance_loss, (ROWS[:1],)),
    (zca_whiten, (ROWS, 3, 1e-3)),
    (zca_whiten, (ROWS, 5, 0.0)),
]


@pytest.mark.parametrize(("function", "arguments"), WRONG)
def test_the_message_is_the_same_compiled(function, arguments):
    torch.compiler.reset()
    with pytest.raises(RuntimeError) as eager:
        function(*arguments)
    message = str(eager.value)
    assert message.startswith(f"{function.__name__}: ") and "must" in message
    with pytest.raises(RuntimeError) as compiled:
        torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)
    assert message in str(compiled.value)
