"""Asynchronous advantage actor-critic (A3C) in environments."""

from typing import Literal

from pydantic import Field

from plaudit.configs.base import Config
from plaudit.configs.policy_gradient import PolicyGradientConfig


class A3CConfig(Config):
    """A2C by several processes, each with an environment of its own, that move shared weights without waiting for each
    other. The defaults are those of `a2c`."""

    name: Literal["a3c"] = "a3c"
    """`a3c` is `a2c` in several processes at once."""
    workers: int = Field(default=2, gt=0)
    """Processes that play and learn; one of them is A2C with one environment. More than the machine has cores only
    makes gradients older."""
    rollout_steps: int = Field(default=5, gt=0)
    """Steps that a worker plays with the weights it has read, before it moves the shared ones (`t_max`)."""
    discount: float = Field(default=0.99, gt=0, le=1)
    """γ, by which a reward counts less for each step that it lies ahead."""
    gae_lambda: float = Field(default=1.0, ge=0, le=1)
    """λ of the advantages; 1 is the paper's, return minus value."""
    value_coefficient: float = Field(default=0.5, ge=0)
    """Weight of the squared error of the learned value."""
    entropy_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus, which keeps the policy exploring."""
    learning_rate: float = Field(default=7e-4, gt=0)
    """Rate of the first update."""
    schedule: Literal["constant", "linear"] = "constant"
    """`linear` lets the rate fall to 0 over the run, by the steps of all workers; the paper's way."""
    squares_decay: float = Field(default=0.99, gt=0, lt=1)
    """α of RMSprop's running squares."""
    epsilon: float = Field(default=1e-5, gt=0)
    """ε of RMSprop, added to the root of the running squares."""
    share_statistics: bool = True
    """All workers share RMSprop's running squares (the paper's best); otherwise each keeps its own, which no checkpoint
    holds."""
    max_gradient_norm: float | None = Field(default=0.5, gt=0)
    """Gradients are scaled down to this joint norm; None leaves them."""
    hidden: tuple[int, ...] = (64, 64)
    """Sizes of the hidden layers of actor and critic."""

    def worker(self) -> PolicyGradientConfig:
        """What one worker does: A2C with one environment."""
        shared = ("rollout_steps", "discount", "gae_lambda", "value_coefficient", "entropy_coefficient")
        others = ("learning_rate", "schedule", "max_gradient_norm", "hidden")
        options = {name: getattr(self, name) for name in (*shared, *others)}
        return PolicyGradientConfig(name="a2c", num_environments=1, optimizer="rmsprop", **options)
