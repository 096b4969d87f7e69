"""Small networks for control: an actor and a critic, each a multilayer perceptron of its own."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn


class ActorCriticNetwork(nn.Module):
    """`logits = actor(o)`, `V = critic(o)`: two perceptrons with tanh between their layers.

    Weights begin orthogonal (gain √2, the last layer .01 for the actor and 1 for the critic) and biases 0, so the first
    policy is nearly uniform. Source of the sizes and gains: Engstrom et al., "Implementation matters"
    (arXiv:2005.12729), and Stable-Baselines3's `MlpPolicy`.

    Attributes:
        observation_size, num_actions: of the vectors that come in and the logits that go out.
    """

    def __init__(
        self, observation_size: int, num_actions: int, *, hidden: Sequence[int] = (64, 64), seed: int = 0
    ) -> None:
        """Draw the weights from `seed`; the global generator is left as it was.

        Raises:
            ValueError: for sizes below 1.
        """
        super().__init__()
        if min(observation_size, num_actions, *hidden) < 1:
            raise ValueError(f"sizes must be at least 1, got {observation_size}, {num_actions}, {tuple(hidden)}")
        self.observation_size, self.num_actions = observation_size, num_actions
        generator = torch.Generator().manual_seed(seed)
        self.actor = perceptron((observation_size, *hidden, num_actions), 0.01, generator)
        self.critic = perceptron((observation_size, *hidden, 1), 1.0, generator)

    def logits(self, observations: Tensor) -> Tensor:
        """Observations `[..., O]` to logits `[..., A]`."""
        found: Tensor = self.actor(observations)
        return found

    def values(self, observations: Tensor) -> Tensor:
        """Observations `[..., O]` to values `[...]`."""
        found: Tensor = self.critic(observations).squeeze(-1)
        return found


class ActorActionValueNetwork(nn.Module):
    """`logits = actor(o)`, `Q = critic(o)`: as `ActorCriticNetwork`, with a value for each action.

    Attributes:
        observation_size, num_actions: of the vectors that come in and the tables that go out.
    """

    def __init__(
        self, observation_size: int, num_actions: int, *, hidden: Sequence[int] = (64, 64), seed: int = 0
    ) -> None:
        """Draw the weights from `seed`; the global generator is left as it was.

        Raises:
            ValueError: for sizes below 1.
        """
        super().__init__()
        if min(observation_size, num_actions, *hidden) < 1:
            raise ValueError(f"sizes must be at least 1, got {observation_size}, {num_actions}, {tuple(hidden)}")
        self.observation_size, self.num_actions = observation_size, num_actions
        generator = torch.Generator().manual_seed(seed)
        self.actor = perceptron((observation_size, *hidden, num_actions), 0.01, generator)
        self.critic = perceptron((observation_size, *hidden, num_actions), 1.0, generator)

    def tables(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Observations `[..., O]` to log-probabilities and action values, both `[..., A]`."""
        return torch.log_softmax(self.actor(observations), -1), self.critic(observations)


def perceptron(sizes: Sequence[int], last_gain: float, generator: torch.Generator) -> nn.Sequential:
    """Linear layers of these sizes, input first, with tanh between them; orthogonal weights, the last by its gain."""
    layers: list[nn.Module] = []
    # Uninitialised, so that the global generator is not drawn from; every weight is set below.
    empty: Callable[..., nn.Linear] = partial(nn.utils.skip_init, nn.Linear)
    for place in range(len(sizes) - 1):
        last = place == len(sizes) - 2
        layer = empty(sizes[place], sizes[place + 1])
        nn.init.orthogonal_(layer.weight, last_gain if last else math.sqrt(2), generator=generator)
        nn.init.zeros_(layer.bias)
        layers += [layer] if last else [layer, nn.Tanh()]
    return nn.Sequential(*layers)
