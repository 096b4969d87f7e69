"""`DialogueMDP`: a short dialogue with a user who answers at random, small enough for the exact optimum.

The policy says one word per turn, the user replies with one of a few signs. The user has a hidden mood that moves like
a Markov chain, pushed by what the policy said; the reply depends on it. The policy sees the dialogue so far, from
which the belief about the mood follows by Bayes' rule: so a dialogue is the state of an exact Markov decision problem.

The optimum of `E[Σ r - β KL]` is `π*(a|s) ∝ π_ref(a|s) exp(Q*(s, a) / β)` with `Q* = r + E[V*]`. Tilting whole
dialogues by `exp(Σ r / β)` would tilt the user as well, whom nobody can train, and promises more than there is.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from plaudit.core.reduction import expect_shape
from plaudit.rollout.tabular import TabularPolicy
from plaudit.rollout.token_mdp import Solution
from plaudit.rollout.trajectory import StepPolicy, Trajectory, new_trajectory


class Dialogues(NamedTuple):
    """Every complete dialogue: `states`, `words`, `replies`, all `[Y, T]` int64 (the last reply is never given: 0)."""

    states: Tensor
    words: Tensor
    replies: Tensor


class DialogueMDP:
    """A dialogue of `T` turns with `A` words, `U` replies and `M` hidden moods.

    A state is the dialogue so far, `(a_0, u_0, …, a_{t-1}, u_{t-1})`; states are numbered by length.

    Attributes:
        num_words, num_replies, num_moods, num_turns: `A`, `U`, `M`, `T`.
        coefficient: `β`.
        states: the `S` dialogues at which the policy speaks, shortest first.
        reference_logprobs: `[S, A]` float64.
        rewards: `[S, A]` float64, the expected reward of a word under the belief about the mood.
        reply_probabilities: `[S, A, U]`, the chance of each reply given dialogue and word.
        next_state: `[S, A, U]` int64; -1 after the last turn.
        beliefs: `[S, M]`, the distribution of the mood given the dialogue.
    """

    def __init__(
        self,
        *,
        num_words: int = 3,
        num_replies: int = 2,
        num_moods: int = 2,
        num_turns: int = 3,
        coefficient: float = 0.5,
        seed: int = 0,
    ) -> None:
        """Draw a user and a reference at random; a seed fixes both.

        Args:
            num_words: `A`, at least 2.
            num_replies: `U`, at least 1.
            num_moods: `M`, at least 1.
            num_turns: `T`, at least 1.
            coefficient: `β`, positive.
            seed: fixes reference, rewards, mood moves and replies.

        Raises:
            ValueError: for sizes out of range or a coefficient that is not positive.
        """
        if min(num_words - 1, num_replies, num_moods, num_turns) < 1 or coefficient <= 0:
            raise ValueError(
                "a dialogue needs two words, one reply, one mood, one turn and a positive coefficient; got "
                f"{num_words}, {num_replies}, {num_moods}, {num_turns}, {coefficient}"
            )
        self.num_words, self.num_replies, self.num_moods, self.num_turns = num_words, num_replies, num_moods, num_turns
        self.coefficient = coefficient
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.mood_rewards = normal(num_moods, num_words)
        self.mood_moves = (1.5 * normal(num_moods, num_words, num_moods)).softmax(-1)
        self.mood_replies = (1.5 * normal(num_moods, num_replies)).softmax(-1)
        self.first_mood = normal(num_moods).softmax(-1)
        self._build_states()
        self.reference_logprobs = (0.7 * normal(self.num_states, num_words)).log_softmax(-1)

    @property
    def num_states(self) -> int:
        """`S`."""
        return len(self.states)

    def optimal_solution(self, *, coefficient: float | None = None, discount: float = 1.0) -> Solution:
        """Soft value iteration: `V = β log Σ_a π_ref exp(Q / β)`, `Q(s, a) = r + γ Σ_u P(u|s, a) V(s a u)`.

        Returns:
            `V*` `[S]`, `Q*` and `log π*` `[S, A]`.
        """
        beta = self.coefficient if coefficient is None else coefficient
        values = torch.zeros(self.num_states, dtype=torch.float64)
        for level in reversed(self._levels):
            found = self._action_values(values, discount)[level]
            values[level] = beta * torch.logsumexp(self.reference_logprobs[level] + found / beta, -1)
        action_values = self._action_values(values, discount)
        return Solution(values, action_values, self.reference_logprobs + (action_values - values.unsqueeze(-1)) / beta)

    def evaluate(self, logprobs: Tensor, *, coefficient: float | None = None, discount: float = 1.0) -> Solution:
        """`V^π [S]` and `Q^π [S, A]` (without the penalty of the word itself) of a policy `[S, A]`, differentiable."""
        expect_shape("logprobs", logprobs, tuple(self.reference_logprobs.shape))
        beta = self.coefficient if coefficient is None else coefficient
        penalty = beta * (logprobs - self.reference_logprobs).masked_fill(logprobs == float("-inf"), 0.0)
        values = torch.zeros(self.num_states, dtype=torch.float64)
        for level in reversed(self._levels):
            found = (logprobs[level].exp() * (self._action_values(values, discount)[level] - penalty[level])).sum(-1)
            values = torch.cat([values[: level.start], found, values[level.stop :]])
        return Solution(values, self._action_values(values, discount), logprobs)

    def objective(self, logprobs: Tensor, *, coefficient: float | None = None, discount: float = 1.0) -> Tensor:
        """`J(π) = V^π(start)`, a differentiable scalar, of a policy `[S, A]`."""
        return self.evaluate(logprobs, coefficient=coefficient, discount=discount).values[0]

    def dialogues(self) -> Dialogues:
        """Every complete dialogue that is possible, in which the policy speaks `T` times and the user `T - 1` times."""
        words, replies = range(self.num_words), range(self.num_replies)
        choices = [words, *([replies, words] * (self.num_turns - 1))]
        place = {state: index for index, state in enumerate(self.states)}
        rows = list(itertools.product(*choices))
        states = torch.tensor([[place[row[: 2 * t]] for t in range(self.num_turns)] for row in rows])
        flat = torch.tensor(rows)
        last = torch.zeros(len(rows), 1, dtype=torch.int64)
        return Dialogues(states, flat[:, 0::2], torch.cat([flat[:, 1::2], last], 1))

    def user_logprobs(self, dialogues: Dialogues) -> Tensor:
        """`Σ_t log P(u_t | s_t, a_t)`, the user's part of the probability of each dialogue, `[Y]`."""
        chances = self.reply_probabilities[dialogues.states, dialogues.words, dialogues.replies].log()
        return chances[:, :-1].sum(-1)

    def policy_logprobs(self, logprobs: Tensor, dialogues: Dialogues) -> Tensor:
        """`Σ_t log π(a_t | s_t)`, the policy's part, `[Y]`, of a policy `[S, A]`."""
        return logprobs[dialogues.states, dialogues.words].sum(-1)

    def returns(self, dialogues: Dialogues) -> Tensor:
        """`Σ_t r(s_t, a_t)` of each dialogue, `[Y]`."""
        return self.rewards[dialogues.states, dialogues.words].sum(-1)

    def policy(self) -> TabularPolicy:
        """A tabular policy `[S, A]` in float64 that begins as the reference."""
        return TabularPolicy(self.reference_logprobs)

    def sample(self, policy: StepPolicy, num_rows: int, *, generator: torch.Generator | None = None) -> Trajectory:
        """Dialogues as one row each: `[B, 2T - 1]`, policy and user taking turns, the user's steps masked.

        Rewards are the expected ones, `r(s, a)`. The user's signs stand in `actions` of the masked steps.
        """
        state = torch.zeros(num_rows, dtype=torch.int64)
        columns: list[tuple[Tensor, ...]] = []
        zeros = torch.zeros(num_rows, dtype=torch.float64)
        for turn in range(self.num_turns):
            drawn = policy.sample(state, generator=generator)
            reference = self.reference_logprobs[state, drawn.actions]
            reward = self.rewards[state, drawn.actions]
            columns.append((state, drawn.actions, drawn.logprobs, reference, reward, drawn.values))
            if turn + 1 < self.num_turns:
                chances = self.reply_probabilities[state, drawn.actions]
                reply = torch.multinomial(chances, 1, generator=generator).squeeze(1)
                columns.append((state, reply, zeros, zeros, zeros, zeros))
                state = self.next_state[state, drawn.actions, reply]
        observations, actions, logprobs, reference, rewards, values = (
            torch.stack(column, 1) for column in zip(*columns, strict=True)
        )
        mask = (torch.arange(actions.shape[1]) % 2 == 0).expand(actions.shape)
        continues = torch.ones_like(rewards)
        continues[:, -1] = 0
        following = torch.zeros_like(values)
        following[:, :-2] = values[:, 2:]
        return new_trajectory(
            actions=actions,
            behaviour_logprobs=logprobs,
            reference_logprobs=reference,
            rewards=rewards,
            values=values,
            next_values=following.masked_fill(~mask, 0.0),
            continues=continues,
            mask=mask,
            observations=observations,
        )

    def _action_values(self, values: Tensor, discount: float) -> Tensor:
        """`r + γ Σ_u P(u|s, a) V(s a u)`, `[S, A]`."""
        behind = values[self.next_state.clamp_min(0)].masked_fill(self.next_state < 0, 0.0)
        return self.rewards + discount * (self.reply_probabilities * behind).sum(-1)

    def _build_states(self) -> None:
        """States, beliefs by Bayes' rule, and from them rewards, chances of replies, and moves."""
        turn = [(word, reply) for word in range(self.num_words) for reply in range(self.num_replies)]
        by_length = [
            [tuple(itertools.chain.from_iterable(turns)) for turns in itertools.product(turn, repeat=length)]
            for length in range(self.num_turns)
        ]
        bounds = list(itertools.accumulate(map(len, by_length), initial=0))
        self._levels = [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
        self.states: list[tuple[int, ...]] = list(itertools.chain.from_iterable(by_length))
        place = {state: index for index, state in enumerate(self.states)}
        beliefs = torch.zeros(self.num_states, self.num_moods, dtype=torch.float64)
        for index, state in enumerate(self.states):
            belief = self.first_mood
            for word, reply in zip(state[0::2], state[1::2], strict=True):
                # The mood moves under the word, then shows in the reply.
                belief = (belief @ self.mood_moves[:, word]) * self.mood_replies[:, reply]
                belief = belief / belief.sum()
            beliefs[index] = belief
        self.beliefs = beliefs
        self.rewards = beliefs @ self.mood_rewards
        moved = torch.einsum("sm,man->san", beliefs, self.mood_moves)
        self.reply_probabilities = moved @ self.mood_replies
        self.next_state = torch.tensor(
            [
                [[place.get((*state, word, reply), -1) for reply in range(self.num_replies)] for word in words]
                for state, words in ((state, range(self.num_words)) for state in self.states)
            ]
        )
