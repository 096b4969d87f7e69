import math

import pytest
import torch

from plaudit.core.policy_losses import (
    actor_critic_loss,
    answer_logprobs,
    clipped_surrogate_loss,
    entropy_bonus,
    kl_penalised_surrogate_loss,
    policy_gradient_loss,
    truncated_importance_weights,
)
from plaudit.core.reduction import reduce_steps, step_weights

B, T = 5, 7
REDUCTIONS = ["per_token", "per_sequence", "sequence_sum", "per_prompt"]
GROUPS = torch.tensor([0, 1, 0, 1, 1])


def wild(seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, T, generator=generator) > 0.35
    mask[3] = False
    tables = [torch.randn(B, T, generator=generator, dtype=torch.float64) for _ in range(3)]
    logprobs, old, advantages = (table.masked_fill(~mask, float("nan")) for table in tables)
    return logprobs.requires_grad_(), old, advantages, mask


def reduce_plainly(losses, mask, reduction):
    """Plain loops over `{(b, t): loss}`."""
    rows = {b: [losses[b, t] for t in range(T) if mask[b, t]] for b in range(B)}
    rows = {b: items for b, items in rows.items() if items}
    if reduction == "per_token":
        return sum(map(sum, rows.values())) / sum(map(len, rows.values()))
    if reduction == "sequence_sum":
        return sum(map(sum, rows.values())) / len(rows)
    if reduction == "per_sequence":
        return sum(sum(items) / len(items) for items in rows.values()) / len(rows)
    prompts = [[x for b, items in rows.items() if GROUPS[b] == g for x in items] for g in (0, 1)]
    return sum(sum(items) / len(items) for items in prompts) / 2


