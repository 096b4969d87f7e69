"""Soft Q-learning on answers: a language model whose log-probabilities and critic together are its action values."""

from typing import Any

import torch
from torch import Tensor

from plaudit.algorithms.base import Prepared
from plaudit.algorithms.minibatches import micro_batches, plan_minibatches
from plaudit.algorithms.stepping import guarded_step
from plaudit.algorithms.targets import penalised_rewards
from plaudit.algorithms.updating import take_steps
from plaudit.configs.q_learning import SoftQConfig
from plaudit.core.finite import NonFiniteError
from plaudit.core.kl import kl_k1
from plaudit.core.masked import masked_mean
from plaudit.core.q_learning import boltzmann_action_values
from plaudit.core.reduction import Metrics, step_weights
from plaudit.core.returns import gae
from plaudit.core.value_losses import huber_td_loss
from plaudit.rollout.trajectory import Policy, Trajectory


class SoftQ:
    """Fits `Q(s, a) = V(s) + β log π(a|s)/π_ref(a|s)` to `y`; satisfies `plaudit.algorithms.base.Algorithm`.

        y_t = r_t + γ ((1 - λ) V⁻(s_{t+1}) + λ G_{t+1}),   G_t = y_t - β log π_old(a_t|s_t)/π_ref(a_t|s_t)
        ℓ = mean_t huber(Q(s_t, a_t) - y_t)

    Any `π` and `V` are action values in this way, and those for which `π ∝ π_ref exp(Q/β)` and
    `V = β log Σ_a π_ref exp(Q/β)` hold exactly: the model *is* its Boltzmann policy and the critic its soft backup, so
    nothing of the size of the vocabulary is added, and sampling, evaluation and export are those of any language model.
    `V⁻` and `π_old` are of the moment at which the batch was sampled: the target network. At `(π*, V*)` every error is
    0, whatever sampled the answers and for every λ, so no importance weights are needed there.

    Sources: Haarnoja et al. (arXiv:1702.08165), soft Q-learning; Nachum et al. (arXiv:1702.08892), path consistency,
    from which the parametrisation is; Mnih et al. (2015), the target network. Departures: a reference in the place of
    the uniform policy; λ-returns; no replay of earlier batches.

    Attributes:
        config: every option.
        policy: learns, critic included.
        needs_critic, needs_groups, needs_greedy: True, False, False.
        num_updates: batches finished so far.
    """

    needs_critic = True
    needs_groups = False
    needs_greedy = False

    def __init__(
        self,
        config: SoftQConfig,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        *,
        max_gradient_norm: float | None = None,
        total_updates: int | None = None,
    ) -> None:
        """See `plaudit.algorithms.build.build_algorithm`; `total_updates` is not needed."""
        self.config = config
        self.policy = policy
        self.optimizer = optimizer
        self.max_gradient_norm = max_gradient_norm
        self.num_updates = 0

    def prepare(self, trajectory: Trajectory, *, baselines: Tensor | None = None) -> Prepared:
        """The targets of a batch, in `Prepared.returns`.

        Raises:
            ValueError: for given baselines.
            NonFiniteError: for a reward that is not finite.
        """
        if baselines is not None:
            raise ValueError("greedy baselines were given, but soft Q-learning compares with its own critic")
        mask, beta = trajectory.mask, self.config.kl_coefficient
        if not bool(trajectory.rewards[mask].isfinite().all()):
            raise NonFiniteError(f"update {self.num_updates}: a reward is not finite, so nothing was learned from it")
        rewards = penalised_rewards(trajectory, coefficient=beta, estimator="k1")
        advantages, returns = gae(
            rewards,
            trajectory.values,
            trajectory.next_values,
            trajectory.continues,
            trajectory.truncated,
            mask,
            discount=self.config.discount,
            gae_lambda=self.config.target_lambda,
        )
        per_step = kl_k1(trajectory.old_logprobs, trajectory.reference_logprobs).masked_fill(~mask, 0.0)
        # The penalty of the action itself is not in its value.
        targets = returns + beta * per_step
        answers = mask.any(1)
        metrics = {
            "objective/kl": float(masked_mean(per_step.sum(1), answers)),
            "objective/kl_per_token": float(masked_mean(per_step, mask)),
            "objective/kl_coefficient": beta,
            "objective/penalised_reward": float(masked_mean(rewards.sum(1), answers)),
        }
        return Prepared(trajectory=trajectory, advantages=advantages, returns=targets, metrics=metrics)

    def minibatches(self, prepared: Prepared, generator: torch.Generator | None = None) -> list[Tensor]:
        """Row indices of every optimizer step, all epochs in order."""
        config = self.config
        return plan_minibatches(
            prepared.trajectory, epochs=config.epochs, minibatches=config.minibatches, generator=generator
        )

    def step(self, prepared: Prepared, rows: Tensor) -> dict[str, float]:
        """One optimizer step on these rows `[n]` int64.

        Raises:
            NonFiniteError: if the loss or the gradient is not finite; the weights have not been moved.
            ValueError: if the policy has no critic that learns.
        """
        rows = rows.to(prepared.returns.device)
        trajectory, targets = prepared.trajectory.select(rows), prepared.returns[rows]
        weights = step_weights(trajectory.mask, "per_token", dtype=targets.dtype)
        self.optimizer.zero_grad(set_to_none=True)
        total, found = 0.0, []
        for part in micro_batches(self.policy, trajectory):
            loss, metrics = self.loss(trajectory.select(part), targets[part], weights[part])
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
            # Means over the tokens of a part count by how many there are.
            share = float(weights[part].sum())
            found.append({name: share * float(value) for name, value in metrics.items()})
        where = f"update {self.num_updates}"
        norm = guarded_step(self.optimizer, total, max_norm=self.max_gradient_norm, where=where)
        together = {name: sum(part[name] for part in found) for name in found[0]}
        return {"value/loss": total, **together, "gradient_norm": norm}

    def loss(self, trajectory: Trajectory, targets: Tensor, weights: Tensor) -> tuple[Tensor, Metrics]:
        """`Σ_t w_t huber(Q(s_t, a_t) - y_t)` of rows `[b, T]`, and means over their tokens."""
        mask = trajectory.mask
        evaluation = self.policy.evaluate(trajectory)
        if not evaluation.values.requires_grad:
            raise ValueError("soft Q-learning needs a critic that learns, but the policy's values have no gradient")
        action_values = boltzmann_action_values(
            evaluation.values,
            evaluation.logprobs.masked_fill(~mask, 0.0),
            trajectory.reference_logprobs.masked_fill(~mask, 0.0),
            coefficient=self.config.kl_coefficient,
        )
        loss, metrics = huber_td_loss(
            action_values, targets, mask, threshold=self.config.huber_threshold, reduction=weights
        )
        found = {f"value/{name}": metrics[name] for name in ("absolute_error", "mean_value", "explained_variance")}
        ratio = (evaluation.logprobs.detach() - trajectory.old_logprobs).masked_fill(~mask, 0.0)
        found["policy/approximate_kl"] = masked_mean(ratio.exp() - 1 - ratio, mask)
        found["policy/entropy"] = masked_mean(evaluation.entropy.detach(), mask)
        return loss, found

    def stop_early(self, metrics: dict[str, float]) -> bool:
        """Never."""
        return False

    def finish(self, metrics: dict[str, float]) -> dict[str, float]:
        """Count the update."""
        self.num_updates += 1
        return dict(metrics)

    def update(
        self, trajectory: Trajectory, *, baselines: Tensor | None = None, generator: torch.Generator | None = None
    ) -> dict[str, float]:
        """Every step on one batch of experience; means of their metrics."""
        return take_steps(self, self.prepare(trajectory, baselines=baselines), generator)

    def state_dict(self) -> dict[str, Any]:
        """A counter."""
        return {"num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.num_updates = int(state["num_updates"])
