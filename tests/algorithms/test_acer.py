"""ACER: what one step expects by enumeration, the optimum that it reaches from replay, and that it resumes."""

import copy
import io
import math

import numpy as np
import pytest
import torch

from plaudit.algorithms.acer import acer_loss, behaviour_table
from plaudit.algorithms.acer_agent import AcerAgent
from plaudit.algorithms.acer_text import AcerText
from plaudit.algorithms.base import TaskSizes
from plaudit.configs.acer import AcerConfig, AcerTextConfig
from plaudit.core.finite import NonFiniteError
from plaudit.rollout.action_values import TabularActionValues
from plaudit.rollout.environments import Collector, evaluate_policy, make_environments
from plaudit.rollout.segments import SegmentReplay
from plaudit.rollout.token_mdp import TokenMDP
from tests.algorithms.problems import SMALL, TINY, random_logits
from tests.algorithms.test_control import LIMIT, Echo

TIGHT = {"rtol": 0, "atol": 1e-10}


def tables_of(mdp, logits=None, action_values=None):
    policy = TabularActionValues(mdp.policy(), mdp.reference_logprobs.flatten(0, 1))
    with torch.no_grad():
        if logits is not None:
            policy.policy.logits.copy_(logits.flatten(0, 1))
        if action_values is not None:
            policy.action_values.copy_(action_values.flatten(0, 1))
    return policy


def text_acer(mdp, policy, rate=0.1, **options):
    optimizer = torch.optim.Adam([policy.policy.logits, policy.action_values], lr=rate)
    return AcerText(AcerTextConfig(**{"kl_coefficient": mdp.coefficient} | options), policy, optimizer)


@pytest.mark.parametrize("truncation", [0.0, 0.5, 1.0, 10.0, None])
def test_a_step_on_the_strings_of_another_policy_expects_the_gradient_at_their_states(truncation):
    """`E_{y~μ}` of `acer_loss`, string by string: `-Σ_s d^μ(s) Σ_a ∇π(a|s) U(s, a)`, penalty and all, for every c."""
    mdp = TokenMDP(**SMALL, seed=1)
    logits = random_logits(mdp)
    solution = mdp.evaluate(logits.log_softmax(-1))
    policy = tables_of(mdp, logits, solution.action_values)
    strings = mdp.enumerate()
    strings = strings.with_fields(behaviour_logits=mdp.reference_logprobs[0][strings.observations])
    chances = mdp.string_logprobs(mdp.reference_logprobs)[0].exp()
    options = AcerTextConfig(truncation=truncation, trust_region=None, value_coefficient=1.0)
    total = torch.zeros_like(policy.policy.logits)
    for row in range(mdp.num_strings):
        one = strings.select(torch.tensor([row]))
        loss, metrics = acer_loss(policy.tables(one), one, options, kl_coefficient=mdp.coefficient)
        (found,) = torch.autograd.grad(loss, policy.policy.logits)
        total += chances[row] * one.mask.sum() * found
        assert float(metrics["value/loss"]) < 1e-20  # every temporal difference is 0 at (π, Q^π)
    leaf = logits.clone().requires_grad_()
    logprobs = leaf.log_softmax(-1)
    utilities = solution.action_values - mdp.coefficient * (logprobs.detach() - mdp.reference_logprobs)
    visits = torch.zeros_like(solution.values)
    for step in range(mdp.max_length):
        rows = mdp.string_mask[:, step]
        visits[0].index_add_(0, mdp.string_prefixes[rows, step], chances[rows])
    objective = (visits.unsqueeze(-1) * logprobs.exp() * utilities).sum()
    (wanted,) = torch.autograd.grad(objective, leaf)
    torch.testing.assert_close(-total, wanted[0], **TIGHT)
    assert wanted.abs().max() > 0.01


def test_nothing_moves_at_the_optimum_whatever_was_sampled():
    mdp = TokenMDP(**SMALL, seed=1)
    best = mdp.optimal_solution()
    policy = tables_of(mdp, best.logprobs, best.action_values)
    strings = mdp.enumerate()
    strings = strings.with_fields(behaviour_logits=mdp.reference_logprobs[0][strings.observations])
    loss, _ = acer_loss(policy.tables(strings), strings, AcerTextConfig(), kl_coefficient=mdp.coefficient)
    for gradient in torch.autograd.grad(loss, [policy.policy.logits, policy.action_values]):
        assert gradient.abs().max() < 1e-14


