"""Derivatives that the operators do not have are errors by every road to them."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, hvp

import medmoco.ops
from medmoco.ops import covariance_loss, queue_info_nce, zca_whiten

ROWS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
# Each operator that has a gradient, as a curved function of (6, 4) features.
FUNCTIONS = {
    "queue_info_nce": lambda rows: queue_info_nce(rows, ROWS, ROWS[:5])[0].square().sum(),
    "covariance_loss": covariance_loss,
    "zca_whiten": lambda rows: zca_whiten(rows, 2, 1e-3)[0].pow(3).sum(),
}
OPERATORS = [name for name in medmoco.ops.__all__ if hasattr(torch.ops.medmoco, f"{name}_backward")]
pytestmark = pytest.mark.parametrize("operator", OPERATORS)
# torch imports a script of its own when the first forward-mode derivative is taken.
forward_mode = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")


def gradient_penalty(function, rows):
    rows = rows.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(rows), rows, create_graph=True)
    gradient.square().sum().backward()


def test_there_is_a_first_derivative(operator):
    rows = ROWS.clone().requires_grad_()
    FUNCTIONS[operator](rows).backward()
    assert rows.grad.any()


@pytest.mark.parametrize(
    "road", [gradient_penalty, hessian, lambda function, rows: hvp(function, rows, rows)]
)
def test_second_derivative_is_an_error(operator, road):
    with pytest.raises(RuntimeError, match=f"{operator}: second derivatives are not implemented"):
        road(FUNCTIONS[operator], ROWS)


@forward_mode
def test_hessian_of_torch_func_is_an_error(operator):
    with pytest.raises(RuntimeError, match="functorch transforms"):  # the message is PyTorch's
        torch.func.hessian(FUNCTIONS[operator])(ROWS)


@forward_mode
def test_forward_mode_is_an_error_where_pytorch_alone_would_give_zero(operator):
    message = f"{operator}: forward-mode derivatives are not implemented"
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(FUNCTIONS[operator], (ROWS,), (ROWS,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
        FUNCTIONS[operator](forward_ad.make_dual(ROWS, ROWS))
