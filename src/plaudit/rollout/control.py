"""A policy for control tasks: a small network that acts, and evaluates what was done."""

import torch
from torch import Tensor, nn

from plaudit.models.control import ActorCriticNetwork
from plaudit.rollout.trajectory import Evaluation, Sampled, Trajectory, evaluation_of, observations_of


class ControlPolicy(nn.Module):
    """`π(a|o) = softmax(logits(o))_a` over vectors of observations; satisfies `StepPolicy`.

    Discrete observations are one-hot vectors of the network's size.

    Attributes:
        network: actor and critic.
        greedy: whether `sample` takes the likeliest action instead of drawing one.
    """

    def __init__(self, network: ActorCriticNetwork, *, greedy: bool = False) -> None:
        """Act by a network; `ControlPolicy(policy.network, greedy=True)` is the same policy for evaluation."""
        super().__init__()
        self.network = network
        self.greedy = greedy

    @torch.no_grad()
    def sample(self, observations: Tensor, *, generator: torch.Generator | None = None) -> Sampled:
        """One action for each of `[B, O]` observations (or `[B]` discrete ones)."""
        seen = self._vectors(observations)
        logprobs = torch.log_softmax(self.network.logits(seen), -1)
        if self.greedy:
            actions = logprobs.argmax(-1, keepdim=True)
        else:
            actions = torch.multinomial(logprobs.exp(), 1, generator=generator)
        return Sampled(actions.squeeze(1), logprobs.gather(1, actions).squeeze(1), self.network.values(seen))

    def values(self, observations: Tensor) -> Tensor:
        """`V(o)` of observations `[..., O]`, `[...]`."""
        return self.network.values(self._vectors(observations))

    def evaluate(self, trajectory: Trajectory) -> Evaluation:
        """Log-probabilities, entropies and values `[B, T]`, with gradients.

        Raises:
            ValueError: if the trajectory has no observations.
        """
        seen = self._vectors(observations_of(trajectory))
        logprobs = torch.log_softmax(self.network.logits(seen), -1)
        return evaluation_of(logprobs, trajectory.actions, self.network.values(seen))

    def _vectors(self, observations: Tensor) -> Tensor:
        return observation_vectors(observations, self.network.observation_size)


def observation_vectors(observations: Tensor, size: int) -> Tensor:
    """Observations `[..., O]` as they are; discrete ones `[...]` int64 as one-hot vectors `[..., size]`."""
    if observations.is_floating_point():
        return observations
    return nn.functional.one_hot(observations, size).to(torch.get_default_dtype())
