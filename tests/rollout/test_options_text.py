"""Styles summed out of a text: brute force over every sequence of styles, and an optimum that does not move."""

import itertools

import pytest
import torch

from plaudit.rollout.options_text import marginal_table, style_policy
from plaudit.rollout.token_mdp import TokenMDP
from studies.hierarchy import learn_styles


def shaken(mdp, seed=0, **options):
    policy = style_policy(mdp, spread=1.0, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for table in (policy.endings, policy.choices):
            table.copy_(torch.randn(table.shape, generator=generator, dtype=table.dtype))
    return policy


@pytest.mark.parametrize("sentence_ends", [(1,), (1, 2, 3), ()])
def test_strings_have_the_probability_of_all_their_style_sequences(sentence_ends):
    mdp = TokenMDP(vocabulary=4, max_length=3, reward="consistent_style")
    policy = shaken(mdp, num_options=2, sentence_ends=sentence_ends)
    table = marginal_table(mdp, policy)
    actions, choices = policy.logits.softmax(-1), policy.choices.softmax(-1)
    ends = policy.endings.sigmoid()
    for index, string in enumerate(mdp.strings):
        prefixes = [mdp.prefixes.index(string[:step]) for step in range(len(string))]
        total = 0.0
        for styles in itertools.product(range(2), repeat=len(string)):
            chance = choices[0, styles[0]]
            for step, (prefix, token) in enumerate(zip(prefixes, string, strict=True)):
                if step:
                    may = string[step - 1] in sentence_ends
                    stop = ends[prefix, styles[step - 1]] if may else torch.zeros(())
                    stays = (1 - stop) * (styles[step] == styles[step - 1])
                    chance = chance * (stays + stop * choices[prefix, styles[step]])
                chance = chance * actions[prefix, styles[step], token]
            total = total + chance
        assert mdp.string_logprobs(table)[0, index].exp().item() == pytest.approx(total.item(), abs=1e-12)
    assert mdp.string_logprobs(table).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_what_is_drawn_has_the_marginal_s_log_probabilities():
    mdp = TokenMDP(vocabulary=4, max_length=3, num_prompts=2, reward="consistent_style")
    policy = shaken(mdp, num_options=3, sentence_ends=(1, 2))
    drawn = mdp.sample(policy, torch.arange(20_000) % 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        again = policy.evaluate(drawn)
    assert torch.allclose(again.logprobs, drawn.behaviour_logprobs, atol=1e-12)
    table = marginal_table(mdp, policy)
    first = torch.bincount(drawn.actions[drawn.group_ids == 1, 0], minlength=4) / 10_000
    assert (first - table[1, 0].exp()).abs().max() < 0.02
    reward = drawn.rewards.sum(1).mean().item()
    assert reward == pytest.approx(mdp.expected_reward(table).mean().item(), abs=0.02)


@pytest.mark.parametrize("name", [pytest.param("rloo", marks=pytest.mark.slow), "ppo"])
def test_the_optimum_stays_the_tilted_reference(name):
    mdp = TokenMDP(vocabulary=4, max_length=3, reward="consistent_style", coefficient=0.2, seed=1)
    policy = learn_styles(mdp, name, updates=120 if name == "rloo" else 60, rows=256, num_options=2, seed=0)
    assert mdp.gap(marginal_table(mdp, policy)) < 0.01
