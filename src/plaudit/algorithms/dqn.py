"""DQN and Double DQN: a Q-network, replayed steps, a target network."""

import copy
from typing import Any

import torch

from plaudit.algorithms.base import TaskSizes
from plaudit.algorithms.stepping import follow, guarded_step, scheduled_rate, set_learning_rate
from plaudit.configs.q_learning import QLearningConfig
from plaudit.core.q_learning import bootstrapped_targets, double_q_values, greedy_values
from plaudit.core.value_losses import huber_td_loss
from plaudit.models.q_network import QNetwork
from plaudit.rollout.control import observation_vectors
from plaudit.rollout.exploration import linear_schedule
from plaudit.rollout.q_policy import QPolicy
from plaudit.rollout.replay import Replay, ReplayBatch
from plaudit.rollout.trajectory import Trajectory


class DQN:
    """Minimises `E[w · huber(Q_θ(s, a) - y)]` over replayed steps; satisfies `Agent`.

    `y = R + Γ V(s')`, with `R` the sum of up to n discounted rewards, `Γ = γⁿ` (0 at a true end), and
        DQN:         `V(s') = max_a Q_θ⁻(s', a)`                   (Mnih et al. 2015, algorithm 1)
        Double DQN:  `V(s') = Q_θ⁻(s', argmax_a Q_θ(s', a))`       (arXiv:1509.06461, equation 4)
    The target network `θ⁻` is a copy of `θ` now and then, or follows it, `θ⁻ ← τ θ + (1 - τ) θ⁻`.

    Departures from the 2015 paper, all as in Stable-Baselines3: Adam for RMSProp, gradients clipped by their norm, a
    round of updates after many steps of play, rewards as they are; a time limit is no end: it bootstraps from the final
    observation. n-step targets have no off-policy correction, as in Rainbow (arXiv:1710.02298, section 4). A following
    target network is that of Lillicrap et al. (arXiv:1509.02971). The dueling network's gradients are not scaled by
    `1/√2` where its two streams meet, and prioritised replay does not lower the rate, as their papers do.

    Attributes:
        policy: explores along its schedule.
        num_environments, num_steps: see `Agent`.
        network, target: `θ` and `θ⁻`.
        replay: what is remembered.
    """

    def __init__(self, config: QLearningConfig, sizes: TaskSizes, *, total_steps: int, seed: int) -> None:
        """See `Agent`."""
        self.config = config
        self.total_steps = total_steps
        self.num_environments, self.num_steps = config.num_environments, config.rollout_steps
        self.network = QNetwork(*sizes, hidden=config.hidden, dueling=config.dueling, seed=seed)
        self.target = copy.deepcopy(self.network).requires_grad_(False)
        self.policy = QPolicy(
            self.network,
            exploration=config.exploration,
            start=config.exploration_start,
            end=config.exploration_end,
            over=config.exploration_fraction * total_steps,
            random_steps=config.learning_starts,
        )
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=config.learning_rate)
        exponent = config.priority_exponent if config.prioritised else None
        self.replay = Replay(config.buffer_size, config.num_environments, priority_exponent=exponent)
        self.generator = torch.Generator().manual_seed(seed)
        self._copied_at = 0

    def greedy_policy(self) -> QPolicy:
        """`argmax_a Q(o, a)` of the network as it learns on."""
        return QPolicy(self.network)

    def update(self, trajectory: Trajectory) -> dict[str, float]:
        """Remember the steps, and once there are enough of them take `gradient_steps` optimizer steps.

        Raises:
            NonFiniteError: if a loss is not finite; the weights have not been moved by it.
        """
        self.replay.add(trajectory)
        metrics = {"replay/size": float(self.replay.size), "exploration/amount": self.policy.amount}
        if self.policy.steps <= self.config.learning_starts:
            return metrics
        rate = scheduled_rate(
            self.config.schedule, self.config.learning_rate, done=self.policy.steps, total=self.total_steps
        )
        set_learning_rate(self.optimizer, rate)
        if self.config.polyak == 1 and self.policy.steps - self._copied_at >= self.config.target_every:
            self.target.load_state_dict(self.network.state_dict())
            self._copied_at = self.policy.steps
        taken = [self._step() for _ in range(self.config.gradient_steps)]
        return metrics | {name: sum(step[name] for step in taken) / len(taken) for name in taken[0]}

    def targets(self, batch: ReplayBatch) -> torch.Tensor:
        """`y [n]` of replayed steps, without gradient."""
        with torch.no_grad():
            following = observation_vectors(batch.next_observations, self.network.observation_size)
            valued = self.target(following)
            if self.config.name == "double_dqn":
                values = double_q_values(self.network(following), valued)
            else:
                values = greedy_values(valued)
        return bootstrapped_targets(batch.returns, values, batch.discounts)

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer, what is remembered, place in the schedules, random state."""
        return {
            "network": self.network.state_dict(),
            "target": self.target.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "replay": self.replay.state_dict(),
            "steps": self.policy.steps,
            "copied_at": self._copied_at,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.network.load_state_dict(state["network"])
        self.target.load_state_dict(state["target"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.replay.load_state_dict(state["replay"])
        self.policy.steps, self._copied_at = int(state["steps"]), int(state["copied_at"])
        self.generator.set_state(state["generator"])

    def _step(self) -> dict[str, float]:
        config = self.config
        batch = self.replay.sample(
            config.batch_size,
            discount=config.discount,
            num_steps=config.num_steps,
            importance_exponent=linear_schedule(
                self.policy.steps, start=config.importance_exponent, end=1.0, over=self.total_steps
            ),
            generator=self.generator,
        )
        targets = self.targets(batch)
        found = self.network(observation_vectors(batch.observations, self.network.observation_size))
        chosen = found.gather(1, batch.actions.unsqueeze(1)).squeeze(1)
        # One step a row; the weights stand in for the mean over the batch.
        loss, metrics = huber_td_loss(
            chosen.unsqueeze(1),
            targets.unsqueeze(1),
            torch.ones_like(batch.actions, dtype=torch.bool).unsqueeze(1),
            threshold=config.huber_threshold,
            reduction=(batch.weights / len(batch.weights)).unsqueeze(1),
        )
        value = float(loss.detach())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = guarded_step(self.optimizer, value, max_norm=config.max_gradient_norm, where=f"step {self.policy.steps}")
        if config.polyak < 1:
            follow(self.target.parameters(), self.network.parameters(), share=config.polyak)
        self.replay.set_errors(batch.places, chosen.detach() - targets)
        return {
            "value/loss": value,
            "value/mean_q": float(metrics["mean_value"]),
            "value/absolute_error": float(metrics["absolute_error"]),
            "gradient_norm": norm,
        }
