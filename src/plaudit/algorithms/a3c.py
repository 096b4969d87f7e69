"""A3C: actor-critics that move shared weights without waiting for each other (Mnih et al. 2016, arXiv:1602.01783).

A worker (algorithm S3) reads the shared weights θ into its own θ', plays `t_max` steps with θ', and takes

    `dθ = ∇_θ' [Σ_t -log π(a_t|s_t) (G_t - V(s_t)) + c₁ (G_t - V(s_t))² - c₂ H(π(·|s_t))] / t_max`

    `g ← α g + (1 - α) dθ²`,  `θ ← θ - η dθ / (√g + ε)`                                   (shared RMSprop, equation S3)

to the shared weights, without a lock: two workers may write at once, and between a worker's reading and its writing
others may have moved the weights. How often they have is the gradient's *staleness*, which is logged.

Departures: gradients are means over the steps of a segment, not sums, and are scaled down to a joint norm, as A2C's are
here; a segment always has `t_max` steps and goes on into the next episode where one ends; ε is added to the root; actor
and critic are two networks. One worker is A2C with one environment, to the bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plaudit.algorithms.base import TaskSizes
from plaudit.algorithms.build import build_algorithm
from plaudit.algorithms.stepping import scheduled_rate, set_learning_rate
from plaudit.configs.a3c import A3CConfig
from plaudit.models.control import ActorCriticNetwork
from plaudit.rollout.control import ControlPolicy
from plaudit.rollout.trajectory import Trajectory


@dataclass(frozen=True)
class SharedWeights:
    """What all workers read and write. `share` puts it into shared memory.

    Attributes:
        parameters: the weights, in the order of the policy's parameters.
        squares: RMSprop's running squares, alike.
        counts: `[workers, 2]` int64, environment steps and updates of each worker, who alone writes its row, so that
            no count is lost without a lock.
    """

    parameters: list[Tensor]
    squares: list[Tensor]
    counts: Tensor

    @classmethod
    def of(cls, parameters: Sequence[Tensor], workers: int) -> "SharedWeights":
        """Copies of these weights, with squares and counts of 0."""
        copies = [parameter.detach().clone() for parameter in parameters]
        return cls(copies, [torch.zeros_like(copy) for copy in copies], torch.zeros(workers, 2, dtype=torch.int64))

    def share(self) -> None:
        """Put every tensor into memory that other processes see."""
        for tensor in (*self.parameters, *self.squares, self.counts):
            tensor.share_memory_()  # type: ignore[no-untyped-call]

    @property
    def steps(self) -> int:
        """Environment steps of all workers."""
        return int(self.counts[:, 0].sum())

    @property
    def updates(self) -> int:
        """Updates of all workers."""
        return int(self.counts[:, 1].sum())


class SharedRMSprop(torch.optim.Optimizer):
    """RMSprop that takes gradients from a worker's parameters and moves the shared ones.

    The arithmetic is `torch.optim.RMSprop`'s, in its order.
    """

    def __init__(
        self, parameters: Sequence[Tensor], shared: SharedWeights, *, lr: float, alpha: float, eps: float, own: bool
    ) -> None:
        """Gradients come from `parameters`; with `own` the running squares are the worker's own."""
        super().__init__(list(parameters), {"lr": lr, "alpha": alpha, "eps": eps})
        self.shared = shared
        self.squares = [torch.zeros_like(each) for each in shared.squares] if own else shared.squares

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move the shared weights; the worker's stay as they are until it reads again."""
        group = self.param_groups[0]
        rate, decay, epsilon = group["lr"], group["alpha"], group["eps"]
        for parameter, weight, square in zip(group["params"], self.shared.parameters, self.squares, strict=True):
            gradient = parameter.grad
            square.mul_(decay).addcmul_(gradient, gradient, value=1 - decay)
            weight.addcdiv_(gradient, square.sqrt().add_(epsilon), value=-rate)


class A3CAgent:
    """One worker: a policy of its own, and shared weights; satisfies `plaudit.algorithms.base.Agent`.

    Alone it is the whole algorithm with one worker. `plaudit.training.workers` starts several over the same weights.

    Attributes:
        config: every option.
        policy: the worker's own, as of its last reading.
        shared: what it moves.
        place: its row in `shared.counts`.
        num_environments, num_steps: see `Agent`.
    """

    num_environments = 1

    def __init__(
        self,
        config: A3CConfig,
        sizes: TaskSizes,
        *,
        total_steps: int,
        seed: int,
        shared: SharedWeights | None = None,
        place: int = 0,
    ) -> None:
        """Weights are drawn from `seed`, and then read from `shared` where it is given."""
        self.config, self.total_steps, self.place = config, total_steps, place
        self.num_steps = config.rollout_steps
        self.policy = ControlPolicy(ActorCriticNetwork(*sizes, hidden=config.hidden, seed=seed))
        parameters = list(self.policy.parameters())
        self.shared = SharedWeights.of(parameters, config.workers) if shared is None else shared
        self.optimizer = SharedRMSprop(
            parameters,
            self.shared,
            lr=config.learning_rate,
            alpha=config.squares_decay,
            eps=config.epsilon,
            own=not config.share_statistics,
        )
        self.algorithm = build_algorithm(
            config.worker(), self.policy, self.optimizer, max_gradient_norm=config.max_gradient_norm
        )
        self.generator = torch.Generator().manual_seed(seed + place)
        self.read()

    @torch.no_grad()
    def read(self) -> None:
        """Take the shared weights as they are now."""
        self.updates_read = self.shared.updates
        for mine, weight in zip(self.policy.parameters(), self.shared.parameters, strict=True):
            mine.copy_(weight)

    def greedy_policy(self) -> ControlPolicy:
        """The likeliest action by the shared weights as they are now; a copy, since others may move them."""
        network = self.policy.network
        copied = ActorCriticNetwork(network.observation_size, network.num_actions, hidden=self.config.hidden)
        greedy = ControlPolicy(copied, greedy=True)
        with torch.no_grad():
            for theirs, weight in zip(greedy.parameters(), self.shared.parameters, strict=True):
                theirs.copy_(weight)
        return greedy

    def update(self, trajectory: Trajectory) -> dict[str, float]:
        """Move the shared weights by the gradient of these steps at the worker's own weights, and read again."""
        config = self.config
        rate = scheduled_rate(config.schedule, config.learning_rate, done=self.shared.steps, total=self.total_steps)
        set_learning_rate(self.optimizer, rate)
        metrics = self.algorithm.update(trajectory, generator=self.generator)
        staleness = self.shared.updates - self.updates_read
        self.shared.counts[self.place] += torch.tensor([trajectory.mask.numel(), 1])
        self.read()
        return metrics | {"workers/staleness": float(staleness)}

    def state_dict(self) -> dict[str, Any]:
        """Shared weights, squares and counts."""
        found = vars(self.shared)
        state = {name: [each.clone() for each in found[name]] for name in ("parameters", "squares")}
        return state | {"counts": self.shared.counts.clone(), "generator": self.generator.get_state()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`; what all of its workers have done counts as the first one's."""
        for name in ("parameters", "squares"):
            for tensor, saved in zip(getattr(self.shared, name), state[name], strict=True):
                tensor.copy_(saved)
        self.shared.counts.zero_()
        self.shared.counts[0] = state["counts"].sum(0)
        self.generator.set_state(state["generator"])
        self.read()
