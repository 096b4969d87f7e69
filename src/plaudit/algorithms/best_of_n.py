"""Best of n: no learning at all, only the answer that the reward likes best. What every algorithm is compared with."""

import torch
from torch import Tensor

from plaudit.core.reduction import expect_shape


def best_of_n(rewards: Tensor, group_ids: Tensor, valid: Tensor | None = None) -> Tensor:
    """The row of the highest reward in each group, the first of equals; groups without a valid row have none.

    The divergence of this policy from the sampler is at most `log n - (n - 1)/n`
    (`plaudit.evaluation.best_of_n.best_of_n_kl`).

    Args:
        rewards: `[B]`, floating point.
        group_ids: `[B]` int64, rows of one prompt share an id.
        valid: `[B]` bool, rows that have a reward; None for all.

    Returns:
        row indices `[G]` int64, in the order of the groups' ids.

    Raises:
        ValueError: for shapes that differ, or a reward of a valid row that is not finite.
    """
    if rewards.ndim != 1:
        raise ValueError(f"rewards must be [B], got {tuple(rewards.shape)}")
    expect_shape("group_ids", group_ids, tuple(rewards.shape))
    valid = torch.ones_like(group_ids, dtype=torch.bool) if valid is None else valid
    expect_shape("valid", valid, tuple(rewards.shape))
    if not bool(rewards[valid].isfinite().all()):
        raise ValueError("the reward of a valid row is not finite; mark rows without a reward as not valid")
    rows = valid.nonzero().flatten()
    _, inverse = torch.unique(group_ids[rows], return_inverse=True)
    order = rewards[rows].argsort(descending=True, stable=True)
    order = order[inverse[order].argsort(stable=True)]
    firsts = torch.ones_like(order, dtype=torch.bool)
    firsts[1:] = inverse[order][1:] != inverse[order][:-1]
    return rows[order[firsts]]
