"""Actor-critic with experience replay (ACER), in environments and on text."""

from typing import Literal

from pydantic import Field, model_validator

from plaudit.configs.base import Config, refuse_unused


class AcerOptions(Config):
    """What ACER is wherever it learns: how replayed experience is weighed, and how far one update may go."""

    discount: float = Field(default=0.99, gt=0, le=1)
    """γ, by which a reward counts less for each step that it lies ahead."""
    truncation: float | None = Field(default=10.0, ge=0)
    """c, the largest importance weight of a sampled action; the critic makes up for what is cut off. 0 trusts the
    critic alone, None cuts nothing off."""
    retrace_lambda: float = Field(default=1.0, ge=0, le=1)
    """λ of Retrace: how much of the observed rewards reaches back, beside the critic's own estimate."""
    trust_region: float | None = Field(default=1.0, ge=0)
    """δ, how much a step may raise the divergence from the average policy, to first order, at each state; no limit and
    no average policy where None."""
    trust_region_statistics: Literal["probabilities", "logits"] = "probabilities"
    """What describes the policy where the step is projected: `probabilities` are the paper's, `logits` are bounded
    however many actions there are."""
    average_decay: float = Field(default=0.99, ge=0, lt=1)
    """α of the average policy: its weights move by 1 - α of the way to the policy's after every update."""
    replay_ratio: float = Field(default=4.0, ge=0)
    """Replayed updates for each one on fresh experience, as the mean of a Poisson distribution."""
    value_coefficient: float = Field(default=0.5, ge=0)
    """Weight of `½ (Q^ret - Q)²`."""
    entropy_coefficient: float = Field(default=0.01, ge=0)
    """Weight of the entropy bonus, which keeps the policy exploring."""

    @model_validator(mode="after")
    def _check_region(self) -> "AcerOptions":
        if self.trust_region is None:
            refuse_unused(self, ("trust_region_statistics", "average_decay"), "has no effect without a trust_region")
        return self


class AcerConfig(AcerOptions):
    """ACER in an environment. The defaults are Stable-Baselines's, with which its zoo ran CartPole-v1."""

    name: Literal["acer"] = "acer"
    """`acer` learns from earlier play as well."""
    num_environments: int = Field(default=8, gt=0)
    """Environments played side by side."""
    rollout_steps: int = Field(default=20, gt=0)
    """Steps of each environment between two updates on fresh experience: the length of a segment."""
    buffer_size: int = Field(default=40_000, gt=0)
    """Steps that are remembered, all environments together; older segments are forgotten."""
    learning_starts: int = Field(default=1000, ge=0)
    """Environment steps before the first replayed update."""
    learning_rate: float = Field(default=7e-4, gt=0)
    """RMSprop's rate at the first update."""
    schedule: Literal["constant", "linear"] = "linear"
    """`linear` lets the rate fall to 0 over the run."""
    squares_decay: float = Field(default=0.99, gt=0, lt=1)
    """Decay of RMSprop's running squares."""
    epsilon: float = Field(default=1e-5, gt=0)
    """ε of RMSprop, added to the root of the running squares."""
    max_gradient_norm: float | None = Field(default=10.0, gt=0)
    """Gradients are scaled down to this joint norm; None leaves them."""
    hidden: tuple[int, ...] = (64, 64)
    """Sizes of the hidden layers of actor and critic."""

    @model_validator(mode="after")
    def _check_replay(self) -> "AcerConfig":
        if not self.replay_ratio:
            refuse_unused(self, ("buffer_size", "learning_starts"), "has no effect with replay_ratio: 0")
        return self


class AcerTextConfig(AcerOptions):
    """ACER on text: answers of earlier iterations are learned from again, with the penalty of the policy as it is now.

    The critic has a value for every token of the vocabulary.
    """

    name: Literal["acer"] = "acer"
    """`acer` learns from each answer several times."""
    discount: float = Field(default=1.0, gt=0, le=1)
    """γ; 1 for text."""
    trust_region_statistics: Literal["probabilities", "logits"] = "logits"
    """What describes the policy where the step is projected: `probabilities` are the paper's, `logits` are bounded
    however many tokens there are."""
    entropy_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus; the penalty towards the reference keeps the policy open already."""
    kl_coefficient: float = Field(default=0.05, ge=0)
    """β, weight of the divergence from the reference policy, charged in the reward of each token."""
    buffer_size: int = Field(default=1024, gt=0)
    """Answers that are remembered; older ones are forgotten."""
    behaviour_tokens: int | None = Field(default=None, gt=0)
    """How many of the likeliest tokens of each step's distribution are remembered, 12 bytes each; the others get no
    correction for truncated weights. None remembers the whole vocabulary, which is exact."""

    @model_validator(mode="after")
    def _check_replay(self) -> "AcerTextConfig":
        if not self.replay_ratio:
            refuse_unused(self, ("buffer_size",), "has no effect with replay_ratio: 0")
        return self

    @property
    def needs_critic(self) -> bool:
        """Whether a value is learned beside the policy."""
        return True

    @property
    def needs_groups(self) -> bool:
        """Whether each prompt needs two or more answers."""
        return False

    @property
    def passes(self) -> int:
        """How often each batch of experience is learned from, about."""
        return 1 + round(self.replay_ratio)

    @property
    def least_prompts(self) -> int:
        """How many prompts a batch must have."""
        return 1
