"""A dialogue with a user who was learned from dialogues: the same words and states, imagined replies and rewards."""

import copy

import torch
from torch import Tensor

from plaudit.core.reduction import expect_shape
from plaudit.models.user import User
from plaudit.rollout.dialogue import DialogueMDP
from plaudit.rollout.trajectory import Trajectory


def imagined_dialogue(mdp: DialogueMDP, rewards: Tensor, reply_probabilities: Tensor) -> DialogueMDP:
    """The same problem with another user; everything else about it (sampling, exact optimum) works as before.

    Args:
        mdp: of which states, words and the reference are taken: what the policy's side knows anyway.
        rewards: `[S, A]`, expected reward of each word.
        reply_probabilities: `[S, A, U]`.

    Raises:
        ValueError: for shapes that do not fit.
    """
    expect_shape("rewards", rewards, tuple(mdp.rewards.shape))
    expect_shape("reply_probabilities", reply_probabilities, tuple(mdp.reply_probabilities.shape))
    found = copy.copy(mdp)
    found.rewards, found.reply_probabilities = rewards.double(), reply_probabilities.double()
    # The moods of the true user are not known in here.
    for name in ("beliefs", "mood_rewards", "mood_moves", "mood_replies", "first_mood"):
        delattr(found, name)
    return found


@torch.no_grad()
def user_tables(user: User, mdp: DialogueMDP) -> tuple[Tensor, Tensor]:
    """What a learned user says to every word in every state: rewards `[S, A]`, chances of replies `[S, A, U]`."""
    rewards = torch.zeros(mdp.num_states, mdp.num_words, dtype=torch.float64)
    replies = torch.zeros(mdp.num_states, mdp.num_words, mdp.num_replies, dtype=torch.float64)
    lengths = torch.tensor([len(state) // 2 for state in mdp.states])
    for length in range(mdp.num_turns):
        places = (lengths == length).nonzero().flatten()
        said = torch.tensor([mdp.states[place] for place in places.tolist()], dtype=torch.int64)
        said = said.reshape(len(places), 2 * length).repeat_interleave(mdp.num_words, 0)
        words = torch.arange(mdp.num_words).repeat(len(places)).unsqueeze(1)
        found = user(torch.cat([said[:, 0::2], words], 1), said[:, 1::2])
        rewards[places] = found.rewards[:, -1].reshape(len(places), -1).double()
        last = found.reply_logprobs[:, -1].exp().reshape(len(places), mdp.num_words, -1)
        replies[places] = last.double()
    return rewards, replies


def turns_of(trajectory: Trajectory) -> tuple[Tensor, Tensor, Tensor]:
    """Words `[B, T]`, replies `[B, T - 1]` and rewards `[B, T]` of dialogues sampled by `DialogueMDP.sample`."""
    return trajectory.actions[:, 0::2], trajectory.actions[:, 1::2], trajectory.rewards[:, 0::2]
