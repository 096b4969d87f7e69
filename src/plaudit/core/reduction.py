"""What every loss over prompts begins and ends with."""

import torch
from torch import Tensor

Metrics = dict[str, Tensor]


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
