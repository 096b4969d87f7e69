import itertools
import math

import pytest
import torch

from plaudit.core.kl import kl_k1
from plaudit.core.returns import gae, shift_to_next
from plaudit.rollout.dialogue import DialogueMDP

CLOSE = {"rtol": 0, "atol": 1e-12}


def random_policy(mdp, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(mdp.reference_logprobs.shape, generator=generator, dtype=torch.float64).log_softmax(-1)


def test_sizes_by_hand():
    mdp = DialogueMDP()
    assert mdp.num_states == 1 + 6 + 36
    assert mdp.states[:3] == [(), (0, 0), (0, 1)]
    assert len(mdp.dialogues().words) == 3 * 6 * 6
    torch.testing.assert_close(mdp.reply_probabilities.sum(-1), torch.ones(43, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="two words"):
        DialogueMDP(num_words=1)


def test_rewards_and_replies_equal_a_sum_over_all_paths_of_moods():
    """The exact answer without beliefs: list the moods as well, reward and reply conditioned on what was said."""
    mdp = DialogueMDP(num_moods=3, num_turns=3, seed=2)
    for index, state in enumerate(mdp.states):
        words, replies = state[0::2], state[1::2]
        total, reward = 0.0, torch.zeros(mdp.num_words, dtype=torch.float64)
        chances = torch.zeros(mdp.num_words, mdp.num_replies, dtype=torch.float64)
        for moods in itertools.product(range(3), repeat=len(words) + 1):
            weight = float(mdp.first_mood[moods[0]])
            for t, (word, reply) in enumerate(zip(words, replies, strict=True)):
                weight *= float(mdp.mood_moves[moods[t], word, moods[t + 1]] * mdp.mood_replies[moods[t + 1], reply])
            total += weight
            reward += weight * mdp.mood_rewards[moods[-1]]
            chances += weight * mdp.mood_moves[moods[-1]] @ mdp.mood_replies
        torch.testing.assert_close(mdp.rewards[index], reward / total, **CLOSE)
        torch.testing.assert_close(mdp.reply_probabilities[index], chances / total, **CLOSE)


def test_the_gap_is_the_divergence_of_the_policy_s_part_from_the_optimum():
    mdp = DialogueMDP()
    listed, optimum = mdp.dialogues(), mdp.optimal_solution()
    user = mdp.user_logprobs(listed)
    for policy in (random_policy(mdp), mdp.reference_logprobs, optimum.logprobs):
        own = mdp.policy_logprobs(policy, listed)
        weights = (own + user).exp()
        assert weights.sum().item() == pytest.approx(1, abs=1e-12)
        reference = mdp.policy_logprobs(mdp.reference_logprobs, listed)
        objective = (weights * (mdp.returns(listed) - mdp.coefficient * (own - reference))).sum()
        torch.testing.assert_close(mdp.objective(policy), objective, **CLOSE)
        divergence = (weights * (own - mdp.policy_logprobs(optimum.logprobs, listed))).sum()
        torch.testing.assert_close(optimum.values[0] - objective, mdp.coefficient * divergence, **CLOSE)


def test_no_policy_does_better_with_and_without_discount():
    mdp = DialogueMDP(seed=4)
    for gamma in (1.0, 0.7):
        optimum = mdp.optimal_solution(discount=gamma)
        logits = optimum.logprobs.clone().requires_grad_()
        reached = mdp.objective(logits.log_softmax(-1), discount=gamma)
        torch.testing.assert_close(reached, optimum.values[0], **CLOSE)
        assert torch.autograd.grad(reached, logits)[0].abs().max() < 1e-12
        assert reached > mdp.objective(random_policy(mdp), discount=gamma) + 0.01


def test_a_discount_counts_each_turn_less_than_the_one_before():
    mdp, gamma = DialogueMDP(seed=4), 0.7
    listed, policy = mdp.dialogues(), random_policy(mdp)
    weights = (mdp.policy_logprobs(policy, listed) + mdp.user_logprobs(listed)).exp()
    paid = (mdp.rewards - mdp.coefficient * (policy - mdp.reference_logprobs))[listed.states, listed.words]
    discounted = (paid * torch.tensor(gamma, dtype=torch.float64) ** torch.arange(mdp.num_turns)).sum(1)
    torch.testing.assert_close(mdp.objective(policy, discount=gamma), (weights * discounted).sum(), **CLOSE)


def test_tilting_whole_dialogues_tilts_the_user_and_promises_too_much():
    mdp = DialogueMDP()
    listed, optimum, beta = mdp.dialogues(), mdp.optimal_solution(), mdp.coefficient
    before = mdp.policy_logprobs(mdp.reference_logprobs, listed) + mdp.user_logprobs(listed)
    promised = beta * torch.logsumexp(before + mdp.returns(listed) / beta, 0)
    assert promised > optimum.values[0] + 1e-3
    # Its policy, read off as a conditional, is worse than π* where users are as they are.
    tilted = (before + mdp.returns(listed) / beta).softmax(0)
    mass = torch.zeros(mdp.num_states, mdp.num_words, dtype=torch.float64)
    for turn in range(mdp.num_turns):
        mass.index_put_((listed.states[:, turn], listed.words[:, turn]), tilted, accumulate=True)
    policy = mass.log() - mass.sum(-1, keepdim=True).log()
    assert mdp.objective(policy) < optimum.values[0] - 1e-4
    # With a user who never varies both are the same.
    fixed = DialogueMDP(num_replies=1)
    listed, optimum = fixed.dialogues(), fixed.optimal_solution()
    whole = (fixed.policy_logprobs(fixed.reference_logprobs, listed) + fixed.returns(listed) / beta).log_softmax(0)
    torch.testing.assert_close(fixed.policy_logprobs(optimum.logprobs, listed), whole, **CLOSE)


def test_errors_vanish_on_average_over_the_user_and_only_on_average():
    mdp = DialogueMDP()
    optimum, policy = mdp.optimal_solution(), mdp.policy()
    with torch.no_grad():
        policy.logits.copy_(optimum.logprobs)
        policy.critic.copy_(optimum.values)
    found = mdp.sample(mdp.policy(), 100_000, generator=torch.Generator().manual_seed(0))
    assert found.mask.tolist()[0] == [True, False, True, False, True]
    evaluated = policy.evaluate(found)
    values = evaluated.values.detach()
    rewards = found.rewards - mdp.coefficient * kl_k1(evaluated.logprobs.detach(), found.reference_logprobs)
    errors, _ = gae(
        rewards, values, shift_to_next(values, found.mask), found.continues, found.truncated, found.mask,
        discount=1.0, gae_lambda=0.0,
    )  # fmt: skip
    assert errors[:, 0].abs().max() > 0.05
    assert errors[:, 4].abs().max() < 1e-12  # nobody answers the last word
    for word in range(mdp.num_words):
        chosen = errors[:, 0][found.actions[:, 0] == word]
        assert abs(chosen.mean().item()) < 5 * chosen.std().item() / math.sqrt(len(chosen))
        exact = sum(
            mdp.reply_probabilities[0, word, reply] * optimum.values[mdp.next_state[0, word, reply]]
            for reply in range(mdp.num_replies)
        )
        error = mdp.rewards[0, word] - mdp.coefficient * (optimum.logprobs - mdp.reference_logprobs)[0, word]
        torch.testing.assert_close(error + exact, optimum.values[0], **CLOSE)


def test_sampling_follows_policy_and_user():
    mdp = DialogueMDP(num_turns=2)
    policy = mdp.policy()
    found = mdp.sample(policy, 50_000, generator=torch.Generator().manual_seed(3))
    listed = mdp.dialogues()
    expected = (mdp.policy_logprobs(mdp.reference_logprobs, listed) + mdp.user_logprobs(listed)).exp()
    codes = (found.actions * torch.tensor([100, 10, 1])).sum(1)
    wanted = listed.words[:, 0] * 100 + listed.replies[:, 0] * 10 + listed.words[:, 1]
    counts = torch.stack([(codes == code).sum() for code in wanted])
    assert counts.sum() == 50_000
    statistic = ((counts - 50_000 * expected).square() / (50_000 * expected)).sum()
    assert statistic < 17 + 5 * math.sqrt(2 * 17)
    evaluated = policy.evaluate(found)
    torch.testing.assert_close(found.behaviour_logprobs[found.mask], evaluated.logprobs[found.mask].detach(), **CLOSE)
    torch.testing.assert_close(found.reference_logprobs, found.behaviour_logprobs, **CLOSE)


def test_a_word_is_followed_by_the_value_of_the_next_one():
    mdp = DialogueMDP()
    policy = mdp.policy()
    with torch.no_grad():
        policy.critic.copy_(torch.randn(policy.critic.shape, generator=torch.Generator().manual_seed(0)))
    found = mdp.sample(policy, 6, generator=torch.Generator().manual_seed(0))
    words = found.mask[0].nonzero().flatten().tolist()
    assert words == [0, 2, 4]
    for word, following in itertools.pairwise(words):
        assert torch.equal(found.next_values[:, word], found.values[:, following])
    assert not found.next_values[:, -1].any()
    assert found.values[:, words].all()
    assert found.continues[:, -1].sum() == 0
    assert found.continues[:, :-1].all()
