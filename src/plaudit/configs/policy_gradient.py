"""The policy-gradient family in environments: what `AlgorithmConfig` leaves to its surroundings on text is here too."""

from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, model_validator

from plaudit.configs.algorithm import AlgorithmConfig, AlgorithmSettings, KlPlacement

DEFAULTS: dict[str, dict[str, Any]] = {
    "reinforce": {"rollout_steps": 64, "learning_rate": 3e-3, "optimizer": "adam", "schedule": "constant"},
    "actor_critic": {"rollout_steps": 5, "learning_rate": 7e-4, "optimizer": "rmsprop", "schedule": "constant"},
    "a2c": {"rollout_steps": 5, "learning_rate": 7e-4, "optimizer": "rmsprop", "schedule": "constant"},
    "ppo": {"rollout_steps": 32, "learning_rate": 1e-3, "optimizer": "adam", "schedule": "linear"},
}
"""What a name stands for where nothing is given. `ppo` and `a2c`: Stable-Baselines3's zoo for CartPole-v1, but for the
discount of `a2c`, which is 0.99 there and 0.98 here, as for all."""

PLAYED: dict[str, dict[str, Any]] = {
    "ppo": {"gae_lambda": 0.8, "epochs": 20, "clip_schedule": "linear"},
}
"""Options of the algorithm that stand for something else in environments than on text, from the same source."""


class PolicyGradientConfig(AlgorithmConfig):
    """A policy-gradient algorithm that plays: the algorithm's own options, and its network, optimizer and batches.

    There is no reference policy, so there is no divergence from one (`kl_placement: none`).
    """

    name: Literal["reinforce", "actor_critic", "a2c", "ppo"] = "ppo"
    """`reinforce`, `actor_critic` (one step), `a2c` or `ppo`. RLOO and GRPO compare several answers to one prompt,
    which an environment cannot give."""
    discount: float = Field(default=0.98, gt=0, le=1)
    """γ, by which a reward counts less for each step that it lies ahead."""
    kl_placement: KlPlacement | None = "none"
    """`none`: there is no reference to stay near."""
    num_environments: int = Field(default=8, gt=0)
    """Environments played side by side."""
    rollout_steps: int | None = Field(default=None, gt=0)
    """Steps of each environment between two updates; 32 for `ppo`, 64 for `reinforce` and 5 for the others if not
    given."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Rate of the first update; 1e-3 for `ppo`, 3e-3 for `reinforce`, 7e-4 for the others if not given."""
    optimizer: Literal["adam", "rmsprop"] | None = None
    """`adam` for `ppo` and `reinforce`, `rmsprop` for the others if not given."""
    schedule: Literal["constant", "linear"] | None = None
    """`linear` lets the rate fall to 0 over the run; so does `ppo` if not given."""
    max_gradient_norm: float | None = Field(default=0.5, gt=0)
    """Gradients are scaled down to this joint norm; None leaves them."""
    hidden: tuple[int, ...] = (64, 64)
    """Sizes of the hidden layers of actor and critic."""

    def resolved(self) -> AlgorithmSettings:
        """As `AlgorithmConfig.resolved`, with what suits environments where nothing is given."""
        settings = super().resolved()
        chosen: dict[str, Any] = dict(PLAYED.get(self.name, {}))
        if self.num_steps is not None:
            chosen.pop("gae_lambda", None)
        if settings.baseline == "value":
            chosen["value_coefficient"] = 0.5
        else:
            chosen.pop("gae_lambda", None)
        if settings.surrogate not in ("clip", "both"):
            chosen.pop("clip_schedule", None)
        return replace(settings, **{key: value for key, value in chosen.items() if getattr(self, key) is None})

    @property
    def first_step_is_on_policy(self) -> bool:
        """Not without a learned value: the first steps of long episodes wait for the end, through other updates."""
        return self.needs_critic

    def playing(self) -> dict[str, Any]:
        """`rollout_steps`, `learning_rate`, `optimizer` and `schedule`, with what the name stands for filled in."""
        given = {key: getattr(self, key) for key in DEFAULTS[self.name]}
        return DEFAULTS[self.name] | {key: value for key, value in given.items() if value is not None}

    @model_validator(mode="after")
    def _check_playing(self) -> "PolicyGradientConfig":
        if self.kl_placement != "none":
            raise ValueError(f"kl_placement: {self.kl_placement}: there is no reference policy in an environment")
        settings = self.resolved()
        if settings.view != "token" or settings.baseline not in ("none", "running_mean", "value"):
            raise ValueError(
                f"baseline: {settings.baseline} with view: {settings.view}: steps of an environment are no whole "
                "answers; use view: token with the baseline none, running_mean or value"
            )
        return self
