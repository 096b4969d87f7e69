"""A memory of recent segments of experience, for algorithms that learn from a stretch of steps at once."""

from typing import Any

import torch
from torch import Tensor

from plaudit.rollout.trajectory import Trajectory


class SegmentReplay:
    """The last segments `[T]` that were added, as rows of trajectories; whole segments are drawn, all alike.

    What a segment holds is what was known when it was played: behaviour, rewards, observations. Everything that
    depends on the policy is for the learner to find anew. The memory is the CPU's, wherever the learner is.

    Attributes:
        capacity: how many segments are remembered.
    """

    def __init__(self, capacity: int) -> None:
        """Begin empty.

        Raises:
            ValueError: for a capacity below 1.
        """
        if capacity < 1:
            raise ValueError(f"a replay must hold at least one segment, got a capacity of {capacity}")
        self.capacity = capacity
        self._columns: dict[str, Tensor] = {}
        self._next = self._count = 0

    def __len__(self) -> int:
        """How many segments are remembered now."""
        return self._count

    def add(self, trajectory: Trajectory) -> None:
        """Remember the rows `[B, T]`, in place of the oldest where there is no room; shorter ones get masked steps.

        Raises:
            ValueError: if their fields differ from those of earlier rows, or there is not room for all.
        """
        if trajectory.num_rows > self.capacity:
            raise ValueError(f"{trajectory.num_rows} segments at once for a replay of {self.capacity}")
        given = {name: tensor.detach().cpu() for name, tensor in trajectory.tensors().items()}
        if not self._columns:
            self._columns = {name: rows.new_zeros((self.capacity, *rows.shape[1:])) for name, rows in given.items()}
        if set(given) != set(self._columns):
            raise ValueError(
                f"segments must be alike: {sorted(self._columns)} in the replay, {sorted(given)} in the new"
            )
        longest = max(trajectory.num_steps, self._columns["mask"].shape[1])
        self._columns = _lengthened(self._columns, longest)
        found = _lengthened(given, longest)
        places = (torch.arange(trajectory.num_rows) + self._next) % self.capacity
        for name, tensor in found.items():
            self._columns[name][places] = tensor
        self._next = (self._next + trajectory.num_rows) % self.capacity
        self._count = min(self._count + trajectory.num_rows, self.capacity)

    def sample(self, num_rows: int, *, generator: torch.Generator | None = None) -> Trajectory:
        """`num_rows` segments on the CPU, drawn with replacement, as long as the longest of them.

        Raises:
            ValueError: if nothing has been added.
        """
        if not self._count:
            raise ValueError("the replay is empty: add a trajectory before sampling")
        rows = torch.randint(self._count, (num_rows,), generator=generator)
        steps = int(self._columns["mask"][rows].any(0).nonzero().max()) + 1
        found = {name: tensor[rows] for name, tensor in self._columns.items()}
        per_row = Trajectory.per_row_names()
        return Trajectory(**{name: rows if name in per_row else rows[:, :steps] for name, rows in found.items()})

    def state_dict(self) -> dict[str, Any]:
        """The remembered rows and where the next one goes."""
        rows = {name: tensor[: self._count] for name, tensor in self._columns.items()}
        return {"columns": rows, "next": self._next, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._columns = {}
        for name, rows in state["columns"].items():
            self._columns[name] = rows.new_zeros((self.capacity, *rows.shape[1:]))
            self._columns[name][: len(rows)] = rows
        self._next, self._count = int(state["next"]), int(state["count"])


def _lengthened(columns: dict[str, Tensor], steps: int) -> dict[str, Tensor]:
    """Columns with masked steps added up to `steps`."""
    per_row = Trajectory.per_row_names()
    found = {}
    for name, rows in columns.items():
        missing = 0 if name in per_row else steps - rows.shape[1]
        filler = rows.new_zeros((rows.shape[0], missing, *rows.shape[2:])) if missing else None
        found[name] = rows if filler is None else torch.cat([rows, filler], 1)
    return found
