"""Soft Q-learning: consistent at the optimum, equal to the soft backup of a table, and there by samples alone."""

import pytest
import torch

from plaudit.algorithms.build import build_algorithm
from plaudit.configs.q_learning import SoftQConfig
from plaudit.core.finite import NonFiniteError
from plaudit.core.q_learning import boltzmann_action_values, soft_values
from plaudit.rollout.token_mdp import TokenMDP
from tests.algorithms.problems import SMALL, random_logits


def learner(mdp, rate=0.1, **options):
    policy = mdp.policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=rate)
    config = SoftQConfig(**{"kl_coefficient": mdp.coefficient} | options)
    return policy, optimizer, build_algorithm(config, policy, optimizer)


@pytest.mark.parametrize("target_lambda", [0.0, 0.6, 1.0])
def test_at_the_optimum_every_error_is_zero_whoever_sampled(target_lambda):
    mdp = TokenMDP(**SMALL)
    optimum = mdp.optimal_solution()
    policy, _, algorithm = learner(mdp, target_lambda=target_lambda, epochs=1)
    with torch.no_grad():
        policy.logits.copy_(optimum.logprobs[0])
        policy.critic.copy_(optimum.values[0])
    before = policy.logits.detach().clone()
    batch = mdp.enumerate(policy)
    other = random_logits(mdp).log_softmax(-1)  # the behaviour: it does not enter
    metrics = algorithm.update(batch.with_fields(behaviour_logprobs=other[0, batch.observations, batch.actions]))
    assert metrics["value/loss"] < 1e-24
    assert metrics["value/absolute_error"] < 1e-12
    assert metrics["gradient_norm"] < 1e-12
    torch.testing.assert_close(policy.logits.detach(), before, atol=1e-5, rtol=0)  # Adam scales what is left of it


