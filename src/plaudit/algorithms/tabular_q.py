"""Q-learning and Double Q-learning with tables, many independent runs at once: where each step can be followed."""

import torch
from torch import Tensor


class TabularQ:
    """`Q(s, a) ← Q(s, a) + α (r + γ V(s') - Q(s, a))`, `R` runs side by side.

    Q-learning:        `V(s') = max_a Q(s', a)`                       (Watkins 1989; Sutton and Barto, 6.5)
    Double Q-learning: `V(s') = Q₂(s', argmax_a Q₁(s', a))`, where a coin decides which of two tables is `Q₁`, which is
                       the one that moves                              (van Hasselt 2010; Sutton and Barto, 6.7)
    Acting is ε-greedy on the sum of the tables. Of equally good actions, in acting and in `argmax`, each is as likely.

    Attributes:
        tables: `[N, R, S, A]` float64, `N` being 1 or 2; -∞ where an action is not allowed.
        step_size, discount, epsilon: `α`, `γ`, `ε`.
    """

    def __init__(
        self,
        num_runs: int,
        allowed: Tensor,
        *,
        double: bool = False,
        step_size: float = 0.1,
        discount: float = 1.0,
        epsilon: float = 0.1,
        seed: int = 0,
    ) -> None:
        """All values are 0.

        Args:
            num_runs: `R`.
            allowed: `[S, A]` bool, which actions each state has; at least one.
            double: whether there are two tables.
            step_size, discount, epsilon: `α`, `γ`, `ε`.
            seed: of every draw.

        Raises:
            ValueError: if a state has no action.
        """
        if not bool(allowed.any(-1).all()):
            raise ValueError("every state needs an action that is allowed")
        plain = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -torch.inf)
        self.tables = plain.expand(2 if double else 1, num_runs, *allowed.shape).clone()
        self.step_size, self.discount, self.epsilon = step_size, discount, epsilon
        self.generator = torch.Generator().manual_seed(seed)
        self._runs = torch.arange(num_runs)

    def act(self, states: Tensor) -> Tensor:
        """An action `[R]` for the state `[R]` int64 of each run."""
        values = self.tables[:, self._runs, states].sum(0)
        noise = torch.rand(values.shape, generator=self.generator)
        best = _any_best(values, noise)
        anything = noise.masked_fill(values.isinf(), -1.0).argmax(-1)
        explores = torch.rand(len(states), generator=self.generator) < self.epsilon
        return torch.where(explores, anything, best)

    def learn(
        self, states: Tensor, actions: Tensor, rewards: Tensor, next_states: Tensor, ended: Tensor, active: Tensor
    ) -> None:
        """Move the values of one step of every run for which `active` is True.

        Args:
            states, actions, next_states: `[R]` int64.
            rewards: `[R]` float64.
            ended: `[R]` bool; after an end nothing follows.
            active: `[R]` bool.
        """
        count = len(self.tables)
        moved = torch.randint(count, (len(states),), generator=self.generator)
        chooser = self.tables[moved, self._runs, next_states]
        valuer = self.tables[(moved + 1) % count, self._runs, next_states]
        best = (
            _any_best(chooser, torch.rand(chooser.shape, generator=self.generator)) if count > 1 else chooser.argmax(1)
        )
        following = valuer.gather(1, best[:, None]).squeeze(1)
        targets = rewards + self.discount * following.masked_fill(ended, 0.0)
        where = (moved, self._runs, states, actions)
        errors = (targets - self.tables[where]).masked_fill(~active, 0.0)
        self.tables[where] += self.step_size * errors


def _any_best(values: Tensor, noise: Tensor) -> Tensor:
    """`[R]`: the largest of `[R, A]` values, among equal ones that with the largest noise from [0, 1)."""
    return noise.masked_fill(values < values.amax(-1, keepdim=True), -1.0).argmax(-1)
