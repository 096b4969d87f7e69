"""A policy that is a table: one row of logits and one value per state. The plainest thing that can learn."""

import torch
from torch import Tensor, nn

from plaudit.core.reduction import expect_shape
from plaudit.rollout.trajectory import Evaluation, Sampled, Trajectory, evaluation_of, observations_of


class TabularPolicy(nn.Module):
    """`π(a|s) = softmax(logits[s])_a` and `V(s) = critic[s]` over states `0..S-1`; satisfies `StepPolicy`.

    Attributes:
        logits: `[S, A]` parameter.
        critic: `[S]` parameter, 0 at first.
    """

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        if logits.ndim != 2:
            raise ValueError(f"logits must be [states, actions], got {tuple(logits.shape)}")
        self.logits = nn.Parameter(logits.detach().clone())
        self.critic = nn.Parameter(torch.zeros_like(logits[:, 0]))

    def logprobs(self) -> Tensor:
        """The whole table of log-probabilities, `[S, A]`, with gradients."""
        return torch.log_softmax(self.logits, -1)

    @torch.no_grad()
    def sample(self, observations: Tensor, *, generator: torch.Generator | None = None) -> Sampled:
        """Draw one action for each state `[B]` int64."""
        logprobs = self.logprobs()[observations]
        actions = torch.multinomial(logprobs.exp(), 1, generator=generator)
        return Sampled(actions.squeeze(1), logprobs.gather(1, actions).squeeze(1), self.critic[observations])

    def values(self, observations: Tensor) -> Tensor:
        """`V(s)` of states of any shape `[...]`."""
        return self.critic[observations]

    def evaluate(self, trajectory: Trajectory) -> Evaluation:
        """Log-probabilities, entropies and values `[B, T]`, with gradients; states are `trajectory.observations`.

        Raises:
            ValueError: if the trajectory has no observations `[B, T]`.
        """
        states = observations_of(trajectory)
        expect_shape("observations", states, tuple(trajectory.actions.shape))
        return evaluation_of(self.logprobs()[states], trajectory.actions, self.critic[states])
