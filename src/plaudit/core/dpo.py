"""Direct preference optimisation: a policy's own log-probabilities as rewards of the Bradley-Terry model.

Pairs may be given (`dpo_loss`), or be all pairs of the answers to each prompt, labelled by a reward (`group_dpo_loss`).
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from plaudit.core.reduction import Metrics, expect_shape


def implicit_rewards(logprobs: Tensor, reference_logprobs: Tensor, *, coefficient: float) -> Tensor:
    """`r̂(x, y) = β log π_θ(y|x) / π_ref(y|x)`: the reward, up to a constant per prompt, whose optimum is `π_θ`.

    Source: Rafailov et al., "Direct preference optimization" (arXiv:2305.18290), equation 5.

    Args:
        logprobs: any shape, log-probability of each whole answer under the policy.
        reference_logprobs: the same shape, under the reference; gradients into them are cut.
        coefficient: scalar `β`, positive.

    Returns:
        the same shape.

    Raises:
        ValueError: if shapes differ or `β` is not positive.
    """
    if not coefficient > 0:
        raise ValueError(f"the coefficient of DPO must be positive, got {coefficient}")
    expect_shape("reference_logprobs", reference_logprobs, tuple(logprobs.shape))
    return coefficient * (logprobs - reference_logprobs.detach())


def dpo_loss(
    first_logprobs: Tensor,
    second_logprobs: Tensor,
    reference_first_logprobs: Tensor,
    reference_second_logprobs: Tensor,
    *,
    coefficient: float,
    preference: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """`ℓ = -q log σ(r̂_1 - r̂_2) - (1 - q) log σ(r̂_2 - r̂_1)`, `r̂ = β log π_θ/π_ref`, averaged over pairs.

    `q` is 1 for a pair whose first answer was chosen; `1 - ε` is label smoothing (cDPO). With the true Bradley-Terry
    probabilities of all pairs as `q`, the minimum is `π* ∝ π_ref exp(r/β)`, whatever the positive weights.
    Source: Rafailov et al., arXiv:2305.18290, equation 7.

    Args:
        first_logprobs, second_logprobs: `[P]`, of whole answers (chosen and rejected), under the policy.
        reference_first_logprobs, reference_second_logprobs: `[P]`, under the reference.
        coefficient: scalar `β`, positive.
        preference: `q [P]` in [0, 1], the probability that the first is preferred; None for 1.
        weights: `[P]`, not negative, or None for 1 each.

    Returns:
        the scalar loss, and the metrics `accuracy` (equal rewards count half), `margin` (mean of `r̂_1 - r̂_2`),
        `reward_first`, `reward_second`.

    Raises:
        ValueError: for shapes that are not `[P]`, probabilities outside [0, 1], or a `β` that is not positive.
    """
    if first_logprobs.ndim != 1:
        raise ValueError(f"log-probabilities of pairs must be [P], got {tuple(first_logprobs.shape)}")
    shape = tuple(first_logprobs.shape)
    expect_shape("second_logprobs", second_logprobs, shape)
    first = implicit_rewards(first_logprobs, reference_first_logprobs, coefficient=coefficient)
    second = implicit_rewards(second_logprobs, reference_second_logprobs, coefficient=coefficient)
    margin = first - second
    preference = torch.ones_like(margin) if preference is None else preference
    weights = torch.ones_like(margin) if weights is None else weights
    expect_shape("preference", preference, shape)
    expect_shape("weights", weights, shape)
    if bool(((preference < 0) | (preference > 1)).any()):
        raise ValueError("preferences are probabilities of the first answer and must lie in [0, 1]")
    per_pair = -preference * logsigmoid(margin) - (1 - preference) * logsigmoid(-margin)
    total = weights.sum()
    loss = (weights * per_pair).sum() / torch.where(total == 0, torch.ones_like(total), total)
    return loss, {
        "accuracy": ((margin.detach().sign() + 1) / 2).mean(),
        "margin": margin.detach().mean(),
        "reward_first": first.detach().mean(),
        "reward_second": second.detach().mean(),
    }


def pairs_within_groups(group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Every unordered pair of rows of one group, `(first [M], second [M])` int64: first before second.

    Args:
        group_ids: `[B]` int64, rows of one prompt share an id.

    Raises:
        ValueError: if the ids are not `[B]`.
    """
    if group_ids.ndim != 1:
        raise ValueError(f"group_ids must be [B], got {tuple(group_ids.shape)}")
    # Laid out by group, the members of a pair are fewer than the largest group apart.
    order = group_ids.argsort(stable=True)
    ids, first, second = group_ids[order], [order[:0]], [order[:0]]
    for distance in range(1, len(ids)):
        near = ids[:-distance] == ids[distance:]
        if not near.any():
            break
        first.append(order[:-distance][near])
        second.append(order[distance:][near])
    return torch.cat(first), torch.cat(second)


def group_dpo_loss(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    rewards: Tensor,
    group_ids: Tensor,
    weights: Tensor,
    *,
    coefficient: float,
) -> tuple[Tensor, Metrics]:
    """DPO on all pairs of a prompt's answers, each labelled by the Bradley-Terry probability of the reward.

    `ℓ = Σ_g Σ_{i<j∈g} ω_ij ℓ_DPO(y_i, y_j; q_ij)`, `q_ij = σ(r_i − r_j)`, `ω_ij = (w_i + w_j)/(K_g − 1)`: the weights
    of a group's pairs add up to those of its rows. With answers that cover what the policy may say, the minimum is
    `π* ∝ π_ref exp(r/β)`, whoever drew them. Labels from a reward in place of people's: Guo et al., "Direct language
    model alignment from online AI feedback" (arXiv:2402.04792), there with hard labels of two answers.

    Args:
        logprobs, reference_logprobs: `[B]`, of whole answers.
        rewards: `[B]`, in the units in which `β` is meant.
        group_ids: `[B]` int64; groups must be whole, a row alone in its group adds nothing.
        weights: `w [B]`, not negative; those of a whole optimizer step add up to 1, so that its parts add up.
        coefficient: scalar `β`, positive.

    Returns:
        the scalar loss, and the metrics of `dpo_loss`; all 0 without a pair.

    Raises:
        ValueError: for shapes that are not `[B]`, or a `β` that is not positive.
    """
    if logprobs.ndim != 1:
        raise ValueError(f"log-probabilities of answers must be [B], got {tuple(logprobs.shape)}")
    for name, tensor in (("rewards", rewards), ("group_ids", group_ids), ("weights", weights)):
        expect_shape(name, tensor, tuple(logprobs.shape))
    first, second = pairs_within_groups(group_ids)
    if not len(first):
        nothing = logprobs.detach().new_zeros(())
        return 0.0 * logprobs.sum(), dict.fromkeys(("accuracy", "margin", "reward_first", "reward_second"), nothing)
    _, inverse, counts = torch.unique(group_ids, return_inverse=True, return_counts=True)
    others = counts[inverse[first]] - 1
    pair_weights = (weights[first] + weights[second]) / others
    # The better answer comes first, so that accuracy and margin say whether the policy agrees with the reward.
    turned = rewards[second] > rewards[first]
    first, second = torch.where(turned, second, first), torch.where(turned, first, second)
    loss, metrics = dpo_loss(
        logprobs[first],
        logprobs[second],
        reference_logprobs[first],
        reference_logprobs[second],
        coefficient=coefficient,
        preference=torch.sigmoid(rewards[first] - rewards[second]),
        weights=pair_weights,
    )
    return loss * pair_weights.sum(), metrics
