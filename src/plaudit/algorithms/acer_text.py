"""ACER on whole answers: those of earlier iterations are learned from again (see `plaudit.algorithms.acer`).

A batch of fresh answers is followed by Poisson-many batches of the same size from the replay. Rewards are kept as the
reward gave them; the penalty towards the reference, the values and the importance weights are those of the policy at
the moment of each step.
"""

from typing import Any

import torch
from torch import Tensor

from plaudit.algorithms.acer import acer_loss
from plaudit.algorithms.base import Prepared
from plaudit.algorithms.stepping import guarded_step
from plaudit.algorithms.updating import take_steps
from plaudit.configs.acer import AcerTextConfig
from plaudit.core.finite import NonFiniteError
from plaudit.rollout.action_values import ActionTablePolicy
from plaudit.rollout.segments import SegmentReplay
from plaudit.rollout.trajectory import Trajectory, concatenate


class AcerText:
    """Satisfies `plaudit.algorithms.base.Algorithm`.

    Attributes:
        config: every option.
        policy: gives tables over all actions, and keeps the average policy.
        replay: answers of earlier batches; `group_ids` must mean the same prompts in every batch.
        needs_critic, needs_groups, needs_greedy: False: the critic is in the tables.
    """

    needs_critic = False
    needs_groups = False
    needs_greedy = False

    def __init__(
        self,
        config: AcerTextConfig,
        policy: ActionTablePolicy,
        optimizer: torch.optim.Optimizer,
        *,
        max_gradient_norm: float | None = None,
        total_updates: int | None = None,
        seed: int | None = None,
    ) -> None:
        """`seed` decides what is replayed, None for torch's own; `total_updates` is not needed."""
        self.config = config
        self.policy = policy
        self.optimizer = optimizer
        self.max_gradient_norm = max_gradient_norm
        self.replay = SegmentReplay(config.buffer_size)
        self.generator = torch.Generator().manual_seed(torch.initial_seed() if seed is None else seed)
        self.num_updates = 0
        self._rows_per_step = 0

    def prepare(self, trajectory: Trajectory, *, baselines: Tensor | None = None) -> Prepared:
        """The fresh answers with the distributions they were drawn from, and after them those that are replayed.

        Raises:
            ValueError: for a reward that is not finite, more answers than the replay holds, or given baselines.
        """
        if baselines is not None:
            raise ValueError("ACER compares with its own critic: greedy baselines were given")
        if not bool(trajectory.rewards[trajectory.mask].isfinite().all()):
            raise NonFiniteError(f"update {self.num_updates}: a reward is not finite, so nothing was learned from it")
        fresh = self.with_distributions(trajectory)
        rows = self._rows_per_step = fresh.num_rows
        if self.config.replay_ratio:
            self.replay.add(fresh)
        replays = int(torch.poisson(torch.tensor(self.config.replay_ratio), generator=self.generator))
        drawn = [self.replay.sample(rows, generator=self.generator) for _ in range(replays)]
        parts = [fresh, *(each.to(fresh.mask.device) for each in drawn)]
        nothing = torch.zeros_like((together := concatenate(parts)).rewards)
        metrics = {"replay/updates": float(replays), "replay/answers": float(len(self.replay))}
        return Prepared(trajectory=together, advantages=nothing, returns=nothing, metrics=metrics)

    @torch.no_grad()
    def with_distributions(self, trajectory: Trajectory) -> Trajectory:
        """The trajectory with the distributions of the policy as it is (the one that answered), without its values."""
        size, mask = self.config.behaviour_tokens, trajectory.mask
        columns: dict[str, Tensor] = {}
        for part in self._micro_batches(trajectory):
            few = trajectory.select(part)
            logprobs = self.policy.logprobs(few)
            found = {"behaviour_logits": logprobs}
            if size is not None and size < logprobs.shape[-1]:
                likeliest = logprobs.topk(size, dim=-1)
                found = {"behaviour_logits": likeliest.values, "behaviour_actions": likeliest.indices}
            for name, entries in found.items():
                rows = entries.new_zeros((*few.mask.shape, entries.shape[-1]))
                rows[few.mask] = entries
                if name not in columns:
                    columns[name] = entries.new_zeros((*mask.shape, entries.shape[-1]))
                columns[name][part] = rows
        zeros = torch.zeros_like(trajectory.rewards)
        return trajectory.with_fields(**columns, values=zeros, next_values=zeros)

    def minibatches(self, prepared: Prepared, generator: torch.Generator | None = None) -> list[Tensor]:
        """The rows of the fresh batch, then of each replayed one; `generator` is not drawn from."""
        return list(torch.split(torch.arange(prepared.trajectory.num_rows), self._rows_per_step))

    def step(self, prepared: Prepared, rows: Tensor) -> dict[str, float]:
        """One optimizer step on these rows, and the average policy's after it.

        Raises:
            NonFiniteError: if the loss or the gradient is not finite; the weights have not been moved.
        """
        whole = prepared.trajectory.select(rows.to(prepared.trajectory.mask.device))
        total, total_loss = int(whole.mask.sum()), 0.0
        self.optimizer.zero_grad(set_to_none=True)
        metrics: dict[str, float] = {}
        for part in self._micro_batches(whole):
            few = whole.select(part)
            share = int(few.mask.sum()) / total
            tables = self.policy.tables(few)
            loss, found = acer_loss(tables, few, self.config, kl_coefficient=self.config.kl_coefficient)
            (share * loss).backward()  # type: ignore[no-untyped-call]
            total_loss += share * float(loss.detach())
            for name, value in found.items():
                extreme = name == "replay/ratio_max"
                old = metrics.get(name, 0.0)
                metrics[name] = max(old, float(value)) if extreme else old + share * float(value)
        where = f"update {self.num_updates}"
        norm = guarded_step(self.optimizer, total_loss, max_norm=self.max_gradient_norm, where=where)
        self.policy.move_average(self.config.average_decay)
        return metrics | {"gradient_norm": norm}

    def stop_early(self, metrics: dict[str, float]) -> bool:
        """Never: the trust region bounds every step."""
        return False

    def finish(self, metrics: dict[str, float]) -> dict[str, float]:
        """Count the update."""
        self.num_updates += 1
        return metrics

    def update(
        self, trajectory: Trajectory, *, baselines: Tensor | None = None, generator: torch.Generator | None = None
    ) -> dict[str, float]:
        """Learn from a fresh batch, and from replayed ones."""
        return take_steps(self, self.prepare(trajectory, baselines=baselines), generator)

    def state_dict(self) -> dict[str, Any]:
        """Counters, replay, random state and the average policy."""
        return {
            "num_updates": self.num_updates,
            "replay": self.replay.state_dict(),
            "generator": self.generator.get_state(),
            "average": self.policy.average_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.num_updates = int(state["num_updates"])
        self.replay.load_state_dict(state["replay"])
        self.generator.set_state(state["generator"])
        self.policy.load_average_state(state["average"])

    def _micro_batches(self, trajectory: Trajectory) -> list[Tensor]:
        split = getattr(self.policy, "micro_batches", None)
        return [torch.arange(trajectory.num_rows)] if split is None else split(trajectory)
