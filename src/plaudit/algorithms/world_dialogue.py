"""A world model of text: the hidden mood of a user, learned from dialogues, and a speaker that plans in dreams of it.

Encoder and memory in one are the belief about the mood (`plaudit.models.user.LatentUser`), which is what a recurrent
state stands for in a world model; the controller is linear in it and chooses the style of each turn:

    π(a|s) ∝ π_ref(a|s) exp(w_a · [b(s), turn, 1]),   w by CMA-ES on J in the learned world

On this problem all dialogues can be listed, so a dream is exact: J of a speaker in the learned world is computed, not
sampled. Source: Ha and Schmidhuber, "World models" (arXiv:1803.10122), with a discrete latent state.
"""

import itertools

import torch
from torch import Tensor

from plaudit.algorithms.deep_dyna import fit_user, user_loss
from plaudit.algorithms.evolution import evolve
from plaudit.models.user import LatentUser
from plaudit.rollout.dialogue import DialogueMDP
from plaudit.rollout.imagined_dialogue import imagined_dialogue, turns_of, user_tables
from plaudit.rollout.trajectory import Trajectory


def fit_latent_user(
    dialogues: Trajectory,
    *,
    num_words: int,
    num_replies: int,
    num_moods: int,
    restarts: int = 4,
    steps: int = 400,
    learning_rate: float = 0.05,
    seed: int = 0,
) -> LatentUser:
    """The likeliest of several users, each learned from the same dialogues from another start.

    The likelihood of a hidden mood has more than one hill, so one start is not enough.

    Args:
        dialogues: `[B, 2T - 1]`, as `DialogueMDP.sample` returns them.
        num_words, num_replies, num_moods: of the user.
        restarts: how many starts.
        steps: optimizer steps from each.
        learning_rate: of Adam.
        seed: of starts and draws.
    """
    words, replies, rewards = turns_of(dialogues)
    found: list[tuple[float, LatentUser]] = []
    for start in range(restarts):
        user = LatentUser(num_words, num_replies, num_moods, seed=seed + 1009 * start)
        optimizer = torch.optim.Adam(user.parameters(), lr=learning_rate)
        generator = torch.Generator().manual_seed(seed)
        fit_user(
            user, words, replies, rewards, optimizer=optimizer, steps=steps, rows_per_step=256, generator=generator
        )
        with torch.no_grad():
            found.append((float(user_loss(user, words, replies, rewards)), user))
    return min(found, key=lambda each: each[0])[1]


def matched_moves(user: LatentUser, moves: Tensor) -> Tensor:
    """The learned transition matrix with its moods renamed so that it is nearest to `moves`, both `[M, A, M]`.

    A hidden mood has no name: only matrices up to a permutation can be compared.

    Raises:
        ValueError: for shapes that differ.
    """
    learned = user.moves.detach().to(moves.dtype)
    if learned.shape != moves.shape:
        raise ValueError(f"moves of shape {tuple(learned.shape)} were learned, those given are {tuple(moves.shape)}")
    orders = [list(order) for order in itertools.permutations(range(user.num_moods))]
    renamed = [learned[order][:, :, order] for order in orders]
    return min(renamed, key=lambda each: float((each - moves).abs().sum()))


@torch.no_grad()
def speaker_features(user: LatentUser, mdp: DialogueMDP) -> Tensor:
    """What the controller sees in every state: belief about the mood and number of the turn, `[S, M + T]`."""
    rows = []
    for state in mdp.states:
        said = torch.tensor(state, dtype=torch.int64)
        # The word that comes next plays no part in the belief before it.
        words = torch.cat([said[0::2], torch.zeros(1, dtype=torch.int64)]).unsqueeze(0)
        belief = user.beliefs(words, said[1::2].unsqueeze(0))[-1].squeeze(0).double()
        turn = torch.nn.functional.one_hot(torch.tensor(len(state) // 2), mdp.num_turns).double()
        rows.append(torch.cat([belief, turn]))
    return torch.stack(rows)


def speaker_logprobs(weights: Tensor, features: Tensor, reference_logprobs: Tensor) -> Tensor:
    """`log π(a|s)`, `[S, A]`, of weights `[A, F]`, features `[S, F]` and the reference's `[S, A]`."""
    return torch.log_softmax(reference_logprobs + features @ weights.T, -1)


def evolve_speaker(
    user: LatentUser, mdp: DialogueMDP, *, generations: int = 60, population: int = 16, seed: int = 0
) -> tuple[Tensor, float]:
    """The linear speaker that does best in the learned world; no real dialogue is used.

    Args:
        user: the learned user.
        mdp: of which only the states and the reference are looked at.
        generations, population, seed: of CMA-ES.

    Returns:
        `log π`, `[S, A]`, and its J in the learned world.
    """
    world, features = imagined_dialogue(mdp, *user_tables(user, mdp)), speaker_features(user, mdp)

    def judge(weights: Tensor) -> Tensor:
        return torch.stack(
            [world.objective(speaker_logprobs(each, features, mdp.reference_logprobs)) for each in weights]
        )

    begin = torch.zeros(mdp.num_words, features.shape[1], dtype=torch.float64)
    found = evolve(begin, judge, spread=0.5, population=population, generations=generations, seed=seed)
    best = speaker_logprobs(found, features, mdp.reference_logprobs)
    return best, float(world.objective(best))