def test_the_critic_s_step_and_the_bonus_are_as_written_out():
    """`Q^ret` by loops over strings of another policy, with λ, γ and the penalty; the weights of all three parts."""
    mdp = TokenMDP(**SMALL, seed=1)
    policy = tables_of(mdp, random_logits(mdp), random_logits(mdp, 1))
    strings = mdp.enumerate()
    strings = strings.with_fields(behaviour_logits=mdp.reference_logprobs[0][strings.observations])
    given = {"discount": 0.9, "retrace_lambda": 0.3, "value_coefficient": 0.8, "trust_region": None}
    parts = [policy.policy.logits, policy.action_values]
    found = {}
    for bonus in (0.0, 0.2):
        options = AcerTextConfig(**given, entropy_coefficient=bonus)
        loss, metrics = acer_loss(policy.tables(strings), strings, options, kl_coefficient=mdp.coefficient)
        found[bonus] = torch.autograd.grad(loss, parts)
    logprobs, table = policy.policy.logprobs().detach(), policy.action_values.detach()
    reference, count = mdp.reference_logprobs[0], int(strings.mask.sum())
    values = (logprobs.exp() * (table - mdp.coefficient * (logprobs - reference))).sum(-1)
    wanted, error = torch.zeros_like(table), 0.0
    for row in range(mdp.num_strings):
        correction = behind = 0.0
        for step in reversed(range(int(strings.mask[row].sum()))):
            state, action = int(strings.observations[row, step]), int(strings.actions[row, step])
            target = float(strings.rewards[row, step]) + 0.9 * (behind + correction)
            ratio = math.exp(float(logprobs[state, action] - strings.behaviour_logprobs[row, step]))
            own = float(table[state, action])
            correction, behind = 0.3 * min(1.0, ratio) * (target - own), float(values[state])
            wanted[state, action] += 0.8 * (own - target) / count
            error += (own - target) ** 2 / count
    torch.testing.assert_close(found[0.0][1], wanted, **TIGHT)
    torch.testing.assert_close(found[0.2][1], wanted, **TIGHT)
    assert float(metrics["value/loss"]) == pytest.approx(error)
    chances = policy.policy.logprobs()[strings.observations[strings.mask]]
    (spread,) = torch.autograd.grad(-(chances.exp() * chances).sum(-1).mean(), policy.policy.logits)
    torch.testing.assert_close(found[0.2][0] - found[0.0][0], -0.2 * spread, **TIGHT)


def test_few_strings_seen_often_reach_the_tilted_optimum():
    mdp = TokenMDP(**SMALL, seed=2)
    policy = tables_of(mdp)
    algorithm = text_acer(mdp, policy, replay_ratio=3)
    schedule = torch.optim.lr_scheduler.LinearLR(algorithm.optimizer, 1.0, 0.0, 60)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        metrics = algorithm.update(mdp.sample(policy, torch.zeros(32, dtype=torch.int64), generator=generator))
        schedule.step()
    assert mdp.gap(mdp.logprob_table(policy).detach()) < 0.01
    assert metrics["value/explained_variance"] > 0.99
    assert metrics["replay/answers"] == 1024


