"""The latent model of the dialogue user, against the exact one."""

import copy
import itertools

import pytest
import torch

from plaudit.algorithms.deep_dyna import user_loss
from plaudit.algorithms.world_dialogue import (
    evolve_speaker,
    fit_latent_user,
    matched_moves,
    speaker_features,
    speaker_logprobs,
)
from plaudit.models.user import LatentUser
from plaudit.rollout.dialogue import DialogueMDP
from plaudit.rollout.imagined_dialogue import imagined_dialogue, turns_of, user_tables
from tests.algorithms.test_deep_dyna import the_true_user


def test_moods_are_matched_whatever_they_are_called():
    mdp = DialogueMDP(num_moods=3, seed=0)
    for order in itertools.permutations(range(3)):
        user = the_true_user(mdp)
        with torch.no_grad():
            user.move_logits.copy_(mdp.mood_moves.log()[list(order)][:, :, list(order)])
        torch.testing.assert_close(matched_moves(user, mdp.mood_moves), mdp.mood_moves)
    with pytest.raises(ValueError, match="were learned"):
        matched_moves(LatentUser(3, 2, 2), mdp.mood_moves)


def test_the_speaker_sees_belief_and_turn_and_begins_as_the_reference():
    mdp = DialogueMDP(seed=3)
    features = speaker_features(the_true_user(mdp), mdp)
    torch.testing.assert_close(features[:, :2], mdp.beliefs)
    assert features[0, 2:].tolist() == [1, 0, 0]
    assert features[-1, 2:].tolist() == [0, 0, 1]
    still = speaker_logprobs(torch.zeros(3, 5, dtype=torch.float64), features, mdp.reference_logprobs)
    torch.testing.assert_close(still, mdp.reference_logprobs)


def test_the_last_turn_s_optimum_is_linear_in_the_belief():
    """`Q*` of the last turn is `b · R`, so `w_a = R_a / β` is exactly the optimum there."""
    mdp = DialogueMDP(num_turns=1, seed=4)
    features = speaker_features(the_true_user(mdp), mdp)
    weights = torch.cat([mdp.mood_rewards.T / mdp.coefficient, torch.zeros(3, 1, dtype=torch.float64)], 1)
    found = speaker_logprobs(weights, features, mdp.reference_logprobs)
    torch.testing.assert_close(found, mdp.optimal_solution().logprobs)


def test_a_speaker_is_judged_by_the_learned_user_alone():
    pytest.importorskip("cma")
    mdp, user = DialogueMDP(seed=0), LatentUser(3, 2, 2, seed=1)
    unknown = copy.copy(mdp)
    unknown.rewards, unknown.reply_probabilities = mdp.rewards * torch.nan, mdp.reply_probabilities * torch.nan
    found, reached = evolve_speaker(user, unknown, generations=2, population=4)
    assert reached == float(imagined_dialogue(mdp, *user_tables(user, mdp)).objective(found))
    torch.testing.assert_close(evolve_speaker(user, mdp, generations=2, population=4)[0], found)


def test_of_several_starts_the_likeliest_is_kept():
    mdp = DialogueMDP(seed=0)
    real = mdp.sample(mdp.policy(), 50, generator=torch.Generator().manual_seed(0))
    sizes = {"num_words": 3, "num_replies": 2, "num_moods": 2}
    starts = [LatentUser(*sizes.values(), seed=1009 * number) for number in range(4)]
    losses = [float(user_loss(each, *turns_of(real)).detach()) for each in starts]
    found = fit_latent_user(real, **sizes, restarts=4, steps=0)
    assert float(user_loss(found, *turns_of(real)).detach()) == min(losses) < max(losses)


def test_a_user_learned_from_dialogues_is_the_true_one_and_the_dreamed_speaker_nearly_the_optimum():
    pytest.importorskip("cma")
    mdp = DialogueMDP(seed=0)
    real = mdp.sample(mdp.policy(), 600, generator=torch.Generator().manual_seed(0))
    user = fit_latent_user(real, num_words=3, num_replies=2, num_moods=2, restarts=2, steps=250)
    away = (matched_moves(user, mdp.mood_moves) - mdp.mood_moves).abs().sum(-1) / 2
    assert away.mean() < 0.12
    speaker, _ = evolve_speaker(user, mdp, generations=25, population=12)
    best, start = mdp.optimal_solution().values[0], mdp.objective(mdp.reference_logprobs)
    assert (mdp.objective(speaker) - start) / (best - start) > 0.95
