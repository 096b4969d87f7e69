"""Networks that remember, a step at a time: what they offer, and the plain one: one LSTM with an actor and a critic."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Outputs(Protocol):
    """What a network says at one step, a named tuple of tensors `[B, ...]`; these two at least.

    Attributes:
        logits: `[B, A]`.
        values: `[B]`, of what the actor is paid.
    """

    @property
    def logits(self) -> Tensor:
        """`[B, A]`."""
        ...

    @property
    def values(self) -> Tensor:
        """`[B]`."""
        ...


class RecurrentNetwork(Protocol):
    """What a policy with a memory needs of its network.

    Attributes:
        observation_size: `O`.
        memory_size: `M`; a memory of zeros is that of a fresh episode.
    """

    observation_size: int
    memory_size: int

    def __call__(self, observations: Tensor, memory: Tensor) -> tuple[Outputs, Tensor]:
        """One step: observations `[B, O]` and memory `[B, M]` to outputs `[B, ...]` and the memory after it."""
        ...


class ActorCriticOutputs(NamedTuple):
    """Logits `[..., A]` and values `[...]`."""

    logits: Tensor
    values: Tensor


class LSTMActorCritic(nn.Module):
    """`z = tanh(W o)`, `h = LSTM(z)`, an actor and a critic over `h`; satisfies `RecurrentNetwork`.

    Attributes:
        observation_size, num_actions, memory_size: `O`, `A`, `M = 2 H`.
    """

    def __init__(
        self, observation_size: int, num_actions: int, *, percept_size: int = 32, hidden_size: int = 32, seed: int = 0
    ) -> None:
        """Draw the weights from `seed`; the global generator is left as it was."""
        super().__init__()
        self.observation_size, self.num_actions, self.memory_size = observation_size, num_actions, 2 * hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.percept = nn.Linear(observation_size, percept_size)
            self.core = nn.LSTMCell(percept_size, hidden_size)
            self.actor = nn.Linear(hidden_size, num_actions)
            self.critic = nn.Linear(hidden_size, 1)
            start_orthogonal(self)
            nn.init.orthogonal_(self.actor.weight, 0.01)

    def forward(self, observations: Tensor, memory: Tensor) -> tuple[ActorCriticOutputs, Tensor]:
        """One step of `[B, O]` observations with memory `[B, M]`."""
        hidden, cell = memory.chunk(2, 1)
        hidden, cell = self.core(torch.tanh(self.percept(observations)), (hidden, cell))
        found = ActorCriticOutputs(self.actor(hidden), self.critic(hidden).squeeze(-1))
        return found, torch.cat([hidden, cell], 1)


def start_orthogonal(network: nn.Module) -> None:
    """Orthogonal weights, gain √2 for linear layers and 1 for LSTMs, and biases of 0; draws from torch's generator.

    With biases of 0 what a memory says at first depends on what was seen, and not on a draw that is alike everywhere.
    The bias of forget gates is 2 alone, so that a memory begins with a half-life of five steps and not of one
    (Jozefowicz et al., "An empirical exploration of recurrent network architectures", 2015, take 1).
    """
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.orthogonal_(module.weight, 2**0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LSTMCell):
            for name, parameter in module.named_parameters():
                if "weight" in name:
                    nn.init.orthogonal_(parameter)
                else:
                    nn.init.zeros_(parameter)
            assert isinstance(module.bias_hh, Tensor)
            nn.init.constant_(module.bias_hh[module.hidden_size : 2 * module.hidden_size], 2.0)