def test_reductions_by_hand():
    values = torch.tensor([[1.0, 2.0, 9.0], [6.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert reduce_steps(values, mask, "per_token").item() == 3
    assert reduce_steps(values, mask, "per_sequence").item() == 3.75
    assert reduce_steps(values, mask, "sequence_sum").item() == 4.5
    assert reduce_steps(values, mask, "per_prompt", group_ids=torch.tensor([4, 4])).item() == 3
    assert reduce_steps(values, mask, "per_prompt", group_ids=torch.tensor([4, 2])).item() == 3.75
    # A row, or a prompt, without a counted step is no part of the mean.
    one = torch.tensor([[True, True, False], [False, False, False]])
    for reduction, wanted in (("per_sequence", 1.5), ("sequence_sum", 3), ("per_prompt", 1.5)):
        assert reduce_steps(values, one, reduction, group_ids=torch.tensor([4, 2])).item() == wanted
    assert reduce_steps(values, mask, "sequence_sum", normaliser=10.0).item() == pytest.approx(0.9)
    with pytest.raises(ValueError, match="per_prompt needs"):
        reduce_steps(values, mask, "per_prompt")
    with pytest.raises(ValueError, match="unknown reduction 'mean'"):
        reduce_steps(values, mask, "mean")


@pytest.mark.parametrize("reduction", ["per_token", "per_sequence", "sequence_sum", "per_prompt"])
def test_weights_of_steps_are_the_reduction_and_add_up_over_any_parts(reduction):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    mask = torch.rand(6, 4, generator=generator) > 0.4
    mask[2] = False
    groups = torch.tensor([0, 1, 0, 1, 5, 5])
    whole = reduce_steps(values, mask, reduction, group_ids=groups)
    weights = step_weights(mask, reduction, group_ids=groups, dtype=torch.float64)
    assert (weights[~mask] == 0).all()
    torch.testing.assert_close((values * weights).sum(), whole)
    parts = [torch.tensor([0, 4, 2]), torch.tensor([5, 1, 3])]  # groups torn apart
    torch.testing.assert_close(sum(reduce_steps(values[part], mask[part], weights[part]) for part in parts), whole)
    with pytest.raises(ValueError, match="give no normaliser"):
        reduce_steps(values, mask, weights, normaliser=2.0)
    with pytest.raises(ValueError, match="unknown reduction 'mean'"):
        step_weights(mask, "mean")


def test_surrogates_by_hand():
    # Ratios 2, ½, 2, ½ with advantages 1, 1, -1, -1 and ε = .2: objectives 1.2, .5, -2, -.8
    logprobs = torch.tensor([[2.0, 0.5, 2.0, 0.5]], dtype=torch.float64).log()
    old, advantages = torch.zeros(1, 4, dtype=torch.float64), torch.tensor([[1.0, 1, -1, -1]], dtype=torch.float64)
    mask = torch.ones(1, 4, dtype=torch.bool)
    loss, metrics = clipped_surrogate_loss(logprobs, old, advantages, mask, reduction="sequence_sum")
    assert loss.item() == pytest.approx(-(1.2 + 0.5 - 2 - 0.8))
    assert metrics["clip_fraction"].item() == 0.5
    assert (metrics["ratio_min"].item(), metrics["ratio_max"].item()) == (pytest.approx(0.5), pytest.approx(2))
    assert metrics["ratio_mean"].item() == pytest.approx(1.25)
    assert metrics["approximate_kl"].item() == pytest.approx(0.25)  # (1 - ln 2, ln 2 - ½) twice: a quarter each
    loss, _ = clipped_surrogate_loss(logprobs, old, advantages, mask, reduction="sequence_sum", clip_high=0.5)
    assert loss.item() == pytest.approx(-(1.5 + 0.5 - 2 - 0.8))
    loss, _ = clipped_surrogate_loss(logprobs, old, advantages, mask, reduction="sequence_sum", dual_clip=1.5)
    assert loss.item() == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8))
    for estimator, divergence in (("k1", 0.0), ("k2", 2 * math.log(2) ** 2), ("k3", 1.0)):
        loss, metrics = kl_penalised_surrogate_loss(
            logprobs, old, advantages, mask, kl_coefficient=3.0, kl_estimator=estimator, reduction="sequence_sum"
        )
        assert loss.item() == pytest.approx(0 + 3 * divergence)
        assert metrics["kl_penalty"].item() == pytest.approx(divergence)
    loss, _ = kl_penalised_surrogate_loss(
        logprobs, old, advantages, mask, kl_coefficient=3.0, clip_low=0.2, reduction="sequence_sum"
    )
    assert loss.item() == pytest.approx(1.1 + 3)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equals_plain_loops(reduction):
    logprobs, old, advantages, mask = wild()
    weights = truncated_importance_weights(logprobs - old, mask, maximum=1.3, minimum=0.4)
    options = {"reduction": reduction, "group_ids": GROUPS}
    losses = {"gradient": {}, "clipped": {}, "penalised": {}}
    for b in range(B):
        for t in range(T):
            if not mask[b, t]:
                continue
            new, was, a = logprobs[b, t].item(), old[b, t].item(), advantages[b, t].item()
            ratio = math.exp(new - was)
            weight = min(max(ratio, 0.4), 1.3)
            assert weights[b, t].item() == pytest.approx(weight)
            clipped = min(ratio * a, min(max(ratio, 0.9), 1.3) * a)
            clipped = max(clipped, 1.5 * a) if a < 0 else clipped
            losses["gradient"][b, t] = -weight * a * new
            losses["clipped"][b, t] = -weight * clipped
            losses["penalised"][b, t] = -ratio * a + 0.7 * (ratio - 1 - math.log(ratio))
    found = {
        "gradient": policy_gradient_loss(logprobs, advantages, mask, importance_weights=weights, **options),
        "clipped": clipped_surrogate_loss(
            logprobs, old, advantages, mask, clip_low=0.1, clip_high=0.3, dual_clip=1.5, importance_weights=weights,
            **options,
        ),
        "penalised": kl_penalised_surrogate_loss(logprobs, old, advantages, mask, kl_coefficient=0.7, **options),
    }  # fmt: skip
    for name, (loss, metrics) in found.items():
        assert loss.item() == pytest.approx(reduce_plainly(losses[name], mask, reduction), rel=1e-12), name
        assert metrics["num_steps"].item() == mask.sum().item()
        (gradient,) = torch.autograd.grad(loss, logprobs, retain_graph=True)
        assert torch.isfinite(gradient).all()
        assert (gradient[~mask] == 0).all()


def test_at_ratio_one_every_surrogate_has_the_policy_gradient():
    logprobs, _, advantages, mask = wild()
    old = logprobs.detach()
    options = {"reduction": "per_token"}
    expected = torch.autograd.grad(policy_gradient_loss(logprobs, advantages, mask, **options)[0], logprobs)[0]
    clipped, metrics = clipped_surrogate_loss(logprobs, old, advantages, mask, **options)
    # k1's gradient does not vanish at π = π_old sample by sample, only in expectation; that of k2 and k3 does.
    penalised = kl_penalised_surrogate_loss(logprobs, old, advantages, mask, kl_coefficient=5.0, **options)[0]
    for loss in (clipped, penalised):
        torch.testing.assert_close(torch.autograd.grad(loss, logprobs)[0], expected, rtol=0, atol=1e-14)
    assert (metrics["clip_fraction"], metrics["approximate_kl"], metrics["ratio_max"]) == (0, 0, 1)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_micro_batches_add_up_and_masked_steps_change_nothing(reduction):
    logprobs, old, advantages, mask = wild(3)
    options = {"reduction": reduction, "group_ids": GROUPS}
    whole = clipped_surrogate_loss(logprobs, old, advantages, mask, **options)[0]
    divisor = {"per_token": mask.sum(), "per_prompt": 2}.get(reduction, 4)
    parts = 0.0
    for rows in (torch.tensor([0, 2]), torch.tensor([1, 3, 4])):
        parts += clipped_surrogate_loss(
            logprobs[rows], old[rows], advantages[rows], mask[rows], reduction=reduction, group_ids=GROUPS[rows],
            normaliser=divisor,
        )[0]  # fmt: skip
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-14)
    pad = (torch.full((B, 3), float("nan"), dtype=torch.float64),)
    longer = [torch.cat([table, *pad], 1) for table in (logprobs, old, advantages)]
    more = torch.cat([mask, torch.zeros(B, 3, dtype=torch.bool)], 1)
    loss, metrics = clipped_surrogate_loss(*longer, more, **options)
    assert torch.equal(loss, whole)
    wanted = clipped_surrogate_loss(logprobs, old, advantages, mask, **options)[1]
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {name: value.item() for name, value in wanted.items()}, rel=1e-14
    )
    ratios = (logprobs - old)[mask].exp()
    assert (metrics["ratio_min"], metrics["ratio_max"]) == (ratios.min(), ratios.max())