def test_action_values_of_a_policy_are_those_it_is_the_boltzmann_policy_of():
    mdp = TokenMDP(**SMALL)
    logprobs = random_logits(mdp).log_softmax(-1)[0]
    reference = mdp.reference_logprobs[0]
    values = torch.randn(len(logprobs), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = boltzmann_action_values(values.expand_as(logprobs), logprobs, reference, coefficient=0.3)
    torch.testing.assert_close(soft_values(found, reference, coefficient=0.3), values.squeeze(1))
    torch.testing.assert_close((reference + found / 0.3).log_softmax(-1), logprobs)
    optimum = mdp.optimal_solution()
    torch.testing.assert_close(
        boltzmann_action_values(
            optimum.values[0][:, None].expand_as(logprobs), optimum.logprobs[0], reference, coefficient=mdp.coefficient
        ),
        optimum.action_values[0],
    )
    for bad in ({"coefficient": 0.0}, {"coefficient": -1.0}):
        with pytest.raises(ValueError, match="positive"):
            boltzmann_action_values(logprobs, logprobs, reference, **bad)


def test_one_step_of_it_by_hand():
    mdp = TokenMDP(vocabulary=2, max_length=2)
    policy, _, algorithm = learner(mdp, target_lambda=0.0, epochs=1)
    with torch.no_grad():
        policy.critic.copy_(torch.tensor([0.5, -0.25]))
        policy.logits.copy_(torch.tensor([[0.2, -0.1], [0.0, 0.4]]))
    batch = mdp.enumerate(policy)
    prepared = algorithm.prepare(batch)
    beta, reference = mdp.coefficient, mdp.reference_logprobs[0]
    logprobs = policy.logprobs().detach()
    errors = []
    for prefix, token in ((0, 0), (0, 1), (1, 0), (0, 1), (1, 1)):  # the strings end; token 1, end; token 1, token 1
        value = policy.critic[prefix].item() + beta * (logprobs - reference)[prefix, token].item()
        following = policy.critic[1].item() if (prefix, token) == (0, 1) else 0.0
        errors.append(value - mdp.rewards[0, prefix, token].item() - following)
    huber = [0.5 * error**2 if abs(error) <= 1 else abs(error) - 0.5 for error in errors]
    metrics = algorithm.step(prepared, torch.arange(batch.num_rows))
    assert metrics["value/loss"] == pytest.approx(sum(huber) / 5)
    assert metrics["value/absolute_error"] == pytest.approx(sum(map(abs, errors)) / 5)


def test_targets_and_loss_are_the_recursion_written_out():
    """From the last token back, with γ, λ and a critic that is wrong; then the loss of a policy that has moved on."""
    mdp = TokenMDP(**SMALL)
    policy, _, algorithm = learner(mdp, discount=0.9, target_lambda=0.6, huber_threshold=0.3, epochs=1)
    beta, reference = mdp.coefficient, mdp.reference_logprobs[0]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        policy.logits.copy_(random_logits(mdp)[0])
        policy.critic.copy_(torch.randn(policy.critic.shape, generator=generator, dtype=torch.float64))
    batch, old, critic = mdp.enumerate(policy), policy.logprobs().detach().clone(), policy.critic.detach().clone()
    prepared = algorithm.prepare(batch)
    targets, divergence = torch.zeros_like(batch.rewards), 0.0
    for row in range(mdp.num_strings):
        behind = 0.0
        for step in reversed(range(int(batch.mask[row].sum()))):
            state, action = int(batch.observations[row, step]), int(batch.actions[row, step])
            targets[row, step] = batch.rewards[row, step] + 0.9 * behind
            ratio = old[state, action] - reference[state, action]
            divergence += float(ratio) / mdp.num_strings
            behind = 0.4 * float(critic[state]) + 0.6 * float(targets[row, step] - beta * ratio)
    torch.testing.assert_close(prepared.returns.masked_fill(~batch.mask, 0.0), targets)
    assert prepared.metrics["objective/kl"] == pytest.approx(divergence)
    with torch.no_grad():
        policy.logits += 0.2 * random_logits(mdp, 1)[0]
        policy.critic += 0.1
    new, critic = policy.logprobs().detach().clone(), policy.critic.detach().clone()
    metrics = algorithm.step(prepared, torch.arange(mdp.num_strings))
    states, actions = batch.observations[batch.mask], batch.actions[batch.mask]
    moved = new[states, actions] - old[states, actions]
    errors = critic[states] + beta * (new - reference)[states, actions] - targets[batch.mask]
    assert errors.abs().min() < 0.3 < errors.abs().max()
    huber = torch.where(errors.abs() <= 0.3, 0.5 * errors.square(), 0.3 * (errors.abs() - 0.15))
    assert metrics["value/loss"] == pytest.approx(huber.mean().item())
    assert metrics["policy/approximate_kl"] == pytest.approx((moved.exp() - 1 - moved).mean().item())


def test_micro_batches_change_nothing():
    mdp = TokenMDP(**SMALL)
    found = []
    for split in (False, True):
        policy, _, algorithm = learner(mdp, epochs=2)
        if split:
            policy.micro_batches = lambda trajectory: list(torch.arange(trajectory.num_rows).split(5))
        metrics = algorithm.update(mdp.enumerate(policy), generator=torch.Generator().manual_seed(0))
        found.append((policy.logits.detach(), metrics))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1]["value/loss"] == pytest.approx(found[1][1]["value/loss"])
    assert found[0][1]["value/absolute_error"] == pytest.approx(found[1][1]["value/absolute_error"])


def gap_after(mdp, updates, rows, seed, **options):
    policy, optimizer, algorithm = learner(mdp, **options)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, updates)
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.zeros(rows, dtype=torch.int64)
    for _ in range(updates):
        algorithm.update(mdp.sample(policy, prompts, generator=generator), generator=generator)
        schedule.step()
    return mdp.gap(mdp.logprob_table(policy).detach())


def test_the_optimum_is_reached_by_samples():
    assert gap_after(TokenMDP(**SMALL), 60, 128, 0, rate=0.2) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("target_lambda", [0.0, 0.5, 0.95, 1.0])
def test_the_gate_of_the_full_problem(target_lambda):
    gaps = [gap_after(TokenMDP(seed=seed), 200, 1024, seed, target_lambda=target_lambda) for seed in range(5)]
    assert max(gaps) <= 0.01, gaps


def test_what_cannot_be_learned_from_is_refused():
    mdp = TokenMDP(**SMALL)
    policy, _, algorithm = learner(mdp)
    batch = mdp.enumerate(policy)
    with pytest.raises(NonFiniteError, match="reward is not finite"):
        algorithm.prepare(batch.with_fields(rewards=torch.full_like(batch.rewards, float("nan"))))
    with pytest.raises(ValueError, match="greedy baselines"):
        algorithm.prepare(batch, baselines=torch.zeros(batch.num_rows))
    policy.critic.requires_grad_(False)
    with pytest.raises(ValueError, match="critic that learns"):
        algorithm.update(batch)
    other = build_algorithm(SoftQConfig(), policy, torch.optim.SGD(policy.parameters(), lr=1.0))
    algorithm.num_updates = 7
    other.load_state_dict(algorithm.state_dict())
    assert other.num_updates == 7
