"""Options of the option-critic: in environments, and as styles of a language model."""

from typing import Any, Literal

from pydantic import Field

from plaudit.configs.algorithm import AlgorithmConfig
from plaudit.configs.base import Config


class OptionCriticConfig(Config):
    """Option-critic (Bacon et al. 2017) with deliberation cost (Harb et al. 2018), as an advantage actor-critic."""

    name: Literal["option_critic"] = "option_critic"
    """`option_critic` learns several ways to act and when to change from one to another."""
    num_options: int = Field(default=4, gt=0)
    """W, how many options there are. 1 is an actor-critic without options."""
    discount: float = Field(default=0.99, gt=0, le=1)
    """γ, by which a reward counts less for each step that it lies ahead."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """λ of the returns: 1 sums rewards to the end of the data, 0 looks one step ahead."""
    exploration: float = Field(default=0.1, ge=0, le=1)
    """ε at the end of the run, the probability that the policy over options picks at random; it falls from 1 over
    `exploration_share` of the run."""
    exploration_share: float = Field(default=0.1, ge=0, le=1)
    """Share of the run over which ε falls along a straight line; 0 begins with `exploration`."""
    deliberation_cost: float = Field(default=0.0, ge=0)
    """η, what each termination costs, in units of the return; makes options last."""
    initial_termination: float = Field(default=0.1, gt=0, lt=1)
    """β in every state before learning: 0.1 lets options last ten steps."""
    termination_coefficient: float = Field(default=1.0, ge=0)
    """Weight of the loss of terminations; 0 leaves them as they begin."""
    value_coefficient: float = Field(default=0.5, ge=0)
    """Weight of the squared error of the option values."""
    entropy_coefficient: float = Field(default=0.01, ge=0)
    """Weight of the entropy bonus of the options' policies."""
    num_environments: int = Field(default=8, gt=0)
    """Environments played side by side."""
    rollout_steps: int = Field(default=16, gt=0)
    """Steps of each environment between two updates."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Rate of the first update (Adam)."""
    schedule: Literal["constant", "linear"] = "linear"
    """`linear` lets the rate fall to 0 over the run."""
    max_gradient_norm: float | None = Field(default=0.5, gt=0)
    """Gradients are scaled down to this joint norm; None leaves them."""
    hidden: tuple[int, ...] = (64, 64)
    """Sizes of the hidden layers; `[]` for tables over discrete observations."""


class StyledConfig(AlgorithmConfig):
    """Option-critic on text: an actor-critic whose policy is a mixture of learned styles, summed out.

    The policy-gradient family's options mean what they mean there, with the marginal over styles as the policy.
    """

    name: Literal["option_critic"] = "option_critic"  # type: ignore[assignment]  # no name of the family
    """`option_critic` learns several styles of answering and when to change from one to another."""
    num_options: int = Field(default=4, gt=0)
    """W, how many styles there are; each costs one more pass through the vocabulary head."""
    sentence_ends: tuple[str, ...] = (".", "!", "?", "。", "！", "？")
    """A style may end behind a token whose text ends with one of these."""
    style_spread: float = Field(default=0.02, gt=0)
    """Standard deviation of the style vectors before learning, beside states that the vocabulary head reads."""
    initial_termination: float = Field(default=0.5, gt=0, lt=1)
    """β behind every sentence before learning."""

    def stands_for(self) -> dict[str, Any]:
        """An advantage actor-critic."""
        return {"baseline": "value", "gae_lambda": 0.95, "reduction": "per_token"}