def test_the_whole_answer_as_one_action():
    logprobs, old, _, mask = wild(1)
    total, rows = answer_logprobs(logprobs, mask)
    mean, _ = answer_logprobs(logprobs, mask, mean=True)
    assert rows.squeeze(1).tolist() == mask.any(1).tolist()
    for b in range(B):
        tokens = [logprobs[b, t].item() for t in range(T) if mask[b, t]]
        assert total[b].item() == pytest.approx(sum(tokens))
        assert mean[b].item() == pytest.approx(sum(tokens) / max(len(tokens), 1))
    advantages = torch.randn(B, 1, dtype=torch.float64)
    loss, metrics = clipped_surrogate_loss(
        total, answer_logprobs(old, mask)[0], advantages, rows, reduction="per_token"
    )
    ratios = (logprobs - old).masked_fill(~mask, 0.0).sum(1).exp()
    expected = -torch.minimum(ratios * advantages[:, 0], ratios.clamp(0.8, 1.2) * advantages[:, 0])[rows[:, 0]].mean()
    torch.testing.assert_close(loss, expected)
    assert metrics["num_steps"] == 4


def test_the_sum_of_all_parts_by_hand():
    one, two, three, four = (torch.tensor(float(x)) for x in (1, 2, 3, 4))
    parts = {"kl": two, "value_loss": three, "entropy": four}
    found = actor_critic_loss(one, **parts, kl_coefficient=0.5, value_coefficient=0.1, entropy_coefficient=0.01)
    assert found.item() == pytest.approx(1 + 1 + 0.3 - 0.04)
    assert actor_critic_loss(one, kl=torch.tensor(float("nan"))).item() == 1
    with pytest.raises(ValueError, match="value_loss was not given"):
        actor_critic_loss(one, value_coefficient=1.0)
    with pytest.raises(ValueError, match="entropy must have shape"):
        actor_critic_loss(one, entropy=torch.ones(2), entropy_coefficient=1.0)
    entropies = torch.tensor([[1.0, 3.0, 50.0]])
    assert entropy_bonus(entropies, entropies < 9, reduction="per_token").item() == 2


def test_gradients_reach_the_policy_alone():
    logprobs, old, advantages, mask = wild()
    old, advantages = old.requires_grad_(), advantages.requires_grad_()
    weights = torch.ones(B, T, dtype=torch.float64, requires_grad=True)
    for loss, _ in (
        clipped_surrogate_loss(logprobs, old, advantages, mask, importance_weights=weights, reduction="per_token"),
        kl_penalised_surrogate_loss(logprobs, old, advantages, mask, kl_coefficient=1.0, reduction="per_token"),
        policy_gradient_loss(logprobs, advantages, mask, importance_weights=weights, reduction="per_token"),
    ):
        found = torch.autograd.grad(loss, [logprobs, old, advantages, weights], allow_unused=True)
        assert found[0] is not None
        assert found[1:] == (None, None, None)
    assert not truncated_importance_weights(logprobs, mask, maximum=2.0).requires_grad


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction):
    _, old, advantages, mask = wild(2)
    old, advantages = old.nan_to_num(), advantages.nan_to_num()
    logprobs = (old + 0.5 * torch.randn_like(old)).requires_grad_()
    options = {"reduction": reduction, "group_ids": GROUPS}

    def everything(x):
        return (
            policy_gradient_loss(x, advantages, mask, **options)[0],
            clipped_surrogate_loss(x, old, advantages, mask, dual_clip=1.1, **options)[0],
            kl_penalised_surrogate_loss(x, old, advantages, mask, kl_coefficient=0.3, **options)[0],
            clipped_surrogate_loss(
                *(answer_logprobs(table, mask)[0] for table in (x, old)), advantages[:, :1], mask.any(1, keepdim=True),
                **options,
            )[0],
        )  # fmt: skip

    assert torch.autograd.gradcheck(everything, [logprobs])


