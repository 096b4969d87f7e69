"""Tables over the vocabulary, in the order of the trajectory: the policy's, the reference's and the average's."""

import pytest
import torch
from torch.testing import assert_close

from plaudit.models.policy import Critic, LanguagePolicy, ReferencePolicy
from plaudit.rollout.text_action_values import TextActionValues
from plaudit.rollout.text_policy import TextPolicy
from plaudit.rollout.trajectory import new_trajectory
from tests.rollout.language_models import random_prompts, tiny_lm


@pytest.fixture(params=[True, False], ids=["shared", "separate"])
def tables(request):
    model = tiny_lm()
    reference = ReferencePolicy(model)
    policy = LanguagePolicy.build(model).eval()
    policy.action_values = Critic.of_actions(model, shared=request.param)
    found = TextActionValues(TextPolicy(policy, temperature=0.7), reference, averaged=True)
    found.text_policy.prompts = random_prompts((5, 1, 9))
    return found


@pytest.fixture
def answers():
    """Answers of several lengths, in an order that is not that of their prompts."""
    actions = torch.randint(3, 64, (5, 4), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(4) < torch.tensor([2, 4, 1, 3, 4])[:, None]
    zeros = torch.zeros(5, 4)
    return new_trajectory(actions=actions, behaviour_logprobs=zeros, rewards=zeros, continues=zeros, mask=mask,
                          group_ids=torch.tensor([2, 0, 1, 0, 2]))  # fmt: skip


def test_tables_hold_what_the_policy_says_of_its_tokens(tables, answers):
    head = tables.critic.head
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(2))
    found = tables.tables(answers)
    assert found.logprobs.shape == found.action_values.shape == (14, 64)
    assert_close(found.logprobs.exp().sum(-1), torch.ones(14))
    chosen = answers.actions[answers.mask].unsqueeze(1)
    own = tables.text_policy.evaluate(answers).logprobs[answers.mask]
    assert_close(found.logprobs.gather(1, chosen)[:, 0], own)
    with torch.no_grad():
        for parameter in tables.language_model.parameters():
            parameter.mul_(1.1)
    moved = tables.tables(answers)
    theirs = tables.text_policy.reference_logprobs(tables.reference, answers)[answers.mask]
    assert_close(moved.reference_logprobs.gather(1, chosen)[:, 0], theirs)
    assert_close(moved.average_logprobs, found.logprobs)
    assert (moved.logprobs - found.logprobs).abs().max() > 0.1
    # A row by itself: its states' values, whatever else is in the pack.
    alone = tables.tables(answers.select(torch.tensor([3])))
    assert_close(alone.action_values, moved.action_values[7:10])
    moved.action_values.sum().backward()
    assert head.weight.grad is not None


def test_the_average_follows_and_is_saved(tables, answers):
    with torch.no_grad():
        for parameter in tables.language_model.parameters():
            parameter.mul_(2.0)
    name, before = next(iter(tables.average_state().items()))
    before = before.clone()
    tables.move_average(0.75)
    assert_close(tables.average_state()[name], 0.75 * before + 0.25 * 2 * before)
    state = {key: value.clone() for key, value in tables.average_state().items()}
    tables.move_average(0.0)
    assert_close(tables.average_state()[name], 2 * before)
    tables.load_average_state(state)
    assert_close(tables.average_state()[name], state[name])
    assert not any(parameter.requires_grad for parameter in tables.average.parameters())


def test_what_has_no_table_is_refused(tables, answers):
    tables.text_policy.prompts[1] = []
    with pytest.raises(ValueError, match="first token after an empty prompt"):
        tables.tables(answers)
    plain = TextPolicy(LanguagePolicy.build(tables.language_model))
    with pytest.raises(ValueError, match="the policy has no action values"):
        TextActionValues(plain, tables.reference, averaged=False)
