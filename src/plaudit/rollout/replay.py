"""A memory of single steps: drawn uniformly, or by how surprising they were; with n-step returns."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from plaudit.rollout.trajectory import Trajectory

_COLUMNS = ("observations", "next_observations", "actions", "rewards", "continues", "truncated")


class ReplayBatch(NamedTuple):
    """`n` remembered steps.

    Attributes:
        observations: `[n, ...]`.
        actions: `[n]` int64.
        returns: `[n]`, `Σ_k γ^k r_k` over up to `num_steps` steps, fewer before an end or the newest step.
        discounts: `[n]`, `γ^m` after the `m` steps that were added up, 0 where the last of them was a true end.
        next_observations: `[n, ...]`, what followed them; the final observation at an end.
        places: `[n]` int64, for `Replay.set_errors`.
        weights: `[n]`, importance weights of prioritised replay, at most 1; all 1 in uniform replay.
    """

    observations: Tensor
    actions: Tensor
    returns: Tensor
    discounts: Tensor
    next_observations: Tensor
    places: Tensor
    weights: Tensor


class Replay:
    """The last `capacity` steps of `num_environments` environments, in the order in which they were made.

    Prioritised (Schaul et al., arXiv:1511.05952, equation 1 and section 3.4): step `i` is drawn with probability
    `P(i) = p_i^α / Σ p^α`, `p_i = |δ_i| + 1e-6`, new steps with the largest priority so far; its loss is weighed by
    `(N P(i))^-β`, divided by the largest of the batch.

    Attributes:
        capacity: steps of each environment that are kept.
        size: steps that are there, all environments together.
    """

    def __init__(self, capacity: int, num_environments: int, *, priority_exponent: float | None = None) -> None:
        """Nothing is remembered yet.

        Args:
            capacity: steps of all environments together; at least one of each is kept.
            num_environments: `B`.
            priority_exponent: `α`; None for uniform replay.

        Raises:
            ValueError: for numbers below 1, or an exponent that is negative.
        """
        if min(capacity, num_environments) < 1:
            raise ValueError(f"capacity and environments must be at least 1, got {capacity} and {num_environments}")
        if priority_exponent is not None and priority_exponent < 0:
            raise ValueError(f"priority_exponent must not be negative, got {priority_exponent}")
        self.num_environments = num_environments
        self.capacity = max(1, capacity // num_environments)
        self.priority_exponent = priority_exponent
        self._written = 0
        self._columns: dict[str, Tensor] = {}
        self._tree = None if priority_exponent is None else SumTree(self.capacity * num_environments)
        self._highest = 1.0

    @property
    def size(self) -> int:
        """Steps that can be drawn."""
        return min(self._written, self.capacity) * self.num_environments

    def add(self, trajectory: Trajectory) -> None:
        """Remember the steps `[B, T]`, which go on where the last ones ended.

        Raises:
            ValueError: for another number of rows, missing observations, or steps that do not count.
        """
        if trajectory.num_rows != self.num_environments or not bool(trajectory.mask.all()):
            raise ValueError(f"{self.num_environments} rows without masked steps are remembered, not this trajectory")
        tensors = trajectory.tensors()
        if missing := [name for name in _COLUMNS if name not in tensors]:
            raise ValueError(f"replay needs trajectory.{missing[0]}, which is None")
        # Of more steps than there is room for, the last ones would overwrite the first.
        skipped = max(0, trajectory.num_steps - self.capacity)
        kept = torch.arange(skipped, trajectory.num_steps)
        slots = (self._written + kept) % self.capacity
        for name in _COLUMNS:
            tensor = tensors[name].detach()
            if name not in self._columns:
                self._columns[name] = tensor.new_zeros((self.num_environments, self.capacity, *tensor.shape[2:]))
            self._columns[name][:, slots] = tensor[:, kept]
        self._written += trajectory.num_steps
        if self._tree is not None:
            places = (torch.arange(self.num_environments)[:, None] * self.capacity + slots).flatten()
            self._tree.set(places, torch.full((len(places),), self._highest, dtype=torch.float64))

    def sample(
        self,
        count: int,
        *,
        discount: float,
        num_steps: int = 1,
        importance_exponent: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> ReplayBatch:
        """Draw `count` steps with replacement.

        Args:
            count: `n`.
            discount: `γ`.
            num_steps: how many rewards are added up before the value of what follows.
            importance_exponent: `β` of prioritised replay.
            generator: draws.

        Raises:
            ValueError: if nothing is remembered yet.
        """
        if self.size == 0:
            raise ValueError("nothing is remembered yet, so nothing can be replayed")
        filled = self.size // self.num_environments
        if self._tree is None:
            drawn = torch.randint(self.size, (count,), generator=generator)
            places = drawn // filled * self.capacity + drawn % filled
            weights = torch.ones(count)
        else:
            places = self._tree.sample(count, generator)
            scaled = (self.size * self._tree.probabilities(places)) ** -importance_exponent
            weights = (scaled / scaled.max()).float()
        return self._batch(places, weights, discount, num_steps)

    def set_errors(self, places: Tensor, errors: Tensor) -> None:
        """Tell the TD errors `[n]` of drawn steps; without effect in uniform replay."""
        if self._tree is None or self.priority_exponent is None:
            return
        priorities = (errors.detach().double().abs() + 1e-6) ** self.priority_exponent
        self._tree.set(places, priorities)
        self._highest = max(self._highest, float(priorities.max()))

    def state_dict(self) -> dict[str, Any]:
        """What is remembered: tensors and numbers."""
        filled = self.size // self.num_environments
        return {
            "columns": {name: tensor[:, :filled].clone() for name, tensor in self._columns.items()},
            "written": self._written,
            "highest": self._highest,
            "priorities": None if self._tree is None else self._tree.leaves().clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict` of a memory of the same size, in new episodes: those under way count as cut off."""
        self._written, self._highest = int(state["written"]), float(state["highest"])
        self._columns = {}
        for name, tensor in state["columns"].items():
            room = tensor.new_zeros((self.num_environments, self.capacity, *tensor.shape[2:]))
            room[:, : tensor.shape[1]] = tensor
            self._columns[name] = room
        if self._written:
            # Or the rewards of the next episode would be added to those of the last step.
            self._columns["truncated"][:, (self._written - 1) % self.capacity] = True
        if self._tree is not None:
            self._tree.set(torch.arange(len(state["priorities"])), state["priorities"])

    def _batch(self, places: Tensor, weights: Tensor, discount: float, num_steps: int) -> ReplayBatch:
        rows, slots = places // self.capacity, places % self.capacity
        columns, newest = self._columns, (self._written - 1) % self.capacity
        returns = torch.zeros_like(columns["rewards"][rows, slots])
        factor, going_on, last = torch.ones_like(returns), torch.ones_like(slots, dtype=torch.bool), slots
        for ahead in range(num_steps):
            here = (slots + ahead) % self.capacity
            last = torch.where(going_on, here, last)
            returns = returns + torch.where(going_on, factor * columns["rewards"][rows, here], 0.0)
            factor = torch.where(going_on, factor * discount, factor)
            going_on = going_on & (columns["continues"][rows, here] > 0) & ~columns["truncated"][rows, here]
            going_on = going_on & (here != newest)
        return ReplayBatch(
            observations=columns["observations"][rows, slots],
            actions=columns["actions"][rows, slots],
            returns=returns,
            discounts=factor * columns["continues"][rows, last],
            next_observations=columns["next_observations"][rows, last],
            places=places,
            weights=weights.to(returns.dtype),
        )


