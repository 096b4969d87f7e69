"""Options of the feudal network."""

from typing import Literal

from pydantic import Field

from plaudit.configs.base import Config


class FeudalConfig(Config):
    """Feudal network (Vezhnevets et al. 2017): a manager sets goals, a worker is paid for going there."""

    name: Literal["feudal"] = "feudal"
    """`feudal`."""
    horizon: int = Field(default=10, gt=0)
    """c, over how many steps a goal points."""
    dilation: int | None = Field(default=None, gt=0)
    """r, how many cores of the manager's LSTM take turns; `horizon` if not given, 1 for a plain LSTM."""
    intrinsic_weight: float = Field(default=0.5, ge=0)
    """α, what following the manager's goals is worth beside the reward; 0 leaves the worker the reward alone."""
    manager_discount: float = Field(default=0.99, gt=0, le=1)
    """γ of the manager, who looks far ahead."""
    worker_discount: float = Field(default=0.95, gt=0, le=1)
    """γ of the worker, who may be short-sighted because the manager is not."""
    return_lambda: float = Field(default=0.95, ge=0, le=1)
    """λ of both returns: 1 sums rewards to the end of the data, 0 looks one step ahead."""
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
