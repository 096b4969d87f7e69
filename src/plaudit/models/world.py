"""A learned world: what an observation is (a code), and what follows an action (a mixture of Gaussians, with a memory).

    z = encode(o),    h' = LSTM([z, a], h),    p(z' | z, a, h') = Σ_m π_m N(z + s μ_m, s² σ_m²),    r, c from the same

Source: Ha and Schmidhuber, "World models" (arXiv:1803.10122), sections 2.2 and 2.3; reward and continuation heads as in
Hafner et al. (arXiv:1912.01603). Departures: the mixture is over the *change* of the code in units `s` of its usual
size, and its head sees code and action beside the memory, so that a world whose observation is its state needs none.
"""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

LEAST_LOG_SCALE, GREATEST_LOG_SCALE = -6.0, 3.0
"""Bounds of `log σ_m`: in a deterministic world the density would grow without end."""


class Encoder(Protocol):
    """Observations to codes and back.

    Attributes:
        code_size: `Z`.
    """

    code_size: int

    def encode(self, observations: Tensor) -> Tensor:
        """Observations `[..., *shape]` to codes `[..., Z]`, without noise or gradients."""
        ...


class PlainEncoder(nn.Module):
    """The code is the observation itself, each number standardised: for vectors that say all there is to know."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, observation_size: int) -> None:
        super().__init__()
        self.code_size = observation_size
        self.register_buffer("mean", torch.zeros(observation_size))
        self.register_buffer("deviation", torch.ones(observation_size))

    @torch.no_grad()
    def encode(self, observations: Tensor) -> Tensor:
        """`(o - mean) / deviation`, `[..., Z]`."""
        return (observations - self.mean) / self.deviation

    def standardise(self, observations: Tensor) -> None:
        """Take mean and deviation from observations `[N, Z]`; what never changes keeps its size."""
        spread = observations.std(0)
        self.mean.copy_(observations.mean(0))
        self.deviation.copy_(torch.where(spread > 1e-6, spread, torch.ones_like(spread)))


class VariationalEncoder(nn.Module):
    """`q(z|x) = N(μ(x), σ(x)²)` and `x̂ = decode(z)`: an autoencoder for pictures or vectors; the code in use is `μ(x)`.

    Pictures go through convolutions of stride 2 until a side is 4 or less; vectors through one hidden layer.

    Attributes:
        shape: of an observation, `(size,)`, or `(channels, height, width)` of a picture.
        code_size: `Z`.
    """

    def __init__(self, shape: tuple[int, ...], code_size: int, *, width: int = 32, seed: int = 0) -> None:
        """Draw the weights from `seed`; the global generator is left as it was.

        Args:
            shape: `(size,)` or `(channels, height, width)`.
            code_size: `Z`.
            width: channels of the first convolution (doubled at each further one), or a quarter of the hidden layer.
            seed: of the weights.

        Raises:
            ValueError: for another number of dimensions, or sizes below 1.
        """
        super().__init__()
        if len(shape) not in (1, 3) or min(*shape, code_size, width) < 1:
            raise ValueError(f"observations must be [size] or [channels, height, width], got {shape} and {code_size}")
        self.shape, self.code_size = shape, code_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if len(shape) == 1:
                hidden = 4 * width
                self.encoder = nn.Sequential(nn.Linear(shape[0], hidden), nn.ReLU())
                self.decoder = nn.Sequential(nn.Linear(code_size, hidden), nn.ReLU(), nn.Linear(hidden, shape[0]))
            else:
                hidden = self._build_convolutions(shape, code_size, width)
            self.code = nn.Linear(hidden, 2 * code_size)

    def _build_convolutions(self, shape: tuple[int, ...], code_size: int, width: int) -> int:
        channels, sides = shape[0], [(shape[1], shape[2])]
        down: list[nn.Module] = []
        widths = [channels]
        while max(sides[-1]) > 4:
            widths.append(width * 2 ** (len(widths) - 1))
            down += [nn.Conv2d(widths[-2], widths[-1], 3, stride=2, padding=1), nn.ReLU()]
            sides.append(((sides[-1][0] + 1) // 2, (sides[-1][1] + 1) // 2))
        hidden = widths[-1] * math.prod(sides[-1])
        up: list[nn.Module] = [nn.Linear(code_size, hidden), nn.ReLU(), nn.Unflatten(1, (widths[-1], *sides[-1]))]
        for place in range(len(widths) - 1, 0, -1):
            up += [nn.Upsample(size=sides[place - 1]), nn.Conv2d(widths[place], widths[place - 1], 3, padding=1)]
            up += [nn.ReLU()] if place > 1 else []
        self.encoder, self.decoder = nn.Sequential(*down, nn.Flatten()), nn.Sequential(*up)
        return hidden

    def distribution(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Means and log-variances `[N, Z]` of the codes of observations `[N, *shape]`."""
        means, log_variances = self.code(self.encoder(observations)).chunk(2, -1)
        return means, log_variances.clamp(-10, 10)

    def decode(self, codes: Tensor) -> Tensor:
        """Observations `[N, *shape]` of codes `[N, Z]`."""
        found: Tensor = self.decoder(codes)
        return found.reshape(-1, *self.shape)

    @torch.no_grad()
    def encode(self, observations: Tensor) -> Tensor:
        """`μ(x)` of observations `[..., *shape]`, `[..., Z]`."""
        leading = observations.shape[: observations.ndim - len(self.shape)]
        means, _ = self.distribution(observations.reshape(-1, *self.shape))
        return means.reshape(*leading, self.code_size)


