import itertools
import math

import pytest
import torch

from plaudit.rollout.token_mdp import TokenMDP

CLOSE = {"rtol": 0, "atol": 1e-12}
SEVERAL = {"num_prompts": 3, "reward_scales": [1.0, 4.0, 0.25], "seed": 5}
VARIANTS = [{}, SEVERAL, {"reward": "consistent_style"}, {"reward": "key_and_door", "num_prompts": 4}]


def random_policy(mdp, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(mdp.reference_logprobs.shape, generator=generator, dtype=torch.float64).log_softmax(-1)


def test_sizes_and_ways_by_hand():
    mdp = TokenMDP()
    assert (mdp.num_prefixes, mdp.num_strings, mdp.num_states) == (85, 341, 85)
    assert len(set(mdp.strings)) == 341
    tiny = TokenMDP(vocabulary=3, max_length=2)
    assert tiny.prefixes == [(), (1,), (2,)]
    assert tiny.strings == [(0,), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
    assert tiny.next_prefix.tolist() == [[-1, 1, 2], [-1, -1, -1], [-1, -1, -1]]
    assert tiny.string_prefixes.tolist() == [[0, 0], [0, 1], [0, 1], [0, 1], [0, 2], [0, 2], [0, 2]]
    assert tiny.string_mask.tolist() == [[True, False]] + [[True, True]] * 6


@pytest.mark.parametrize("options", VARIANTS)
def test_both_ways_to_the_optimum_agree(options):
    mdp = TokenMDP(**options)
    for beta in (0.1, 0.5, 3.0):
        solution = mdp.optimal_solution(coefficient=beta)
        tilted = mdp.tilted_string_logprobs(coefficient=beta)
        torch.testing.assert_close(mdp.string_logprobs(solution.logprobs).exp(), tilted.exp(), **CLOSE)
        normaliser = torch.logsumexp(mdp.string_logprobs(mdp.reference_logprobs) + mdp.string_rewards / beta, -1)
        torch.testing.assert_close(solution.values[:, 0], beta * normaliser, **CLOSE)
        torch.testing.assert_close(solution.logprobs.exp().sum(-1), torch.ones_like(solution.values), **CLOSE)


@pytest.mark.parametrize("options", VARIANTS)
def test_the_gap_is_the_divergence_from_the_optimum(options):
    mdp = TokenMDP(**options)
    optimum = mdp.optimal_solution()
    for policy in (random_policy(mdp), mdp.reference_logprobs, optimum.logprobs):
        reached = mdp.objective(policy)
        by_listing = (mdp.expected_reward(policy) - mdp.coefficient * mdp.kl(policy)).mean()
        torch.testing.assert_close(reached, by_listing, **CLOSE)
        missing = optimum.values[:, 0].mean() - reached
        torch.testing.assert_close(missing, mdp.coefficient * mdp.kl(policy, optimum.logprobs).mean(), **CLOSE)
    assert mdp.gap(optimum.logprobs) == pytest.approx(0, abs=1e-12)
    assert mdp.gap(mdp.reference_logprobs) == pytest.approx(1)
    assert mdp.total_variation(optimum.logprobs, optimum.logprobs).abs().max() == 0


def test_discounted_values_of_transition_rewards_equal_a_plain_sum_over_strings():
    shape = (2, 15, 3)
    extra = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mdp = TokenMDP(vocabulary=3, num_prompts=2, transition_rewards=extra)
    policy, gamma, total = random_policy(mdp), 0.8, 0.0
    for prompt in range(2):
        for string in mdp.strings:
            probability, collected = 1.0, 0.0
            for t, token in enumerate(string):
                place = (prompt, mdp.prefixes.index(string[:t]), token)
                ratio = policy[place] - mdp.reference_logprobs[place]
                collected += gamma**t * float(mdp.rewards[place] - mdp.coefficient * ratio)
                probability *= float(policy[place].exp())
            total += probability * collected / 2
    assert mdp.objective(policy, discount=gamma).item() == pytest.approx(total, abs=1e-12)
    # The optimum of the discounted problem: no other policy does better, and its gradient is 0.
    optimum = mdp.optimal_solution(discount=gamma)
    logits = optimum.logprobs.clone().requires_grad_()
    reached = mdp.objective(logits.log_softmax(-1), discount=gamma)
    torch.testing.assert_close(reached, optimum.values[:, 0].mean(), **CLOSE)
    assert torch.autograd.grad(reached, logits)[0].abs().max() < 1e-12
    assert reached > mdp.objective(policy, discount=gamma)


def test_hard_values_are_the_best_reward_and_the_limit_of_the_soft_ones():
    mdp = TokenMDP(**SEVERAL)
    hard = mdp.hard_solution()
    torch.testing.assert_close(hard.values[:, 0], mdp.string_rewards.max(1).values, **CLOSE)
    torch.testing.assert_close(mdp.expected_reward(hard.logprobs), hard.values[:, 0], **CLOSE)
    soft = mdp.optimal_solution(coefficient=1e-4).values[:, 0]
    assert (hard.values[:, 0] - soft).abs().max() < 1e-2
    assert mdp.evaluate(hard.logprobs, coefficient=0.0).values[0, 0].item() == pytest.approx(hard.values[0, 0].item())


@pytest.mark.parametrize("reward", ["random", "consistent_style"])  # the second is full of ties
@pytest.mark.parametrize("n", [1, 2, 3])
def test_best_of_n_equals_all_groups_of_n(reward, n):
    mdp = TokenMDP(vocabulary=3, max_length=3, reward=reward)
    own = mdp.string_logprobs(mdp.reference_logprobs)[0].exp().tolist()
    rewards = mdp.string_rewards[0].tolist()
    expected = [0.0] * mdp.num_strings
    for group in itertools.product(range(mdp.num_strings), repeat=n):
        best = max(rewards[y] for y in group)
        winners = [y for y in group if rewards[y] == best]
        for y in winners:
            expected[y] += math.prod(own[y] for y in group) / len(winners)
    assert mdp.best_of_n(n)[0].tolist() == pytest.approx(expected, abs=1e-12)


def test_divergence_of_best_of_n_keeps_its_bound():
    mdp = TokenMDP(**SEVERAL)
    reference = mdp.string_logprobs(mdp.reference_logprobs)
    before = mdp.expected_reward(mdp.reference_logprobs)
    for n in (2, 4, 16, 256):
        best = mdp.best_of_n(n)
        torch.testing.assert_close(best.sum(-1), torch.ones(3, dtype=torch.float64))
        kl = torch.xlogy(best, best).sum(-1) - (best * reference).sum(-1)
        assert (kl <= math.log(n) - (n - 1) / n + 1e-12).all()
        assert (kl > 0).all()
        after = (best * mdp.string_rewards).sum(-1)
        assert (after > before).all()
        before = after
    with pytest.raises(ValueError, match="n must be at least 1"):
        mdp.best_of_n(0)


def test_structured_rewards_by_hand():
    style = TokenMDP(reward="consistent_style")
    reward = dict(zip(style.strings, style.string_rewards[0].tolist(), strict=True))
    assert reward[0,] == reward[3, 0] == 0
    assert reward[1, 2, 1, 2] == reward[3, 4, 4, 3] == 1
    assert reward[1, 2, 0] == pytest.approx(1 / 3)
    assert reward[1, 3, 1, 3] == -1
    door = TokenMDP(reward="key_and_door", num_prompts=2, reward_scales=[1.0, 5.0])
    for prompt, key, size in ((0, 1, 1.0), (1, 2, 5.0)):
        found = {string for string, r in zip(door.strings, door.string_rewards[prompt], strict=True) if r}
        expected = {(key, a, 5 - key, 0) for a in range(1, 5)} | {
            (key, a, b, 5 - key) for a in range(1, 5) for b in range(1, 5)
        }
        assert found == expected
        assert door.string_rewards[prompt].unique().tolist() == [0, size]
    own = TokenMDP(reward=lambda prompt, tokens: len(tokens) + 10 * prompt, num_prompts=2)
    assert own.string_rewards[1, own.strings.index((2, 0))] == 12


def test_sampling_follows_the_policy_and_records_it():
    mdp = TokenMDP(vocabulary=3, max_length=3, num_prompts=2)
    policy = mdp.policy()
    with torch.no_grad():
        policy.critic.copy_(torch.arange(mdp.num_states))
    prompts = torch.arange(2).repeat(20_000)
    found = mdp.sample(policy, prompts, generator=torch.Generator().manual_seed(0))
    evaluated = policy.evaluate(found)
    torch.testing.assert_close(found.behaviour_logprobs[found.mask], evaluated.logprobs[found.mask], **CLOSE)
    assert torch.equal(found.values[found.mask], evaluated.values[found.mask])
    assert torch.equal(found.behaviour_logprobs, found.reference_logprobs)
    place = {string: index for index, string in enumerate(mdp.strings)}
    counts = torch.zeros(2, mdp.num_strings, dtype=torch.float64)
    for row in range(200):
        string = tuple(found.actions[row][found.mask[row]].tolist())
        assert string in place
        last = len(string) - 1
        assert found.continues[row].tolist() == [float(t < last) for t in range(3)]
        assert found.rewards[row].sum() == mdp.string_rewards[row % 2, place[string]]
        assert found.next_values[row, :last].tolist() == found.values[row, 1 : last + 1].tolist()
        assert torch.equal(found.next_observations[row, :last], found.observations[row, 1 : last + 1])
    codes = (found.actions * 3 ** torch.arange(3)).sum(1) * 10 + found.mask.sum(1)
    wanted = [sum(a * 3**t for t, a in enumerate(s)) * 10 + len(s) for s in mdp.strings]
    for index, code in enumerate(wanted):
        for prompt in range(2):
            counts[prompt, index] = (codes[prompt::2] == code).sum()
    expected = 20_000 * mdp.string_logprobs(mdp.reference_logprobs).exp()
    statistic = ((counts - expected).square() / expected).sum()
    assert counts.sum() == 40_000
    assert statistic < 28 + 5 * math.sqrt(2 * 28)  # χ² with 2 · 14 degrees of freedom


def test_listing_and_tables_agree_with_the_policy():
    mdp = TokenMDP(**SEVERAL)
    policy = mdp.policy()
    with torch.no_grad():
        policy.logits.add_(torch.randn_like(policy.logits))
    table = mdp.logprob_table(policy)
    everything = mdp.enumerate(policy)
    assert everything.num_rows == 3 * 341
    torch.testing.assert_close(everything.behaviour_logprobs.sum(1), mdp.string_logprobs(table).flatten(), **CLOSE)
    torch.testing.assert_close(everything.rewards.sum(1), mdp.string_rewards.flatten(), **CLOSE)
    torch.testing.assert_close(
        mdp.enumerate().behaviour_logprobs.sum(1), mdp.string_logprobs(mdp.reference_logprobs).flatten(), **CLOSE
    )
    mdp.objective(table).backward()
    assert policy.logits.grad.abs().sum() > 0


def test_a_seed_fixes_everything_and_faults_are_named():
    assert torch.equal(TokenMDP(seed=3).rewards, TokenMDP(seed=3).rewards)
    assert not torch.equal(TokenMDP(seed=3).rewards, TokenMDP(seed=4).rewards)
    with pytest.raises(ValueError, match="vocabulary ≥ 2"):
        TokenMDP(vocabulary=1)
    with pytest.raises(ValueError, match="coefficient must be positive, got 0"):
        TokenMDP(coefficient=0)
    with pytest.raises(ValueError, match="got 'keys'"):
        TokenMDP(reward="keys")
    with pytest.raises(ValueError, match="reward_scales must have shape"):
        TokenMDP(num_prompts=2, reward_scales=[1.0])
    with pytest.raises(ValueError, match="not finite"):
        TokenMDP(reward=lambda prompt, tokens: math.nan)
    with pytest.raises(ValueError, match="logits must be"):
        type(TokenMDP().policy())(torch.zeros(3))
