"""Learned users: against the exact ones of the dialogue problem."""

import pytest
import torch

from plaudit.algorithms import deep_dyna
from plaudit.algorithms.build import build_algorithm
from plaudit.algorithms.deep_dyna import DialogueDyna, fit_user, user_loss
from plaudit.configs.algorithm import AlgorithmConfig
from plaudit.core.finite import NonFiniteError
from plaudit.models.user import LatentUser, RecurrentUser
from plaudit.rollout.dialogue import DialogueMDP
from plaudit.rollout.imagined_dialogue import imagined_dialogue, turns_of, user_tables


def the_true_user(mdp):
    """A `LatentUser` whose tables are those of the problem."""
    user = LatentUser(mdp.num_words, mdp.num_replies, mdp.num_moods).double()
    with torch.no_grad():
        user.first_logits.copy_(mdp.first_mood.log())
        user.move_logits.copy_(mdp.mood_moves.log())
        user.reply_logits.copy_(mdp.mood_replies.log())
        user.mood_rewards.copy_(mdp.mood_rewards)
    return user


@pytest.mark.parametrize("sizes", [{}, {"num_words": 2, "num_replies": 3, "num_moods": 3, "num_turns": 4}])
def test_the_true_user_has_the_true_tables(sizes):
    mdp = DialogueMDP(seed=1, **sizes)
    rewards, replies = user_tables(the_true_user(mdp), mdp)
    torch.testing.assert_close(rewards, mdp.rewards, atol=1e-12, rtol=0)
    torch.testing.assert_close(replies, mdp.reply_probabilities, atol=1e-12, rtol=0)
    again = imagined_dialogue(mdp, rewards, replies)
    torch.testing.assert_close(again.optimal_solution().values, mdp.optimal_solution().values)
    assert not hasattr(again, "mood_moves")


def test_the_true_user_s_beliefs_are_bayes_rule():
    mdp = DialogueMDP(seed=2)
    dialogues = mdp.dialogues()
    beliefs = the_true_user(mdp).beliefs(dialogues.words, dialogues.replies[:, :-1])
    for turn in range(mdp.num_turns):
        torch.testing.assert_close(beliefs[turn], mdp.beliefs[dialogues.states[:, turn]])


@pytest.mark.parametrize("make", [RecurrentUser, lambda a, u: LatentUser(a, u, 3)])
def test_what_is_expected_does_not_look_ahead(make):
    user = make(3, 2)
    words, replies = torch.tensor([[0, 1, 2]]), torch.tensor([[1, 0]])
    whole = user(words, replies)
    for turn in range(3):
        part = user(words[:, : turn + 1], replies[:, :turn])
        torch.testing.assert_close(part.rewards[:, turn], whole.rewards[:, turn])
        torch.testing.assert_close(part.reply_logprobs[:, turn], whole.reply_logprobs[:, turn])
    torch.testing.assert_close(whole.reply_logprobs.exp().sum(-1), torch.ones(1, 3))
    other = user(words, torch.tensor([[0, 0]]))
    torch.testing.assert_close(other.rewards[:, 0], whole.rewards[:, 0])
    assert not torch.allclose(other.rewards[:, 1], whole.rewards[:, 1])


def test_the_loss_by_hand():
    user = LatentUser(2, 2, 1)
    with torch.no_grad():
        user.reply_logits.zero_()
        user.mood_rewards.copy_(torch.tensor([[1.0, 3.0]]))
    loss = user_loss(user, torch.tensor([[0, 1]]), torch.tensor([[1]]), torch.tensor([[0.0, 1.0]]))
    assert loss.item() == pytest.approx(0.5 * (1 + 4) / 2 + 0.6931471805599453)


def test_a_learned_user_comes_close_and_planning_in_it_is_nearly_the_optimum():
    mdp = DialogueMDP(seed=0)
    real = mdp.sample(mdp.policy(), 400, generator=torch.Generator().manual_seed(0))
    user = RecurrentUser(3, 2, seed=0)
    optimizer = torch.optim.Adam(user.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    fit_user(user, *turns_of(real), optimizer=optimizer, steps=250, generator=generator)
    world = imagined_dialogue(mdp, *user_tables(user, mdp))
    best, start = mdp.optimal_solution().values[0], mdp.objective(mdp.reference_logprobs)
    reached = (mdp.objective(world.optimal_solution().logprobs) - start) / (best - start)
    assert reached > 0.9
    likely = (mdp.reply_probabilities - world.reply_probabilities).abs().sum(-1) / 2
    assert likely[:19].mean() < 0.12  # the states before the last turn


def learned(imagined, *, shuffled=False, batches=8, seed=0):
    mdp = DialogueMDP(seed=seed)
    policy = mdp.policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.05)
    algorithm = build_algorithm(AlgorithmConfig(name="rloo", kl_coefficient=mdp.coefficient), policy, optimizer)
    user = RecurrentUser(3, 2, seed=seed)
    dyna = DialogueDyna(mdp, policy, algorithm, user, imagined=imagined, fit_steps=30, seed=seed, shuffled=shuffled)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(batches):
        real = mdp.sample(policy, 8, generator=generator).with_fields(group_ids=torch.zeros(8, dtype=torch.int64))
        dyna.update(real)
    best, start = mdp.optimal_solution().values[0], mdp.objective(mdp.reference_logprobs)
    return dyna, float((mdp.objective(policy.logprobs().detach()) - start) / (best - start))


def test_imagined_dialogues_save_real_ones_unless_they_are_wrong():
    """Sixty-four real dialogues: most of the way with imagined ones, little without, and less with a wrong user."""
    dyna, with_imagination = learned(20)
    assert dyna.num_real == 64
    _, without = learned(0)
    _, wrong = learned(20, shuffled=True)
    assert with_imagination > 0.85 > 0.6 > without
    assert wrong < with_imagination - 0.1


def test_the_user_is_learned_from_every_real_dialogue_so_far(monkeypatch):
    seen = []

    def noted(user, words, replies, rewards, **options):
        seen.append((len(words), len(replies), len(rewards)))
        return 0.0

    monkeypatch.setattr(deep_dyna, "fit_user", noted)
    learned(1, batches=3)
    assert seen == [(8, 8, 8), (16, 16, 16), (24, 24, 24)]


def test_what_is_refused():
    user, said = LatentUser(2, 2, 1), torch.zeros(1, 2, dtype=torch.int64)
    before = user.mood_rewards.detach().clone()
    with pytest.raises(NonFiniteError, match="learning a user: the loss is nan"):
        fit_user(
            user,
            said,
            said[:, :1],
            torch.full((1, 2), torch.nan),
            optimizer=torch.optim.Adam(user.parameters()),
            steps=1,
        )
    assert torch.equal(user.mood_rewards, before)
    with pytest.raises(ValueError, match="must not be negative"):
        learned(-1)
    with pytest.raises(ValueError, match="at least 1"):
        LatentUser(2, 0, 1)
    mdp = DialogueMDP()
    with pytest.raises(ValueError, match="rewards"):
        imagined_dialogue(mdp, mdp.rewards[1:], mdp.reply_probabilities)
