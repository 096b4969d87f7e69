"""The network of an option-critic: for every option a policy, a termination and a value."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from plaudit.models.control import perceptron


class OptionOutputs(NamedTuple):
    """What the network says of observations `[..., O]`.

    Attributes:
        logits: `[..., W, A]`, of the intra-option policies `π_ω(a|s)`.
        terminations: `[..., W]`, `β_ω(s)`, the probability that ω ends upon arrival in s.
        values: `[..., W]`, `Q_Ω(s, ω)`.
    """

    logits: Tensor
    terminations: Tensor
    values: Tensor


class OptionNetwork(nn.Module):
    """Three perceptrons: actors `π_ω`, terminations `β_ω = σ(·)` and a critic `Q_Ω`, for all options at once.

    With one-hot observations and no hidden layer they are tables. Unlike in Bacon et al. (2017, figure 1) nothing is
    shared between the three: on small problems, where sharing saves nothing, the critic's scale then cannot drown the
    terminations' gradient.

    Attributes:
        observation_size, num_actions, num_options: `O`, `A`, `W`.
    """

    def __init__(
        self,
        observation_size: int,
        num_actions: int,
        num_options: int,
        *,
        hidden: Sequence[int] = (64, 64),
        termination: float = 0.5,
        seed: int = 0,
    ) -> None:
        """Draw the weights from `seed`; the global generator is left as it was.

        Args:
            observation_size, num_actions, num_options: `O`, `A`, `W`.
            hidden: sizes of the hidden layers.
            termination: `β` at first, in every state.
            seed: of the weights.

        Raises:
            ValueError: for sizes below 1, or a termination that is not between 0 and 1.
        """
        super().__init__()
        if min(observation_size, num_actions, num_options, *hidden) < 1:
            raise ValueError(
                f"sizes must be at least 1, got {observation_size}, {num_actions}, {num_options}, {hidden}"
            )
        if not 0 < termination < 1:
            raise ValueError(f"termination must lie between 0 and 1, got {termination}")
        self.observation_size, self.num_actions, self.num_options = observation_size, num_actions, num_options
        generator = torch.Generator().manual_seed(seed)
        self.actors = perceptron((observation_size, *hidden, num_options * num_actions), 0.01, generator)
        self.endings = perceptron((observation_size, *hidden, num_options), 0.01, generator)
        self.critic = perceptron((observation_size, *hidden, num_options), 1.0, generator)
        last = self.endings[-1]
        assert isinstance(last, nn.Linear)
        nn.init.constant_(last.bias, torch.logit(torch.tensor(termination)).item())

    def forward(self, observations: Tensor) -> OptionOutputs:
        """Observations `[..., O]` to logits `[..., W, A]`, terminations and values `[..., W]`."""
        logits = self.actors(observations).unflatten(-1, (self.num_options, self.num_actions))
        return OptionOutputs(logits, self.endings(observations).sigmoid(), self.critic(observations))
