"""Option-critic: options, their policies and their terminations, learned together from one reward.

Bacon, Harb, Precup, "The option-critic architecture" (arXiv:1609.05140). With `U(ω, s') = (1 - β_ω(s')) Q_Ω(s', ω) +
β_ω(s') V_Ω(s')`:

- critic: `Q_Ω(s, ω) → r + γ U(ω, s')` (equations 1 to 3), here by λ-returns along the options that were followed;
- intra-option policy gradient (theorem 1): `Σ μ(s, ω) ∇π_ω(a|s) Q_U(s, ω, a)`, with `Q_Ω(s, ω)` as baseline;
- termination gradient (theorem 2): `-Σ μ(s', ω) ∇β_ω(s') (Q_Ω(s', ω) - V_Ω(s') + η)`, η the deliberation cost of Harb
  et al., "When waiting is not an option" (arXiv:1709.04571).

Departures: as in most actor-critics, and in Harb et al., states are weighted as they were visited and not by discounted
occupancy; the λ-return of the option that acted stands for `Q_U`, so no critic of actions is kept; the deliberation
cost is charged in expectation, `-γ η β_ω(s')` at each step, which has the mean of charging it where an option ended
and less noise; `V_Ω` is that of the ε-greedy policy over options that acts, not the maximum. Nothing is replayed and
there is no target network, where the paper's Atari agent is a DQN over options.
"""

from typing import Any

import torch
from torch import Tensor

from plaudit.algorithms.base import TaskSizes
from plaudit.algorithms.stepping import guarded_step, scheduled_rate, set_learning_rate
from plaudit.configs.option_critic import OptionCriticConfig
from plaudit.core.hierarchy_losses import arrival_values, option_metrics, option_state_values, termination_loss
from plaudit.core.masked import masked_mean
from plaudit.core.policy_losses import policy_gradient_loss
from plaudit.core.reduction import Metrics
from plaudit.core.returns import lambda_returns
from plaudit.core.value_losses import squared_value_loss
from plaudit.models.options import OptionNetwork
from plaudit.rollout.options import OptionPolicy, of_option
from plaudit.rollout.trajectory import Trajectory


class OptionCritic:
    """Satisfies `plaudit.algorithms.base.Agent`.

    Attributes:
        config: its options.
        policy: the options, acting.
        num_environments, num_steps: `B` and `T` of a trajectory.
        num_updates: how many there were.
    """

    def __init__(self, config: OptionCriticConfig, sizes: TaskSizes, *, total_steps: int, seed: int = 0) -> None:
        self.config = config
        self.num_environments, self.num_steps = config.num_environments, config.rollout_steps
        self.network = OptionNetwork(
            sizes.observation_size,
            sizes.num_actions,
            config.num_options,
            hidden=config.hidden,
            termination=config.initial_termination,
            seed=seed,
        )
        self.policy = OptionPolicy(self.network)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=config.learning_rate, eps=1e-5)
        self.total_updates = max(total_steps // (self.num_environments * self.num_steps), 1)
        self.num_updates = 0
        self._schedule()

    def greedy_policy(self) -> OptionPolicy:
        """Acts by each option's likeliest action; options still end by chance."""
        return OptionPolicy(self.network, greedy=True)

    def update(self, trajectory: Trajectory) -> dict[str, float]:
        """One gradient step on `[B, T]` steps with the options that took them.

        Raises:
            NonFiniteError: if the loss or the gradient is not finite; the weights have not been moved.
            ValueError: if the trajectory lacks observations, next observations or options.
        """
        loss, metrics = option_critic_loss(self.policy, trajectory, self.config)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        where = f"update {self.num_updates}"
        norm = guarded_step(self.optimizer, float(loss.detach()), max_norm=self.config.max_gradient_norm, where=where)
        self.num_updates += 1
        self._schedule()
        found = {name: float(value) for name, value in metrics.items()}
        return found | {"gradient_norm": norm, "options/exploration": self.policy.exploration}

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer and counter; the options in force go with the episodes, which cannot be saved."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "num_updates": self.num_updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`, in new episodes."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.num_updates = int(state["num_updates"])
        self.policy.end_episodes(torch.ones(len(self.policy.memory(self.num_environments)), dtype=torch.bool))
        self._schedule()

    def _schedule(self) -> None:
        """Exploration and learning rate of the next update."""
        config, done = self.config, self.num_updates / self.total_updates
        share = min(done / config.exploration_share, 1.0) if config.exploration_share else 1.0
        self.policy.exploration = 1.0 + share * (config.exploration - 1.0)
        rate = scheduled_rate(config.schedule, config.learning_rate, done=self.num_updates, total=self.total_updates)
        set_learning_rate(self.optimizer, rate)


def option_critic_loss(
    policy: OptionPolicy, trajectory: Trajectory, config: OptionCriticConfig
) -> tuple[Tensor, Metrics]:
    """The sum of the losses of policies, terminations and values on `[B, T]` steps, and what to log.

    Raises:
        ValueError: if the trajectory lacks observations, next observations or options.
    """
    if trajectory.next_observations is None or trajectory.options is None:
        raise ValueError("option-critic reads trajectory.next_observations and .options, and one is None")
    options, mask = trajectory.options, trajectory.mask
    evaluation = policy.evaluate(trajectory)
    arrived = policy.outputs(trajectory.next_observations)
    values = arrived.values.detach()
    state_values = option_state_values(values, exploration=policy.exploration)
    upon_arrival = of_option(arrival_values(values, arrived.terminations.detach(), state_values), options)
    ends = of_option(arrived.terminations, options)
    fee = config.discount * config.deliberation_cost * ends.detach() * trajectory.continues
    returns = lambda_returns(
        trajectory.rewards - fee,
        upon_arrival,
        trajectory.continues,
        trajectory.truncated,
        mask,
        discount=config.discount,
        return_lambda=config.gae_lambda,
    )
    advantages = returns - evaluation.values.detach()
    policy_loss, _ = policy_gradient_loss(evaluation.logprobs, advantages, mask, reduction="per_token")
    value_loss, value_metrics = squared_value_loss(evaluation.values, returns, mask)
    goes_on = mask & (trajectory.continues > 0)
    ending_loss, ending_metrics = termination_loss(
        ends,
        of_option(values, options),
        state_values,
        goes_on,
        reduction="per_token",
        deliberation_cost=config.deliberation_cost,
    )
    entropy = masked_mean(evaluation.entropy, mask)
    loss = (
        policy_loss
        + config.value_coefficient * value_loss
        + config.termination_coefficient * ending_loss
        - config.entropy_coefficient * entropy
    )
    usage = option_metrics(options, ends, goes_on, num_options=config.num_options)
    metrics = {
        "loss": loss.detach(),
        "policy/loss": policy_loss.detach(),
        "policy/entropy": entropy.detach(),
        "value/loss": value_loss.detach(),
        "value/explained_variance": value_metrics["explained_variance"],
        **{f"options/{name}": value for name, value in (ending_metrics | usage).items()},
    }
    return loss, metrics
