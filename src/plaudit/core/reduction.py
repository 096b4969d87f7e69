"""What every loss over prompts, or over the steps of trajectories, begins and ends with."""

from typing import Literal

import torch
from torch import Tensor

Metrics = dict[str, Tensor]
StepReduction = Literal["per_token", "per_sequence", "sequence_sum", "per_prompt"]
Reduction = StepReduction | Tensor
"""A reduction by name, or the weight of each step `[B, T]` from `step_weights`."""


def prepare_scores(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores in at least float32 with 0 at masked places.

    Args:
        scores: `[P, K]` or `[P, K, A]`, any floating dtype.
        mask: the same shape, bool.

    Returns:
        the shape of `scores`.

    Raises:
        ValueError: if shapes differ or the mask is not boolean.
    """
    if scores.ndim < 2 or scores.shape != mask.shape:
        raise ValueError(f"scores {tuple(scores.shape)} and mask {tuple(mask.shape)} must both be [P, K]")
    if mask.dtype != torch.bool:
        raise ValueError(f"a mask must be boolean (True = judged), got {mask.dtype}")
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~mask, 0.0)


def expect_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise `ValueError` naming the argument unless `tensor` has exactly this shape (`[B]` against `[B, 1]` too)."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def reduce_prompts(
    per_prompt: Tensor, usable: Tensor, weights: Tensor | None, normaliser: float | Tensor | None
) -> tuple[Tensor, Metrics]:
    """`Σ_x w_x ℓ_x / normaliser` over usable prompts, with the counts that let micro-batches be put together.

    Args:
        per_prompt: `[P]`, each prompt's own loss.
        usable: `[P]` bool, the prompts whose judgement says something.
        weights: `[P]` or None for 1 each.
        normaliser: what to divide by; None for the weight sum of these usable prompts (1 where that is 0).

    Returns:
        the scalar loss, and the metrics `num_prompts` and `weight_sum`.

    Raises:
        ValueError: if the weights are not `[P]`.
    """
    if weights is None:
        weights = torch.ones_like(per_prompt)
    expect_shape("weights", weights, tuple(per_prompt.shape))
    weights = weights.to(per_prompt.dtype).masked_fill(~usable, 0.0)
    weight_sum = weights.sum()
    if normaliser is None:
        normaliser = torch.where(weight_sum == 0, torch.ones_like(weight_sum), weight_sum)
    loss = (weights * per_prompt.masked_fill(~usable, 0.0)).sum() / normaliser
    return loss, {"num_prompts": usable.sum(), "weight_sum": weight_sum}


def step_weights(
    mask: Tensor, reduction: StepReduction, *, group_ids: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weight of each step in a named reduction: `reduce_steps(ℓ, mask, reduction) = Σ_bt w_bt ℓ_bt`.

    Taken over a whole optimizer step and cut up with its rows, they make micro-batches add up exactly, however rows and
    groups are split between them.

    Args:
        mask: `[B, T]` bool.
        reduction: one of the names of `reduce_steps`.
        group_ids: `[B]` int64, needed by `per_prompt`.
        dtype: of the weights.

    Returns:
        `[B, T]`; 0 at masked steps.

    Raises:
        ValueError: for an unknown reduction, shapes that do not fit, or missing `group_ids`.
    """
    if mask.ndim != 2 or mask.dtype != torch.bool:
        raise ValueError(f"a mask must be boolean [B, T] (True = counts), got {mask.dtype} {tuple(mask.shape)}")
    counts = mask.sum(1)
    rows = (counts > 0).sum().clamp_min(1).to(dtype)
    if reduction == "per_token":
        weights = (1 / counts.sum().clamp_min(1).to(dtype)).expand(len(counts))
    elif reduction == "per_sequence":
        weights = 1 / (counts.clamp_min(1).to(dtype) * rows)
    elif reduction == "per_prompt":
        if group_ids is None:
            raise ValueError("the reduction per_prompt needs group_ids")
        expect_shape("group_ids", group_ids, (mask.shape[0],))
        groups, inverse = torch.unique(group_ids, return_inverse=True)
        group_counts = counts.new_zeros(len(groups)).index_add(0, inverse, counts)
        prompts = (group_counts > 0).sum().clamp_min(1).to(dtype)
        weights = 1 / (group_counts.clamp_min(1).to(dtype) * prompts)[inverse]
    elif reduction == "sequence_sum":
        weights = (1 / rows).expand(len(counts))
    else:
        raise ValueError(f"unknown reduction {reduction!r}; one of per_token, per_sequence, sequence_sum, per_prompt")
    return weights.unsqueeze(1).expand(mask.shape).masked_fill(~mask, 0.0)


def reduce_steps(
    per_step: Tensor,
    mask: Tensor,
    reduction: Reduction,
    *,
    group_ids: Tensor | None = None,
    normaliser: float | Tensor | None = None,
) -> Tensor:
    """One number out of `ℓ [B, T]`, with `n_b` the counted steps of row b.

    | reduction | equation | divisor without `normaliser` |
    |---|---|---|
    | `per_token` | `Σ_bt ℓ / Σ_b n_b` | counted steps (DAPO) |
    | `per_sequence` | `Σ_b (1/n_b) Σ_t ℓ / rows` | rows with a counted step (GRPO) |
    | `sequence_sum` | `Σ_b Σ_t ℓ / rows` | rows with a counted step (gradient of `J`; Dr. GRPO up to a constant) |
    | `per_prompt` | `Σ_g (1/n_g) Σ_{b∈g} Σ_t ℓ / prompts` | groups with a counted step |

    With an explicit `normaliser`, the divisor of the whole step, micro-batches add up exactly (for `per_prompt`, only
    if no group is split between them).

    Args:
        per_step: `[B, T]`.
        mask: `[B, T]` bool.
        reduction: one of the names above, or weights `w [B, T]` (see `step_weights`) for `Σ_bt w ℓ`.
        group_ids: `[B]` int64, needed by `per_prompt`: rows of one prompt share an id.
        normaliser: what to divide by in place of the last column.

    Returns:
        a scalar; 0 where nothing counts.

    Raises:
        ValueError: for an unknown reduction, shapes that do not fit, or missing `group_ids`.
    """
    if per_step.ndim != 2:
        raise ValueError(f"a loss per step must be [B, T], got {tuple(per_step.shape)}")
    expect_shape("mask", mask, tuple(per_step.shape))
    if mask.dtype != torch.bool:
        raise ValueError(f"a mask must be boolean (True = counts), got {mask.dtype}")
    if isinstance(reduction, Tensor):
        if normaliser is not None:
            raise ValueError("weights of steps have their divisor in them: give no normaliser beside them")
        expect_shape("the weights of steps", reduction, tuple(mask.shape))
        return (per_step.masked_fill(~mask, 0.0) * reduction).sum()
    counts = mask.sum(1)
    sums = per_step.masked_fill(~mask, 0.0).sum(1)
    divisor = (counts > 0).sum()
    if reduction == "per_token":
        divisor = counts.sum()
    elif reduction == "per_sequence":
        sums = sums / counts.clamp_min(1)
    elif reduction == "per_prompt":
        if group_ids is None:
            raise ValueError("the reduction per_prompt needs group_ids")
        expect_shape("group_ids", group_ids, (per_step.shape[0],))
        groups, inverse = torch.unique(group_ids, return_inverse=True)
        group_counts = counts.new_zeros(len(groups)).index_add(0, inverse, counts)
        sums = sums.new_zeros(len(groups)).index_add(0, inverse, sums) / group_counts.clamp_min(1)
        divisor = (group_counts > 0).sum()
    elif reduction != "sequence_sum":
        raise ValueError(f"unknown reduction {reduction!r}; one of per_token, per_sequence, sequence_sum, per_prompt")
    return sums.sum() / (divisor.clamp_min(1) if normaliser is None else normaliser)