class SumTree:
    """Non-negative priorities of `size` places, drawn in proportion in `O(log size)` for a whole batch at once.

    Node `i` of the binary tree is the sum of nodes `2i` and `2i + 1`; the leaves begin at the first power of two that
    is not below `size`.
    """

    def __init__(self, size: int) -> None:
        """All priorities are 0."""
        self.size = size
        self._first = 1 << (size - 1).bit_length()
        self._nodes = torch.zeros(2 * self._first, dtype=torch.float64)

    @property
    def total(self) -> float:
        """The sum of all priorities."""
        return float(self._nodes[1])

    def leaves(self) -> Tensor:
        """`[size]` float64, the priorities; a view."""
        return self._nodes[self._first : self._first + self.size]

    def set(self, places: Tensor, priorities: Tensor) -> None:
        """Set the priorities `[n]` of places `[n]`; of a place that is given twice, one of the two stays.

        Raises:
            ValueError: for a priority that is negative or not finite.
        """
        if not bool((priorities.isfinite() & (priorities >= 0)).all()):
            raise ValueError("priorities must be finite and not negative: look for a loss that is not finite")
        nodes = places + self._first
        self._nodes[nodes] = priorities.double()
        # One unique parent list per level; the size of the tree decides how many levels.
        while len(nodes) and int(nodes[0]) > 1:
            nodes = torch.unique(nodes // 2)
            self._nodes[nodes] = self._nodes[2 * nodes] + self._nodes[2 * nodes + 1]

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """`[count]` places, one from each of `count` equal slices of the total (as the paper does)."""
        within = torch.rand(count, generator=generator, dtype=torch.float64)
        wanted = (torch.arange(count) + within) / count * self._nodes[1]
        nodes = torch.ones(count, dtype=torch.int64)
        while int(nodes[0]) < self._first:
            left = self._nodes[2 * nodes]
            # Rounding may ask for a little more than there is: never go where nothing is.
            right = (wanted >= left) & (self._nodes[2 * nodes + 1] > 0)
            wanted = torch.where(right, wanted - left, wanted)
            nodes = 2 * nodes + right.long()
        return nodes - self._first

    def probabilities(self, places: Tensor) -> Tensor:
        """`[n]`, how likely each place is to be drawn."""
        return self._nodes[places + self._first] / self._nodes[1]