def test_approximate_kl_is_k3_of_the_old_policy_towards_the_new_one():
    old = torch.zeros(1, 1, dtype=torch.float64)
    _, metrics = clipped_surrogate_loss(old + 1, old, old, old == 0, reduction="per_token")
    assert metrics["approximate_kl"].item() == pytest.approx(math.e - 2)  # ρ - 1 - log ρ


def test_extremes():
    logprobs, old, advantages, mask = wild()
    nothing = torch.zeros_like(mask)
    for reduction in REDUCTIONS:
        options = {"reduction": reduction, "group_ids": GROUPS}
        loss, metrics = clipped_surrogate_loss(logprobs, old, advantages, nothing, **options)
        assert loss.item() == 0
        assert (metrics["ratio_min"], metrics["ratio_max"], metrics["clip_fraction"]) == (1, 1, 0)
    far = torch.full((1, 2), 1e4, dtype=torch.float64)
    both = torch.ones(1, 2, dtype=torch.bool)
    # The clip bounds a gain however far the ratio is; a dual clip bounds the loss too.
    options = {"reduction": "per_token"}
    assert clipped_surrogate_loss(far, 0 * far, far, both, **options)[0].item() == pytest.approx(-1.2e4)
    assert clipped_surrogate_loss(far, 0 * far, -far, both, dual_clip=3.0, **options)[0].item() == pytest.approx(3e4)
    assert truncated_importance_weights(far, both, maximum=2.0).tolist() == [[2, 2]]
    assert truncated_importance_weights(far, torch.tensor([[True, False]]), maximum=2.0).tolist() == [[2, 0]]
    # What the clip has cut off has the gradient 0, not 0 times infinity.
    for signed, dual_clip in ((far, None), (-far, 3.0)):
        moved = far.clone().requires_grad_()
        loss, _ = clipped_surrogate_loss(moved, 0 * far, signed, both, dual_clip=dual_clip, **options)
        assert torch.autograd.grad(loss, moved)[0].tolist() == [[0, 0]]


def test_faults_are_named():
    logprobs, old, advantages, mask = wild()
    with pytest.raises(ValueError, match="advantages must have shape"):
        policy_gradient_loss(logprobs, advantages[:, :1], mask, reduction="per_token")
    with pytest.raises(ValueError, match="old_logprobs must have shape"):
        clipped_surrogate_loss(logprobs, old[:, 0], advantages, mask, reduction="per_token")
    with pytest.raises(ValueError, match="dual_clip must be above 1"):
        clipped_surrogate_loss(logprobs, old, advantages, mask, dual_clip=0.5, reduction="per_token")
    with pytest.raises(ValueError, match="must not be negative"):
        kl_penalised_surrogate_loss(logprobs, old, advantages, mask, kl_coefficient=-1.0, reduction="per_token")
    with pytest.raises(ValueError, match="one of k1, k2, k3, got 'k4'"):
        kl_penalised_surrogate_loss(
            logprobs, old, advantages, mask, kl_coefficient=1.0, kl_estimator="k4", reduction="per_token"
        )
    with pytest.raises(ValueError, match="minimum ≤ maximum"):
        truncated_importance_weights(logprobs, mask, maximum=1.0, minimum=2.0)


def test_samples_of_another_policy_are_weighed_in_the_penalty_too():
    """One state, every action once, weighed by μ: `E_μ[w k3] = KL(π_old‖π_θ)` and `E_μ[w ρ A] = E_π[A]`."""
    draws = torch.Generator().manual_seed(3)
    behaviour, old, own = (torch.randn(4, 1, generator=draws, dtype=torch.float64).log_softmax(0) for _ in range(3))
    advantages, mask = torch.randn(4, 1, generator=draws, dtype=torch.float64), torch.ones(4, 1, dtype=torch.bool)
    loss, metrics = kl_penalised_surrogate_loss(
        own, old, advantages, mask, kl_coefficient=0.7, reduction=behaviour.exp(),
        importance_weights=(old - behaviour).exp(),
    )  # fmt: skip
    divergence = (old.exp() * (old - own)).sum()
    torch.testing.assert_close(metrics["kl_penalty"], divergence, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss, 0.7 * divergence - (own.exp() * advantages).sum(), rtol=1e-12, atol=0)
