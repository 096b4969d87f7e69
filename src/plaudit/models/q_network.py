"""A small network of action values, plain or dueling."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn


class QNetwork(nn.Module):
    """`Q(o, ·)`: a perceptron with rectified layers; dueling: `Q = V + A - mean_a A` from two last layers.

    Weights and biases begin uniform in `±1/√n` of the layer's inputs, which is torch's own start and that of
    Stable-Baselines3's DQN. Source of the dueling form: Wang et al. (arXiv:1511.06581), equation 9.

    Attributes:
        observation_size, num_actions: of the vectors that come in and the values that go out.
    """

    def __init__(
        self,
        observation_size: int,
        num_actions: int,
        *,
        hidden: Sequence[int] = (256, 256),
        dueling: bool = False,
        seed: int = 0,
    ) -> None:
        """Draw the weights from `seed`; the global generator is left as it was.

        Raises:
            ValueError: for sizes below 1, or no hidden layer.
        """
        super().__init__()
        if not hidden or min(observation_size, num_actions, *hidden) < 1:
            raise ValueError(f"sizes must be at least 1, got {observation_size}, {num_actions}, {tuple(hidden)}")
        self.observation_size, self.num_actions = observation_size, num_actions
        generator = torch.Generator().manual_seed(seed)
        layers: list[nn.Module] = []
        for size, following in zip((observation_size, *hidden), hidden, strict=False):
            layers += [_layer(size, following, generator), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.advantages = _layer(hidden[-1], num_actions, generator)
        self.value = _layer(hidden[-1], 1, generator) if dueling else None

    def forward(self, observations: Tensor) -> Tensor:
        """Observations `[..., O]` to action values `[..., A]`."""
        states = self.trunk(observations)
        found: Tensor = self.advantages(states)
        if self.value is None:
            return found
        centred: Tensor = self.value(states) + found - found.mean(-1, keepdim=True)
        return centred


def _layer(size: int, following: int, generator: torch.Generator) -> nn.Linear:
    # Uninitialised, so that the global generator is not drawn from; every weight is set below.
    empty: Callable[..., nn.Linear] = partial(nn.utils.skip_init, nn.Linear)
    layer = empty(size, following)
    bound = 1 / math.sqrt(size)
    nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
    nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    return layer
