"""Options of feudal networks: in environments, and over the states of a language model."""

from typing import Any, Literal

from pydantic import Field, model_validator

from plaudit.configs.algorithm import AlgorithmConfig
from plaudit.configs.base import Config


class FeudalConfig(Config):
    """Feudal network (Vezhnevets et al. 2017): a manager sets goals, a worker is paid for going there."""

    name: Literal["feudal"] = "feudal"
    """`feudal` has a manager that sets goals for the worker that acts."""
    horizon: int = Field(default=10, gt=0)
    """c, over how many steps a goal points."""
    dilation: int | None = Field(default=None, gt=0)
    """r, how many cores of the manager's LSTM take turns; `horizon` if not given, 1 for a plain LSTM."""
    intrinsic_weight: float = Field(default=0.5, ge=0)
    """α, what following the manager's goals is worth beside the reward; 0 leaves the worker the reward alone."""
    discount: float = Field(default=0.95, gt=0, le=1)
    """γ of the worker, who may be short-sighted because the manager is not."""
    manager_discount: float = Field(default=0.99, gt=0, le=1)
    """γ of the manager, who looks far ahead."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """λ of the returns of both levels: 1 sums rewards to the end of the data, 0 looks one step ahead."""
    manager_coefficient: float = Field(default=1.0, ge=0)
    """Weight of the manager's loss of directions."""
    value_coefficient: float = Field(default=0.5, ge=0)
    """Weight of the squared errors of both values."""
    entropy_coefficient: float = Field(default=0.01, ge=0)
    """Weight of the worker's entropy bonus."""
    whiten_advantages: bool = True
    """Shift and scale the advantages of each level over the batch to mean 0 and deviation 1; with rare rewards they
    would otherwise be drowned by the entropy bonus."""
    percept_size: int = Field(default=32, gt=0)
    """Size of the shared percept and of the worker's LSTM."""
    manager_size: int = Field(default=16, gt=0)
    """D, dimensions of the manager's latent states and goals."""
    goal_size: int = Field(default=8, gt=0)
    """k, dimensions of a goal as the worker reads it."""
    num_environments: int = Field(default=16, gt=0)
    """Environments played side by side."""
    rollout_steps: int = Field(default=40, gt=0)
    """Steps of each environment between two updates; several horizons, since goals are judged within them."""
    learning_rate: float = Field(default=3e-3, gt=0)
    """Rate of the first update (Adam)."""
    schedule: Literal["constant", "linear"] = "linear"
    """`linear` lets the rate fall to 0 over the run."""
    max_gradient_norm: float | None = Field(default=0.5, gt=0)
    """Gradients are scaled down to this joint norm; None leaves them."""


class FeudalTextConfig(AlgorithmConfig):
    """Feudal network on text: a manager reads the language model's states every c tokens, the language model is paid
    for going where it points.

    The policy-gradient family's options are the worker's, `discount` among them.
    """

    name: Literal["feudal"] = "feudal"  # type: ignore[assignment]  # no name of the family
    """`feudal` has a manager that sets goals for the model that writes."""
    horizon: int = Field(default=8, gt=0)
    """c, tokens for which a goal is in force."""
    intrinsic_weight: float = Field(default=0.1, ge=0)
    """α, what a token in the manager's direction is worth, divided by c, beside the scaled reward. Above 0 the optimum
    is no longer that of the reward alone."""
    manager_discount: float = Field(default=1.0, gt=0, le=1)
    """γ of the manager, for each of its own steps of c tokens."""
    manager_value_coefficient: float = Field(default=0.5, ge=0)
    """Weight of the squared error of the manager's value beside its loss of directions."""
    manager_size: int = Field(default=32, gt=0)
    """D, dimensions of the manager's latent states and goals."""

    def stands_for(self) -> dict[str, Any]:
        """An advantage actor-critic."""
        return {"baseline": "value", "gae_lambda": 0.95, "reduction": "per_token"}

    @model_validator(mode="after")
    def _check_warmup(self) -> "FeudalTextConfig":
        self._refuse(("critic_warmup",), "would not hold the policy still: the manager's goals move it")
        return self
