"""An algorithm from its configuration."""

from collections.abc import Callable, Mapping

import torch

from plaudit.algorithms.acer_text import AcerText
from plaudit.algorithms.base import Algorithm
from plaudit.algorithms.feudal_text import FeudalText
from plaudit.algorithms.soft_q import SoftQ
from plaudit.algorithms.updating import PolicyGradient
from plaudit.configs.acer import AcerTextConfig
from plaudit.configs.agents import AlignAlgorithm
from plaudit.configs.algorithm import AlgorithmConfig
from plaudit.configs.base import Config
from plaudit.configs.feudal import FeudalTextConfig
from plaudit.configs.option_critic import StyledConfig
from plaudit.configs.policy_gradient import PolicyGradientConfig
from plaudit.configs.q_learning import SoftQConfig
from plaudit.rollout.trajectory import Policy

ALGORITHMS: Mapping[type[Config], Callable[..., Algorithm]] = {
    AlgorithmConfig: PolicyGradient,
    PolicyGradientConfig: PolicyGradient,
    AcerTextConfig: AcerText,
    SoftQConfig: SoftQ,
    StyledConfig: PolicyGradient,
    FeudalTextConfig: FeudalText,
}
"""What each configuration makes: `Class(config, policy, optimizer, *, max_gradient_norm, total_updates)`."""


def build_algorithm(
    config: AlignAlgorithm,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    *,
    max_gradient_norm: float | None = None,
    total_updates: int | None = None,
) -> Algorithm:
    """The algorithm that improves `policy` by steps of `optimizer`.

    Args:
        config: which one, and its options.
        policy: has `evaluate`, and perhaps `micro_batches(trajectory) -> list of row indices`; its critic, where the
            baseline is `value`, gives `Evaluation.values`.
        optimizer: over the parameters that learn; its learning rate may be changed between updates.
        max_gradient_norm: gradients are scaled down to this joint norm; None leaves them.
        total_updates: how many updates the run has, needed by `clip_schedule: linear`.

    Raises:
        ValueError: if the clip follows a schedule over a run of unknown length, or a limit is not positive.
    """
    if max_gradient_norm is not None and not max_gradient_norm > 0:
        raise ValueError(f"max_gradient_norm must be positive, got {max_gradient_norm}")
    return ALGORITHMS[type(config)](
        config, policy, optimizer, max_gradient_norm=max_gradient_norm, total_updates=total_updates
    )
