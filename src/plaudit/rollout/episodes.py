"""Whole episodes out of batches of steps: what has not ended waits."""

import torch

from plaudit.rollout.trajectory import Trajectory, concatenate


class FinishedEpisodes:
    """Keeps the steps of each environment back until their episode has ended.

    Which episodes are learned from then does not depend on how long they are, as it would if those that a batch cuts
    were thrown away.
    """

    def __init__(self) -> None:
        self._waiting: list[Trajectory | None] = []

    def add(self, trajectory: Trajectory) -> Trajectory | None:
        """Take the next steps `[B, T]` of every environment.

        Returns:
            rows that each end with the end of an episode, shorter ones filled up with masked steps; None where no
            episode has ended.
        """
        waiting = self._waiting or [None] * trajectory.num_rows
        finished: list[Trajectory] = []
        self._waiting = []
        for row, before in enumerate(waiting):
            new = trajectory.select(torch.tensor([row]))
            whole = new if before is None else _joined(before, new)
            ends = torch.nonzero((whole.continues[0] == 0) | whole.truncated[0]).flatten()
            cut = int(ends[-1]) + 1 if len(ends) else 0
            if cut:
                finished.append(_steps(whole, 0, cut))
            self._waiting.append(_steps(whole, cut, whole.num_steps) if cut < whole.num_steps else None)
        return concatenate(finished) if finished else None


def _steps(trajectory: Trajectory, first: int, last: int) -> Trajectory:
    return Trajectory(**{name: tensor[:, first:last] for name, tensor in trajectory.tensors().items()})


def _joined(before: Trajectory, after: Trajectory) -> Trajectory:
    """One row after the other in time."""
    later = after.tensors()
    return Trajectory(**{name: torch.cat([tensor, later[name]], 1) for name, tensor in before.tensors().items()})
