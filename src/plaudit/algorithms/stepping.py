"""The optimizer step that every algorithm takes: bounded, and not taken at all where a number is not finite."""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from plaudit.core.finite import NonFiniteError

HINT = "Lower the learning rate, or look at the rewards"


def guarded_step(
    optimizer: torch.optim.Optimizer, loss: float, *, max_norm: float | None, where: str, hint: str = HINT
) -> float:
    """Scale the gradients that have been computed down to a joint norm of `max_norm`, and take the step.

    Args:
        optimizer: of all parameters that have a gradient.
        loss: what the gradients are of, to be looked at.
        max_norm: of the whole gradient; None leaves it.
        where: the place in the run, for the message.
        hint: what to do about it, for the message.

    Returns:
        The norm before.

    Raises:
        NonFiniteError: if the loss or the norm is not finite; the weights have not been moved, the gradients are gone.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = float(clip_grad_norm_(parameters, math.inf if max_norm is None else max_norm))
    for name, value in (("loss", loss), ("norm of the gradient", norm)):
        if not math.isfinite(value):
            optimizer.zero_grad(set_to_none=True)
            raise NonFiniteError(f"{where}: the {name} is {value}, so the weights were left as they were. {hint}")
    optimizer.step()
    return norm


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The same rate for every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def scheduled_rate(schedule: Literal["constant", "linear"], rate: float, *, done: int, total: int) -> float:
    """A learning rate: `rate`, or with `linear` `rate · max(0, 1 - done / total)`, 0 at the end of the run.

    Args:
        schedule: `constant` or `linear`.
        rate: of the first update.
        done, total: steps or updates, so far and of the whole run.
    """
    return rate if schedule == "constant" else rate * max(0.0, 1 - done / total)


@torch.no_grad()
def follow(kept: Iterable[Tensor], learned: Iterable[Tensor], *, share: float) -> None:
    """`θ⁻ ← τ θ + (1 - τ) θ⁻` in place: target networks and average policies, which follow slowly.

    Args:
        kept, learned: `θ⁻` and `θ`, in the same order.
        share: `τ`.
    """
    for old, new in zip(kept, learned, strict=True):
        old.lerp_(new, share)
