"""`TokenMDP`: text so small that everything about it can be listed, and every estimator held against the exact answer.

A vocabulary of `V` tokens (token 0 ends the text), at most `L` tokens, `P` prompts. Reaching L tokens is an end. With
V = 5 and L = 4 there are 85 prefixes and 341 complete strings. Tables have the shape `[P, S, V]`: prompt, prefix, next
token; a *state* is `prompt * S + prefix`, and that is what policies see as an observation.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from plaudit.core.reduction import expect_shape
from plaudit.rollout.string_rewards import STRING_REWARDS, StringReward
from plaudit.rollout.tabular import TabularPolicy
from plaudit.rollout.trajectory import Policy, StatefulPolicy, StepPolicy, Trajectory, new_trajectory


class Solution(NamedTuple):
    """Values `[P, S]`, action values `[P, S, V]` and log-probabilities `[P, S, V]` of a policy."""

    values: Tensor
    action_values: Tensor
    logprobs: Tensor


class TokenMDP:
    """An enumerable text problem with its exact optimum.

    The objective of a policy q is `J(q) = E_q[Σ_t γ^t (r_t - β log q(a_t|s_t) / π_ref(a_t|s_t))]`, averaged over
    prompts; with γ = 1 it is `E_q[r] - β KL(q‖π_ref)`, whose optimum is `π*(y) ∝ π_ref(y) exp(r(y) / β)`.

    Attributes:
        vocabulary, max_length, num_prompts: `V`, `L`, `P`.
        coefficient: `β`.
        prefixes: the `S` prefixes, shortest first.
        strings: the `Y` complete strings.
        reference_logprobs: `[P, S, V]` float64.
        rewards: `[P, S, V]` float64, the reward of each transition.
        string_rewards: `[P, Y]` float64, their sums along each string.
        next_prefix: `[S, V]` int64, the prefix that a token leads to; -1 where the string is complete.
        string_prefixes, string_tokens: `[Y, L]` int64, the way to each string, 0 behind its end.
        string_mask: `[Y, L]` bool, its tokens.
    """

    def __init__(
        self,
        *,
        vocabulary: int = 5,
        max_length: int = 4,
        num_prompts: int = 1,
        coefficient: float = 0.5,
        reward: str | StringReward = "random",
        reward_scales: Sequence[float] | None = None,
        transition_rewards: Tensor | None = None,
        reference_scale: float = 0.7,
        seed: int = 0,
    ) -> None:
        """Build the tables.

        Args:
            vocabulary: `V`, at least 2, the end of text included.
            max_length: `L`, at least 1.
            num_prompts: `P`; every prompt has a reference and, for random rewards, rewards of its own.
            coefficient: `β`, positive.
            reward: `random` (normal, with a bonus for the pair 1, 2), `consistent_style` (see
                `consistent_style_reward`), `key_and_door` (see `key_and_door_reward`), or a function of
                `(prompt, tokens)`.
            reward_scales: one factor per prompt, None for 1 each.
            transition_rewards: `[P, S, V]` or None, added to the reward of each transition.
            reference_scale: standard deviation of the reference's logits; 0 for the uniform policy.
            seed: fixes reference and random rewards.

        Raises:
            ValueError: for sizes out of range, an unknown reward, or scales and tables that do not fit.
        """
        if vocabulary < 2 or max_length < 1 or num_prompts < 1:
            raise ValueError(
                f"vocabulary ≥ 2, max_length ≥ 1, num_prompts ≥ 1; got {vocabulary}, {max_length}, {num_prompts}"
            )
        if coefficient <= 0:
            raise ValueError(f"coefficient must be positive, got {coefficient}; `hard_solution` is the case of 0")
        self.vocabulary, self.max_length, self.num_prompts = vocabulary, max_length, num_prompts
        self.coefficient = coefficient
        self._build_strings()
        generator = torch.Generator().manual_seed(seed)
        shape = (num_prompts, self.num_prefixes, vocabulary)
        logits = reference_scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        self.reference_logprobs = torch.log_softmax(logits, -1)
        noise = torch.randn((num_prompts, self.num_strings), generator=generator, dtype=torch.float64)
        scales = torch.tensor(reward_scales or [1.0] * num_prompts, dtype=torch.float64)
        expect_shape("reward_scales", scales, (num_prompts,))
        ends = self._string_rewards(reward, noise) * scales[:, None]
        self.rewards = torch.zeros(shape, dtype=torch.float64)
        self.rewards[:, self._last_prefix, self._last_token] = ends
        if transition_rewards is not None:
            expect_shape("transition_rewards", transition_rewards, shape)
            self.rewards = self.rewards + transition_rewards.double()
        along = self.rewards[:, self.string_prefixes, self.string_tokens]
        self.string_rewards = (along * self.string_mask).sum(-1)

    @property
    def num_prefixes(self) -> int:
        """`S`."""
        return len(self.prefixes)

    @property
    def num_strings(self) -> int:
        """`Y`."""
        return len(self.strings)

    @property
    def num_states(self) -> int:
        """`P · S`, the number of observations."""
        return self.num_prompts * self.num_prefixes

    def optimal_solution(self, *, coefficient: float | None = None, discount: float = 1.0) -> Solution:
        """Soft value iteration: `V(s) = β log Σ_a π_ref(a|s) exp(Q(s, a) / β)`, `Q = r + γ V(s')`, one sweep backwards.

        Returns:
            `V*` `[P, S]`, `Q*` and `log π* = log π_ref + (Q - V) / β`, both `[P, S, V]`.
        """
        beta = self.coefficient if coefficient is None else coefficient
        values, action_values = self._backwards(
            lambda q, level: beta * torch.logsumexp(self.reference_logprobs[:, level] + q / beta, -1), discount
        )
        logprobs = self.reference_logprobs + (action_values - values.unsqueeze(-1)) / beta
        return Solution(values, action_values, logprobs)

    def hard_solution(self, *, discount: float = 1.0) -> Solution:
        """Value iteration without the penalty, `V(s) = max_a Q(s, a)`: what plain Q-learning reaches.

        Returns:
            `V` `[P, S]`, `Q` and the log-probabilities (0 or -inf) of the first best token, both `[P, S, V]`.
        """
        values, action_values = self._backwards(lambda q, level: q.max(-1).values, discount)
        best = torch.nn.functional.one_hot(action_values.argmax(-1), self.vocabulary)
        return Solution(values, action_values, best.double().log())

    def evaluate(self, logprobs: Tensor, *, coefficient: float | None = None, discount: float = 1.0) -> Solution:
        """`V^π` and `Q^π` of a policy `[P, S, V]`, differentiable: `V(s) = Σ_a π (Q - β log π / π_ref)`.

        Args:
            logprobs: `[P, S, V]`.
            coefficient: `β`; 0 for values of the reward alone, None for the problem's own.
            discount: `γ`.

        Returns:
            `V^π` `[P, S]`; `Q^π` `[P, S, V]`, without the penalty of the token itself; and the policy.
        """
        expect_shape("logprobs", logprobs, tuple(self.reference_logprobs.shape))
        beta = self.coefficient if coefficient is None else coefficient
        penalty = beta * (logprobs - self.reference_logprobs).masked_fill(logprobs == float("-inf"), 0.0)
        values, action_values = self._backwards(
            lambda q, level: (logprobs[:, level].exp() * (q - penalty[:, level])).sum(-1), discount
        )
        return Solution(values, action_values, logprobs)

    def objective(self, logprobs: Tensor, *, coefficient: float | None = None, discount: float = 1.0) -> Tensor:
        """`J(π)`, a differentiable scalar, of a policy `[P, S, V]`."""
        return self.evaluate(logprobs, coefficient=coefficient, discount=discount).values[:, 0].mean()

    def string_logprobs(self, logprobs: Tensor) -> Tensor:
        """`log π(y|x) = Σ_t log π(y_t|x, y_<t)`: `[P, S, V]` to `[P, Y]`, differentiable."""
        along = logprobs[:, self.string_prefixes, self.string_tokens]
        return along.masked_fill(~self.string_mask, 0.0).sum(-1)

    def tilted_string_logprobs(self, *, coefficient: float | None = None) -> Tensor:
        """`log π*(y|x) = log π_ref(y|x) + r(y) / β - log Z(x)` over whole strings, `[P, Y]`; needs γ = 1."""
        beta = self.coefficient if coefficient is None else coefficient
        return torch.log_softmax(self.string_logprobs(self.reference_logprobs) + self.string_rewards / beta, -1)

    def expected_reward(self, logprobs: Tensor) -> Tensor:
        """`E_π[r]` for each prompt: `[P, S, V]` to `[P]`, by enumeration."""
        return (self.string_logprobs(logprobs).exp() * self.string_rewards).sum(-1)

    def kl(self, logprobs: Tensor, other: Tensor | None = None) -> Tensor:
        """`KL(π‖other)` of whole strings for each prompt, `[P]`, by enumeration; `other` None for the reference.

        Args:
            logprobs, other: `[P, S, V]`.
        """
        own = self.string_logprobs(logprobs)
        others = self.string_logprobs(self.reference_logprobs if other is None else other)
        return (own.exp() * (own - others).masked_fill(own == float("-inf"), 0.0)).sum(-1)

    def total_variation(self, logprobs: Tensor, other: Tensor) -> Tensor:
        """`½ Σ_y |π(y) - other(y)|` for each prompt, `[P]`, of two policies `[P, S, V]`."""
        return 0.5 * (self.string_logprobs(logprobs).exp() - self.string_logprobs(other).exp()).abs().sum(-1)

    def gap(self, logprobs: Tensor, *, discount: float = 1.0) -> float:
        """`(J* - J(π)) / (J* - J(π_ref))` of a policy `[P, S, V]`: 1 for the reference, 0 for the optimum."""
        optimum = self.optimal_solution(discount=discount).values[:, 0].mean()
        reached = self.objective(logprobs.detach(), discount=discount)
        return float((optimum - reached) / (optimum - self.objective(self.reference_logprobs, discount=discount)))

    def best_of_n(self, n: int, logprobs: Tensor | None = None) -> Tensor:
        """Distribution of the best of `n` samples: `P(y) = p(y) / p(r = r_y) · (F(r_y)^n - F_-(r_y)^n)`.

        `F(r)` is the probability of a reward of at most r, `F_-` of less; among equal rewards each sample is as likely.

        Args:
            n: number of samples.
            logprobs: the sampler `[P, S, V]`, None for the reference.

        Returns:
            probabilities `[P, Y]`.

        Raises:
            ValueError: if `n` is below 1.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        own = self.string_logprobs(self.reference_logprobs if logprobs is None else logprobs).exp()
        rewards = self.string_rewards
        equal = (own.unsqueeze(1) * (rewards.unsqueeze(1) == rewards.unsqueeze(2))).sum(-1)
        below = (own.unsqueeze(1) * (rewards.unsqueeze(1) < rewards.unsqueeze(2))).sum(-1)
        wins = (below + equal) ** n - below**n
        return torch.where(own > 0, own * wins / equal, torch.zeros_like(own))

    def policy(self) -> TabularPolicy:
        """A tabular policy `[P·S, V]` in float64 that begins as the reference."""
        return TabularPolicy(self.reference_logprobs.flatten(0, 1))

    def logprob_table(self, policy: Policy) -> Tensor:
        """What any policy does everywhere, `[P, S, V]`: it evaluates every token at every state, with gradients."""
        states = torch.arange(self.num_states).unsqueeze(1).expand(-1, self.vocabulary)
        tokens = torch.arange(self.vocabulary).expand_as(states)
        zeros = torch.zeros(states.shape, dtype=torch.float64)
        everywhere = new_trajectory(
            actions=tokens,
            behaviour_logprobs=zeros,
            rewards=zeros,
            continues=zeros,
            mask=torch.ones_like(states, dtype=torch.bool),
            observations=states,
        )
        return policy.evaluate(everywhere).logprobs.view(self.reference_logprobs.shape)

    def sample(self, policy: StepPolicy, prompts: Tensor, *, generator: torch.Generator | None = None) -> Trajectory:
        """One answer to each prompt `[B]` int64 (in `0..P-1`); `group_ids` are the prompts.

        Returns:
            a trajectory `[B, L]` of states as observations, with the policy's log-probabilities and values and the
            reference's log-probabilities; steps behind the end of a string are masked. A policy with a memory begins
            afresh.
        """
        if isinstance(policy, StatefulPolicy):
            policy.end_episodes(torch.ones(len(policy.memory(len(prompts))), dtype=torch.bool))
        prefixes = torch.zeros_like(prompts)
        alive = torch.ones_like(prompts, dtype=torch.bool)
        steps: list[tuple[Tensor, ...]] = []
        for _ in range(self.max_length):
            states = prompts * self.num_prefixes + prefixes
            drawn = policy.sample(states, generator=generator)
            steps.append((prefixes, drawn.actions, drawn.logprobs, drawn.values, alive))
            following = self.next_prefix[prefixes, drawn.actions]
            alive = alive & (following >= 0)
            prefixes = torch.where(alive, following, 0)
        columns = [torch.stack(column, 1) for column in zip(*steps, strict=True)]
        return self._trajectory(prompts, columns[0], columns[1], columns[4], columns[2], columns[3])

    def enumerate(self, policy: Policy | None = None) -> Trajectory:
        """Every string of every prompt once, `[P·Y, L]`, prompt by prompt in the order of `strings`.

        With a policy (else the reference) as the behaviour. Weigh rows by `string_logprobs(…).exp()` for expectations.
        """
        prompts = torch.arange(self.num_prompts).repeat_interleave(self.num_strings)
        prefixes, tokens, mask = (
            table.repeat(self.num_prompts, 1) for table in (self.string_prefixes, self.string_tokens, self.string_mask)
        )
        found = self._trajectory(prompts, prefixes, tokens, mask)
        if policy is None:
            return found
        with torch.no_grad():
            evaluated = policy.evaluate(found)
        return self._trajectory(prompts, prefixes, tokens, mask, evaluated.logprobs, evaluated.values)

    def _trajectory(
        self,
        prompts: Tensor,
        prefixes: Tensor,
        tokens: Tensor,
        mask: Tensor,
        logprobs: Tensor | None = None,
        values: Tensor | None = None,
    ) -> Trajectory:
        rows = prompts.unsqueeze(1)
        tokens = tokens.masked_fill(~mask, 0)
        reference = self.reference_logprobs[rows, prefixes, tokens]
        logprobs = reference if logprobs is None else logprobs
        values = torch.zeros_like(reference) if values is None else values
        following = self.next_prefix[prefixes, tokens]
        continues = (following >= 0) & mask
        states = rows * self.num_prefixes + prefixes
        next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
        return new_trajectory(
            actions=tokens,
            behaviour_logprobs=logprobs.masked_fill(~mask, 0.0),
            reference_logprobs=reference.to(logprobs.dtype).masked_fill(~mask, 0.0),
            rewards=self.rewards[rows, prefixes, tokens].to(logprobs.dtype).masked_fill(~mask, 0.0),
            values=values.masked_fill(~mask, 0.0),
            next_values=next_values.masked_fill(~continues, 0.0),
            continues=continues.to(logprobs.dtype),
            mask=mask,
            observations=states,
            next_observations=torch.where(continues, rows * self.num_prefixes + following, states),
            group_ids=prompts,
        )

    def _backwards(self, backup: Callable[[Tensor, slice], Tensor], discount: float) -> tuple[Tensor, Tensor]:
        """`V [P, S]` and `Q [P, S, V]`, longest prefixes first; `backup` makes `V` of one length out of `Q`."""
        values: list[Tensor] = []
        action_values: list[Tensor] = []
        for level in reversed(self._levels):
            found = self.rewards[:, level]
            if values:
                behind = values[-1].view(self.num_prompts, level.stop - level.start, self.vocabulary - 1)
                found = found + discount * torch.nn.functional.pad(behind, (1, 0))
            action_values.append(found)
            values.append(backup(found, level))
        return torch.cat(values[::-1], 1), torch.cat(action_values[::-1], 1)

    def _build_strings(self) -> None:
        words = range(1, self.vocabulary)
        by_length = [list(itertools.product(words, repeat=length)) for length in range(self.max_length)]
        bounds = list(itertools.accumulate(map(len, by_length), initial=0))
        self._levels = [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
        self.prefixes: list[tuple[int, ...]] = list(itertools.chain.from_iterable(by_length))
        place = {prefix: index for index, prefix in enumerate(self.prefixes)}
        successors = [[place.get((*prefix, token), -1) for token in range(self.vocabulary)] for prefix in self.prefixes]
        for successor in successors:
            successor[0] = -1
        self.next_prefix = torch.tensor(successors)
        self._last_prefix, self._last_token = (self.next_prefix < 0).nonzero(as_tuple=True)
        ends = zip(self._last_prefix.tolist(), self._last_token.tolist(), strict=True)
        self.strings: list[tuple[int, ...]] = [(*self.prefixes[prefix], token) for prefix, token in ends]
        size = (len(self.strings), self.max_length)
        self.string_prefixes = torch.zeros(size, dtype=torch.int64)
        self.string_tokens = torch.zeros(size, dtype=torch.int64)
        for row, string in enumerate(self.strings):
            self.string_tokens[row, : len(string)] = torch.tensor(string)
            self.string_prefixes[row, : len(string)] = torch.tensor([place[string[:t]] for t in range(len(string))])
        lengths = torch.tensor([len(string) for string in self.strings])
        self.string_mask = torch.arange(self.max_length) < lengths.unsqueeze(1)

    def _string_rewards(self, reward: str | StringReward, noise: Tensor) -> Tensor:
        """`[P, Y]` rewards of whole strings."""
        if reward == "random":
            pairs = [float((1, 2) in itertools.pairwise(string)) for string in self.strings]
            return 0.8 * noise + torch.tensor(pairs, dtype=torch.float64)
        if isinstance(reward, str):
            if reward not in STRING_REWARDS:
                raise ValueError(f"reward must be random, {', '.join(STRING_REWARDS)} or a function, got {reward!r}")
            function = STRING_REWARDS[reward](self.vocabulary, self.max_length)
        else:
            function = reward
        table = [[float(function(prompt, string)) for string in self.strings] for prompt in range(self.num_prompts)]
        if not all(math.isfinite(value) for row in table for value in row):
            raise ValueError("the reward of a string is not finite")
        return torch.tensor(table, dtype=torch.float64)
