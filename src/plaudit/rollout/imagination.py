"""Experience that never happened: dreams in a learned world, and acting in the real one with the world's memory.

A dream is a trajectory like any other, so every algorithm can learn from it. What its policy sees at each step is
`[z, h]`, the code and the memory of `plaudit.models.world.RecurrentDynamics`.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from plaudit.core.world_losses import sample_mixture
from plaudit.models.world import PlainEncoder, RecurrentDynamics, VariationalEncoder
from plaudit.rollout.control import ControlPolicy
from plaudit.rollout.trajectory import Evaluation, Sampled, StepPolicy, Trajectory, new_trajectory, observations_of


class World(nn.Module):
    """A learned world: encoder and dynamics."""

    def __init__(self, encoder: PlainEncoder | VariationalEncoder, dynamics: RecurrentDynamics) -> None:
        super().__init__()
        if encoder.code_size != dynamics.code_size:
            raise ValueError(f"codes of size {encoder.code_size} for dynamics over {dynamics.code_size}")
        self.encoder, self.dynamics = encoder, dynamics


class _Step(NamedTuple):
    """A dreamed step of all rows."""

    features: Tensor
    drawn: Sampled
    rewards: Tensor
    continues: Tensor
    alive: Tensor
    following: Tensor


def _steps(
    world: RecurrentDynamics,
    policy: StepPolicy,
    starts: Tensor,
    *,
    horizon: int,
    temperature: float,
    generator: torch.Generator | None,
    repeats: int,
) -> Iterator[_Step]:
    """Dreamed steps until all rows have ended; rows come `repeats` times and share their random numbers."""
    codes = starts.repeat(repeats, 1)
    rows = len(codes)
    memory, alive = world.initial(rows), torch.ones(rows, dtype=torch.bool)
    features = world.features(codes, memory)
    for _ in range(horizon):
        drawn = policy.sample(features, generator=generator)
        found, memory = world.step(codes, drawn.actions, memory)
        uniform = torch.rand(len(starts), generator=generator, dtype=codes.dtype)
        normal = torch.randn(starts.shape, generator=generator, dtype=codes.dtype)
        codes = sample_mixture(*found[:3], uniform.repeat(repeats), normal.repeat(repeats, 1), temperature=temperature)
        following = world.features(codes, memory)
        goes_on = found.continuation_logits > 0
        # No more than was ever seen: a controller finds where a head that extrapolates promises too much.
        rewards = found.rewards.clamp(*world.reward_range)
        yield _Step(features, drawn, rewards, goes_on, alive, following)
        features, alive = following, alive & goes_on
        if not alive.any():
            return


@torch.no_grad()
def dream(
    world: RecurrentDynamics,
    policy: StepPolicy,
    starts: Tensor,
    *,
    horizon: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Trajectory:
    """Let a policy act in the learned world.

    Args:
        world: the dynamics.
        policy: sees features `[B, Z + H]`.
        starts: codes `[B, Z]` of first observations.
        horizon: most steps; a row that is still going then is truncated.
        temperature: `τ` of `sample_mixture`; above 1 the world is less certain than it was learned to be.
        generator: of actions and outcomes.

    Returns:
        a trajectory `[B, T]`, `T` the longest row, with `observations` and `next_observations` `[B, T, Z + H]`. A row
        ends where going on is less likely than not; steps behind that are masked.

    Raises:
        ValueError: for a horizon below 1.
    """
    if horizon < 1:
        raise ValueError(f"a dream needs a horizon of at least 1, got {horizon}")
    steps = list(
        _steps(world, policy, starts, horizon=horizon, temperature=temperature, generator=generator, repeats=1)
    )
    mask = torch.stack([step.alive for step in steps], 1)
    continues = torch.stack([step.continues for step in steps], 1)
    following = torch.stack([step.following for step in steps], 1)
    truncated = torch.zeros_like(mask)
    if len(steps) == horizon:
        truncated[:, -1] = mask[:, -1] & continues[:, -1]
    rewards = torch.stack([step.rewards for step in steps], 1)
    return new_trajectory(
        actions=torch.stack([step.drawn.actions for step in steps], 1),
        behaviour_logprobs=torch.stack([step.drawn.logprobs for step in steps], 1),
        rewards=rewards.masked_fill(~mask, 0.0),
        continues=continues.to(rewards.dtype),
        truncated=truncated,
        mask=mask,
        values=torch.stack([step.drawn.values for step in steps], 1),
        next_values=policy.values(following),
        observations=torch.stack([step.features for step in steps], 1),
        next_observations=following,
    )


@torch.no_grad()
def dreamed_returns(
    world: RecurrentDynamics,
    weights: Tensor,
    starts: Tensor,
    *,
    horizon: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Undiscounted returns of several linear controllers, all in the same dreams: `[N, D]`.

    Args:
        world: the dynamics.
        weights: `[N, A, Z + H + 1]`, see `LinearController`.
        starts: `[D, Z]`; every controller begins in each and meets the same random numbers.
        horizon, temperature, generator: see `dream`.
    """
    controllers = LinearController(weights.repeat_interleave(len(starts), 0))
    total = torch.zeros(len(weights) * len(starts), dtype=starts.dtype)
    for step in _steps(
        world,
        controllers,
        starts,
        horizon=horizon,
        temperature=temperature,
        generator=generator,
        repeats=len(weights),
    ):
        total += step.rewards * step.alive
    return total.reshape(len(weights), len(starts))