@pytest.mark.parametrize("kept", [None, 2])
def test_micro_batches_add_up(kept):
    mdp = TokenMDP(**SMALL, seed=2)
    logits, values = random_logits(mdp), random_logits(mdp, 1)
    found = []
    for size in (None, 5):
        policy = tables_of(mdp, logits, values)
        if size:
            policy.micro_batches = lambda trajectory: list(torch.arange(trajectory.num_rows).split(5))
        algorithm = text_acer(mdp, policy, trust_region=0.05, behaviour_tokens=kept, replay_ratio=1)
        generator = torch.Generator().manual_seed(0)
        metrics = algorithm.update(mdp.sample(policy, torch.zeros(32, dtype=torch.int64), generator=generator))
        assert 0 < metrics["policy/projected_fraction"] < 1
        found.append([*(value.detach() for value in policy.parameters()), torch.tensor(metrics["policy/loss"])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


def test_distributions_that_are_kept_in_part():
    mdp = TokenMDP(seed=2)
    policy = tables_of(mdp, random_logits(mdp))
    fresh = mdp.sample(policy, torch.zeros(16, dtype=torch.int64), generator=torch.Generator().manual_seed(0))
    whole = behaviour_table(text_acer(mdp, policy).with_distributions(fresh), mdp.vocabulary)
    exact = policy.tables(fresh).logprobs.detach()
    torch.testing.assert_close(whole, exact, **TIGHT)
    part = behaviour_table(text_acer(mdp, policy, behaviour_tokens=2).with_distributions(fresh), mdp.vocabulary)
    known = part < math.inf
    torch.testing.assert_close(part[known], exact[known], **TIGHT)
    likely = torch.zeros_like(known).scatter(1, exact.topk(2).indices, True)
    sampled = torch.zeros_like(known).scatter(1, fresh.actions[fresh.mask].unsqueeze(1), True)
    assert torch.equal(known, likely | sampled)
    assert (sampled & ~likely).any()
    with pytest.raises(ValueError, match="behaviour's whole distributions are needed"):
        behaviour_table(fresh, mdp.vocabulary)


def test_answers_resume_and_are_refused():
    mdp = TokenMDP(**TINY, seed=2)
    policy = tables_of(mdp)
    algorithm = text_acer(mdp, policy)
    batches = [
        mdp.sample(mdp.policy(), torch.zeros(8, dtype=torch.int64), generator=torch.Generator().manual_seed(seed))
        for seed in range(4)
    ]
    for batch in batches[:2]:
        algorithm.update(batch)
    state = [algorithm.state_dict(), policy.state_dict(), algorithm.optimizer.state_dict()]
    torch.save(state, file := io.BytesIO())
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other_policy = tables_of(mdp)
    other = text_acer(mdp, other_policy)
    other.load_state_dict(saved[0])
    other_policy.load_state_dict(saved[1])
    other.optimizer.load_state_dict(saved[2])
    for batch in batches[2:]:
        assert algorithm.update(batch) == other.update(batch)
    assert torch.equal(policy.policy.logits, other_policy.policy.logits)
    assert torch.equal(policy.average.logits, other_policy.average.logits)
    assert other.num_updates == 4
    bad = batches[0].with_fields(rewards=batches[0].rewards.masked_fill(batches[0].mask, math.nan))
    with pytest.raises(NonFiniteError, match="update 4: a reward is not finite"):
        algorithm.update(bad)
    with pytest.raises(ValueError, match="greedy baselines were given"):
        algorithm.update(batches[0], baselines=torch.zeros(8))


@pytest.mark.parametrize("ratio", [0.0, 2.5])
def test_replays_after_a_fresh_batch_are_poisson(ratio):
    mdp = TokenMDP(**TINY, seed=2)
    algorithm = text_acer(mdp, tables_of(mdp), replay_ratio=ratio)
    fresh = mdp.sample(mdp.policy(), torch.zeros(3, dtype=torch.int64), generator=torch.Generator().manual_seed(0))
    counts = []
    for _ in range(400):
        prepared = algorithm.prepare(fresh)
        counts.append(prepared.metrics["replay/updates"])
        assert bool(prepared.metrics["replay/answers"]) == bool(ratio)  # what is never replayed is not kept
        assert [len(rows) for rows in algorithm.minibatches(prepared)] == [3] * (1 + int(counts[-1]))
    # Within four standard errors: sqrt(λ/n) of the mean, about sqrt((λ + 2 λ²)/n) of the variance.
    assert abs(np.mean(counts) - ratio) <= 4 * math.sqrt(ratio / 400)
    assert abs(np.var(counts) - ratio) <= 4 * math.sqrt((ratio + 2 * ratio**2) / 400)


def test_the_replay_is_a_ring_of_rows():
    mdp = TokenMDP(**SMALL, seed=2)
    replay = SegmentReplay(5)
    with pytest.raises(ValueError, match="the replay is empty"):
        replay.sample(1)
    rows = mdp.enumerate()
    short = rows.select(rows.mask.sum(1) == 1)
    short = short.with_fields(**{name: tensor[:, :1] for name, tensor in short.tensors().items() if tensor.ndim > 1})
    replay.add(short)  # one string of one token; longer ones make room for themselves
    replay.add(rows.select(torch.tensor([5, 6])))
    replay.add(rows.select(torch.tensor([7, 8, 9])))  # the sixth goes where the first was
    assert len(replay) == 5
    drawn = replay.sample(400, generator=torch.Generator().manual_seed(0))
    keys = drawn.actions.mul(torch.tensor([1, 10, 100])).sum(1)
    wanted = rows.select(torch.tensor([5, 6, 7, 8, 9])).actions.mul(torch.tensor([1, 10, 100])).sum(1)
    found, counts = keys.unique(return_counts=True)
    assert found.tolist() == sorted(wanted.tolist())
    assert counts.min() > 50
    other = SegmentReplay(5)
    other.load_state_dict(replay.state_dict())
    again = other.sample(400, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.actions, drawn.actions)
    assert torch.equal(again.mask, drawn.mask)
    with pytest.raises(ValueError, match="6 segments at once for a replay of 5"):
        replay.add(rows.select(torch.arange(6)))
    with pytest.raises(ValueError, match="segments must be alike"):
        replay.add(rows.select(torch.arange(2)).with_fields(group_ids=None))


def echo_agent(seed=0, **options):
    values = {"discount": 0.9, "hidden": (16,), "learning_rate": 0.01, "learning_starts": 256, "num_environments": 8}
    return AcerAgent(
        AcerConfig(**values | {"rollout_steps": 16} | options), TaskSizes(4, 4), total_steps=3840, seed=seed
    )


def test_the_agent_learns_to_echo():
    agent = echo_agent()
    collector = Collector(make_environments(Echo, 8), seed=0)
    for _ in range(30):
        metrics = agent.update(collector.collect(agent.policy, agent.num_steps))
    collector.environments.close()
    assert evaluate_policy(Echo, agent.greedy_policy(), num_episodes=16) == [LIMIT] * 16
    assert np.mean(collector.episode_returns[:8]) < 4
    # Cut off, not ended: near the values of going on for ever, 1 / (1 - γ) = 10; ends would give 3.6.
    assert agent.policy.values(torch.arange(4)).mean().item() > 5
    assert metrics["replay/segments"] == 240


def test_the_agent_is_the_same_twice_and_resumes():
    collector = Collector(make_environments(Echo, 8), seed=0)
    agent, twin = echo_agent(), echo_agent(trust_region=1.0)
    batches = [collector.collect(agent.policy, 16) for _ in range(5)]
    collector.environments.close()
    for batch in batches[:3]:
        assert agent.update(batch) == twin.update(batch)
    third = echo_agent(seed=9)
    third.load_state_dict(copy.deepcopy(agent.state_dict()))
    for batch in batches[3:]:
        assert agent.update(batch) == third.update(batch)
    assert agent.replay.sample(1).values.abs().max() == 0  # stale values are not kept


def test_what_follows_a_step_is_the_next_one_or_the_final_observation():
    agent = echo_agent()
    collector = Collector(make_environments(Echo, 8), seed=0)
    batch = collector.collect(agent.policy, 12)  # cut off after 8 steps
    collector.environments.close()
    _, found = agent._judge(batch)
    wanted = agent.policy.values(batch.next_observations)
    torch.testing.assert_close(found, wanted)
    assert (found[:, 7] - agent.policy.values(batch.observations[:, 8])).abs().max() > 1e-3


def test_as_many_segments_are_kept_as_have_that_many_steps():
    assert echo_agent(buffer_size=330).replay.capacity == 20  # of 16 steps each
    assert echo_agent(buffer_size=9).replay.capacity == 8  # one of each environment is kept whatever is said


def test_the_average_policy_follows_slowly():
    agent = echo_agent(average_decay=0.9, replay_ratio=0.0, learning_starts=1000)
    before = [value.clone() for value in agent.average.actor.parameters()]
    collector = Collector(make_environments(Echo, 8), seed=0)
    agent.update(collector.collect(agent.policy, 16))
    collector.environments.close()
    own, after = agent.policy.network.actor.parameters(), agent.average.actor.parameters()
    for old, mine, new in zip(before, own, after, strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * mine.detach())


def test_replay_begins_where_it_is_told_to_and_the_rate_falls():
    agent, steady = echo_agent(learning_starts=300), echo_agent(schedule="constant")
    collector, found = Collector(make_environments(Echo, 8), seed=0), []
    for _ in range(4):  # 128 steps each
        batch = collector.collect(agent.policy, 16)
        found.append((agent.update(batch)["replay/updates"], agent.optimizer.param_groups[0]["lr"]))
        steady.update(batch)
    collector.environments.close()
    assert [updates for updates, _ in found[:2]] == [0, 0]
    assert sum(updates for updates, _ in found) > 0
    assert [rate for _, rate in found] == pytest.approx([0.01 * (1 - done * 128 / 3840) for done in range(4)])
    assert steady.optimizer.param_groups[0]["lr"] == 0.01
