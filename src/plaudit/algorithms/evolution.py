"""An evolution strategy for a few hundred parameters without gradients: the controllers of learned worlds."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def evolve(
    begin: Tensor,
    judge: Callable[[Tensor], Tensor],
    *,
    spread: float,
    population: int,
    generations: int,
    seed: int,
    report: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """CMA-ES: candidates from a Gaussian whose mean and covariance move towards the better half of them.

    Args:
        begin: the first mean, of any shape.
        judge: candidates `[N, *shape]` to how good each is, `[N]`; more is better.
        spread: the first standard deviation.
        population: `N`.
        generations: how many.
        seed: of the candidates.
        report: called with the number of each generation and what was found, `[N]`.

    Returns:
        the mean of the last distribution, which is less lucky than its best sample; of `begin`'s shape and dtype.

    Raises:
        ValueError: if the package `cma` is not installed.

    Source: Hansen, "The CMA evolution strategy: a tutorial" (arXiv:1604.00772), by the package `cma`; used as in Ha and
    Schmidhuber (arXiv:1803.10122), appendix A.4.
    """
    try:
        import cma
    except ModuleNotFoundError as error:
        raise ValueError("the evolution strategy needs the package cma: pip install 'plaudit[world]'") from error
    options = {"popsize": population, "seed": seed + 1, "verbose": -9}  # 0 would be a seed drawn from the clock
    strategy = cma.CMAEvolutionStrategy(begin.double().flatten().numpy(), spread, options)
    for generation in range(generations):
        asked = strategy.ask()
        found = judge(torch.tensor(np.array(asked), dtype=begin.dtype).reshape(-1, *begin.shape))
        strategy.tell(asked, (-found).tolist())
        if report is not None:
            report(generation, found)
    return torch.tensor(strategy.mean, dtype=begin.dtype).reshape(begin.shape)