class LinearController(nn.Module):
    """`a = argmax_a (W [f, 1])_a`: the smallest controller there is, the same always; satisfies `StepPolicy`.

    Source: Ha and Schmidhuber (arXiv:1803.10122), section 2.4, for discrete actions.

    Attributes:
        weights: `[A, F + 1]`, the last column a bias; or `[B, A, F + 1]`, one controller per row.
    """

    weights: Tensor

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("weights", weights)

    def sample(self, observations: Tensor, *, generator: torch.Generator | None = None) -> Sampled:
        """The best action for each of `[B, F]` features."""
        actions = self._scores(observations).argmax(-1)
        zeros = observations.new_zeros(len(observations))
        return Sampled(actions, zeros, zeros)

    def values(self, observations: Tensor) -> Tensor:
        """0: it has no critic."""
        return observations.new_zeros(observations.shape[:-1])

    def evaluate(self, trajectory: Trajectory) -> Evaluation:
        """Log-probability 0 of what it would do and -inf of all else, `[B, T]`."""
        chosen = self._scores(observations_of(trajectory)).argmax(-1) == trajectory.actions
        zeros = torch.zeros_like(trajectory.rewards)
        return Evaluation(zeros.masked_fill(~chosen, float("-inf")), zeros, zeros)

    def _scores(self, features: Tensor) -> Tensor:
        slope, bias = self.weights[..., :-1], self.weights[..., -1]
        return (slope @ features.unsqueeze(-1)).squeeze(-1) + bias


class WorldPolicy(nn.Module):
    """Acts in the real world on code and memory; satisfies `StepPolicy` and `StatefulPolicy`.

    Attributes:
        world: the learned world, which is only used as eyes and memory here.
        controller: acts on features `[B, Z + H]`.
        prepare: turns the environment's observations into what the encoder reads.
    """

    def __init__(
        self, world: World, controller: "LinearController | ControlPolicy", prepare: "ObservationShape"
    ) -> None:
        super().__init__()
        self.world, self.controller, self.prepare = world, controller, prepare
        self._memory = world.dynamics.initial(0)

    def memory(self, num_rows: int) -> Tensor:
        """`[B, 2H]`; fresh where the number of rows is another than before."""
        if len(self._memory) != num_rows:
            self._memory = self.world.dynamics.initial(num_rows)
        return self._memory

    def end_episodes(self, ended: Tensor) -> None:
        """Forget the rows `[B]` whose episode has ended."""
        self._memory = self._memory.masked_fill(ended.unsqueeze(1), 0.0)

    @torch.no_grad()
    def sample(self, observations: Tensor, *, generator: torch.Generator | None = None) -> Sampled:
        """One action for each of `[B, ...]` observations; the memory moves on."""
        memory = self.memory(len(observations))
        codes = self.world.encoder.encode(self.prepare(observations))
        drawn = self.controller.sample(self.world.dynamics.features(codes, memory), generator=generator)
        _, self._memory = self.world.dynamics.step(codes, drawn.actions, memory)
        return drawn

    def values(self, observations: Tensor) -> Tensor:
        """0 for observations `[B, T, ...]`: nobody bootstraps from real steps here."""
        return torch.zeros(observations.shape[:2])

    def evaluate(self, trajectory: Trajectory) -> Evaluation:
        """The controller's view `[B, T]` of a dream, whose observations are features."""
        return self.controller.evaluate(trajectory)


class ObservationShape:
    """The environment's observations as an encoder reads them.

    Attributes:
        size: of vectors; discrete observations become one-hot vectors of that size.
        picture: `(height, width, channels)` where the vectors are pictures, row by row; None where they are not.
        scale: what pixels are divided by.
    """

    def __init__(self, size: int, picture: tuple[int, int, int] | None = None, *, scale: float = 255.0) -> None:
        if picture is not None and math.prod(picture) != size:
            raise ValueError(f"picture: {list(picture)} has {math.prod(picture)} numbers, an observation has {size}")
        self.size, self.picture, self.scale = size, picture, scale

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one prepared observation: `(size,)`, or channels first."""
        return (self.size,) if self.picture is None else (self.picture[2], *self.picture[:2])

    def __call__(self, observations: Tensor) -> Tensor:
        """Vectors `[..., size]`, or discrete observations `[...]`, to `[..., *shape]` float32."""
        if not observations.is_floating_point():
            return nn.functional.one_hot(observations, self.size).float()
        if self.picture is None:
            return observations.float()
        pixels = observations.float().reshape(*observations.shape[:-1], *self.picture)
        return pixels.movedim(-1, -3) / self.scale
