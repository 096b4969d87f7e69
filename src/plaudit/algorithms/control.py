"""Learning in Gymnasium environments: collect, update, repeat."""

from collections.abc import Callable
from typing import Literal

import torch

from plaudit.algorithms.base import Algorithm
from plaudit.rollout.environments import Collector
from plaudit.rollout.trajectory import StepPolicy


def learn(
    algorithm: Algorithm,
    policy: StepPolicy,
    optimizer: torch.optim.Optimizer,
    collector: Collector,
    *,
    num_steps: int,
    num_updates: int,
    schedule: Literal["constant", "linear"] = "constant",
    generator: torch.Generator | None = None,
    report: Callable[[int, dict[str, float]], None] | None = None,
) -> dict[str, float]:
    """Improve a policy by playing: `num_updates` times `num_steps` steps of every environment and one update on them.

    Args:
        algorithm: built over `policy` and `optimizer`; `kl_placement: none`, since there is no reference.
        policy: acts, and is improved.
        optimizer: its learning rates are those of the first update.
        collector: environments and their episodes' returns.
        num_steps: `T`, steps of each environment per update.
        num_updates: how many updates; environment steps are `num_updates · T · B`.
        schedule: `linear` lets the learning rates fall to 0 along a straight line over these updates.
        generator: orders minibatches.
        report: called with the number of the update (from 0) and its metrics.

    Returns:
        the metrics of the last update.

    Raises:
        ValueError: for numbers below 1.
    """
    if num_steps < 1 or num_updates < 1:
        raise ValueError(f"num_steps and num_updates must be at least 1, got {num_steps} and {num_updates}")
    rates = [group["lr"] for group in optimizer.param_groups]
    metrics: dict[str, float] = {}
    for update in range(num_updates):
        if schedule == "linear":
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - update / num_updates)
        metrics = algorithm.update(collector.collect(policy, num_steps), generator=generator)
        if report is not None:
            report(update, metrics)
    return metrics
