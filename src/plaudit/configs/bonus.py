"""Bonuses for what is new, which any agent can be paid on top of its environment's rewards."""

from typing import Literal

from pydantic import Field

from plaudit.configs.base import Config


class CountBonusConfig(Config):
    """`scale / √N(s')`, where `N` counts how often an observation has been reached."""

    kind: Literal["count"] = "count"
    """Counts of observations; those that are not discrete are rounded first."""
    scale: float = Field(default=0.1, gt=0)
    """The bonus of an observation that is reached for the first time, in units of the reward."""
    decimals: int = Field(default=1, ge=0)
    """Observations that are not discrete are the same where they agree to so many decimals."""


class DistillationBonusConfig(Config):
    """Random network distillation: how badly a network predicts what another, random one says of an observation."""

    kind: Literal["rnd"] = "rnd"
    """Needs no counts, so it serves observations that never come twice."""
    scale: float = Field(default=0.1, gt=0)
    """The bonus of an observation as new as those so far were on average, in units of the reward."""
    hidden: tuple[int, ...] = (64,)
    """Sizes of the hidden layers of both networks."""
    features: int = Field(default=32, gt=0)
    """Numbers that are predicted."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Adam's rate of the network that predicts."""
    gradient_steps: int = Field(default=4, gt=0)
    """Its optimizer steps on each batch of what was reached."""


BonusConfig = CountBonusConfig | DistillationBonusConfig
