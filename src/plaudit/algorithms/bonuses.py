"""Bonuses for what is new: counts of observations, and random network distillation."""

from typing import Any, Protocol

import torch
from torch import Tensor

from plaudit.algorithms.stepping import guarded_step
from plaudit.configs.bonus import CountBonusConfig, DistillationBonusConfig
from plaudit.models.control import perceptron
from plaudit.rollout.control import observation_vectors


class Bonus(Protocol):
    """What an observation is worth for being new."""

    def pay(self, observations: Tensor) -> Tensor:
        """The bonus `[B, T]` of observations `[B, T, ...]` in the order of time, which are then known better."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and strings."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        ...


class CountBonus:
    """`scale / √N(s')`, `N` being 1 the first time. Source: Strehl and Littman, "An analysis of model-based interval
    estimation" (2008); Bellemare et al. (arXiv:1606.01868), equation 4.

    Attributes:
        counts: how often each observation has been reached, by its numbers.
    """

    def __init__(self, config: CountBonusConfig) -> None:
        self.config = config
        self.counts: dict[tuple[float, ...], int] = {}

    def pay(self, observations: Tensor) -> Tensor:
        """See `Bonus`."""
        rows, steps = observations.shape[:2]
        found = torch.zeros(rows, steps)
        rounded = observations.double().round(decimals=self.config.decimals) if observations.ndim > 2 else observations
        table = rounded.reshape(rows, steps, -1).tolist()
        for step in range(steps):
            for row in range(rows):
                key = tuple(table[row][step])
                self.counts[key] = self.counts.get(key, 0) + 1
                found[row, step] = self.config.scale / self.counts[key] ** 0.5
        return found

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        keys = torch.tensor(list(self.counts), dtype=torch.float64)
        return {"keys": keys, "counts": torch.tensor(list(self.counts.values()))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        keys = [tuple(row) for row in state["keys"].tolist()]
        self.counts = dict(zip(keys, state["counts"].tolist(), strict=True))


class DistillationBonus:
    """`scale · ‖f̂(s') - f(s')‖² / mean`, with `f` random and `f̂` trained to predict it on what was reached.

    What has been reached often is predicted well and pays little. Observations are standardised by their running mean
    and deviation and limited to ±5; errors are divided by their mean over all that has been reached so far, so an
    observation as new as they were on average pays `scale`, and once all is known nothing pays. Source: Burda et al.,
    "Exploration by random network distillation" (arXiv:1810.12894), section 2. Departures: errors are divided by their
    mean, not by the deviation of their returns; there is one value for both rewards, with one discount, so bonuses end
    with the episode (the paper's go on behind it); normalising begins with the first batch, without steps at random.

    Attributes:
        target, predictor: `f` and `f̂`.
    """

    def __init__(self, config: DistillationBonusConfig, observation_size: int, *, seed: int = 0) -> None:
        """Networks over observations of this size."""
        self.config, self.observation_size = config, observation_size
        generator = torch.Generator().manual_seed(seed)
        sizes = (observation_size, *config.hidden, config.features)
        self.target = perceptron(sizes, 1.0, generator).requires_grad_(False)
        self.predictor = perceptron(sizes, 1.0, generator)
        self.optimizer = torch.optim.Adam(self.predictor.parameters(), lr=config.learning_rate)
        self._seen = 0
        self._mean = torch.zeros(observation_size, dtype=torch.float64)
        self._squares = torch.zeros(observation_size, dtype=torch.float64)
        self._errors = 0.0

    def pay(self, observations: Tensor) -> Tensor:
        """See `Bonus`; then the optimizer steps on these observations.

        Raises:
            NonFiniteError: for observations that are not finite.
        """
        vectors = observation_vectors(observations, self.observation_size)
        self._count(vectors.reshape(-1, self.observation_size).double())
        deviation = (self._squares / self._seen).sqrt().clamp(min=1e-6)
        known = ((vectors.double() - self._mean) / deviation).clamp(-5, 5).float()
        before = self._differences(known).detach()
        for _ in range(self.config.gradient_steps):
            self.optimizer.zero_grad(set_to_none=True)
            loss = self._differences(known).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            guarded_step(self.optimizer, float(loss.detach()), max_norm=None, where="random network distillation")
        self._errors += float(before.double().sum())
        return self.config.scale * before * self._seen / max(self._errors, 1e-12)

    def state_dict(self) -> dict[str, Any]:
        """Both networks, the optimizer and the running statistics."""
        return {
            "target": self.target.state_dict(),
            "predictor": self.predictor.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "seen": self._seen,
            "mean": self._mean,
            "squares": self._squares,
            "errors": self._errors,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.target.load_state_dict(state["target"])
        self.predictor.load_state_dict(state["predictor"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._seen, self._errors = int(state["seen"]), float(state["errors"])
        self._mean, self._squares = state["mean"].clone(), state["squares"].clone()

    def _differences(self, known: Tensor) -> Tensor:
        found: Tensor = (self.predictor(known) - self.target(known)).square().mean(-1)
        return found

    def _count(self, vectors: Tensor) -> None:
        """Running mean and sum of squared deviations, by the rule for joining two samples (Chan et al. 1979)."""
        count = len(vectors)
        mean = vectors.mean(0)
        apart = mean - self._mean
        together = self._seen + count
        self._squares = (
            self._squares + (vectors - mean).square().sum(0) + apart.square() * self._seen * count / together
        )
        self._mean = self._mean + apart * count / together
        self._seen = together
