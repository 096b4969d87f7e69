"""The whole policy-gradient family: prepare a batch, cut it into steps, take them, adapt the coefficients."""

from typing import Any

import torch
from torch import Tensor

from plaudit.algorithms.base import Algorithm, Prepared
from plaudit.algorithms.minibatches import micro_batches, plan_minibatches
from plaudit.algorithms.objective import Coefficients, Rows, step_loss, value_error, weigh_rows
from plaudit.algorithms.stepping import guarded_step
from plaudit.algorithms.targets import actions_mask, estimate_targets, penalised_rewards
from plaudit.configs.algorithm import GROUP_BASELINES, AlgorithmConfig
from plaudit.core.advantages import RunningMean
from plaudit.core.finite import NonFiniteError
from plaudit.core.kl import adaptive_kl_coefficient, kl_k1
from plaudit.core.masked import masked_mean, masked_variance, masked_whiten
from plaudit.core.reduction import Metrics
from plaudit.rollout.trajectory import Evaluation, Policy, Trajectory


class PolicyGradient:
    """REINFORCE, RLOO, GRPO, REINFORCE++, actor-critic, A2C, PPO and DPO: which one is what the configuration says.

    Satisfies `plaudit.algorithms.base.Algorithm`. The learning rate is the optimizer's, its schedule the caller's.

    Attributes:
        config: what was asked for; `settings` is the same with nothing left open.
        needs_critic, needs_groups, needs_greedy: see `Algorithm`.
        kl_coefficient, old_kl_coefficient: `β` towards the reference and towards the old policy, perhaps adapted.
        running_mean: the running baseline.
        num_updates: batches finished so far.
    """

    def __init__(
        self,
        config: AlgorithmConfig,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        *,
        max_gradient_norm: float | None = None,
        total_updates: int | None = None,
    ) -> None:
        """See `plaudit.algorithms.build.build_algorithm`."""
        self.config = config
        self.settings = config.resolved()
        if self.settings.clip_schedule != "constant" and total_updates is None:
            raise ValueError("clip_schedule: linear needs total_updates, the number of updates of the run")
        self.policy = policy
        self.optimizer = optimizer
        self.max_gradient_norm = max_gradient_norm
        self.total_updates = total_updates
        self.needs_critic = self.settings.baseline == "value"
        self.needs_groups = self.settings.baseline in GROUP_BASELINES or self.settings.surrogate == "preference"
        self.needs_greedy = self.settings.baseline == "greedy"
        self.kl_coefficient = self.settings.kl_coefficient
        self.old_kl_coefficient = self.settings.old_kl_coefficient
        self.running_mean = RunningMean()
        self.num_updates = 0

    @property
    def warming_up(self) -> bool:
        """Whether the update that is under way is for the critic alone."""
        return self.num_updates < self.settings.critic_warmup

    def prepare(self, trajectory: Trajectory, *, baselines: Tensor | None = None) -> Prepared:
        """Rewards with the penalty in them, advantages and returns of a batch.

        Args:
            trajectory: `rewards` are the task's; `old_logprobs`, `reference_logprobs` and `values` are there already.
            baselines: `[B]`, the return of the greedy answer to each row's prompt, for the baseline `greedy` alone.

        Raises:
            ValueError: for a reward that is not finite, or what `estimate_targets` refuses.
        """
        settings = self.settings
        self._require_finite_rewards(trajectory)
        in_reward = self.kl_coefficient if settings.kl_placement == "reward" else 0.0
        rewards = penalised_rewards(trajectory, coefficient=in_reward, estimator=settings.kl_estimator)
        targets = estimate_targets(trajectory, rewards, settings, running_mean=self.running_mean, baselines=baselines)
        self.running_mean = targets.running_mean
        metrics = self._divergence_metrics(trajectory)
        mask = trajectory.mask & targets.usable.unsqueeze(1)
        actions = actions_mask(mask, settings.view)
        metrics["objective/advantage_std"] = float(masked_variance(targets.advantages, actions).sqrt())
        answers = trajectory.mask.any(1)
        metrics["objective/penalised_reward"] = float(masked_mean(rewards.sum(1), answers))
        metrics["objective/rows_left_out"] = float((~targets.usable).sum())
        advantages = targets.advantages
        if settings.whiten_advantages:
            advantages = masked_whiten(advantages, actions)
        return Prepared(
            trajectory=trajectory.with_fields(mask=mask),
            advantages=advantages,
            returns=targets.returns,
            metrics=metrics,
        )

    def minibatches(self, prepared: Prepared, generator: torch.Generator | None = None) -> list[Tensor]:
        """Row indices of every optimizer step, all epochs in order, each epoch in an order of its own.

        The rows of a prompt stay together as long as there are at least as many prompts as minibatches. Rows without a
        counted step are in none; fewer rows than minibatches give fewer steps.
        """
        settings = self.settings
        return plan_minibatches(
            prepared.trajectory,
            epochs=settings.epochs,
            minibatches=settings.minibatches,
            keep_groups=settings.reduction == "per_prompt",
            generator=generator,
        )

    def step(self, prepared: Prepared, rows: Tensor) -> dict[str, float]:
        """One optimizer step on these rows `[n]` int64, forward and backward in the policy's micro-batches.

        The loss is that of all rows together, whatever the micro-batches. `prepared.evaluation` saves the forward pass;
        the rows are all of the batch's then, in their own order, and this is the only step on it. While the critic
        warms up, the loss is `c₁ L_V` and the policy stays as it is.

        Raises:
            NonFiniteError: if the loss or the gradient is not finite; the weights have not been moved.
            ValueError: if a learned value is needed and the policy has none.
        """
        device = prepared.advantages.device
        rows = rows.to(device)
        whole = weigh_rows(
            prepared.trajectory.select(rows), prepared.advantages[rows], prepared.returns[rows], self.settings
        )
        coefficients = Coefficients(self.kl_coefficient, self.old_kl_coefficient, self._clip_scale())
        self.optimizer.zero_grad(set_to_none=True)
        if self.warming_up:
            loss, found = self._backward_of_critic(whole)
        else:
            loss, found = self._backward(whole, coefficients, prepared.evaluation)
        norm = guarded_step(
            self.optimizer,
            float(loss),
            max_norm=self.max_gradient_norm,
            where=f"update {self.num_updates}, rows {_shown(rows)}",
            hint="Lower the learning rate, or look at the rewards and log-probabilities of these rows",
        )
        return {name: float(value) for name, value in found.items()} | {"gradient_norm": norm}

    def stop_early(self, metrics: dict[str, float]) -> bool:
        """Whether `KL(π_old‖π_θ)` per action of the last step was above 1.5 times `target_kl`."""
        target = self.settings.target_kl
        return target is not None and metrics.get("policy/approximate_kl", 0.0) > 1.5 * target

    def finish(self, metrics: dict[str, float]) -> dict[str, float]:
        """Adapt the coefficients to the divergences that were measured, and count the update.

        While the critic warms up, the policy has not moved, and its divergence says nothing about a coefficient.

        Args:
            metrics: with `objective/kl` of the batch and `policy/approximate_kl` of its steps.

        Returns:
            the metrics, with the coefficients of the next update where they are adapted.
        """
        settings = self.settings
        found = dict(metrics)
        if settings.kl_target is not None and not self.warming_up:
            self.kl_coefficient = adaptive_kl_coefficient(
                self.kl_coefficient, metrics["objective/kl"], target=settings.kl_target, gain=settings.kl_adaptation
            )
            found["objective/next_kl_coefficient"] = self.kl_coefficient
        if settings.old_kl_target is not None and "policy/approximate_kl" in metrics:
            self.old_kl_coefficient = adaptive_kl_coefficient(
                self.old_kl_coefficient,
                metrics["policy/approximate_kl"],
                target=settings.old_kl_target,
                gain=settings.kl_adaptation,
            )
            found["policy/next_old_kl_coefficient"] = self.old_kl_coefficient
        self.num_updates += 1
        return found

    def update(
        self, trajectory: Trajectory, *, baselines: Tensor | None = None, generator: torch.Generator | None = None
    ) -> dict[str, float]:
        """Every step on one batch of experience.

        Args:
            trajectory, baselines: as in `prepare`.
            generator: orders the minibatches; None for torch's own.

        Returns:
            the metrics of the batch with those of its steps: least and greatest ratio, the mean of all others, and
            `policy/steps`, how many were taken.
        """
        return take_steps(self, self.prepare(trajectory, baselines=baselines), generator)

    def state_dict(self) -> dict[str, Any]:
        """Coefficients, running baseline and counters, as numbers."""
        return {
            "kl_coefficient": self.kl_coefficient,
            "old_kl_coefficient": self.old_kl_coefficient,
            "running_total": self.running_mean.total,
            "running_weight": self.running_mean.weight,
            "num_updates": self.num_updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.kl_coefficient = float(state["kl_coefficient"])
        self.old_kl_coefficient = float(state["old_kl_coefficient"])
        self.running_mean = RunningMean(float(state["running_total"]), float(state["running_weight"]))
        self.num_updates = int(state["num_updates"])

    def _backward(self, whole: Rows, coefficients: Coefficients, known: Evaluation | None) -> tuple[Tensor, Metrics]:
        """Gradients of all rows, micro-batch by micro-batch; loss and metrics of the whole, without gradient."""
        pairs = self.settings.surrogate == "preference"  # are made of answers that go together
        parts = [torch.empty(0)] if known else micro_batches(self.policy, whole.trajectory, whole_groups=pairs)
        tables: list[Tensor] = []
        for part in parts:
            rows = whole if len(parts) == 1 else whole.select(part)
            evaluation = self.policy.evaluate(rows.trajectory) if known is None else known
            if self.needs_critic:
                require_critic(evaluation.values)
            loss, metrics = step_loss(evaluation, rows, self.settings, coefficients)
            loss.backward()  # type: ignore[no-untyped-call]
            if len(parts) == 1:
                return loss.detach(), metrics
            tables.append(torch.stack([tensor.detach() for tensor in evaluation]))
        together = Evaluation(*torch.cat(tables, 1)[:, torch.cat(parts).argsort()])
        with torch.no_grad():
            return step_loss(together, whole, self.settings, coefficients)

    def _backward_of_critic(self, whole: Rows) -> tuple[Tensor, Metrics]:
        """As `_backward`, of the critic's error alone: no gradient goes into anything else."""
        tables: list[Tensor] = []
        parts = micro_batches(self.policy, whole.trajectory)
        for part in parts:
            rows = whole.select(part)
            values = critic_values(self.policy, rows.trajectory)
            loss, _ = value_error(values, rows, self.settings)
            (self.settings.value_coefficient * loss).backward()  # type: ignore[no-untyped-call]
            tables.append(values.detach())
        with torch.no_grad():
            loss, metrics = value_error(torch.cat(tables)[torch.cat(parts).argsort()], whole, self.settings)
        return loss, metrics

    def _clip_scale(self) -> float:
        if self.settings.clip_schedule == "constant" or self.total_updates is None:
            return 1.0
        return max(1 - self.num_updates / self.total_updates, 0.0)

    def _divergence_metrics(self, trajectory: Trajectory) -> dict[str, float]:
        mask = trajectory.mask
        per_step = kl_k1(trajectory.old_logprobs, trajectory.reference_logprobs).masked_fill(~mask, 0.0)
        return {
            "objective/kl": float(masked_mean(per_step.sum(1), mask.any(1))),
            "objective/kl_per_token": float(masked_mean(per_step, mask)),
            "objective/kl_coefficient": self.kl_coefficient,
        }

    def _require_finite_rewards(self, trajectory: Trajectory) -> None:
        bad = (~trajectory.rewards.isfinite() & trajectory.mask).any(1).nonzero().flatten()
        if len(bad):
            raise NonFiniteError(
                f"update {self.num_updates}: rewards of rows {_shown(bad)} are not finite, so nothing was learned from "
                "the batch. A reward that is missing has to be left out, not written as NaN"
            )


def critic_values(policy: Policy, trajectory: Trajectory) -> Tensor:
    """`V(s_t)` `[B, T]` with gradients, into the critic alone where the policy offers that (`critic_values`).

    Raises:
        ValueError: if the values have no gradient: there is no critic that learns.
    """
    own = getattr(policy, "critic_values", None)
    values: Tensor = policy.evaluate(trajectory).values if own is None else own(trajectory)
    require_critic(values)
    return values


def require_critic(values: Tensor) -> None:
    """Refuse values that nothing can be learned from.

    Raises:
        ValueError: if they have no gradient.
    """
    if not values.requires_grad:
        raise ValueError("the baseline value needs a critic that learns, but the policy's values have no gradient")


def take_steps(algorithm: Algorithm, prepared: Prepared, generator: torch.Generator | None) -> dict[str, float]:
    """Every step of an algorithm on a batch, until it wants no further one; the metrics of the batch with theirs."""
    taken: list[dict[str, float]] = []
    for rows in algorithm.minibatches(prepared, generator):
        taken.append(algorithm.step(prepared, rows))
        if algorithm.stop_early(taken[-1]):
            break
    return algorithm.finish(prepared.metrics | combine_metrics(taken))


def combine_metrics(steps: list[dict[str, float]]) -> dict[str, float]:
    """Metrics of several optimizer steps as one: least `…ratio_min`, greatest `…ratio_max`, means of the others.

    Adds `policy/steps`, their number; without any step, that alone.
    """
    found: dict[str, float] = {"policy/steps": float(len(steps))}
    for name in steps[0] if steps else ():
        values = [step[name] for step in steps]
        together = {"ratio_min": min, "ratio_max": max}.get(name.rpartition("/")[2])
        found[name] = together(values) if together else sum(values) / len(values)
    return found


def _shown(rows: Tensor, limit: int = 16) -> str:
    places = rows.tolist()
    return ", ".join(map(str, places[:limit])) + (f" and {len(places) - limit} more" if len(places) > limit else "")
