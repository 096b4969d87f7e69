"""A policy over a network that remembers: it acts step by step, and unrolls trajectories with gradients."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from plaudit.models.recurrent import RecurrentNetwork
from plaudit.rollout.control import observation_vectors
from plaudit.rollout.trajectory import Evaluation, Sampled, Trajectory, evaluation_of


class Unrolled(NamedTuple):
    """A network's outputs along a trajectory.

    Attributes:
        outputs: the network's named tuple with tensors `[B, T, ...]`, of every step.
        following: the same tuple for the state that each step leads to, where one follows: of the next step, and where
            a time limit or the end of the data cuts, of the final observation. Without gradient. What stands behind a
            true end never matters.
    """

    outputs: Any
    following: Any


class RecurrentPolicy(nn.Module):
    """Satisfies `StepPolicy` and `StatefulPolicy` for any `RecurrentNetwork`.

    Attributes:
        network: with its weights.
        greedy: take the likeliest action.
    """

    def __init__(self, network: RecurrentNetwork, *, greedy: bool = False) -> None:
        super().__init__()
        self.network = network
        self.greedy = greedy
        self._memory = torch.zeros(0, network.memory_size)

    def memory(self, num_rows: int) -> Tensor:
        """`[B, M]`; zeros for new rows."""
        if len(self._memory) != num_rows:
            self._memory = torch.zeros(num_rows, self.network.memory_size)
        return self._memory

    def end_episodes(self, ended: Tensor) -> None:
        """Forget the rows `[B]` bool whose episode has ended."""
        self._memory = self._memory.masked_fill(ended.unsqueeze(1), 0.0)

    @torch.no_grad()
    def sample(self, observations: Tensor, *, generator: torch.Generator | None = None) -> Sampled:
        """One action for each of `[B, O]` observations (or `[B]` discrete ones)."""
        found, self._memory = self.network(
            observation_vectors(observations, self.network.observation_size), self.memory(len(observations))
        )
        logprobs = torch.log_softmax(found.logits, -1)
        if self.greedy:
            actions = logprobs.argmax(-1, keepdim=True)
        else:
            actions = torch.multinomial(logprobs.exp(), 1, generator=generator)
        columns = {"goals": found.goals} if hasattr(found, "goals") else None
        return Sampled(actions.squeeze(1), logprobs.gather(1, actions).squeeze(1), found.values, columns)

    def values(self, observations: Tensor) -> Tensor:
        """Zeros of the shape of the observations `[..., O]` or `[...]`: what a state is worth depends on the memory.

        `unroll` gives the values that follow each step.
        """
        return torch.zeros(observations.shape[:-1] if observations.is_floating_point() else observations.shape)

    def evaluate(self, trajectory: Trajectory) -> Evaluation:
        """Log-probabilities, entropies and values `[B, T]`, with gradients through time from `trajectory.state` on."""
        outputs = self.unroll(trajectory).outputs
        return evaluation_of(torch.log_softmax(outputs.logits, -1), trajectory.actions, outputs.values)

    def unroll(self, trajectory: Trajectory) -> Unrolled:
        """The network's outputs at every step and behind it.

        Raises:
            ValueError: if the trajectory lacks observations, next observations or the memory before its first step.
        """
        if trajectory.observations is None or trajectory.next_observations is None or trajectory.state is None:
            raise ValueError("a recurrent policy reads observations, next_observations and state, and one is None")
        size = self.network.observation_size
        seen = observation_vectors(trajectory.observations, size)
        after = observation_vectors(trajectory.next_observations, size)
        ends = (trajectory.continues == 0) | trajectory.truncated
        memory, steps, cut = trajectory.state, list[Any](), list[Any]()
        last = trajectory.num_steps - 1
        for step in range(trajectory.num_steps):
            found, memory = self.network(seen[:, step], memory)
            steps.append(found)
            if step == last or bool(trajectory.truncated[:, step].any()):
                with torch.no_grad():
                    cut.append(self.network(after[:, step], memory)[0])
            else:
                cut.append(None)
            memory = memory.masked_fill(ends[:, step : step + 1], 0.0)
        following = list[Any]()
        for step, beyond in enumerate(cut):
            if step == last:
                following.append(beyond)
                continue
            plain = [tensor.detach() for tensor in steps[step + 1]]
            if beyond is not None:
                here = trajectory.truncated[:, step]
                plain = [
                    torch.where(here.view(-1, *[1] * (new.ndim - 1)), new, old)
                    for new, old in zip(beyond, plain, strict=True)
                ]
            following.append(plain)
        make = type(steps[0])
        return Unrolled(
            *(make(*(torch.stack(list(t), 1) for t in zip(*part, strict=True))) for part in (steps, following))
        )
