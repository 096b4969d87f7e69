"""The guarded step by hand, and that nothing moves where a number is not finite."""

import math

import pytest
import torch

from plaudit.algorithms.stepping import guarded_step, set_learning_rate
from plaudit.core.finite import NonFiniteError


def with_gradient(*values: float) -> tuple[torch.nn.Parameter, torch.optim.SGD]:
    parameter = torch.nn.Parameter(torch.zeros(len(values)))
    parameter.grad = torch.tensor(values)
    return parameter, torch.optim.SGD([parameter], lr=1.0)


@pytest.mark.parametrize(("limit", "expected"), [(None, [-3.0, -4.0]), (10.0, [-3.0, -4.0]), (2.5, [-1.5, -2.0])])
def test_the_step_is_bounded(limit, expected):
    parameter, optimizer = with_gradient(3.0, 4.0)
    assert guarded_step(optimizer, 1.0, max_norm=limit, where="here") == pytest.approx(5.0)
    assert parameter.detach().tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_moves_nothing(loss):
    parameter, optimizer = with_gradient(3.0, 4.0)
    with pytest.raises(NonFiniteError, match=r"^step 7: the loss is (nan|inf), so the weights were left as they were"):
        guarded_step(optimizer, loss, max_norm=1.0, where="step 7")
    assert parameter.detach().tolist() == [0.0, 0.0]
    assert parameter.grad is None


def test_nor_does_a_gradient_that_is_not():
    parameter, optimizer = with_gradient(3.0, math.nan)
    with pytest.raises(NonFiniteError, match="the norm of the gradient is nan"):
        guarded_step(optimizer, 1.0, max_norm=None, where="step 7")
    assert parameter.detach().tolist() == [0.0, 0.0]


def test_the_rate_of_every_group():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [each], "lr": 0.1 * place} for place, each in enumerate(parameters, 1)])
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
