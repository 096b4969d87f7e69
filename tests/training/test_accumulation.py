"""A loss over parts: the loss and gradient of one graph, also with dropout and with parameters inside the loss."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from plaudit.training.accumulation import backward_in_parts


def network(dropout: float) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1)).double()


def scored(model: nn.Module, inputs: Tensor, slots: list[int], draws: list[float] | None = None) -> Tensor:
    """A `[1, 5]` table with the scores of some slots; `draws` keeps one random number of every pass."""
    if draws is not None:
        draws.append(torch.rand(()).item())
    scores = model(inputs[slots]).squeeze(-1)
    return torch.zeros(1, 5, dtype=torch.double).index_put((torch.tensor(0), torch.tensor(slots)), scores)


def all_pairs(table: Tensor, scale: Tensor) -> tuple[Tensor, str]:
    upper = torch.ones(5, 5, dtype=torch.bool).triu(1)
    return -nn.functional.logsigmoid(scale * (table[0, :, None] - table[0]))[upper].mean(), "extra"


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("cut", [[[0, 1, 2, 3, 4]], [[3], [0, 4], [1, 2]], [[0], [1], [2], [3], [4]]])
def test_loss_and_gradient_are_those_of_one_graph(cut: list[list[int]], dropout: float) -> None:
    inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.double)

    def run(method: Callable[[nn.Module, Tensor], Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
        model, scale = network(dropout), nn.Parameter(torch.tensor(1.5, dtype=torch.double))
        torch.manual_seed(7)
        loss = method(model, scale)
        return loss, [p.grad.clone() for p in (*model.parameters(), scale) if p.grad is not None], torch.rand(3)

    def at_once(model: nn.Module, scale: Tensor) -> Tensor:
        loss, _ = all_pairs(sum((scored(model, inputs, part) for part in cut), torch.zeros(())), scale)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def in_parts(model: nn.Module, scale: Tensor) -> Tensor:
        parts = [partial(scored, model, inputs, part) for part in cut]
        loss, extra = backward_in_parts(parts, lambda table: all_pairs(table, scale))
        assert extra == "extra"
        assert not loss.requires_grad
        return loss

    expected, gradients, after = run(at_once)
    found, others, after_parts = run(in_parts)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    assert len(gradients) == len(others) == 5
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-15)
    # Whatever draws next draws the same numbers.
    assert torch.equal(after, after_parts)


def test_a_part_that_is_scored_again_draws_the_same_numbers() -> None:
    model, inputs, draws = network(0.0), torch.ones(5, 3, dtype=torch.double), list[float]()
    parts = [partial(scored, model, inputs, part, draws) for part in ([0, 1], [2], [3, 4])]
    backward_in_parts(parts, lambda table: (table.square().sum(), None))
    assert len(draws) == 5
    assert draws[3:] == draws[:2]
    assert len(set(draws)) == 3


def test_a_loss_that_reads_no_score_gives_zeros_and_no_part_is_refused() -> None:
    model, inputs = network(0.0), torch.ones(5, 3, dtype=torch.double)
    parts = [partial(scored, model, inputs, part) for part in ([0], [1])]
    free = nn.Parameter(torch.tensor(2.0))
    loss, _ = backward_in_parts(parts, lambda table: (free.square(), None))
    assert loss.item() == 4.0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    with pytest.raises(ValueError, match="no part to score"):
        backward_in_parts([], lambda table: (table.sum(), None))