class Prediction(NamedTuple):
    """What follows a step: the mixture over the next code, the reward, the logit of going on.

    Attributes:
        log_weights: `[..., M]`.
        means, log_scales: `[..., M, Z]`, in units of the code.
        rewards, continuation_logits: `[...]`.
    """

    log_weights: Tensor
    means: Tensor
    log_scales: Tensor
    rewards: Tensor
    continuation_logits: Tensor


class RecurrentDynamics(nn.Module):
    """A mixture-density LSTM with heads for reward and continuation.

    The memory is one tensor `[B, 2H]`, hidden and cell state side by side; zeros at the start.

    Attributes:
        code_size, num_actions, hidden_size, components: `Z`, `A`, `H`, `M`.
        change, reward_scale: units of a code's change `[Z]` and of rewards.
        reward_range: the least and the greatest reward that was ever seen; without bounds at first.
    """

    change: Tensor
    reward_scale: Tensor
    reward_range: Tensor

    def __init__(
        self,
        code_size: int,
        num_actions: int,
        *,
        hidden_size: int = 32,
        components: int = 5,
        head_size: int = 64,
        seed: int = 0,
    ) -> None:
        """Draw the weights from `seed`; the global generator is left as it was.

        Raises:
            ValueError: for sizes below 1.
        """
        super().__init__()
        if min(code_size, num_actions, hidden_size, components, head_size) < 1:
            raise ValueError(
                f"sizes must be at least 1, got {(code_size, num_actions, hidden_size, components, head_size)}"
            )
        self.code_size, self.num_actions = code_size, num_actions
        self.hidden_size, self.components = hidden_size, components
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.memory = nn.LSTM(code_size + num_actions, hidden_size, batch_first=True)
            seen = hidden_size + code_size + num_actions
            # Apart from each other: the density's gradients are so much larger that a shared head would serve it alone.
            self.density = _head(seen, head_size, components * (1 + 2 * code_size))
            self.outcome = _head(seen, head_size, 2)
        self.register_buffer("change", torch.ones(code_size))
        self.register_buffer("reward_scale", torch.ones(()))
        self.register_buffer("reward_range", torch.tensor([-math.inf, math.inf]))

    @property
    def feature_size(self) -> int:
        """`Z + H`: what a controller sees, code and hidden state."""
        return self.code_size + self.hidden_size

    def initial(self, num_rows: int) -> Tensor:
        """The memory before the first step, `[B, 2H]`."""
        return self.change.new_zeros(num_rows, 2 * self.hidden_size)

    def features(self, codes: Tensor, memory: Tensor) -> Tensor:
        """Codes `[B, Z]` and memory `[B, 2H]` to what a controller sees, `[B, Z + H]`."""
        return torch.cat([codes, memory[:, : self.hidden_size]], -1)

    def forward(self, codes: Tensor, actions: Tensor, memory: Tensor) -> tuple[Prediction, Tensor]:
        """What follows each of `T` steps.

        Args:
            codes: `[B, T, Z]`.
            actions: `[B, T]` int64.
            memory: `[B, 2H]`, before the first step.

        Returns:
            predictions `[B, T, ...]`, and the memory after the last step.
        """
        chosen = nn.functional.one_hot(actions, self.num_actions).to(codes.dtype)
        seen = torch.cat([codes, chosen], -1)
        before = tuple(each.unsqueeze(0).contiguous() for each in memory.chunk(2, -1))
        hidden, after = self.memory(seen, before)
        seen = torch.cat([hidden, seen], -1)
        size = self.components * self.code_size
        weights, means, scales = self.density(seen).split([self.components, size, size], -1)
        rest = self.outcome(seen)
        shape = (*codes.shape[:-1], self.components, self.code_size)
        scales = LEAST_LOG_SCALE + (GREATEST_LOG_SCALE - LEAST_LOG_SCALE) * torch.sigmoid(scales.reshape(shape))
        prediction = Prediction(
            weights,
            codes.unsqueeze(-2) + self.change * means.reshape(shape),
            scales + self.change.log(),
            self.reward_scale * rest[..., 0],
            rest[..., 1],
        )
        return prediction, torch.cat(after, -1).squeeze(0)

    def step(self, codes: Tensor, actions: Tensor, memory: Tensor) -> tuple[Prediction, Tensor]:
        """One step: codes `[B, Z]`, actions `[B]`, memory `[B, 2H]`; predictions `[B, ...]` and the memory after it."""
        found, memory = self(codes.unsqueeze(1), actions.unsqueeze(1), memory)
        return Prediction(*(each.squeeze(1) for each in found)), memory

    def set_scales(self, codes: Tensor, next_codes: Tensor, rewards: Tensor) -> None:
        """Units of changes `[N, Z]` and rewards `[N]` from what was seen: root mean squares, or 1 where 0.

        The range of the rewards too, in which dreams stay.
        """
        self.reward_range.copy_(torch.stack([rewards.min(), rewards.max()]))
        for buffer, values in ((self.change, next_codes - codes), (self.reward_scale, rewards)):
            size = values.square().mean(0).sqrt()
            buffer.copy_(torch.where(size > 1e-6, size, torch.ones_like(size)))


def _head(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, outputs)
    )
