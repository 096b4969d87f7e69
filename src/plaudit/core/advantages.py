"""Advantages of whole answers relative to the other answers of their prompt, and running baselines.

All take one reward per row and the group (prompt) of each row. A row whose reward is invalid is no member of its group:
what stands in its reward, even NaN, never matters. A group with fewer than two valid rows says nothing relative; its
rows get advantage 0 and are reported as not usable, so that the loss can leave them out and the caller count them.
For advantages of single steps see `plaudit.core.returns.gae`; for whitening over a batch,
`plaudit.core.masked.masked_whiten`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from plaudit.core.masked import masked_sum
from plaudit.core.reduction import expect_shape


class GroupAdvantages(NamedTuple):
    """Advantages `[B]` (0 where not usable) and `usable [B]` bool: valid, in a group with at least two valid rows."""

    advantages: Tensor
    usable: Tensor


def group_mean_advantages(rewards: Tensor, group_ids: Tensor, valid: Tensor) -> GroupAdvantages:
    """`A_i = r_i - mean_g`, the mean over the valid rows of the group, the row itself included.

    Because the mean includes the sample, the expected policy gradient is `(1 - 1/K) ∇J`.
    Source: Liu et al., "Understanding R1-Zero-like training" (arXiv:2503.20783), "Dr. GRPO".

    Args:
        rewards: `[B]`, floating point.
        group_ids: `[B]` int64; rows of one prompt share an id, in any order.
        valid: `[B]` bool.

    Returns:
        advantages and usable rows, both `[B]`.

    Raises:
        ValueError: for shapes that are not `[B]` or `valid` that is not boolean.
    """
    groups = _group(rewards, group_ids, valid)
    centred = groups.rewards - (groups.sums / groups.counts.clamp_min(1))[groups.inverse]
    return GroupAdvantages(centred.masked_fill(~groups.usable, 0.0), groups.usable)


def leave_one_out_advantages(rewards: Tensor, group_ids: Tensor, valid: Tensor) -> GroupAdvantages:
    """`A_i = r_i - (1/(K-1)) Σ_{j≠i} r_j = K/(K-1) (r_i - mean_g)`: RLOO, unbiased.

    Source: Kool et al., "Buy 4 REINFORCE samples, get a baseline for free!" (2019); Ahmadian et al., "Back to basics"
    (arXiv:2402.14740), equation 9. Arguments, shapes `[B]` and errors as in `group_mean_advantages`.
    """
    groups = _group(rewards, group_ids, valid)
    counts = groups.counts[groups.inverse]
    centred = groups.rewards - groups.sums[groups.inverse] / counts.clamp_min(1)
    advantages = centred * counts / (counts - 1).clamp_min(1)
    return GroupAdvantages(advantages.masked_fill(~groups.usable, 0.0), groups.usable)


def group_standardised_advantages(
    rewards: Tensor, group_ids: Tensor, valid: Tensor, *, eps: float = 1e-4
) -> GroupAdvantages:
    """`A_i = (r_i - mean_g) / (std_g + eps)`, the unbiased standard deviation of the group: GRPO.

    A group whose rewards are all equal gets advantages of exactly 0. The division is a bias: prompts whose answers
    hardly differ weigh as much as any other.
    Source: Shao et al., "DeepSeekMath" (arXiv:2402.03300), section 4.1.2.
    Arguments, shapes `[B]` and errors as in `group_mean_advantages`; `eps` is added to the standard deviation.
    """
    groups = _group(rewards, group_ids, valid)
    centred = (groups.rewards - (groups.sums / groups.counts.clamp_min(1))[groups.inverse]).masked_fill(
        ~groups.usable, 0.0
    )
    squares = groups.sums.new_zeros(len(groups.sums)).index_add(0, groups.inverse, centred.square())
    deviation = (squares / (groups.counts - 1).clamp_min(1)).sqrt()
    return GroupAdvantages(centred / (deviation[groups.inverse] + eps), groups.usable)


@dataclass(frozen=True)
class RunningMean:
    """A baseline that follows the mean reward: state that an algorithm saves in its checkpoints.

    Attributes:
        total: weighted sum of the rewards seen.
        weight: their weight; the mean is `total / weight`, 0 before the first reward.
    """

    total: float = 0.0
    weight: float = 0.0

    @property
    def mean(self) -> float:
        """The running mean, 0 before the first reward."""
        return self.total / self.weight if self.weight else 0.0

    def updated(self, rewards: Tensor, valid: Tensor, *, decay: float = 1.0) -> "RunningMean":
        """`total ← decay · total + Σ r`, `weight ← decay · weight + n`; `decay` 1 is the mean of everything seen.

        Take advantages from the state **before** the update: a baseline that has seen the sample is biased.

        Args:
            rewards: `[B]`.
            valid: `[B]` bool.
            decay: in [0, 1].

        Raises:
            ValueError: for shapes that differ or a decay outside [0, 1].
        """
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must lie in [0, 1], got {decay}")
        total = float(masked_sum(rewards.double(), valid))
        return RunningMean(decay * self.total + total, decay * self.weight + int(valid.sum()))


def over_steps(advantages: Tensor, mask: Tensor) -> Tensor:
    """The answer's advantage at each of its steps: `A_bt = A_b`.

    Args:
        advantages: `[B]`.
        mask: `[B, T]` bool.

    Returns:
        `[B, T]`; 0 at masked steps.

    Raises:
        ValueError: if the rows differ.
    """
    expect_shape("advantages", advantages, (mask.shape[0],))
    return advantages.unsqueeze(1).expand(mask.shape).masked_fill(~mask, 0.0)


class _Groups(NamedTuple):
    rewards: Tensor
    inverse: Tensor
    sums: Tensor
    counts: Tensor
    usable: Tensor


def _group(rewards: Tensor, group_ids: Tensor, valid: Tensor) -> _Groups:
    """Rewards `[B]`, group of each row `[B]`, sums and counts per group `[G]`, usable rows `[B]`.

    Rewards are clean and counted from the highest of their group, which no relative advantage notices: equal rewards
    are then exactly equal to their mean, and a large common offset costs no digits.
    """
    if rewards.ndim != 1 or not rewards.is_floating_point():
        raise ValueError(f"rewards must be floating point [B], got {rewards.dtype} {tuple(rewards.shape)}")
    expect_shape("group_ids", group_ids, tuple(rewards.shape))
    expect_shape("valid", valid, tuple(rewards.shape))
    if valid.dtype != torch.bool:
        raise ValueError(f"valid must be boolean, got {valid.dtype}")
    groups, inverse = torch.unique(group_ids, return_inverse=True)
    lowest = rewards.masked_fill(~valid, float("-inf"))
    highest = lowest.new_full((len(groups),), float("-inf")).scatter_reduce(0, inverse, lowest, "amax")
    kept = (rewards - highest[inverse]).masked_fill(~valid, 0.0)
    sums = kept.new_zeros(len(groups)).index_add(0, inverse, kept)
    counts = torch.zeros(len(groups), dtype=torch.int64, device=kept.device).index_add(0, inverse, valid.long())
    return _Groups(kept, inverse, sums, counts, valid & (counts[inverse] >= 2))
